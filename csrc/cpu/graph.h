// The graph stage on the CPU: both branches, forward and backward, L::kLanes nodes at a time.
#pragma once

#include "../common/graph.h"
#include "branch.h"
#include "graph_triples.h"
#include "threads.h"
#include "vec.h"
#include "weights.h"

namespace steam {
namespace {

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

// The gradient of <out_grad, T(tokens)> by the tokens, from the nodes `where`. The part through a node's own query is
// added to token_grad. The parts for its neighbours go into the tape, or (K = 0) are added to the neighbours'
// token_grad.
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
    V weights[K ? K : 1], partial[K ? K : 1];
    for (int k = 0; k < K; ++k) partial[k] = L::zero();
    for (int64_t h = 0; h < heads.count; ++h) {
      const V a = L::set(heads.a[h]), slope = a * t, mean_grad = L::set(heads.b[h]) * og;
      const Attention<L> head = attend<L>(nodes, slope, lo, hi, K ? weights : nullptr);
      V variance = L::zero();
      for (int64_t k = 0; k < nodes.count(); ++k) {
        const V d = edge_difference<L>(nodes, k, head.extreme);
        const V alpha = (K ? weights[K ? k : 0] : edge_weight<L>(nodes, k, slope, d)) * head.inverse;
        const V centred = d - head.mean, weighted = alpha * centred;
        variance += weighted * centred;
        // The weight is multiplied first: it is 0 if slope * centred may overflow.
        const V given = mean_grad * (alpha + slope * weighted);
        if (K) {
          partial[K ? k : 0] += given;
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
      store(tape.partials + k * branch.size + at, L::select(is_node & nodes.exists(k), partial[k], L::zero()));
    }
  }
}

// Calls f.run<Nodes, K>(). The usual sizes of a neighbourhood have functions of their own, whose weights stay in
// registers; all other sizes have K = 0.
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

// sigmoid(o) at every node.
template <class L>
void open_gates(Positions where, const typename L::A* o, typename L::A* gate) {
  for (int64_t at = where.begin; at < where.end; at += L::kLanes) store(gate + at, sigmoid<L>(load(o + at)).open);
}

// o = T(tokens) and the gates open = sigmoid(o), at the nodes `where`. `tokens` also has the places around the nodes
// (surround).
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

// The same at every node, after `surround`.
template <class L>
void graph_forward(const Branch<L>& branch, const Heads<L>& heads, typename L::A* tokens, typename L::A* o,
                   typename L::A* open, const cpu::Parallel* parallel) {
  surround(branch, tokens);
  for_tasks(parallel, node_blocks(branch),
            [&](int64_t block) { transform<L>(branch, heads, node_block(branch, block), tokens, o, open); });
}

// The gradient of the tokens from the gradient of the gates. `grad` holds the gradient of the gates, and in the end the
// gradient of o.
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
    if (K && !branch.wraps) memset(tape.partials, 0, sizeof(A) * static_cast<size_t>(K * branch.size));
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
        A* partial = tape.partials + k * branch.size;
        for (int64_t j = 0; j < branch.margin; ++j) {
          partial[first - 1 - j] = partial[first + n - 1 - j];
          partial[first + n + j] = partial[first + j];
        }
      }
      for (int64_t j = 0; !K && j < branch.margin; ++j) {
        token_grad[first + n - 1 - j] += token_grad[first - 1 - j];
        token_grad[first + j] += token_grad[first + n + j];
      }
    }
    if (K == 0) return;
    // The graphs are symmetric, so each node gathers the partials from its own neighbours, and no place has two
    // writers.
    for_tasks(parallel, blocks, [&](int64_t block) {
      const Positions where = node_block(branch, block);
      for (int64_t at = where.begin; at < where.end; at += L::kLanes) {
        typename L::V sum = load(token_grad + at);
        for (int64_t k = 0; k < K; ++k) sum += load(tape.partials + k * branch.size + at - branch.offsets[k]);
        store(token_grad + at, sum);
      }
    });
  }
};

// `sums` gets the gradients of a of each head, and then those of b.
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

}  // namespace
}  // namespace steam
