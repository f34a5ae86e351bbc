// The working memory of a call. A call allocates it once, before the first task, so that no task can fail to get
// memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace steam {
namespace cpu {

// One block of memory for the length of a scope. The calling thread keeps it for its next call, because the page faults
// of a new block take longer than a small kernel.
class Scratch {
 public:
  // `threads` threads use the block. The limit of the memory that is kept grows with their number.
  Scratch(std::size_t bytes, int64_t threads);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // The beginning of a page, or null if the allocation failed.
  char* data() const { return data_; }

 private:
  char* data_;
  bool kept_;
};

}  // namespace cpu

namespace {

// The slices of two threads have no page in common, because a page that both write would move between their caches.
constexpr std::size_t kPage = 4096;

// Places pieces of memory one after another, from `at` on. If `at` is null, it only counts their bytes, so that the
// same code first counts and then places. A number of bytes that does not fit in size_t counts as more than any memory.
class Arena {
 public:
  explicit Arena(char* at) : at_(at) {}

  // `rows` rows of `row` numbers, aligned to 64 bytes.
  template <class X>
  X* take(int64_t rows, int64_t row = 1) {
    std::size_t bytes;
    const bool counted =
        rows >= 0 && row >= 0 &&
        !__builtin_mul_overflow(static_cast<std::size_t>(rows), static_cast<std::size_t>(row), &bytes) &&
        !__builtin_mul_overflow(bytes, sizeof(X), &bytes);
    return reinterpret_cast<X*>(place(counted ? bytes : kMost, 64));
  }
  // `count` slices of `bytes` bytes, with no page in common.
  char* take_slices(int64_t count, std::size_t bytes) {
    std::size_t all;
    const bool counted = !__builtin_mul_overflow(static_cast<std::size_t>(count), slice(bytes), &all);
    return place(counted ? all : kMost, kPage);
  }
  static std::size_t slice(std::size_t bytes) { return round(bytes, kPage); }

  bool counts() const { return at_ == nullptr; }
  std::size_t used() const { return used_; }

 private:
  static constexpr std::size_t kMost = PTRDIFF_MAX / kPage * kPage;
  static std::size_t round(std::size_t bytes, std::size_t multiple) {
    return bytes < kMost ? (bytes + multiple - 1) / multiple * multiple : kMost;
  }

  char* place(std::size_t bytes, std::size_t alignment) {
    const std::size_t begin = round(used_, alignment);
    bytes = round(bytes, alignment);
    used_ = bytes < kMost - begin ? begin + bytes : kMost;
    return at_ ? at_ + begin : nullptr;
  }

  char* at_;
  std::size_t used_ = 0;
};

}  // namespace
}  // namespace steam
