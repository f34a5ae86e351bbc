// The gate stage on the CPU: y = x * gates (+ residual, ReLU), and backward the gradient of x.
//
//   the maps x, residual        Along: the numbers along one run, and their factors
//   (dy)                           |
//      |                        Pattern: the same with the factors in all lanes
//      |                           |
//      +------------+--------------+
//                   v
//      GateForward or GateBackward: makes one vector of the output
//                   |
//                   v
//      Sink: takes the vectors of one task, in the order of memory
//                   |
//      Route:  kPlain ------> the output (kClaimed: its next lines are asked for)
//              kStream -----> a buffer -> the output, past the caches
//              kStaged -----> a buffer -> the output, behind the reads of x
//
// gate_walk.h divides a sample into tasks and runs, and calls the loops of this file. Sink and Route are in sink.h.
#pragma once

#include "../common/problem.h"
#include "sink.h"
#include "vec.h"

namespace steam {
namespace {

// Elements from `at` to the next beginning of a cache line; 0 at such a beginning.
template <class T>
STEAM_INLINE int64_t until_line_of(const T* at) {
  return static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(at)) % kLine / sizeof(T));
}

// The factor of a vector of elements, and the two parts of its shift: from the spatial and from the channel tokens.
template <class V>
struct By {
  V gate, spatial_shift, channel_shift;
};

// An operation makes one vector of the output. make() reads the maps at element e, whole vectors or (kWhole = false)
// the part of a vector before the end of the sample, and only then calls by(). Compilers fuse a product and a sum only
// if no branch lies between them, and the rounding of an element must not depend on kWhole. A loop copies the
// operation before it starts, because the compiler must assume that stores of the loop change the original.

// y = relu(x * gate + residual). Without a ReLU, no number is below `least`.
template <class T, bool kResidual>
struct GateForward {
  using Type = T;
  using L = Lanes<T>;
  using V = typename L::V;
  using A = typename L::A;
  const T* x;
  const T* residual;
  A least;  // 0 with a ReLU, else minus infinity
  int64_t size;

  int64_t until_line(int64_t e) const { return until_line_of(x + e); }
  template <bool kWhole, class F>
  STEAM_INLINE V make(int64_t e, const F& by) const {
    const auto read = [&](const T* map)
                          STEAM_LAMBDA_INLINE { return kWhole ? load(map + e) : load_until(map + e, map + size); };
    const V in = read(x), rest = kResidual ? read(residual) : L::zero();
    V out = in * by().gate;
    if (kResidual) out += rest;
    // A NaN stays a NaN, as in PyTorch's ReLU.
    return L::select(out < least, L::set(least), out);
  }
};

// dx = dy * gate + (spatial_shift + channel_shift).
template <class M>
struct GateBackward {
  using Type = typename M::Type;
  using L = typename M::L;
  using V = typename L::V;
  using A = typename L::A;
  M maps;
  int64_t size;

  int64_t until_line(int64_t e) const { return until_line_of(maps.dy + e); }
  template <bool kWhole, class F>
  STEAM_INLINE V make(int64_t e, const F& by) const {
    const V g = kWhole ? maps.upstream(e) : maps.upstream_until(e);
    const By<V> b = by();
    return g * b.gate + (b.spatial_shift + b.channel_shift);
  }
};

// The numbers along one run of elements: the pixels of one channel, or the channels of one pixel. The arrays hold
// `period` numbers, and then at least a vector of them again. An element at place q of the period has
//   gate           gate[q] * gate_factor
//   spatial_shift  spatial_shift[q] * spatial_factor
//   channel_shift  channel_shift[q], or channel_shift_all
template <class L>
struct Along {
  const typename L::A* gate;
  const typename L::A* spatial_shift;  // backward only, like the rest
  const typename L::A* channel_shift;  // kChannelShifts only
  int64_t period;
  typename L::A gate_factor;
  typename L::A spatial_factor;
  typename L::A channel_shift_all;
};

// An Along whose factors are in all lanes.
template <bool kBackward, bool kChannelShifts, class L>
struct Pattern {
  using V = typename L::V;
  const typename L::A *gates, *spatial_shifts, *channel_shifts;
  V gate_factor, spatial_factor, channel_shift_all;
  explicit STEAM_INLINE Pattern(const Along<L>& a)
      : gates(a.gate),
        spatial_shifts(a.spatial_shift),
        channel_shifts(a.channel_shift),
        gate_factor(L::set(a.gate_factor)),
        spatial_factor(L::set(a.spatial_factor)),
        channel_shift_all(L::set(a.channel_shift_all)) {}
  // The vector of output at element e, which is at place q of the period.
  template <bool kWhole, class G>
  STEAM_INLINE V make(const G& op, int64_t e, int64_t q) const {
    return op.template make<kWhole>(e, [&]() STEAM_LAMBDA_INLINE {
      const V gate = gate_factor * load(gates + q);
      if (!kBackward) return By<V>{gate, gate, gate};
      return By<V>{gate, spatial_factor * load(spatial_shifts + q),
                   kChannelShifts ? load(channel_shifts + q) : channel_shift_all};
    });
  }
};

// `vectors` vectors of output from element e on, which is at place q of the period.
template <class G, class P>
STEAM_INLINE void gate_vectors(const G& op, const P& pattern, int64_t e, int64_t q, int64_t vectors,
                               Piece<typename G::Type> out) {
  constexpr int64_t lanes = G::L::kLanes;
  int64_t k = 0;
  for (; k + 2 * lanes <= vectors * lanes; k += 2 * lanes) {
    const auto a = pattern.template make<true>(op, e + k, q + k);
    const auto b = pattern.template make<true>(op, e + k + lanes, q + k + lanes);
    out.put_two(k, a, b);
  }
  if (k < vectors * lanes) out.put(k, pattern.template make<true>(op, e + k, q + k));
}

// n <= kChunk elements from element e on, which is at place q of the period.
template <bool kBackward, bool kChannelShifts, class G, class L>
STEAM_INLINE void gate_chunk(const G& operation, int64_t e, int64_t n, const Along<L>& along, int64_t q,
                             Piece<typename G::Type> out) {
  constexpr int64_t lanes = L::kLanes;
  const G op = operation;
  const Pattern<kBackward, kChannelShifts, L> pattern(along);
  const int64_t period = along.period;
  const int64_t whole = e + round_up(n, lanes) <= op.size ? round_up(n, lanes) : n / lanes * lanes;
  if (q + whole <= period + lanes) {
    gate_vectors(op, pattern, e, q, whole / lanes, out);
    q += whole;
  } else {
    const int64_t step = lanes % period;
    for (int64_t k = 0; k < whole; k += lanes) {
      out.put(k, pattern.template make<true>(op, e + k, q));
      q += step;
      q -= q >= period ? period : 0;
    }
  }
  if (whole < n) {
    out.put(whole, pattern.template make<false>(op, e + whole, q % period));
  }
}

// A run of any length from element e on. Its first chunk ends at the end of a cache line of the map, because loads
// across lines take longer to come from memory.
template <bool kBackward, bool kChannelShifts, class G, class L, class S>
STEAM_INLINE void gate_run(const G& op, int64_t e, int64_t length, const Along<L>& along, S& sink) {
  const int64_t head = op.until_line(e);
  int64_t q = 0, n = 0;
  for (int64_t done = 0; done < length; done += n) {
    n = smaller(done == 0 && head ? head : kChunk, length - done);
    gate_chunk<kBackward, kChannelShifts>(op, e + done, n, along, q, sink.begin(n));
    q += n;
    if (q >= along.period) q %= along.period;
    sink.commit(n);
  }
}

// `runs` runs of `length` elements, one after the other. along(i) gives the numbers along run i, whose period is not
// shorter than the run.
template <bool kBackward, bool kChannelShifts, class G, class F, class S>
STEAM_INLINE void gate_runs(const G& operation, int64_t e, int64_t runs, int64_t length, const F& along, S& sink) {
  using L = typename G::L;
  const int64_t group = kChunk / length;
  if (group < 2) {
    for (int64_t i = 0; i < runs; ++i) {
      gate_run<kBackward, kChannelShifts>(operation, e + i * length, length, along(i), sink);
    }
    return;
  }
  const G op = operation;
  const int64_t vectors = (length + L::kLanes - 1) / L::kLanes;
  for (int64_t done = 0; done < runs; done += group) {
    const int64_t n = smaller(group, runs - done);
    const auto out = sink.begin(n * length);
    int64_t i = 0, at = e + done * length;
    for (; i < n && at + vectors * L::kLanes <= op.size; ++i, at += length) {
      gate_vectors(op, Pattern<kBackward, kChannelShifts, L>(along(done + i)), at, 0, vectors, out.from(i * length));
    }
    for (; i < n; ++i, at += length) {
      gate_chunk<kBackward, kChannelShifts>(op, at, length, along(done + i), 0, out.from(i * length));
    }
    sink.commit(n * length);
  }
}

// The same if the arrays of all runs are those of run 0, and are kVectors vectors long: they stay in registers, and
// only the factors differ between runs.
template <bool kBackward, int kVectors, class G, class F, class S>
STEAM_INLINE void gate_short_runs(const G& operation, int64_t e, int64_t runs, int64_t length, const F& along,
                                  S& sink) {
  using L = typename G::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const G op = operation;
  const auto first_run = along(0);
  V gates[kVectors], spatial_shifts[kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) {
    gates[k] = load(first_run.gate + k * lanes);
    spatial_shifts[k] = kBackward ? load(first_run.spatial_shift + k * lanes) : gates[k];
  }
  const int64_t group = kChunk / length;
  for (int64_t done = 0; done < runs; done += group) {
    const int64_t n = smaller(group, runs - done);
    const auto out = sink.begin(n * length);
    int64_t i = 0, at = e + done * length;
    for (; i < n && at + kVectors * lanes <= op.size; ++i, at += length) {
      const auto run = along(done + i);
      const V gate_factor = L::set(run.gate_factor), spatial_factor = L::set(run.spatial_factor);
      const V channel_shift = L::set(run.channel_shift_all);
      const auto made = [&](int k) STEAM_LAMBDA_INLINE {
        return op.template make<true>(at + k * lanes, [&]() STEAM_LAMBDA_INLINE {
          const V gate = gate_factor * gates[k];
          return By<V>{gate, kBackward ? spatial_factor * spatial_shifts[k] : gate, channel_shift};
        });
      };
      const auto to = out.from(i * length);
#pragma GCC unroll 16
      for (int k = 0; k + 2 <= kVectors; k += 2) {
        const auto a = made(k), b = made(k + 1);
        to.put_two(k * lanes, a, b);
      }
      if (kVectors % 2) to.put((kVectors - 1) * lanes, made(kVectors - 1));
    }
    for (; i < n; ++i, at += length) {
      gate_chunk<kBackward, false>(op, at, length, along(done + i), 0, out.from(i * length));
    }
    sink.commit(n * length);
  }
}

}  // namespace
}  // namespace steam
