// The graph transform of a node with three distinct neighbours, as on the usual ring: sorted, they need two
// exponentials a head instead of three.
#pragma once

#include "branch.h"
#include "vec.h"
#include "weights.h"

namespace steam {
namespace {

// The tokens p, q, r of three neighbours in order of size, and their distances. If one of the tokens is not finite, all
// distances are NaN: exact arithmetic keeps such a token, but sorting may drop it.
template <class L>
struct Triple {
  using V = typename L::V;
  typename L::M swapped, below, above;  // q is smaller than p; r is the smallest; r is the largest
  V lo, hi, down, up, range;

  STEAM_INLINE Triple(V p, V q, V r) {
    swapped = q < p;
    const V low = L::select(swapped, q, p), high = L::select(swapped, p, q);
    below = r < low;
    above = r > high;
    lo = L::select(below, r, low);
    hi = L::select(above, r, high);
    const V mid = L::select(above, high, L::select(below, low, r));
    const V poison = (p - p) + (q - q) + (r - r);
    down = mid - hi + poison;
    up = mid - lo + poison;
    range = hi - lo + poison;
  }

  // From numbers of the smallest, middle and largest token to numbers of the neighbours p, q, r.
  STEAM_INLINE void sort_back(V of_lo, V of_mid, V of_hi, V& of_p, V& of_q, V& of_r) const {
    const V of_low = L::select(below, of_mid, of_lo), of_high = L::select(above, of_mid, of_hi);
    of_r = L::select(below, of_lo, L::select(above, of_hi, of_mid));
    of_p = L::select(swapped, of_high, of_low);
    of_q = L::select(swapped, of_low, of_high);
  }
};

// A Triple seen from the end with the largest score: the token of this end, and the distances from it to the middle and
// to the other end.
template <class L>
struct View {
  typename L::V end, near, far;
};

// The sign of a head's slope a and the sign of the node's token decide which end has the largest score. So all heads
// with a > 0 have one view, and all other heads have the view from the other end.
template <class L>
struct Views {
  using V = typename L::V;
  typename L::M positive;
  View<L> rising, falling;  // set member by member: GCC copies a struct of vectors through memory, in halves

  STEAM_INLINE Views(const Triple<L>& of, V token) {
    positive = L::less(L::zero(), token);
    rising.end = L::select(positive, of.hi, of.lo);
    rising.near = L::select(positive, of.down, of.up);
    rising.far = L::select(positive, -of.range, of.range);
    falling.end = L::select(positive, of.lo, of.hi);
    falling.near = L::select(positive, of.up, of.down);
    falling.far = -rising.far;
  }
};

// The attention of one head. The end has weight 1, so two exponentials are enough.
template <class L>
struct TripleAttention {
  using V = typename L::V;
  V near_weight, far_weight, inverse, mean;

  STEAM_INLINE TripleAttention(const View<L>& view, V slope) {
    near_weight = L::exp_nonpositive(slope * view.near);
    far_weight = L::exp_nonpositive(slope * view.far);
    inverse = L::set(1) / (1 + near_weight + far_weight);
    mean = (near_weight * view.near + far_weight * view.far) * inverse;
  }
};

template <class L>
STEAM_INLINE Triple<L> triple_at(const Branch<L>& branch, const typename L::A* tokens, int64_t at) {
  return {load(tokens + at + branch.offsets[0]), load(tokens + at + branch.offsets[1]),
          load(tokens + at + branch.offsets[2])};
}

// transform_nodes on a ring of three distinct neighbours.
template <class L>
void transform_triples(const Branch<L>& branch, const Heads<L>& heads, Positions where, const typename L::A* tokens,
                       typename L::A* out) {
  using V = typename L::V;
  for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
    const V t = load(tokens + at);
    const Views<L> views(triple_at(branch, tokens, at), t);
    V o = L::zero();
    for (int64_t h = 0; h < heads.count; ++h) {
      const View<L>& view = heads.a[h] > 0 ? views.rising : views.falling;
      const TripleAttention<L> head(view, L::set(heads.a[h]) * t);
      o += L::set(heads.b[h]) * (view.end + head.mean);
    }
    store(out + at, o);
  }
}

// The working memory of one branch in the backward pass.
template <class L>
struct GraphTape {
  // Arrays of branch.size, one for each neighbour, or null if a node has more neighbours than kTapedNeighbours. Number
  // i of array k is the partial that node i adds to the gradient of its k-th neighbour's token.
  typename L::A* partials;
  // 2 * heads vectors for each block of nodes: the gradients of a, then of b, still to be summed over the lanes.
  typename L::V* sums;
};

// The most neighbours of a node that with_nodes (graph.h) has a function for.
constexpr int64_t kTapedNeighbours = 9;

template <class L>
GraphTape<L> make_tape(const Branch<L>& branch, const Heads<L>& heads, Arena& arena) {
  using A = typename L::A;
  A* partials = branch.count <= kTapedNeighbours ? arena.take<A>(branch.count, branch.size) : nullptr;
  return {partials, arena.take<typename L::V>(node_blocks(branch), 2 * heads.count)};
}

// transform_nodes_backward on a ring of three distinct neighbours. Positions without a node have zeros as tokens, so
// all their gradients are zero.
template <class L>
void transform_triples_backward(const Branch<L>& branch, const Heads<L>& heads, Positions where,
                                const typename L::A* tokens, const typename L::A* out_grad, typename L::A* token_grad,
                                const GraphTape<L>& tape, typename L::V* sums) {
  using V = typename L::V;
  for (int64_t h = 0; h < 2 * heads.count; ++h) sums[h] = L::zero();
  for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
    const auto is_node = RingNodes<L, 3>::make(branch, tokens, at).is_node();
    const auto of_node = [&](const typename L::A* from)
                             STEAM_LAMBDA_INLINE { return L::select(is_node, load(from), L::zero()); };
    const auto neighbour = [&](int k) STEAM_LAMBDA_INLINE { return of_node(tokens + at + branch.offsets[k]); };
    const V t = of_node(tokens + at), og = of_node(out_grad + at);
    const Triple<L> triple(neighbour(0), neighbour(1), neighbour(2));
    const Views<L> views(triple, t);
    V own = L::zero(), to_mid = L::zero(), to_rising = L::zero(), to_falling = L::zero();
    for (int64_t h = 0; h < heads.count; ++h) {
      const V a = L::set(heads.a[h]), slope = a * t, mean_grad = L::set(heads.b[h]) * og;
      const auto look = [&](const View<L>& view, V& to_end, V& to_other) STEAM_LAMBDA_INLINE {
        const TripleAttention<L> head(view, slope);
        const V near = view.near - head.mean, far = view.far - head.mean;
        const V of_end = mean_grad * head.inverse;
        const V of_near = of_end * head.near_weight, of_far = of_end * head.far_weight;
        // The weights are multiplied first: they are 0 if the product of the slope and a distance may overflow.
        const V by_near = of_near * near, by_far = of_far * far, by_end = of_end * head.mean;
        to_mid += of_near + slope * by_near;
        to_other += of_far + slope * by_far;
        to_end += of_end - slope * by_end;
        const V spread = by_near * near + by_far * far + by_end * head.mean;
        own += a * spread;
        sums[h] += t * spread;
        sums[heads.count + h] += og * (view.end + head.mean);
      };
      if (heads.a[h] > 0) {
        look(views.rising, to_rising, to_falling);
      } else {
        look(views.falling, to_falling, to_rising);
      }
    }
    store(token_grad + at, load(token_grad + at) + own);
    V partial[3];
    triple.sort_back(L::select(views.positive, to_falling, to_rising), to_mid,
                     L::select(views.positive, to_rising, to_falling), partial[0], partial[1], partial[2]);
    for (int k = 0; k < 3; ++k) store(tape.partials + k * branch.size + at, partial[k]);
  }
}

}  // namespace
}  // namespace steam
