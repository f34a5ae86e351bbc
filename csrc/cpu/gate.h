// The gate stage on the CPU: y = x * gates (+ residual, ReLU) and its input gradient, written through sinks.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace steam {
namespace {

// Elements that a loop produces before it hands them over.
constexpr int64_t kChunk = 1024;

// Outputs larger than this go past the caches: they would only evict what is still to be read.
constexpr int64_t kStreamBytes = int64_t{12} << 20;

// Where a contiguous run of output goes, in pieces: begin(n) gives room for n elements and the rest of a vector, commit(n)
// says that n of them are valid. What a vector wrote past n is overwritten or dropped.
enum class Route {
  kPlain,   // straight into the output, which nobody reads meanwhile
  kStream,  // past the caches, whole lines at a time, at any alignment
  kStaged,  // through a buffer, behind the reads: the output is the very map that is being read
};

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
    detour_ = route_ != Route::kPlain || end_ - at_ < round_up(n, Lanes<T>::kLanes);
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

  // Writes the whole lines out and moves what is left of the last one to the front.
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
  T* at_;  // staged: the line that the buffer's front stands for
  T* end_;
  int64_t head_ = 0;  // elements of the first line that are not ours
  int64_t fill_ = 0;
  bool detour_ = false;
  alignas(kLine) T buffer_[2 * kChunk + 128];
};

// An output that nobody asked for.
template <class T>
struct NoSink {
  NoSink(T*, int64_t, Route) {}
  STEAM_INLINE T* begin(int64_t) { return nullptr; }
  STEAM_INLINE void commit(int64_t) {}
  void finish() {}
};

// What one vector of output takes: forward, out = relu(x * gate + residual).
template <class T, bool kResidual, bool kRelu>
struct GateForward {
  using L = Lanes<T>;
  using V = typename L::V;
  const T* x;
  const T* residual;
  int64_t size;
  STEAM_INLINE V operator()(V in, V gate, V rest) const {
    V out = in * gate;
    if (kResidual) out += rest;
    // As PyTorch's: a NaN stays.
    if (kRelu) out = L::select(out < L::zero(), L::zero(), out);
    return out;
  }
};

// A row of a periodic map: `period` numbers, then at least a vector's worth of them again.
template <class L>
struct Pattern {
  const typename L::A* gate;
  const typename L::A* shift;  // backward only
  int64_t period;
};

// y over a run of `length` elements of one channel, from element e of the sample on. gate = channel_gate * pattern.
template <class T, bool kResidual, bool kRelu>
STEAM_INLINE void gate_run(const GateForward<T, kResidual, kRelu>& g, int64_t e, int64_t length,
                           const Pattern<Lanes<T>>& pattern, typename Lanes<T>::A channel_gate, Sink<T>& sink) {
  using L = Lanes<T>;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const V channel = L::set(channel_gate);
  const int64_t step = lanes % pattern.period;
  int64_t q = 0;
  for (int64_t done = 0; done < length; done += kChunk, e += kChunk) {
    const int64_t n = smaller(kChunk, length - done);
    T* out = sink.begin(n);
    const bool inside = e + round_up(n, lanes) <= g.size;
    const int64_t whole = inside ? round_up(n, lanes) : n / lanes * lanes;
    for (int64_t k = 0; k < whole; k += lanes) {
      const V rest = kResidual ? load(g.residual + e + k) : L::zero();
      store(out + k, g(load(g.x + e + k), channel * load(pattern.gate + q), rest));
      q += step;
      q -= q >= pattern.period ? pattern.period : 0;
    }
    if (whole < n) {
      const V rest = kResidual ? load_until(g.residual + e + whole, g.residual + g.size) : L::zero();
      store(out + whole, g(load_until(g.x + e + whole, g.x + g.size), channel * load(pattern.gate + q), rest));
    }
    sink.commit(n);
  }
}

// dx = dy * channel_gate * gate + (channel_share * shift + offset), and the residual's gradient, the masked dy.
template <class M, class DxSink, class ResidualSink>
STEAM_INLINE void gate_run_backward(const M& maps, int64_t e, int64_t length, const Pattern<typename M::L>& pattern,
                                    typename M::L::A channel_gate, typename M::L::A channel_share,
                                    typename M::L::A offset, DxSink& dx_sink, ResidualSink& residual_sink) {
  using L = typename M::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const V channel = L::set(channel_gate), share = L::set(channel_share), add = L::set(offset);
  const int64_t step = lanes % pattern.period;
  int64_t q = 0;
  for (int64_t done = 0; done < length; done += kChunk, e += kChunk) {
    const int64_t n = smaller(kChunk, length - done);
    auto* dx = dx_sink.begin(n);
    auto* dres = residual_sink.begin(n);
    const bool inside = e + round_up(n, lanes) <= maps.size;
    const int64_t whole = inside ? round_up(n, lanes) : n / lanes * lanes;
    const auto one = [&](int64_t k, V g) STEAM_LAMBDA_INLINE {
      if (dx) store(dx + k, g * (channel * load(pattern.gate + q)) + (share * load(pattern.shift + q) + add));
      if (dres) store(dres + k, g);
    };
    for (int64_t k = 0; k < whole; k += lanes) {
      one(k, maps.upstream(e + k));
      q += step;
      q -= q >= pattern.period ? pattern.period : 0;
    }
    if (whole < n) one(whole, maps.upstream_until(e + whole));
    dx_sink.commit(n);
    residual_sink.commit(n);
  }
}

// channels_last, a pixel: y over its channels. `channel_gates` is padded to whole vectors.
template <class T, bool kResidual, bool kRelu>
STEAM_INLINE void gate_pixel(const GateForward<T, kResidual, kRelu>& g, int64_t e, int64_t channels,
                             const typename Lanes<T>::A* channel_gates, typename Lanes<T>::A spatial_gate, Sink<T>& sink) {
  using L = Lanes<T>;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const V spatial = L::set(spatial_gate);
  for (int64_t done = 0; done < channels; done += kChunk, e += kChunk) {
    const int64_t n = smaller(kChunk, channels - done);
    T* out = sink.begin(n);
    const bool inside = e + round_up(n, lanes) <= g.size;
    const int64_t whole = inside ? round_up(n, lanes) : n / lanes * lanes;
    for (int64_t k = 0; k < whole; k += lanes) {
      const V rest = kResidual ? load(g.residual + e + k) : L::zero();
      store(out + k, g(load(g.x + e + k), spatial * load(channel_gates + done + k), rest));
    }
    if (whole < n) {
      const V rest = kResidual ? load_until(g.residual + e + whole, g.residual + g.size) : L::zero();
      const V gate = spatial * load(channel_gates + done + whole);
      store(out + whole, g(load_until(g.x + e + whole, g.x + g.size), gate, rest));
    }
    sink.commit(n);
  }
}

// channels_last, a pixel: dx = dy * gate * spatial_gate + (share * spatial_share + offset) over its channels.
template <class M, class DxSink, class ResidualSink>
STEAM_INLINE void gate_pixel_backward(const M& maps, int64_t e, int64_t channels, const typename M::L::A* gates,
                                      const typename M::L::A* shares, const typename M::L::A* offsets,
                                      typename M::L::A spatial_gate, typename M::L::A spatial_share, DxSink& dx_sink,
                                      ResidualSink& residual_sink) {
  using L = typename M::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const V spatial = L::set(spatial_gate), share = L::set(spatial_share);
  for (int64_t done = 0; done < channels; done += kChunk, e += kChunk) {
    const int64_t n = smaller(kChunk, channels - done);
    auto* dx = dx_sink.begin(n);
    auto* dres = residual_sink.begin(n);
    const bool inside = e + round_up(n, lanes) <= maps.size;
    const int64_t whole = inside ? round_up(n, lanes) : n / lanes * lanes;
    const auto one = [&](int64_t k, V g) STEAM_LAMBDA_INLINE {
      const int64_t c = done + k;
      if (dx) store(dx + k, g * (spatial * load(gates + c)) + (share * load(shares + c) + load(offsets + c)));
      if (dres) store(dres + k, g);
    };
    for (int64_t k = 0; k < whole; k += lanes) one(k, maps.upstream(e + k));
    if (whole < n) one(whole, maps.upstream_until(e + whole));
    dx_sink.commit(n);
    residual_sink.commit(n);
  }
}

}  // namespace
}  // namespace steam
