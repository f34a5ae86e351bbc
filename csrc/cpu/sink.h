// Where the gate stage writes its outputs.
#pragma once

#include "kernels.h"
#include "plan.h"
#include "vec.h"

namespace steam {
namespace {

// Elements that a loop writes between begin() and commit() of a sink, at most.
constexpr int64_t kChunk = 1024;

enum class Route {
  kPlain,   // straight into the output
  kStream,  // past the caches in whole lines, at any alignment of the output
  kStaged,  // through a buffer: the output is x itself, and a direct store would overwrite elements that are still to
            // be read
};

// Outputs go past the cache if the cache cannot hold them beside their inputs, because they would evict inputs that are
// still to be read.
template <class T>
Route output_route(const Plan<T>& plan) {
  const int64_t bytes = plan.problem.samples * plan.sample_size * static_cast<int64_t>(sizeof(T));
  return bytes > cpu::cache_bytes() / 2 ? Route::kStream : Route::kPlain;
}

// A contiguous range of output, written in pieces. begin(n) gives memory for n elements and one vector more, and
// commit(n) says that n of them are valid. Elements past n are overwritten by the next piece, or dropped.
template <class T>
class Sink {
 public:
  Sink(T* at, int64_t count, Route route) : route_(route), at_(at), end_(at + count) {
    if (route == Route::kPlain) return;
    head_ = static_cast<int64_t>((reinterpret_cast<uintptr_t>(at) % kLine) / sizeof(T));
    at_ = at - head_;
    fill_ = head_;
  }

  STEAM_INLINE T* begin(int64_t n) {
    detour_ = route_ != Route::kPlain || end_ - at_ < n + Lanes<T>::kLanes;
    return detour_ ? buffer_ + fill_ : at_;
  }

  STEAM_INLINE void commit(int64_t n) {
    if (!detour_) {
      at_ += n;
      return;
    }
    fill_ += n;
    if (route_ == Route::kPlain) {
      finish();
    } else if (fill_ >= kChunk) {
      flush();
    }
  }

  __attribute__((noinline)) void finish() {
    if (route_ != Route::kPlain) flush();
    memcpy(at_ + head_, buffer_ + head_, static_cast<size_t>(fill_ - head_) * sizeof(T));
    at_ += fill_;
    fill_ = head_ = 0;
    if (route_ == Route::kStream) stream_fence();
  }

 private:
  static constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(T));

  // Writes the whole lines, and moves the rest of the last line to the front of the buffer.
  __attribute__((noinline)) void flush() {
    int64_t k = 0;
    if (head_ && fill_ >= kPerLine) {
      memcpy(at_ + head_, buffer_ + head_, static_cast<size_t>(kPerLine - head_) * sizeof(T));
      head_ = 0;
      k = kPerLine;
    }
    const int64_t whole = fill_ / kPerLine * kPerLine;
    if (whole == 0) return;
    if (route_ == Route::kStream) {
      for (; k < whole; k += kPerLine) stream_line(at_ + k, buffer_ + k);
    } else {
      memcpy(at_ + k, buffer_ + k, static_cast<size_t>(whole - k) * sizeof(T));
    }
    memcpy(buffer_, buffer_ + whole, kLine);
    at_ += whole;
    fill_ -= whole;
  }

  Route route_;
  T* at_;  // kPlain: the next output; else the line of the output that the front of the buffer is for
  T* end_;
  int64_t head_ = 0;     // elements of the first line that belong to another sink
  int64_t fill_ = 0;     // elements in the buffer, with those of head_
  bool detour_ = false;  // whether the piece that begin() gave is in the buffer
  alignas(kLine) T buffer_[2 * kChunk + 128];
};

}  // namespace
}  // namespace steam
