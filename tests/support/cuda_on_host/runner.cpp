// Runs the CUDA kernels on this machine's memory: reads calls from standard input, writes results to standard output.
//
// A call is a Call, and then the bytes of each array that the call reads. The reply is an int64, and as many characters
// of error. If there is no error, the number of launches, the launches, and the bytes of each written array follow. A
// call that only plans has no bytes: its arrays have no memory, and no kernel runs.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "cuda_on_host.h"

namespace {

enum Array {
  kChannelWeight,
  kSpatialWeight,
  kX,
  kResidual,
  kDy,
  kY,
  kSaved,
  kDx,
  kDResidual,
  kDChannel,
  kDSpatial,
  kArrays
};
enum Role : int64_t { kAbsent, kRead, kWritten, kIsX };

struct Call {
  steam::Problem problem;
  steam::DType weight_dtype;
  int32_t backward;
  uint64_t seed;
  int64_t shared_memory_limit;
  int64_t failing_launch;
  int64_t only_plans;
  struct {
    int64_t role, bytes, offset;  // offset: bytes between a 16-byte boundary and the array
  } arrays[kArrays];
};

void read_all(void* to, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = read(STDIN_FILENO, static_cast<char*>(to) + done, bytes - done);
    if (n <= 0) std::_Exit(n < 0 || done > 0);
    done += static_cast<size_t>(n);
  }
}

void write_all(const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = write(STDOUT_FILENO, static_cast<const char*>(from) + done, bytes - done);
    if (n <= 0) std::_Exit(1);
    done += static_cast<size_t>(n);
  }
}

// An array that ends at the end of its heap block, so that AddressSanitizer finds an access behind it.
class Memory {
 public:
  Memory(int64_t bytes, int64_t offset)
      : block_(new unsigned char[static_cast<size_t>(bytes + offset)]), bytes_(bytes), offset_(offset) {
    std::memset(block_.get(), 0xff, static_cast<size_t>(bytes + offset));  // NaN in every dtype
  }
  unsigned char* data() const { return block_.get() + offset_; }
  size_t bytes() const { return static_cast<size_t>(bytes_); }

 private:
  std::unique_ptr<unsigned char[]> block_;
  int64_t bytes_, offset_;
};

std::string run(const Call& call, const std::vector<void*>& at) {
  using namespace steam;
  const Weight channel{at[kChannelWeight], call.weight_dtype}, spatial{at[kSpatialWeight], call.weight_dtype};
  const size_t bytes =
      call.backward ? cuda::backward_workspace_bytes(call.problem) : cuda::forward_workspace_bytes(call.problem);
  const Memory workspace(call.only_plans ? 0 : static_cast<int64_t>(bytes), 0);
  void* room = bytes ? workspace.data() : nullptr;
  if (!call.backward) {
    return cuda::forward({call.problem, channel, spatial, at[kX], at[kResidual], at[kY], at[kSaved], room}, nullptr);
  }
  return cuda::backward({call.problem,
                         channel,
                         spatial,
                         at[kDy],
                         at[kX],
                         at[kY],
                         at[kSaved],
                         at[kDx],
                         at[kDResidual],
                         {at[kDChannel], call.weight_dtype},
                         {at[kDSpatial], call.weight_dtype},
                         room},
                        nullptr);
}

}  // namespace

int main() {
  for (;;) {
    Call call;
    read_all(&call, sizeof(call));
    cuda_on_host::random_order.seed(call.seed);
    cuda_on_host::shared_memory_limit = call.shared_memory_limit;
    cuda_on_host::failing_launch = call.failing_launch;
    cuda_on_host::only_plans = call.only_plans != 0;
    cuda_on_host::launches.clear();
    std::vector<std::unique_ptr<Memory>> memory(kArrays);
    std::vector<std::vector<unsigned char>> given(kArrays);
    std::vector<void*> at(kArrays);
    for (int k = 0; k < kArrays; ++k) {
      const auto& array = call.arrays[k];
      if (array.role == kIsX) at[k] = at[kX];
      if (array.role != kRead && array.role != kWritten) continue;
      if (call.only_plans) {
        at[k] = reinterpret_cast<void*>(uintptr_t{4096});
        continue;
      }
      memory[k] = std::make_unique<Memory>(array.bytes, array.offset);
      at[k] = memory[k]->data();
      if (array.role != kRead) continue;
      read_all(at[k], memory[k]->bytes());
      given[k].assign(memory[k]->data(), memory[k]->data() + memory[k]->bytes());
    }
    std::string error = run(call, at);
    const bool in_place = call.arrays[kY].role == kIsX;
    for (int k = 0; k < kArrays && !call.only_plans; ++k) {
      if (call.arrays[k].role == kRead && !(in_place && k == kX) &&
          std::memcmp(given[k].data(), at[k], given[k].size()) != 0) {
        error = "array " + std::to_string(k) + " was written into";
      }
    }
    const int64_t length = static_cast<int64_t>(error.size());
    write_all(&length, sizeof(length));
    write_all(error.data(), error.size());
    if (!error.empty()) continue;
    const auto& launches = cuda_on_host::launches;
    const int64_t count = static_cast<int64_t>(launches.size());
    write_all(&count, sizeof(count));
    write_all(launches.data(), launches.size() * sizeof(launches[0]));
    for (int k = 0; k < kArrays && !call.only_plans; ++k) {
      const bool is_y_in_place = in_place && k == kY;
      if (call.arrays[k].role != kWritten && !is_y_in_place) continue;
      write_all(at[k], is_y_in_place ? memory[kX]->bytes() : memory[k]->bytes());
    }
  }
}
