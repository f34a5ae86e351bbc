// The gate stage on the CPU: y = x * gates (+ residual, ReLU) and its input gradient, written through sinks.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace steam {
namespace {

// Elements that a loop produces before it hands them over.
constexpr int64_t kChunk = 1024;

// Where a contiguous run of output goes, in pieces: begin(n) gives room for n elements and one vector more, commit(n)
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

// An output that nobody asked for has no address to move along.
template <class T>
STEAM_INLINE T* ahead(T* at, int64_t n) {
  return at ? at + n : nullptr;
}

// A vector of each output.
template <class V>
struct Made {
  V first, second;
};

// Elements before the next line begins; 0 where one does.
template <class T>
STEAM_INLINE int64_t until_line_of(const T* at) {
  return static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(at)) % kLine / sizeof(T));
}

// What a vector of elements is multiplied by and what is added to it.
template <class V>
struct By {
  V gate, shift, offset;
};

// How one vector of output is made. An operation reads its maps at element e, whole vectors or what there is of one
// before the sample's end, and then calls by(): compilers fuse a product and a sum only where no branch lies between
// them, and an element must not round by how much of its vector there is. kFirst and kSecond say which outputs it has.
// Loops copy it first: their stores could otherwise change it, for all that the compiler knows.

// y = relu(x * gate + residual).
template <class T, bool kResidual, bool kRelu>
struct GateForward {
  using Type = T;
  using L = Lanes<T>;
  using V = typename L::V;
  using A = typename L::A;
  static constexpr bool kFirst = true, kSecond = false;
  const T* x;
  const T* residual;
  int64_t size;

  int64_t until_line(int64_t e) const { return until_line_of(x + e); }
  template <bool kWhole, class F>
  STEAM_INLINE Made<V> make(int64_t e, const F& by) const {
    const auto read = [&](const T* map)
                          STEAM_LAMBDA_INLINE { return kWhole ? load(map + e) : load_until(map + e, map + size); };
    const V in = read(x), rest = kResidual ? read(residual) : L::zero();
    V out = in * by().gate;
    if (kResidual) out += rest;
    // As PyTorch's: a NaN stays.
    if (kRelu) out = L::select(out < L::zero(), L::zero(), out);
    return {out, out};
  }
};

// dx = dy * gate + (share * token + offset), and the residual's gradient: dy where the ReLU let it pass.
template <class M, bool kInput, bool kResidual>
struct GateBackward {
  using Type = typename M::Type;
  using L = typename M::L;
  using V = typename L::V;
  using A = typename L::A;
  static constexpr bool kFirst = kInput, kSecond = kResidual;
  M maps;
  int64_t size;

  int64_t until_line(int64_t e) const { return until_line_of(maps.dy + e); }
  template <bool kWhole, class F>
  STEAM_INLINE Made<V> make(int64_t e, const F& by) const {
    const V g = kWhole ? maps.upstream(e) : maps.upstream_until(e);
    const By<V> b = by();
    return {g * b.gate + (b.shift + b.offset), g};
  }
};

// Along a run of elements that share what varies slowest: one channel's pixels, or one pixel's channels.
template <class L>
struct Along {
  // Numbers that vary along the run: `period` of them, and then at least a vector's worth of them again.
  const typename L::A* gate;
  const typename L::A* share;   // backward only, like the rest
  const typename L::A* offset;  // or `add` for all
  int64_t period;
  // And those that do not: gate * gate_factor, share * share_factor + offset.
  typename L::A gate_factor;
  typename L::A share_factor;
  typename L::A add;
};

// Vectors along a pattern: what stays the same for a run, spelt out over the lanes.
template <bool kBackward, bool kOffset, class L>
struct Pattern {
  using V = typename L::V;
  const typename L::A *gates, *shares, *offsets;
  V gate_factor, share_factor, add;
  explicit STEAM_INLINE Pattern(const Along<L>& a)
      : gates(a.gate),
        shares(a.share),
        offsets(a.offset),
        gate_factor(L::set(a.gate_factor)),
        share_factor(L::set(a.share_factor)),
        add(L::set(a.add)) {}
  // The vector of output at element e, where the pattern is at q.
  template <bool kWhole, class G>
  STEAM_INLINE Made<V> make(const G& op, int64_t e, int64_t q) const {
    return op.template make<kWhole>(e, [&]() STEAM_LAMBDA_INLINE {
      const V gate = gate_factor * load(gates + q);
      if (!kBackward) return By<V>{gate, gate, gate};
      return By<V>{gate, share_factor * load(shares + q), kOffset ? load(offsets + q) : add};
    });
  }
};

template <class G, class V>
STEAM_INLINE void put(typename G::Type* out, typename G::Type* second, const Made<V>& made) {
  if (G::kFirst) store(out, made.first);
  if (G::kSecond) store(second, made.second);
}

// `vectors` of output from element e on, with the pattern from q on.
template <class G, class P>
STEAM_INLINE void gate_vectors(const G& op, const P& pattern, int64_t e, int64_t q, int64_t vectors,
                               typename G::Type* out, typename G::Type* second) {
  constexpr int64_t lanes = G::L::kLanes;
  int64_t k = 0;
  for (; k + 2 * lanes <= vectors * lanes; k += 2 * lanes) {
    const auto a = pattern.template make<true>(op, e + k, q + k);
    const auto b = pattern.template make<true>(op, e + k + lanes, q + k + lanes);
    if (G::kFirst) store_two(out + k, a.first, b.first);
    if (G::kSecond) store_two(second + k, a.second, b.second);
  }
  if (k < vectors * lanes) put<G>(ahead(out, k), ahead(second, k), pattern.template make<true>(op, e + k, q + k));
}

// n <= kChunk elements from e on, whose pattern starts at q.
template <bool kBackward, bool kOffset, class G, class L>
STEAM_INLINE void gate_chunk(const G& operation, int64_t e, int64_t n, const Along<L>& along, int64_t q,
                             typename G::Type* out, typename G::Type* second) {
  constexpr int64_t lanes = L::kLanes;
  const G op = operation;
  const Pattern<kBackward, kOffset, L> pattern(along);
  const int64_t period = along.period;
  const int64_t whole = e + round_up(n, lanes) <= op.size ? round_up(n, lanes) : n / lanes * lanes;
  if (q + whole <= period + lanes) {
    gate_vectors(op, pattern, e, q, whole / lanes, out, second);
    q += whole;
  } else {
    const int64_t step = lanes % period;
    for (int64_t k = 0; k < whole; k += lanes) {
      put<G>(ahead(out, k), ahead(second, k), pattern.template make<true>(op, e + k, q));
      q += step;
      q -= q >= period ? period : 0;
    }
  }
  if (whole < n) {
    put<G>(ahead(out, whole), ahead(second, whole), pattern.template make<false>(op, e + whole, q % period));
  }
}

// A run of any length from element e on. Its first chunk ends where a line of the map does: loads that cross lines take
// longer to come from memory.
template <bool kBackward, bool kOffset, class G, class L, class S1, class S2>
STEAM_INLINE void gate_run(const G& op, int64_t e, int64_t length, const Along<L>& along, S1& sink, S2& second) {
  const int64_t head = op.until_line(e);
  int64_t q = 0, n = 0;
  for (int64_t done = 0; done < length; done += n) {
    n = smaller(done == 0 && head ? head : kChunk, length - done);
    auto* out = sink.begin(n);
    gate_chunk<kBackward, kOffset>(op, e + done, n, along, q, out, second.begin(n));
    q += n;
    if (q >= along.period) q %= along.period;
    sink.commit(n);
    second.commit(n);
  }
}

// Several short runs of `length` elements one behind the other, each no longer than its pattern; along(i) says what
// the i-th goes by.
template <bool kBackward, bool kOffset, class G, class F, class S1, class S2>
STEAM_INLINE void gate_runs(const G& operation, int64_t e, int64_t runs, int64_t length, const F& along, S1& sink,
                            S2& second) {
  using L = typename G::L;
  const int64_t group = kChunk / length;
  if (group < 2) {
    for (int64_t i = 0; i < runs; ++i) {
      gate_run<kBackward, kOffset>(operation, e + i * length, length, along(i), sink, second);
    }
    return;
  }
  const G op = operation;
  const int64_t vectors = (length + L::kLanes - 1) / L::kLanes;
  for (int64_t done = 0; done < runs; done += group) {
    const int64_t n = smaller(group, runs - done);
    auto* out = sink.begin(n * length);
    auto* second_out = second.begin(n * length);
    int64_t i = 0, at = e + done * length;
    for (; i < n && at + vectors * L::kLanes <= op.size; ++i, at += length) {
      gate_vectors(op, Pattern<kBackward, kOffset, L>(along(done + i)), at, 0, vectors, ahead(out, i * length),
                   ahead(second_out, i * length));
    }
    for (; i < n; ++i, at += length) {
      gate_chunk<kBackward, kOffset>(op, at, length, along(done + i), 0, ahead(out, i * length),
                                     ahead(second_out, i * length));
    }
    sink.commit(n * length);
    second.commit(n * length);
  }
}

// The same for short runs that all go by one pattern of U vectors, which stays in registers.
template <bool kBackward, int U, class G, class F, class S1, class S2>
STEAM_INLINE void gate_short_runs(const G& operation, int64_t e, int64_t runs, int64_t length, const F& along, S1& sink,
                                  S2& second) {
  using L = typename G::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const G op = operation;
  const auto pattern = along(0);
  V gates[U], shares[U];
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) {
    gates[u] = load(pattern.gate + u * lanes);
    shares[u] = kBackward ? load(pattern.share + u * lanes) : gates[u];
  }
  const int64_t group = kChunk / length;
  for (int64_t done = 0; done < runs; done += group) {
    const int64_t n = smaller(group, runs - done);
    auto* out = sink.begin(n * length);
    auto* second_out = second.begin(n * length);
    int64_t i = 0, at = e + done * length;
    for (; i < n && at + U * lanes <= op.size; ++i, at += length) {
      const auto run = along(done + i);
      const V gate = L::set(run.gate_factor), share = L::set(run.share_factor), add = L::set(run.add);
      const auto made = [&](int u) STEAM_LAMBDA_INLINE {
        return op.template make<true>(at + u * lanes, [&]() STEAM_LAMBDA_INLINE {
          const V by = gate * gates[u];
          return By<V>{by, kBackward ? share * shares[u] : by, add};
        });
      };
      auto *to = ahead(out, i * length), *second_to = ahead(second_out, i * length);
#pragma GCC unroll 16
      for (int u = 0; u + 2 <= U; u += 2) {
        const auto a = made(u), b = made(u + 1);
        if (G::kFirst) store_two(to + u * lanes, a.first, b.first);
        if (G::kSecond) store_two(second_to + u * lanes, a.second, b.second);
      }
      if (U % 2) put<G>(ahead(to, (U - 1) * lanes), ahead(second_to, (U - 1) * lanes), made(U - 1));
    }
    for (; i < n; ++i, at += length) {
      gate_chunk<kBackward, false>(op, at, length, along(done + i), 0, ahead(out, i * length),
                                   ahead(second_out, i * length));
    }
    sink.commit(n * length);
    second.commit(n * length);
  }
}

}  // namespace
}  // namespace steam
