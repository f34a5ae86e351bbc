#include "scratch.h"

#include <steam/steam.h>

#include <cstdlib>

namespace steam {
namespace cpu {
namespace {

// The calling thread keeps at most so many bytes for each thread of its last call.
constexpr std::size_t kKeptBytes = std::size_t{64} << 20;

char* pages(std::size_t bytes) { return static_cast<char*>(std::aligned_alloc(kPage, bytes)); }

// The memory that a thread keeps between its calls.
struct Kept {
  char* block = nullptr;
  std::size_t bytes = 0;
  bool lent = false;

  ~Kept() { drop(); }
  void allocate(std::size_t size) {
    block = pages(size);
    bytes = block ? size : 0;
  }
  void drop() {
    std::free(block);
    block = nullptr;
    bytes = 0;
  }
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(std::size_t bytes, int64_t threads) {
  bytes = Arena::slice(bytes > 0 ? bytes : 1);
  const std::size_t limit = kKeptBytes * static_cast<std::size_t>(threads < 1024 ? threads : 1024);
  // A call inside another call of the same thread, or with a large block, gets a block of its own.
  kept_ = !kept.lent && bytes <= limit;
  if (!kept_) {
    data_ = pages(bytes);
    if (data_ == nullptr && !kept.lent) {
      kept.drop();
      data_ = pages(bytes);
    }
    return;
  }
  if (bytes > kept.bytes) {
    // The new block has the bytes of the old one in addition, so that growing maps need new blocks ever less often.
    const std::size_t more = bytes + kept.bytes < limit ? bytes + kept.bytes : limit;
    kept.drop();
    kept.allocate(more);
    if (kept.block == nullptr) kept.allocate(bytes);
  }
  data_ = kept.block;
  kept.lent = data_ != nullptr;
}

Scratch::~Scratch() {
  if (kept_) {
    kept.lent = false;
  } else {
    std::free(data_);
  }
}

}  // namespace cpu
}  // namespace steam

// Bytes that the calling thread keeps. A test checks that they are bounded.
extern "C" STEAM_API int64_t steam_cpu_probe_kept_bytes(void) { return static_cast<int64_t>(steam::cpu::kept.bytes); }
