// The graph transform T of docs/math.md with collapsed heads, for one node or one vector of nodes at a time. The code
// has a lane type L, so that SIMD vectors on the CPU and scalars on a GPU run the same source. L has
//   V, M                       value and mask types
//   set(double) -> V, zero()   broadcast
//   select(M, V, V) -> V       lane-wise choice
//   less(V, V) -> M
//   exp_nonpositive(V) -> V    exp for arguments <= 0; NaN for NaN, exactly 0 for -inf
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#  define STEAM_HD __host__ __device__ __forceinline__
#else
#  define STEAM_HD inline __attribute__((always_inline))
#endif

namespace steam {
namespace {

// The neighbours of c on the ring: c + lo ... c + hi modulo C, each node once, and without c itself if `skip_self`.
struct RingStencil {
  int64_t lo;
  int64_t hi;
  bool skip_self;
  STEAM_HD int64_t count() const { return hi - lo + 1 - (skip_self ? 1 : 0); }
  STEAM_HD int64_t offset(int64_t k) const { return lo + k + (skip_self && lo + k >= 0 ? 1 : 0); }
};

STEAM_HD RingStencil ring_stencil(int64_t channels, int64_t radius, bool self_loops) {
  const bool wraps_whole = radius >= (channels - 1) / 2 + ((channels - 1) % 2);
  RingStencil s;
  s.lo = wraps_whole ? -((channels - 1) / 2) : -radius;
  s.hi = wraps_whole ? channels / 2 : radius;
  // A node without neighbours attends to itself alone.
  s.skip_self = !self_loops && s.hi > s.lo;
  return s;
}

// The lattice's neighbours: row and column steps, in reading order.
struct LatticeStencil {
  int32_t count;
  int8_t dr[9];
  int8_t dc[9];
};

STEAM_HD LatticeStencil lattice_stencil(int64_t grid_h, int64_t grid_w, int32_t neighbors, bool self_loops) {
  LatticeStencil s;
  s.count = 0;
  const bool alone = grid_h * grid_w == 1;
  for (int dr = -1; dr <= 1; ++dr) {
    for (int dc = -1; dc <= 1; ++dc) {
      const bool self = dr == 0 && dc == 0;
      const bool diagonal = dr != 0 && dc != 0;
      if (self ? !(self_loops || alone) : (alone || (diagonal && neighbors == 4))) continue;
      s.dr[s.count] = static_cast<int8_t>(dr);
      s.dc[s.count] = static_cast<int8_t>(dc);
      ++s.count;
    }
  }
  return s;
}

// The attention of one head at one node: alpha_k = weight_k * inverse, m = extreme + mean. Distances are d_k = t_k -
// extreme.
template <class L>
struct Attention {
  typename L::V extreme;
  typename L::V inverse;
  typename L::V mean;
};

// The smallest and the largest token of a neighbourhood. N has count(), token(k) and exists(k).
template <class L, class N>
STEAM_HD void extremes(const N& nodes, typename L::V& lo, typename L::V& hi) {
  lo = L::set(INFINITY);
  hi = L::set(-INFINITY);
  for (int64_t k = 0; k < nodes.count(); ++k) {
    const typename L::V t = nodes.token(k);
    lo = L::select(nodes.exists(k) & L::less(t, lo), t, lo);
    hi = L::select(nodes.exists(k) & L::less(hi, t), t, hi);
  }
}

// exp(score_k - largest score), or 0 for a neighbour that does not exist. The difference of tokens comes before the
// product (docs/math.md, "Numerics").
template <class L, class N>
STEAM_HD typename L::V edge_weight(const N& nodes, int64_t k, typename L::V slope, typename L::V d) {
  return L::select(nodes.exists(k), L::exp_nonpositive(slope * d), L::zero());
}

template <class L, class N>
STEAM_HD typename L::V edge_difference(const N& nodes, int64_t k, typename L::V extreme) {
  return L::select(nodes.exists(k), nodes.token(k) - extreme, L::zero());
}

// If `weights` is not null, it gets the weights before their division by the sum.
template <class L, class N>
STEAM_HD Attention<L> attend(const N& nodes, typename L::V slope, typename L::V lo, typename L::V hi,
                             typename L::V* weights) {
  using V = typename L::V;
  Attention<L> out;
  out.extreme = L::select(L::less(L::zero(), slope), hi, lo);
  V sum = L::zero(), moment = L::zero();
  for (int64_t k = 0; k < nodes.count(); ++k) {
    const V d = edge_difference<L>(nodes, k, out.extreme);
    const V e = edge_weight<L>(nodes, k, slope, d);
    if (weights) weights[k] = e;
    sum += e;
    moment += e * d;
  }
  out.inverse = L::set(1) / sum;
  out.mean = moment * out.inverse;
  return out;
}

// a = <w_q, w_k> / sqrt(d_h) and b = <w_v, w_o> of one head, over the columns of the head. get(row, column) reads the
// weight.
template <class Get>
STEAM_HD void collapse_head(const Get& get, int32_t dim, int32_t heads, int32_t head, double& a, double& b) {
  const int32_t width = dim / heads;
  a = 0;
  b = 0;
  for (int32_t j = head * width; j < (head + 1) * width; ++j) {
    a += get(0, j) * get(1, j);
    b += get(2, j) * get(3, j);
  }
  a /= sqrt(static_cast<double>(width));
}

// Lanes of one number, for a thread that works on one node.
template <class S>
struct ScalarLane {
  using A = S;
  using V = S;
  using M = bool;
  static STEAM_HD V set(double a) { return static_cast<S>(a); }
  static STEAM_HD V zero() { return S{0}; }
  static STEAM_HD V select(M m, V a, V b) { return m ? a : b; }
  static STEAM_HD M less(V a, V b) { return a < b; }
  static STEAM_HD V exp_nonpositive(V x) { return std::exp(x); }
};

// v = sum_k alpha_k (t_k - m)^2.
template <class L, class N>
STEAM_HD typename L::V message_variance(const N& nodes, typename L::V slope, const Attention<L>& head) {
  typename L::V sum = L::zero();
  for (int64_t k = 0; k < nodes.count(); ++k) {
    const typename L::V d = edge_difference<L>(nodes, k, head.extreme);
    const typename L::V centred = d - head.mean;
    sum += edge_weight<L>(nodes, k, slope, d) * centred * centred;
  }
  return sum * head.inverse;
}

// The partial that a node with this slope adds to the gradient of the token of an existing neighbour, whose distance is
// d. The weight is multiplied before the slope: it is 0 if the product of the slope and d - m may overflow.
template <class L>
STEAM_HD typename L::V edge_gradient(typename L::V d, typename L::V slope, typename L::V mean_grad,
                                     const Attention<L>& head) {
  const typename L::V alpha = L::exp_nonpositive(slope * d) * head.inverse;
  const typename L::V given = mean_grad * alpha;
  return given + slope * (given * (d - head.mean));
}

}  // namespace
}  // namespace steam
