#include "scratch.h"

#include <steam/steam.h>

#include <cstdlib>

namespace steam {
namespace cpu {
namespace {

// A thread keeps at most so much for each thread that shared its last call.
constexpr std::size_t kKeptBytes = std::size_t{64} << 20;

char* pages(std::size_t bytes) { return static_cast<char*>(std::aligned_alloc(kPage, bytes)); }

// What a thread keeps between its calls.
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
  const std::size_t shares = static_cast<std::size_t>(threads < 1024 ? threads : 1024);
  const std::size_t limit = kKeptBytes * shares;
  // A call within another one of its thread, or a large one, has a block to itself.
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
    // With what there was before on top, growing sizes ask for a new block ever more seldom.
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

// Bytes that the calling thread keeps, so that a test can see that they are bounded.
extern "C" STEAM_API int64_t steam_cpu_probe_kept_bytes(void) { return static_cast<int64_t>(steam::cpu::kept.bytes); }
