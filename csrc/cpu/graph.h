// The graph stage on the CPU: both branches, forward and backward, L::kLanes nodes at a time.
#pragma once

#include "../common/graph.h"
#include "../common/problem.h"
#include "scratch.h"
#include "threads.h"
#include "vec.h"

namespace steam {
namespace {

// Where a branch's nodes lie: row i, column j at first + i * pitch + j of an array of `size` numbers that has room
// around the nodes for the neighbours of the outermost ones. A ring is one row whose surroundings repeat its other end.
template <class L>
struct Branch {
  using A = typename L::A;
  int64_t rows, cols;
  bool wraps;
  int64_t first, pitch, span, size, margin;
  int64_t count;           // neighbours of a node
  int64_t* offsets;        // their distances in the array
  typename L::I* present;  // lattice: bit k of present[position] says that neighbour k exists
  int64_t at(int64_t i, int64_t j) const { return first + i * pitch + j; }
};

inline RingStencil ring_of(const Problem& p) { return ring_stencil(p.channels, p.channel_radius, p.self_loops); }
inline LatticeStencil lattice_of(const Problem& p) {
  return lattice_stencil(p.grid_h, p.grid_w, p.spatial_neighbors, p.self_loops);
}

template <class L>
Branch<L> ring_branch(const Problem& p, Arena& arena) {
  const RingStencil stencil = ring_of(p);
  Branch<L> b{};
  b.rows = 1;
  b.cols = b.span = b.pitch = p.channels;
  b.wraps = true;
  b.margin = larger(-stencil.lo, stencil.hi);
  b.first = round_up(b.margin, kLine);
  b.size = b.first + round_up(p.channels, kLine) + b.margin + kLine;
  b.count = stencil.count();
  b.offsets = arena.take<int64_t>(b.count);
  return b;
}
template <class L>
void fill_ring(const Branch<L>& b, const Problem& p) {
  const RingStencil stencil = ring_of(p);
  for (int64_t k = 0; k < b.count; ++k) b.offsets[k] = stencil.offset(k);
}

template <class L>
Branch<L> lattice_branch(const Problem& p, Arena& arena) {
  Branch<L> b{};
  b.rows = p.grid_h;
  b.cols = p.grid_w;
  b.pitch = p.grid_w + 2;
  b.first = b.pitch + 1;
  b.span = (b.rows - 1) * b.pitch + b.cols;
  b.size = (b.rows + 2) * b.pitch + 2 * kLine;
  b.count = lattice_of(p).count;
  b.offsets = arena.take<int64_t>(b.count);
  b.present = arena.take<typename L::I>(b.size);
  return b;
}
template <class L>
void fill_lattice(const Branch<L>& b, const Problem& p) {
  using I = typename L::I;
  const LatticeStencil stencil = lattice_of(p);
  memset(b.present, 0, sizeof(I) * static_cast<size_t>(b.size));
  for (int64_t k = 0; k < b.count; ++k) {
    const int64_t dr = stencil.dr[k], dc = stencil.dc[k];
    b.offsets[k] = dr * b.pitch + dc;
    for (int64_t i = larger<int64_t>(0, -dr); i < smaller(b.rows, b.rows - dr); ++i) {
      for (int64_t j = larger<int64_t>(0, -dc); j < smaller(b.cols, b.cols - dc); ++j) {
        b.present[b.at(i, j)] |= I{1} << k;
      }
    }
  }
}

// Nodes come in blocks of so many positions: what threads share, and within which sums are kept apart.
constexpr int64_t kNodeBlock = 256;

struct Positions {
  int64_t begin, end;
};
template <class L>
int64_t node_blocks(const Branch<L>& branch) {
  return (branch.span + kNodeBlock - 1) / kNodeBlock;
}
template <class L>
Positions node_block(const Branch<L>& branch, int64_t block) {
  const int64_t begin = branch.first + block * kNodeBlock;
  return {begin, smaller(begin + kNodeBlock, branch.first + branch.span)};
}

// The neighbourhoods of L::kLanes consecutive positions. K: their size where it is known at compile time, else 0.
template <class L, int K>
struct RingNodes {
  const typename L::A* at;
  const Branch<L>* branch;
  int64_t left;  // nodes from here on
  STEAM_INLINE int64_t count() const { return K ? K : branch->count; }
  STEAM_INLINE typename L::V token(int64_t k) const { return load(at + branch->offsets[k]); }
  STEAM_INLINE typename L::M exists(int64_t) const { return typename L::M{} == typename L::M{}; }
  STEAM_INLINE typename L::M is_node() const { return L::first(left < L::kLanes ? left : L::kLanes); }
  static STEAM_INLINE RingNodes make(const Branch<L>& b, const typename L::A* tokens, int64_t position) {
    return {tokens + position, &b, b.first + b.span - position};
  }
};

template <class L, int K>
struct LatticeNodes {
  const typename L::A* at;
  const Branch<L>* branch;
  typename L::M bits;
  STEAM_INLINE int64_t count() const { return K ? K : branch->count; }
  STEAM_INLINE typename L::V token(int64_t k) const { return load(at + branch->offsets[k]); }
  STEAM_INLINE typename L::M exists(int64_t k) const { return (bits & (typename L::M{} + (1 << k))) != 0; }
  STEAM_INLINE typename L::M is_node() const { return bits != 0; }
  static STEAM_INLINE LatticeNodes make(const Branch<L>& b, const typename L::A* tokens, int64_t position) {
    typename L::M bits;
    __builtin_memcpy(&bits, b.present + position, sizeof(bits));
    return {tokens + position, &b, bits};
  }
};

// Slopes a and gains b of the heads (math step T, collapsed).
template <class L>
struct Heads {
  typename L::A* a;
  typename L::A* b;
  int64_t count;
};

template <class L, class N>
void transform_nodes(const Branch<L>& branch, const Heads<L>& heads, Positions where, const typename L::A* tokens,
                     typename L::A* out) {
  using V = typename L::V;
  for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
    const N nodes = N::make(branch, tokens, at);
    const V t = load(tokens + at);
    V lo, hi, o = L::zero();
    extremes<L>(nodes, lo, hi);
    for (int64_t h = 0; h < heads.count; ++h) {
      const Attention<L> head = attend<L>(nodes, L::set(heads.a[h]) * t, lo, hi, nullptr);
      o += L::set(heads.b[h]) * (head.extreme + head.mean);
    }
    store(out + at, o);
  }
}

// Three neighbours' tokens in order of size, and how far they lie apart. With one of them not finite, all distances are
// NaN: sorting may drop such a token, exact arithmetic does not.
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

  // What belongs to the smallest, the middle and the largest, to each neighbour.
  STEAM_INLINE void sort_back(V of_lo, V of_mid, V of_hi, V& of_p, V& of_q, V& of_r) const {
    const V of_low = L::select(below, of_mid, of_lo), of_high = L::select(above, of_mid, of_hi);
    of_r = L::select(below, of_lo, L::select(above, of_hi, of_mid));
    of_p = L::select(swapped, of_high, of_low);
    of_q = L::select(swapped, of_low, of_high);
  }
};

// A Triple from the end with the largest score: its token, and how far the middle and the other end lie from it.
template <class L>
struct View {
  typename L::V end, near, far;
};

// Which end that is depends on the signs of a head's slope a and of the node's token alone: one view for the heads with
// a > 0, and for the others the one from the other end.
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

// What one head sees there. The end has weight 1: two exponentials of three.
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

// Working memory of one branch's backward pass.
template <class L>
struct GraphTape {
  typename L::A*
      shares;  // count arrays of branch.size: what node i gives to its k-th neighbour (static neighbourhoods only)
  typename L::V* sums;  // a block of nodes after another, 2 * heads each: lanes of the gradients of a, then of b
};

// d<out_grad, T(tokens)>/d tokens, of the nodes `where`: what each node has through its own query into token_grad, what
// it gives to its neighbours into the tape (K = 0: added to theirs).
template <class L, class N, int K>
void transform_nodes_backward(const Branch<L>& branch, const Heads<L>& heads, Positions where,
                              const typename L::A* tokens, const typename L::A* out_grad, typename L::A* token_grad,
                              const GraphTape<L>& tape, typename L::V* sums) {
  using V = typename L::V;
  using A = typename L::A;
  for (int64_t h = 0; h < 2 * heads.count; ++h) sums[h] = L::zero();
  for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
    const N nodes = N::make(branch, tokens, at);
    const auto is_node = nodes.is_node();
    const V t = load(tokens + at);
    const V og = L::select(is_node, load(out_grad + at), L::zero());
    V lo, hi, own = L::zero();
    extremes<L>(nodes, lo, hi);
    V weights[K ? K : 1], share[K ? K : 1];
    for (int k = 0; k < K; ++k) share[k] = L::zero();
    for (int64_t h = 0; h < heads.count; ++h) {
      const V a = L::set(heads.a[h]), slope = a * t, mean_grad = L::set(heads.b[h]) * og;
      const Attention<L> head = attend<L>(nodes, slope, lo, hi, K ? weights : nullptr);
      V variance = L::zero();
      for (int64_t k = 0; k < nodes.count(); ++k) {
        const V d = edge_difference<L>(nodes, k, head.extreme);
        const V alpha = (K ? weights[K ? k : 0] : edge_weight<L>(nodes, k, slope, d)) * head.inverse;
        const V centred = d - head.mean, weighted = alpha * centred;
        variance += weighted * centred;
        // The weight comes before the slope: it is 0 where slope * centred may overflow.
        const V given = mean_grad * (alpha + slope * weighted);
        if (K) {
          share[K ? k : 0] += given;
        } else {
          A* to = token_grad + at + branch.offsets[k];
          store(to, load(to) + L::select(is_node & nodes.exists(k), given, L::zero()));
        }
      }
      own += mean_grad * a * variance;
      sums[h] += L::select(is_node, mean_grad * t * variance, L::zero());
      sums[heads.count + h] += L::select(is_node, og * (head.extreme + head.mean), L::zero());
    }
    own = L::select(is_node, own, L::zero());
    store(token_grad + at, load(token_grad + at) + own);
    for (int k = 0; k < K; ++k) {
      store(tape.shares + k * branch.size + at, L::select(is_node & nodes.exists(k), share[k], L::zero()));
    }
  }
}

// transform_nodes_backward on a ring of three distinct neighbours. Where there is no node all is zero, and stays so.
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
        // Weights come before the slope: they are 0 where its product with a distance may overflow.
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
    V share[3];
    triple.sort_back(L::select(views.positive, to_falling, to_rising), to_mid,
                     L::select(views.positive, to_rising, to_falling), share[0], share[1], share[2]);
    for (int k = 0; k < 3; ++k) store(tape.shares + k * branch.size + at, share[k]);
  }
}

// One function for each usual size of a neighbourhood, where weights stay in registers; any other size goes the general
// way.
template <class L, class F>
STEAM_INLINE void with_nodes(const Branch<L>& branch, const F& f) {
  if constexpr (sizeof(typename L::A) == 4) {
    if (branch.wraps) {
      switch (branch.count) {
        case 1: return f.template run<RingNodes<L, 1>, 1>();
        case 2: return f.template run<RingNodes<L, 2>, 2>();
        case 3: return f.template run<RingNodes<L, 3>, 3>();
        case 5: return f.template run<RingNodes<L, 5>, 5>();
        case 7: return f.template run<RingNodes<L, 7>, 7>();
        default: break;
      }
    } else {
      switch (branch.count) {
        case 4: return f.template run<LatticeNodes<L, 4>, 4>();
        case 5: return f.template run<LatticeNodes<L, 5>, 5>();
        case 8: return f.template run<LatticeNodes<L, 8>, 8>();
        case 9: return f.template run<LatticeNodes<L, 9>, 9>();
        default: break;
      }
    }
  }
  if (branch.wraps) return f.template run<RingNodes<L, 0>, 0>();
  return f.template run<LatticeNodes<L, 0>, 0>();
}

// Fills what lies around the nodes: a ring's other end, zeros elsewhere. The nodes' own tokens are in place.
template <class L>
void surround(const Branch<L>& branch, typename L::A* tokens) {
  using A = typename L::A;
  const int64_t first = branch.first, n = branch.cols;
  if (branch.wraps) {
    for (int64_t i = first + n + branch.margin; i < branch.size; ++i) tokens[i] = 0;
    for (int64_t j = 0; j < branch.margin; ++j) {
      tokens[first - 1 - j] = tokens[first + n - 1 - j];
      tokens[first + n + j] = tokens[first + j];
    }
    return;
  }
  for (int64_t i = 0; i < first; ++i) tokens[i] = 0;
  for (int64_t i = 0; i + 1 < branch.rows; ++i) {
    for (int64_t j = n; j < branch.pitch; ++j) tokens[first + i * branch.pitch + j] = A{0};
  }
  for (int64_t i = first + branch.span; i < branch.size; ++i) tokens[i] = 0;
}

// sigmoid(o) at every node.
template <class L>
void open_gates(Positions where, const typename L::A* o, typename L::A* gate) {
  for (int64_t at = where.begin; at < where.end; at += L::kLanes) store(gate + at, sigmoid<L>(load(o + at)).open);
}

// o = T(tokens) at the nodes `where`, and the gates open = sigmoid(o). `tokens`, `o` and `open` are arrays of
// branch.size; tokens and their surroundings are in place.
template <class L>
struct GraphForward {
  const Branch<L>& branch;
  const Heads<L>& heads;
  Positions where;
  const typename L::A* tokens;
  typename L::A* o;
  typename L::A* open;
  template <class N, int K>
  void run() const {
    if (K == 3 && branch.wraps) {
      transform_triples(branch, heads, where, tokens, o);
    } else {
      transform_nodes<L, N>(branch, heads, where, tokens, o);
    }
    open_gates<L>(where, o, open);
  }
};

template <class L>
void transform(const Branch<L>& branch, const Heads<L>& heads, Positions where, const typename L::A* tokens,
               typename L::A* o, typename L::A* open) {
  with_nodes<L>(branch, GraphForward<L>{branch, heads, where, tokens, o, open});
}

// The same at every node.
template <class L>
void graph_forward(const Branch<L>& branch, const Heads<L>& heads, typename L::A* tokens, typename L::A* o,
                   typename L::A* open, const cpu::Parallel* parallel) {
  surround(branch, tokens);
  for_tasks(parallel, node_blocks(branch),
            [&](int64_t block) { transform<L>(branch, heads, node_block(branch, block), tokens, o, open); });
}

// From the gradient of the gates (in `grad`, overwritten by that of o) to the gradient of the tokens.
template <class L>
struct GraphBackward {
  using A = typename L::A;
  const Branch<L>& branch;
  const Heads<L>& heads;
  const A* tokens;
  const A* o;
  A* grad;
  A* token_grad;
  const GraphTape<L>& tape;
  const cpu::Parallel* parallel;
  template <class N, int K>
  void run() const {
    const int64_t blocks = node_blocks(branch), first = branch.first, n = branch.cols;
    memset(token_grad, 0, sizeof(A) * static_cast<size_t>(branch.size));
    if (K && !branch.wraps) memset(tape.shares, 0, sizeof(A) * static_cast<size_t>(K * branch.size));
    for_tasks(K ? parallel : nullptr, blocks, [&](int64_t block) {
      const Positions where = node_block(branch, block);
      for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
        const Gate<L> gate = sigmoid<L>(load(o + at));
        store(grad + at, load(grad + at) * gate.open * gate.closed);
      }
      typename L::V* sums = tape.sums + block * 2 * heads.count;
      if (K == 3 && branch.wraps) {
        transform_triples_backward(branch, heads, where, tokens, grad, token_grad, tape, sums);
      } else {
        transform_nodes_backward<L, N, K>(branch, heads, where, tokens, grad, token_grad, tape, sums);
      }
    });
    if (branch.wraps) {
      for (int64_t k = 0; k < K; ++k) {
        A* share = tape.shares + k * branch.size;
        for (int64_t j = 0; j < branch.margin; ++j) {
          share[first - 1 - j] = share[first + n - 1 - j];
          share[first + n + j] = share[first + j];
        }
      }
      for (int64_t j = 0; !K && j < branch.margin; ++j) {
        token_grad[first + n - 1 - j] += token_grad[first - 1 - j];
        token_grad[first + j] += token_grad[first + n + j];
      }
    }
    if (K == 0) return;
    // A gather over the same neighbours: graphs are symmetric, so no two nodes ever add to one place.
    for_tasks(parallel, blocks, [&](int64_t block) {
      const Positions where = node_block(branch, block);
      for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
        typename L::V sum = load(token_grad + at);
        for (int64_t k = 0; k < K; ++k) sum += load(tape.shares + k * branch.size + at - branch.offsets[k]);
        store(token_grad + at, sum);
      }
    });
  }
};

// `sums` receives the gradients of a, then of b, for each head.
template <class L>
void graph_backward(const Branch<L>& branch, const Heads<L>& heads, typename L::A* tokens, const typename L::A* o,
                    typename L::A* grad, typename L::A* token_grad, const GraphTape<L>& tape, double* sums,
                    const cpu::Parallel* parallel) {
  surround(branch, tokens);
  with_nodes<L>(branch, GraphBackward<L>{branch, heads, tokens, o, grad, token_grad, tape, parallel});
  const int64_t blocks = node_blocks(branch);
  for (int64_t h = 0; h < 2 * heads.count; ++h) {
    sums[h] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      sums[h] += static_cast<double>(sum_lanes<L>(tape.sums[block * 2 * heads.count + h]));
    }
  }
}

// Dense rows of nodes to and from a branch's array.
template <class L>
void scatter_nodes(const Branch<L>& branch, const typename L::A* dense, typename L::A* array) {
  for (int64_t i = 0; i < branch.rows; ++i) {
    memcpy(array + branch.at(i, 0), dense + i * branch.cols, sizeof(*dense) * static_cast<size_t>(branch.cols));
  }
}
template <class L>
void gather_nodes(const Branch<L>& branch, const typename L::A* array, typename L::A* dense) {
  for (int64_t i = 0; i < branch.rows; ++i) {
    memcpy(dense + i * branch.cols, array + branch.at(i, 0), sizeof(*dense) * static_cast<size_t>(branch.cols));
  }
}

}  // namespace
}  // namespace steam
