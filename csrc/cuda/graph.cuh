// The graph stage on CUDA: a block computes the gates of one sample from sums over cells or pixels, and backward the
// gradients of its tokens from the gradients of its gates.
#pragma once

#include "device.cuh"
#include "pool.cuh"

namespace steam {
namespace {

// ---------------------------------------------------------------- the graph transform T of docs/math.md

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

template <class A>
__device__ void load_heads(const Problem& p, const Weight& weight, int first, const HeadTable<A>& table) {
  __syncthreads();
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
  __syncthreads();
}

// The neighbourhood of one node, in the form that common/graph.h needs. `node(k)` is the k-th neighbour.
template <class A>
struct RingNodes {
  const A* tokens;
  RingStencil stencil;
  int64_t nodes, self;
  __device__ __forceinline__ int64_t count() const { return stencil.count(); }
  __device__ __forceinline__ bool exists(int64_t) const { return true; }
  __device__ __forceinline__ int64_t node(int64_t k) const {
    const int64_t i = self + stencil.offset(k);
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

template <class A>
struct Ring {
  const Plan& plan;
  const A* tokens;
  __device__ int64_t nodes() const { return plan.problem.channels; }
  __device__ RingNodes<A> at(int64_t i) const { return {tokens, plan.ring, plan.problem.channels, i}; }
};

template <class A>
struct Lattice {
  const Plan& plan;
  const A* tokens;
  __device__ int64_t nodes() const { return plan.cells(); }
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

// o = T(tokens) and the gates sigmoid(o), by the threads of the block.
template <class A, class G>
__device__ void transform(const Problem& p, const Weight& weight, const G& graph, const HeadTable<A>& heads, A* o,
                          A* gate) {
  using L = ScalarLane<A>;
  for (int first = 0; first < p.num_heads; first += kHeads) {
    load_heads(p, weight, first, heads);
    const int count = smaller(kHeads, p.num_heads - first);
    for (int64_t i = threadIdx.x; i < graph.nodes(); i += blockDim.x) {
      const auto nodes = graph.at(i);
      A lo, hi, sum = first == 0 ? A{0} : o[i];
      extremes<L>(nodes, lo, hi);
      for (int h = 0; h < count; ++h) {
        const Attention<L> head = attend<L>(nodes, heads.slope[h] * graph.tokens[i], lo, hi, nullptr);
        sum += heads.gain[h] * (head.extreme + head.mean);
      }
      o[i] = sum;
      gate[i] = sigmoid(sum).open;
    }
  }
  __syncthreads();
}

// The attention of one head at every node. The backward pass reads it at the neighbours of a node.
template <class A>
struct GraphTape {
  A *extreme, *inverse, *mean;
};

// Computes the gradients of the tokens, and in `sums` (2 * heads) the gradients of the heads' a and b. `flow` is the
// gradient of o.
template <class A, class G>
__device__ void transform_backward(const Problem& p, const Weight& weight, const G& graph, const HeadTable<A>& heads,
                                   const A* flow, const GraphTape<A>& tape, A* scratch, A* token_grad, double* sums) {
  using L = ScalarLane<A>;
  for (int h = 0; h < p.num_heads; ++h) {
    if (h % kHeads == 0) load_heads(p, weight, h, heads);
    const A a = heads.slope[h % kHeads], b = heads.gain[h % kHeads];
    A slope_grad{0}, gain_grad{0};
    for (int64_t i = threadIdx.x; i < graph.nodes(); i += blockDim.x) {
      const auto nodes = graph.at(i);
      const A t = graph.tokens[i], mean_grad = b * flow[i];
      A lo, hi;
      extremes<L>(nodes, lo, hi);
      const Attention<L> head = attend<L>(nodes, a * t, lo, hi, nullptr);
      const A variance = message_variance(nodes, a * t, head);
      tape.extreme[i] = head.extreme;
      tape.inverse[i] = head.inverse;
      tape.mean[i] = head.mean;
      token_grad[i] = (h == 0 ? A{0} : token_grad[i]) + mean_grad * a * variance;
      slope_grad += mean_grad * t * variance;
      gain_grad += flow[i] * (head.extreme + head.mean);
    }
    __syncthreads();
    // The graphs are symmetric: the nodes that attend to j are the neighbours of j. So the sum needs no atomics.
    for (int64_t j = threadIdx.x; j < graph.nodes(); j += blockDim.x) {
      const auto nodes = graph.at(j);
      A sum{0};
      for (int64_t k = 0; k < nodes.count(); ++k) {
        if (!nodes.exists(k)) continue;
        const int64_t i = nodes.node(k);
        const Attention<L> head{tape.extreme[i], tape.inverse[i], tape.mean[i]};
        sum += edge_gradient(graph.tokens[j] - head.extreme, a * graph.tokens[i], b * flow[i], head);
      }
      token_grad[j] += sum;
    }
    slope_grad = sum_block(slope_grad, scratch);
    gain_grad = sum_block(gain_grad, scratch);
    if (threadIdx.x == 0) {
      sums[h] = static_cast<double>(slope_grad);
      sums[p.num_heads + h] = static_cast<double>(gain_grad);
    }
  }
  __syncthreads();
}

// ---------------------------------------------------------------- between maps and tokens

// The order of the numbers of a sample in memory, one for each channel c and place s. A place is a cell or a pixel.
template <bool kChannelsLast>
struct Layout {
  int64_t channels, places;
  __device__ __forceinline__ int64_t at(int64_t c, int64_t s) const {
    return kChannelsLast ? s * channels + c : c * places + s;
  }
};

// The sums over cells in global memory.
template <class A>
struct StoredSums {
  const A* values;
  const A* products;
  __device__ __forceinline__ A value(int64_t e) const { return values[e]; }
  __device__ __forceinline__ A product(int64_t e) const { return products[e]; }
  __device__ StoredSums at(int64_t e) const { return {values ? values + e : nullptr, products + e}; }
};

// Calls out(c, sum of f(c, s) over the places).
template <class A, bool kChannelsLast, class F, class Out>
__device__ void sum_places(const Layout<kChannelsLast>& layout, A* scratch, const F& f, const Out& out) {
  if constexpr (kChannelsLast) {
    sum_columns<A>(layout.places, layout.channels, scratch, [&](int64_t s, int64_t c) { return f(c, s); }, out);
  } else {
    sum_rows<A>(layout.channels, layout.places, f, out);
  }
}
// Calls out(s, sum of f(c, s) over the channels).
template <class A, bool kChannelsLast, class F, class Out>
__device__ void sum_channels(const Layout<kChannelsLast>& layout, A* scratch, const F& f, const Out& out) {
  if constexpr (kChannelsLast) {
    sum_rows<A>(layout.places, layout.channels, [&](int64_t s, int64_t c) { return f(c, s); }, out);
  } else {
    sum_columns<A>(layout.channels, layout.places, scratch, f, out);
  }
}

// Calls out(cell, sum over the pixels of the cell). `pixels` has a number for each pixel.
template <class A, class Out>
__device__ void sum_pixels(const Plan& plan, const A* pixels, const Out& out) {
  const int lanes = 1 << plan.cell_lanes.log2_count, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t groups = blockDim.x >> plan.cell_lanes.log2_count;
  for (int64_t k = threadIdx.x >> plan.cell_lanes.log2_count; k < plan.cells(); k += groups) {
    A sum{0};
    const Cell cell = cell_at(plan.problem, k / plan.problem.grid_w, k % plan.problem.grid_w);
    for_cell(cell, plan.problem.width, 0, plan.pixels(), plan.cell_lanes, lane, [&](int e) { sum += pixels[e]; });
    sum = sum_lanes(sum, plan.cell_lanes.log2_count);
    if (lane == 0) out(k, sum);
  }
}

// C * n_ij, the number of elements in the mean of spatial token k.
template <class A>
__device__ A token_size(const Plan& plan, int64_t k) {
  const Cell cell = cell_at(plan.problem, k / plan.problem.grid_w, k % plan.problem.grid_w);
  return static_cast<A>(plan.problem.channels) * static_cast<A>(cell.size());
}

// ---------------------------------------------------------------- one sample

// The tokens, pre-activations and gates of both branches.
template <class A>
struct Nodes {
  A *z, *o_c, *u, *o_s;  // in the order of a row of `saved`
  A *g_c, *g_s;
};
template <class A>
__device__ Nodes<A> make_nodes(const Plan& plan, A* row, A* gates) {
  const int64_t c = plan.problem.channels, cells = plan.cells();
  return {row, row + c, row + 2 * c, row + 2 * c + cells, gates, gates + c};
}

// Fills `nodes`. `pixel_sums` has a number for each pixel, and is null if the places are cells. `scratch` has a number
// for each thread.
template <class A, bool kChannelsLast, class Source>
__device__ void graph_forward(const Plan& plan, const Source& source, const Layout<kChannelsLast>& layout,
                              const Nodes<A>& nodes, A* pixel_sums, A* scratch, const HeadTable<A>& heads) {
  const Problem& p = plan.problem;
  const A pixels = static_cast<A>(plan.pixels());
  sum_places<A>(
      layout, scratch, [&](int64_t c, int64_t s) { return source.value(layout.at(c, s)); },
      [&](int64_t c, A sum) { nodes.z[c] = sum / pixels; });
  __syncthreads();
  transform(p, plan.channel_weight, Ring<A>{plan, nodes.z}, heads, nodes.o_c, nodes.g_c);
  const auto token = [&](int64_t k, A sum) { nodes.u[k] = sum / token_size<A>(plan, k); };
  sum_channels<A>(
      layout, scratch,
      [&](int64_t c, int64_t s) {
        const A v = source.value(layout.at(c, s));
        return p.sequential ? nodes.g_c[c] * v : v;
      },
      [&](int64_t s, A sum) {
        if (pixel_sums) {
          pixel_sums[s] = sum;
        } else {
          token(s, sum);
        }
      });
  __syncthreads();
  if (pixel_sums) {
    sum_pixels(plan, pixel_sums, token);
    __syncthreads();
  }
  transform(p, plan.spatial_weight, Lattice<A>{plan, nodes.u}, heads, nodes.o_s, nodes.g_s);
}

// The gradients of one sample.
template <class A>
struct Grads {
  A *flow_c, *flow_s;  // (C) and (cells)
  A* dz;               // (C)
  A* share;            // (cells), and the gradients of u before their division
  GraphTape<A> tape;   // three arrays of max(C, cells)
};
template <class A>
STEAM_HD Grads<A> make_grads(const Plan& plan, A* row) {
  const int64_t c = plan.problem.channels, cells = plan.cells(), nodes = larger(c, cells);
  A* tape = row + 2 * (c + cells);
  return {row, row + c, row + c + cells, row + 2 * c + cells, {tape, tape + nodes, tape + 2 * nodes}};
}
STEAM_HD int64_t grads_count(const Plan& plan) {
  return 2 * (plan.problem.channels + plan.cells()) + 3 * larger(plan.problem.channels, plan.cells());
}

// The gate and the share of each pixel, copied from its cell, so that a sum over pixels need not compute the cell of
// each pixel. Before that, `gate` has sums over the channels. Both are null if the places are cells.
template <class A>
struct PerPixel {
  A* gate;
  A* share;
};

// Fills `d`, and computes g_c and g_s again from the pre-activations. `sums` (4 * heads) gets the gradients of the
// heads' a and b, first of the channel branch, then of the spatial branch.
template <class A, bool kChannelsLast, class Source>
__device__ void graph_backward(const Plan& plan, const Source& source, const Layout<kChannelsLast>& layout,
                               const Nodes<A>& nodes, const Grads<A>& d, const PerPixel<A>& per_pixel, A* scratch,
                               const HeadTable<A>& heads, double* sums) {
  const Problem& p = plan.problem;
  const A scale = static_cast<A>(p.scale);
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) nodes.g_c[c] = sigmoid(nodes.o_c[c]).open;
  for (int64_t k = threadIdx.x; k < plan.cells(); k += blockDim.x) nodes.g_s[k] = sigmoid(nodes.o_s[k]).open;
  __syncthreads();

  const auto flow = [&](A sum, A o) {
    const Gate<A> gate = sigmoid(o);
    return sum * gate.open * gate.closed;
  };
  const auto write_flow_s = [&](int64_t k, A sum) { d.flow_s[k] = flow(scale * sum, nodes.o_s[k]); };
  sum_channels<A>(
      layout, scratch, [&](int64_t c, int64_t s) { return nodes.g_c[c] * source.product(layout.at(c, s)); },
      [&](int64_t s, A sum) {
        if (per_pixel.gate) {
          per_pixel.gate[s] = sum;
        } else {
          write_flow_s(s, sum);
        }
      });
  __syncthreads();
  if (per_pixel.gate) {
    sum_pixels(plan, per_pixel.gate, write_flow_s);
    __syncthreads();
  }
  transform_backward(p, plan.spatial_weight, Lattice<A>{plan, nodes.u}, heads, d.flow_s, d.tape, scratch, d.share,
                     sums + 2 * p.num_heads);
  for (int64_t k = threadIdx.x; k < plan.cells(); k += blockDim.x) d.share[k] /= token_size<A>(plan, k);
  __syncthreads();
  if (per_pixel.gate) {
    for_pixels(p, 0, plan.pixels(), [&](int64_t e, int64_t k) {
      per_pixel.gate[e] = nodes.g_s[k];
      per_pixel.share[e] = d.share[k];
    });
    __syncthreads();
  }

  const A* gates = per_pixel.gate ? per_pixel.gate : nodes.g_s;
  const A* shares = per_pixel.gate ? per_pixel.share : d.share;
  sum_places<A>(
      layout, scratch,
      [&](int64_t c, int64_t s) {
        const int64_t e = layout.at(c, s);
        const A through_gates = scale * gates[s] * source.product(e);
        return p.sequential ? through_gates + shares[s] * source.value(e) : through_gates;
      },
      [&](int64_t c, A sum) { d.flow_c[c] = flow(sum, nodes.o_c[c]); });
  __syncthreads();
  transform_backward(p, plan.channel_weight, Ring<A>{plan, nodes.z}, heads, d.flow_c, d.tape, scratch, d.dz, sums);
}

// ---------------------------------------------------------------- the kernels: one block for each sample

// The threads of a block that processes one sample. A float64 needs two registers, so such a block has fewer threads.
template <class A>
constexpr int kSampleThreads = sizeof(A) == 8 ? 256 : 512;

template <class A>
int64_t graph_bytes() {
  return shared_bytes<A>(kSampleThreads<A>) + shared_bytes<A>(2 * kHeads);
}

// values has the sums over cells, or x itself if the cells are pixels. saved is (N, 2 * (C + cells)), and gates is
// (N, C + cells).
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_graph_forward(Plan plan, const T* values, Accumulate<T>* saved, Accumulate<T>* gates) {
  using A = Accumulate<T>;
  SharedMemory shared;
  A* scratch = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const int64_t n = blockIdx.x, nodes = plan.problem.channels + plan.cells();
  const Maps<T> source{values + n * plan.problem.channels * plan.cells(), nullptr, nullptr};
  graph_forward<A>(plan, source, Layout<kChannelsLast>{plan.problem.channels, plan.cells()},
                   make_nodes(plan, saved + n * 2 * nodes, gates + n * nodes), nullptr, scratch, heads);
}

// source has the sums over cells (StoredSums), or x and dy themselves if the cells are pixels (Maps). grads is
// (N, grads_count), and sums is (N, 4 * heads).
template <class Source, class A, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<A>, 1)
    steam_graph_backward(Plan plan, Source source, const A* saved, A* gates, A* grads, double* sums) {
  SharedMemory shared;
  A* scratch = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const int64_t n = blockIdx.x, nodes = plan.problem.channels + plan.cells();
  graph_backward<A>(plan, source.at(n * plan.problem.channels * plan.cells()),
                    Layout<kChannelsLast>{plan.problem.channels, plan.cells()},
                    make_nodes(plan, const_cast<A*>(saved) + n * 2 * nodes, gates + n * nodes),
                    make_grads(plan, grads + n * grads_count(plan)), PerPixel<A>{nullptr, nullptr}, scratch, heads,
                    sums + n * 4 * plan.problem.num_heads);
}

}  // namespace
}  // namespace steam
