// The graph transform T of docs/math.md on CUDA, and its gradient, by the threads of a block. The CPU and CUDA kernels
// share the code for one node, common/graph.h.
#pragma once

#include "device.cuh"

namespace steam {
namespace {

// The heads that are in shared memory at a time.
constexpr int kHeads = 16;

// The slope a and the gain b of kHeads heads of a branch (docs/math.md, "It collapses").
template <class A>
struct HeadTable {
  A* slope;
  A* gain;
};
template <class A>
__device__ HeadTable<A> take_heads(SharedMemory& shared) {
  A* memory = shared.take<A>(2 * kHeads);
  return {memory, memory + kHeads};
}

// Writes heads `first` to `first` + kHeads. The table is ready after the next barrier.
template <class A>
__device__ void load_heads(const Problem& p, const Weight& weight, int first, const HeadTable<A>& table) {
  const int head = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kHeads && head < p.num_heads) {
    const auto get = [&](int row, int column) {
      return read_number(weight.data, weight.dtype, row * static_cast<int64_t>(p.embed_dim) + column);
    };
    double slope, gain;
    collapse_head(get, p.embed_dim, p.num_heads, head, slope, gain);
    table.slope[threadIdx.x] = static_cast<A>(slope);
    table.gain[threadIdx.x] = static_cast<A>(gain);
  }
}
// Replaces the heads in the table, of which no thread needs the old ones after the first barrier.
template <class A>
__device__ void replace_heads(const Problem& p, const Weight& weight, int first, const HeadTable<A>& table) {
  __syncthreads();
  load_heads(p, weight, first, table);
  __syncthreads();
}

// The neighbourhood of one node, in the form that common/graph.h needs. `node(k)` is the k-th neighbour.
template <class A>
struct RingNodes {
  const A* tokens;
  int first, neighbors, nodes, self;
  bool skip_self;
  __device__ __forceinline__ int64_t count() const { return neighbors; }
  __device__ __forceinline__ bool exists(int64_t) const { return true; }
  __device__ __forceinline__ int node(int64_t k) const {
    const int offset = first + static_cast<int>(k), i = self + offset + (skip_self && offset >= 0 ? 1 : 0);
    return i < 0 ? i + nodes : i < nodes ? i : i - nodes;
  }
  __device__ __forceinline__ A token(int64_t k) const { return tokens[node(k)]; }
};

template <class A>
struct LatticeNodes {
  const A* tokens;
  int32_t present;  // bit k: the neighbour k / 3 - 1 rows and k % 3 - 1 columns away exists
  int64_t columns, self;
  __device__ __forceinline__ int64_t count() const { return 9; }
  __device__ __forceinline__ bool exists(int64_t k) const { return (present >> k & 1) != 0; }
  __device__ __forceinline__ int64_t node(int64_t k) const { return self + (k / 3 - 1) * columns + k % 3 - 1; }
  __device__ __forceinline__ A token(int64_t k) const { return tokens[exists(k) ? node(k) : self]; }
};

// A row of nodes whose last node is beside the first: the whole ring of channels, or a window of the ring. In a window
// the neighbours of the nodes that are computed never go around its ends.
template <class A>
struct Ring {
  const A* tokens;
  int nodes;
  RingStencil stencil;
  __device__ RingNodes<A> at(int64_t i) const {
    return {tokens, static_cast<int>(stencil.lo), static_cast<int>(stencil.count()),
            nodes,  static_cast<int>(i),          stencil.skip_self};
  }
};

template <class A>
struct Lattice {
  const Plan& plan;
  const A* tokens;
  __device__ LatticeNodes<A> at(int64_t i) const {
    const int64_t r = i / plan.problem.grid_w, c = i % plan.problem.grid_w;
    int32_t present = plan.lattice;
    if (r == 0) present &= ~0007;
    if (r == plan.problem.grid_h - 1) present &= ~0700;
    if (c == 0) present &= ~0111;
    if (c == plan.problem.grid_w - 1) present &= ~0444;
    return {tokens, present, plan.problem.grid_w, i};
  }
};

template <class A>
struct Gate {
  A open;    // sigmoid(o)
  A closed;  // sigmoid(-o), because 1 - open would lose digits
};
template <class A>
__device__ __forceinline__ Gate<A> sigmoid(A o) {
  const A e = std::exp(-std::abs(o)), large = A{1} / (e + 1), small = e * large;
  return o < 0 ? Gate<A>{small, large} : Gate<A>{large, small};
}

// The nodes that a block computes: [begin, end) of a graph.
struct Nodes {
  int64_t begin, end;
};

// The nodes whose gradients a block computes, and `near`: these nodes and their neighbours.
struct GradNodes {
  Nodes own, near;
};

// o[i - begin] = T(tokens) at the nodes [begin, end), and gate(i - begin, sigmoid(o)). The heads from 0 on are in the
// table.
template <class A, class G, class Out>
__device__ void transform(const Plan& plan, const Weight& weight, const G& graph, const Nodes& nodes,
                          const HeadTable<A>& heads, A* o, const Out& gate) {
  using L = ScalarLane<A>;
  const Problem& p = plan.problem;
  const int log2 = plan.log2_head_lanes, lanes = 1 << log2, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  for (int first = 0; first < p.num_heads; first += kHeads) {
    if (first > 0) replace_heads(p, weight, first, heads);
    const int count = smaller(kHeads, p.num_heads - first);
    for (int64_t i = nodes.begin + (threadIdx.x >> log2); i < nodes.end; i += blockDim.x >> log2) {
      const auto node = graph.at(i);
      A lo, hi, sum{0};
      extremes<L>(node, lo, hi);
      for (int h = lane; h < count; h += lanes) {
        const Attention<L> head = attend<L>(node, heads.slope[h] * graph.tokens[i], lo, hi, nullptr);
        sum += heads.gain[h] * (head.extreme + head.mean);
      }
      sum = sum_lanes(sum, log2);
      if (lane != 0) continue;
      if (first > 0) sum += o[i - nodes.begin];
      o[i - nodes.begin] = sum;
      gate(i - nodes.begin, sigmoid(sum).open);
    }
  }
}

// The attention of 2^log2_head_lanes heads at the nodes of `near`. The backward pass reads it at the neighbours of a
// node.
template <class A>
struct GraphTape {
  A *extreme, *inverse, *mean;
};
STEAM_HD int64_t tape_count(const Plan& plan, int64_t nodes) { return 3 * (nodes << plan.log2_head_lanes); }
template <class A>
STEAM_HD GraphTape<A> make_tape(const Plan& plan, A* memory, int64_t nodes) {
  const int64_t count = nodes << plan.log2_head_lanes;
  return {memory, memory + count, memory + 2 * count};
}

// Computes the gradients of the tokens of the nodes `own`, and in `sums` (2, heads) the sums over these nodes of the
// gradients of the heads' a and b, if `sums` is not null. flow[i] is the gradient of o at node i of `near`. The heads
// from 0 on are in the table. The sums are ready in the thread that stored them, and token_grad after the last barrier.
template <class A, class G>
__device__ void transform_backward(const Plan& plan, const Weight& weight, const G& graph, const GradNodes& nodes,
                                   const HeadTable<A>& heads, const A* flow, const GraphTape<A>& tape, A* scratch,
                                   A* token_grad, double* sums) {
  using L = ScalarLane<A>;
  const Nodes own = nodes.own, near = nodes.near;
  const Problem& p = plan.problem;
  const int t = static_cast<int>(threadIdx.x), log2 = plan.log2_head_lanes, lanes = 1 << log2, lane = t & (lanes - 1);
  const int64_t groups = blockDim.x >> log2;
  for (int first = 0; first < p.num_heads; first += lanes) {
    if (first > 0 && first % kHeads == 0) replace_heads(p, weight, first, heads);
    const bool has_head = first + lane < p.num_heads;
    const A a = has_head ? heads.slope[(first + lane) % kHeads] : A{0};
    const A b = has_head ? heads.gain[(first + lane) % kHeads] : A{0};
    A slope_grad{0}, gain_grad{0};
    for (int64_t i = near.begin + (t >> log2); i < near.end; i += groups) {
      const bool owned = i >= own.begin && i < own.end;
      A grad{0};
      if (has_head) {
        const auto node = graph.at(i);
        const A token = graph.tokens[i], mean_grad = b * flow[i];
        A lo, hi;
        extremes<L>(node, lo, hi);
        const Attention<L> head = attend<L>(node, a * token, lo, hi, nullptr);
        const int64_t at = ((i - near.begin) << log2) + lane;
        tape.extreme[at] = head.extreme;
        tape.inverse[at] = head.inverse;
        tape.mean[at] = head.mean;
        if (owned) {
          const A variance = message_variance(node, a * token, head);
          grad = mean_grad * a * variance;
          slope_grad += mean_grad * token * variance;
          gain_grad += flow[i] * (head.extreme + head.mean);
        }
      }
      grad = sum_lanes(grad, log2);
      if (owned && lane == 0) token_grad[i - own.begin] = first == 0 ? grad : token_grad[i - own.begin] + grad;
    }
    __syncthreads();
    // The graphs are symmetric: the nodes that attend to j are the neighbours of j. So the sum needs no atomics.
    for (int64_t j = own.begin + (t >> log2); j < own.end; j += groups) {
      const auto node = graph.at(j);
      A sum{0};
      for (int64_t k = 0; has_head && k < node.count(); ++k) {
        if (!node.exists(k)) continue;
        const int64_t i = node.node(k), at = ((i - near.begin) << log2) + lane;
        const Attention<L> head{tape.extreme[at], tape.inverse[at], tape.mean[at]};
        sum += edge_gradient(graph.tokens[j] - head.extreme, a * graph.tokens[i], b * flow[i], head);
      }
      sum = sum_lanes(sum, log2);
      if (lane == 0) token_grad[j - own.begin] += sum;
    }
    slope_grad = sum_block(slope_grad, log2, scratch);
    gain_grad = sum_block(gain_grad, log2, scratch);
    if (sums && t < lanes && has_head) {
      sums[first + t] = static_cast<double>(slope_grad);
      sums[p.num_heads + first + t] = static_cast<double>(gain_grad);
    }
  }
}

}  // namespace
}  // namespace steam
