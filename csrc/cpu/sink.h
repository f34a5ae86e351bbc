// Where the gate stage writes its outputs.
#pragma once

#include "kernels.h"
#include "plan.h"
#include "vec.h"

namespace steam {
namespace {

// Elements that a loop writes between begin() and commit() of a sink, at most.
constexpr int64_t kChunk = 1024;
// Bytes from a store to the line that it claims. 4096 bytes took as long in a measurement. Fewer bytes reach less far
// into the next task, which may be another thread's.
constexpr int64_t kClaimAhead = 1024;

enum class Route {
  kPlain,    // straight into the output
  kClaimed,  // the same, and the lines that are written soon are asked for, for writing
  kStream,   // past the caches in whole lines, at any alignment of the output
  kStaged,   // through a buffer: the output is x itself, and a direct store would overwrite elements that are still to
             // be read
};

// Outputs go past the cache if the cache cannot hold them beside their inputs, because they would evict inputs that are
// still to be read. cpu::Stores says where this takes longer.
template <class T>
Route output_route(const Plan<T>& plan, int64_t threads) {
  const int64_t bytes = plan.problem.samples * plan.sample_size * static_cast<int64_t>(sizeof(T));
  const cpu::Stores stores = cpu::stores_of(threads);
  if (bytes > stores.streams_above) return Route::kStream;
  return stores.claims ? Route::kClaimed : Route::kPlain;
}

// A piece of output that a loop writes in order.
template <class T>
struct Piece {
  T* at;
  bool claims;  // whether each store asks for the line that is kClaimAhead bytes further

  Piece from(int64_t k) const { return {at + k, claims}; }
  template <class V>
  STEAM_INLINE void put(int64_t k, const V& v) const {
    if (claims) claim(k, 1);
    store(at + k, v);
  }
  template <class V>
  STEAM_INLINE void put_two(int64_t k, const V& a, const V& b) const {
    if (claims) claim(k, 2);
    store_two(at + k, a, b);
  }

 private:
  STEAM_INLINE void claim(int64_t k, int vectors) const {
    const char* first = reinterpret_cast<const char*>(at + k) + kClaimAhead;
    const int bytes = vectors * static_cast<int>(Lanes<T>::kLanes * sizeof(T));
    for (int b = 0; b < bytes; b += kLine) claim_line(first + b);
  }
};

// A contiguous range of output, written in pieces. begin(n) gives a piece of n elements and one vector more, and
// commit(n) says that n of them are valid. Elements past n are overwritten by the next piece, or dropped.
template <class T>
class Sink {
 public:
  Sink(T* at, int64_t count, Route route) : route_(route), at_(at), end_(at + count) {
    if (direct()) return;
    head_ = static_cast<int64_t>((reinterpret_cast<uintptr_t>(at) % kLine) / sizeof(T));
    at_ = at - head_;
    fill_ = head_;
  }

  STEAM_INLINE Piece<T> begin(int64_t n) {
    detour_ = !direct() || end_ - at_ < n + Lanes<T>::kLanes;
    return {detour_ ? buffer_ + fill_ : at_, !detour_ && route_ == Route::kClaimed};
  }

  STEAM_INLINE void commit(int64_t n) {
    if (!detour_) {
      at_ += n;
      return;
    }
    fill_ += n;
    if (direct()) {
      finish();
    } else if (fill_ >= kChunk) {
      flush();
    }
  }

  __attribute__((noinline)) void finish() {
    if (!direct()) flush();
    memcpy(at_ + head_, buffer_ + head_, static_cast<size_t>(fill_ - head_) * sizeof(T));
    at_ += fill_;
    fill_ = head_ = 0;
    if (route_ == Route::kStream) stream_fence();
  }

 private:
  static constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(T));

  STEAM_INLINE bool direct() const { return route_ == Route::kPlain || route_ == Route::kClaimed; }

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
  T* at_;  // direct: the next output; else the line of the output that the front of the buffer is for
  T* end_;
  int64_t head_ = 0;     // elements of the first line that belong to another sink
  int64_t fill_ = 0;     // elements in the buffer, with those of head_
  bool detour_ = false;  // whether the piece that begin() gave is in the buffer
  alignas(kLine) T buffer_[2 * kChunk + 128];
};

}  // namespace
}  // namespace steam
