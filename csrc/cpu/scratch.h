// Working memory of a call: asked for once, before anything runs, so that nothing that runs can lack it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace steam {
namespace cpu {

// One block for the length of a scope. It belongs to the calling thread, which keeps it for its next call: a fresh
// block would page-fault for longer than a small kernel runs.
class Scratch {
 public:
  // `threads` will share the block, and each of them justifies that some of it is kept.
  Scratch(std::size_t bytes, int64_t threads);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Begins on a page; null where there is no memory for it.
  char* data() const { return data_; }

 private:
  char* data_;
  bool kept_;
};

}  // namespace cpu

namespace {

// Two threads that write to one page would move it to and fro between them.
constexpr std::size_t kPage = 4096;

// Places pieces one behind the other from `at` on. Where `at` is null it only counts, so that the same code says how
// much it needs and takes it. What cannot be counted is counted as more than there is.
class Arena {
 public:
  explicit Arena(char* at) : at_(at) {}

  // `rows` of `row` numbers, aligned to 64 bytes.
  template <class X>
  X* take(int64_t rows, int64_t row = 1) {
    std::size_t bytes;
    const bool counted =
        rows >= 0 && row >= 0 &&
        !__builtin_mul_overflow(static_cast<std::size_t>(rows), static_cast<std::size_t>(row), &bytes) &&
        !__builtin_mul_overflow(bytes, sizeof(X), &bytes);
    return reinterpret_cast<X*>(place(counted ? bytes : kMost, 64));
  }
  // `count` slices of `bytes`, with no page in common.
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
  static std::size_t round(std::size_t bytes, std::size_t unit) {
    return bytes < kMost ? (bytes + unit - 1) / unit * unit : kMost;
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
