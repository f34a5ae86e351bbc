#include "scratch.h"

#include <cstdlib>
#include <new>

namespace steam {
namespace cpu {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kChunkBytes = std::size_t{1} << 20;
// A thread that needed more than this gives it back after the call.
constexpr std::size_t kKeptBytes = std::size_t{64} << 20;
constexpr int kChunks = 64;

class Stack {
 public:
  ~Stack() { clear(); }

  ScratchMark mark() const { return {current_, used_}; }

  void* take(std::size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    while (current_ < count_ && used_ + bytes > sizes_[current_]) {
      ++current_;
      used_ = 0;
    }
    if (current_ == count_) grow(bytes);
    void* piece = chunks_[current_] + used_;
    used_ += bytes;
    return piece;
  }

  void release(ScratchMark mark) {
    current_ = mark.chunk;
    used_ = mark.used;
    if (current_ == 0 && used_ == 0 && total_ > kKeptBytes) clear();
  }

 private:
  void grow(std::size_t bytes) {
    const std::size_t size = bytes < kChunkBytes ? kChunkBytes : bytes;
    char* chunk = count_ < kChunks ? static_cast<char*>(std::aligned_alloc(kAlignment, size)) : nullptr;
    if (chunk == nullptr) throw std::bad_alloc();
    chunks_[count_] = chunk;
    sizes_[count_++] = size;
    total_ += size;
  }

  void clear() {
    while (count_ > 0) std::free(chunks_[--count_]);
    current_ = 0;
    used_ = total_ = 0;
  }

  char* chunks_[kChunks] = {};
  std::size_t sizes_[kChunks] = {};
  int count_ = 0;
  int current_ = 0;
  std::size_t used_ = 0;
  std::size_t total_ = 0;
};

thread_local Stack stack;

}  // namespace

ScratchMark scratch_mark() { return stack.mark(); }
void* scratch_take(std::size_t bytes) { return stack.take(bytes); }
void scratch_release(ScratchMark mark) { stack.release(mark); }

}  // namespace cpu
}  // namespace steam
