// Working memory of a thread, kept between calls: a fresh block of this size would page-fault for longer than a kernel
// runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace steam {
namespace cpu {

struct ScratchMark {
  int chunk;
  std::size_t used;
};
// A stack of memory that belongs to the calling thread: `take` gives 64-byte aligned pieces, `release` drops all taken
// since.
ScratchMark scratch_mark();
void* scratch_take(std::size_t bytes);
void scratch_release(ScratchMark mark);

}  // namespace cpu

namespace {

// The pieces of one scope.
class Arena {
 public:
  Arena() : mark_(cpu::scratch_mark()) {}
  ~Arena() { cpu::scratch_release(mark_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <class X>
  X* take(int64_t count) {
    return static_cast<X*>(cpu::scratch_take(static_cast<std::size_t>(count) * sizeof(X)));
  }

 private:
  cpu::ScratchMark mark_;
};

}  // namespace
}  // namespace steam
