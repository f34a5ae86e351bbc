// The graph stage on CUDA: a block takes one sample from sums over cells (or pixels) to the gates, and back from the
// gates' gradients to the tokens'.
#pragma once

#include "device.cuh"
#include "pool.cuh"

namespace steam {
namespace {

// ---------------------------------------------------------------- the graph transform (math step T)

// Heads whose slopes and gains are in shared memory at a time.
constexpr int kHeads = 16;

template <class A>
struct HeadTable {
  A* slope;
  A* gain;
};
template <class A>
__device__ HeadTable<A> take_heads(SharedMemory& shared) {
  A* room = shared.take<A>(2 * kHeads);
  return {room, room + kHeads};
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

// The neighbourhood of one node, in the form of common/graph.h; `node(k)` is its k-th neighbour.
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
  int32_t present;  // bit k: the neighbour at row k / 3 - 1, column k % 3 - 1 exists
  int64_t columns, self;
  __device__ __forceinline__ int64_t count() const { return 9; }
  __device__ __forceinline__ bool exists(int64_t k) const { return (present >> k & 1) != 0; }
  __device__ __forceinline__ int64_t node(int64_t k) const { return self + (k / 3 - 1) * columns + k % 3 - 1; }
  __device__ __forceinline__ A token(int64_t k) const { return tokens[exists(k) ? node(k) : self]; }
};

template <class A>
struct Ring {
  const Unit& unit;
  const A* tokens;
  __device__ int64_t nodes() const { return unit.p.channels; }
  __device__ RingNodes<A> at(int64_t i) const { return {tokens, unit.ring, unit.p.channels, i}; }
};

template <class A>
struct Lattice {
  const Unit& unit;
  const A* tokens;
  __device__ int64_t nodes() const { return unit.cells(); }
  __device__ LatticeNodes<A> at(int64_t i) const {
    const int64_t r = i / unit.p.grid_w, c = i % unit.p.grid_w;
    int32_t present = unit.lattice;
    if (r == 0) present &= ~0007;
    if (r == unit.p.grid_h - 1) present &= ~0700;
    if (c == 0) present &= ~0111;
    if (c == unit.p.grid_w - 1) present &= ~0444;
    return {tokens, present, unit.p.grid_w, i};
  }
};

template <class A>
struct Gate {
  A open;    // sigmoid(o)
  A closed;  // 1 - sigmoid(o), from the pre-activation
};
template <class A>
__device__ __forceinline__ Gate<A> sigmoid(A o) {
  const A e = std::exp(-std::abs(o)), large = A{1} / (e + 1), small = e * large;
  return o < 0 ? Gate<A>{small, large} : Gate<A>{large, small};
}

// o = T(tokens) and the gates sigmoid(o), by the block's threads.
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

// What the heads' backward pass keeps of each node.
template <class A>
struct GraphTape {
  A *extreme, *inverse, *mean;
};

// From the gradient of o to that of the tokens, and to those of the heads' a and b, which go to `sums` (2 * heads).
template <class A, class G>
__device__ void transform_backward(const Problem& p, const Weight& weight, const G& graph, const HeadTable<A>& heads,
                                   const A* grad, const GraphTape<A>& tape, A* room, A* token_grad, double* sums) {
  using L = ScalarLane<A>;
  for (int h = 0; h < p.num_heads; ++h) {
    if (h % kHeads == 0) load_heads(p, weight, h, heads);
    const A a = heads.slope[h % kHeads], b = heads.gain[h % kHeads];
    A slope_grad{0}, gain_grad{0};
    for (int64_t i = threadIdx.x; i < graph.nodes(); i += blockDim.x) {
      const auto nodes = graph.at(i);
      const A t = graph.tokens[i], mean_grad = b * grad[i];
      A lo, hi;
      extremes<L>(nodes, lo, hi);
      const Attention<L> head = attend<L>(nodes, a * t, lo, hi, nullptr);
      const A variance = message_variance(nodes, a * t, head);
      tape.extreme[i] = head.extreme;
      tape.inverse[i] = head.inverse;
      tape.mean[i] = head.mean;
      token_grad[i] = (h == 0 ? A{0} : token_grad[i]) + mean_grad * a * variance;
      slope_grad += mean_grad * t * variance;
      gain_grad += grad[i] * (head.extreme + head.mean);
    }
    __syncthreads();
    // A gather: the graphs are symmetric, so that those who attend to j are j's own neighbours.
    for (int64_t j = threadIdx.x; j < graph.nodes(); j += blockDim.x) {
      const auto nodes = graph.at(j);
      A sum{0};
      for (int64_t k = 0; k < nodes.count(); ++k) {
        if (!nodes.exists(k)) continue;
        const int64_t i = nodes.node(k);
        const Attention<L> head{tape.extreme[i], tape.inverse[i], tape.mean[i]};
        sum += edge_gradient(graph.tokens[j] - head.extreme, a * graph.tokens[i], b * grad[i], head);
      }
      token_grad[j] += sum;
    }
    slope_grad = sum_block(slope_grad, room);
    gain_grad = sum_block(gain_grad, room);
    if (threadIdx.x == 0) {
      sums[h] = static_cast<double>(slope_grad);
      sums[p.num_heads + h] = static_cast<double>(gain_grad);
    }
  }
  __syncthreads();
}

// ---------------------------------------------------------------- between maps and tokens

// One sample's numbers by channel c and place s, of the memory order's layout. Places are cells, or pixels.
template <bool kChannelsLast>
struct Layout {
  int64_t channels, places;
  __device__ __forceinline__ int64_t at(int64_t c, int64_t s) const {
    return kChannelsLast ? s * channels + c : c * places + s;
  }
};

// Cells' sums from memory.
template <class A>
struct StoredSums {
  const A* values;
  const A* products;
  __device__ __forceinline__ A value(int64_t e) const { return values[e]; }
  __device__ __forceinline__ A product(int64_t e) const { return products[e]; }
  __device__ StoredSums at(int64_t e) const { return {values ? values + e : nullptr, products + e}; }
};

// out(c, sum of f(c, s) over places), and out(s, sum of f(c, s) over channels).
template <class A, bool kChannelsLast, class F, class Out>
__device__ void sum_places(const Layout<kChannelsLast>& layout, A* room, const F& f, const Out& out) {
  if constexpr (kChannelsLast) {
    sum_columns<A>(layout.places, layout.channels, room, [&](int64_t s, int64_t c) { return f(c, s); }, out);
  } else {
    sum_rows<A>(layout.channels, layout.places, f, out);
  }
}
template <class A, bool kChannelsLast, class F, class Out>
__device__ void sum_channels(const Layout<kChannelsLast>& layout, A* room, const F& f, const Out& out) {
  if constexpr (kChannelsLast) {
    sum_rows<A>(layout.places, layout.channels, [&](int64_t s, int64_t c) { return f(c, s); }, out);
  } else {
    sum_columns<A>(layout.channels, layout.places, room, f, out);
  }
}

// out(cell, sum of `map` over it), where `map` holds a number for each pixel.
template <class A, class Out>
__device__ void sum_pixels(const Unit& unit, const A* map, const Out& out) {
  const int lanes = 1 << unit.share.lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t groups = blockDim.x >> unit.share.lanes;
  for (int64_t k = threadIdx.x >> unit.share.lanes; k < unit.cells(); k += groups) {
    A sum{0};
    const Cell cell = cell_at(unit.p, k / unit.p.grid_w, k % unit.p.grid_w);
    for_cell(cell, unit.p.width, 0, unit.pixels(), unit.share, lane, [&](int e) { sum += map[e]; });
    sum = sum_lanes(sum, unit.share.lanes);
    if (lane == 0) out(k, sum);
  }
}

// C n_ij: the numbers that a spatial token is the mean of.
template <class A>
__device__ A token_size(const Unit& unit, int64_t k) {
  const Cell cell = cell_at(unit.p, k / unit.p.grid_w, k % unit.p.grid_w);
  return static_cast<A>(unit.p.channels) * static_cast<A>(cell.size());
}

// ---------------------------------------------------------------- one sample

// Tokens, pre-activations and gates of both branches.
template <class A>
struct Nodes {
  A *z, *o_c, *u, *o_s;  // as a row of `saved`
  A *g_c, *g_s;
};
template <class A>
__device__ Nodes<A> make_nodes(const Unit& unit, A* row, A* gates) {
  const int64_t c = unit.p.channels, cells = unit.cells();
  return {row, row + c, row + 2 * c, row + 2 * c + cells, gates, gates + c};
}

// `map` holds a number for each pixel; null where the places are cells. `room` holds one for each thread.
template <class A, bool kChannelsLast, class Source>
__device__ void graph_forward(const Unit& unit, const Source& source, const Layout<kChannelsLast>& layout,
                              const Nodes<A>& nodes, A* map, A* room, const HeadTable<A>& heads) {
  const Problem& p = unit.p;
  const A pixels = static_cast<A>(unit.pixels());
  sum_places<A>(
      layout, room, [&](int64_t c, int64_t s) { return source.value(layout.at(c, s)); },
      [&](int64_t c, A sum) { nodes.z[c] = sum / pixels; });
  __syncthreads();
  transform(p, unit.channel_weight, Ring<A>{unit, nodes.z}, heads, nodes.o_c, nodes.g_c);
  const auto token = [&](int64_t k, A sum) { nodes.u[k] = sum / token_size<A>(unit, k); };
  sum_channels<A>(
      layout, room,
      [&](int64_t c, int64_t s) {
        const A v = source.value(layout.at(c, s));
        return p.sequential ? nodes.g_c[c] * v : v;
      },
      [&](int64_t s, A sum) {
        if (map) {
          map[s] = sum;
        } else {
          token(s, sum);
        }
      });
  __syncthreads();
  if (map) {
    sum_pixels(unit, map, token);
    __syncthreads();
  }
  transform(p, unit.spatial_weight, Lattice<A>{unit, nodes.u}, heads, nodes.o_s, nodes.g_s);
}

// Working memory of a sample's backward pass.
template <class A>
struct Grads {
  A *channel, *spatial;  // of the gates, then of the pre-activations: C, cells
  A* z;                  // C
  A* share;              // du / (C n_ij), what one pixel's token gradient comes to: cells
  GraphTape<A> tape;     // max(C, cells) each
};
template <class A>
STEAM_HD Grads<A> make_grads(const Unit& unit, A* row) {
  const int64_t c = unit.p.channels, cells = unit.cells(), nodes = larger(c, cells);
  A* tape = row + 2 * (c + cells);
  return {row, row + c, row + c + cells, row + 2 * c + cells, {tape, tape + nodes, tape + 2 * nodes}};
}
STEAM_HD int64_t grads_count(const Unit& unit) {
  return 2 * (unit.p.channels + unit.cells()) + 3 * larger(unit.p.channels, unit.cells());
}

// What the places' gates and shares are read through: straight where places are cells, else spread to pixels.
template <class A>
struct PlaceMaps {
  A* gate;  // null where places are cells; so is share
  A* share;
};

// `sums` receives the gradients of the channel branch's a and b, then of the spatial branch's: 4 * heads. g_c and g_s
// are restored from the pre-activations.
template <class A, bool kChannelsLast, class Source>
__device__ void graph_backward(const Unit& unit, const Source& source, const Layout<kChannelsLast>& layout,
                               const Nodes<A>& nodes, const Grads<A>& d, const PlaceMaps<A>& maps, A* room,
                               const HeadTable<A>& heads, double* sums) {
  const Problem& p = unit.p;
  const A scale = static_cast<A>(p.scale);
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) nodes.g_c[c] = sigmoid(nodes.o_c[c]).open;
  for (int64_t k = threadIdx.x; k < unit.cells(); k += blockDim.x) nodes.g_s[k] = sigmoid(nodes.o_s[k]).open;
  __syncthreads();

  const auto through_gate = [&](A sum, A o) {
    const Gate<A> gate = sigmoid(o);
    return sum * gate.open * gate.closed;
  };
  const auto gate_grad = [&](int64_t k, A sum) { d.spatial[k] = through_gate(scale * sum, nodes.o_s[k]); };
  sum_channels<A>(
      layout, room, [&](int64_t c, int64_t s) { return nodes.g_c[c] * source.product(layout.at(c, s)); },
      [&](int64_t s, A sum) {
        if (maps.gate) {
          maps.gate[s] = sum;
        } else {
          gate_grad(s, sum);
        }
      });
  __syncthreads();
  if (maps.gate) {
    sum_pixels(unit, maps.gate, gate_grad);
    __syncthreads();
  }
  transform_backward(p, unit.spatial_weight, Lattice<A>{unit, nodes.u}, heads, d.spatial, d.tape, room, d.share,
                     sums + 2 * p.num_heads);
  for (int64_t k = threadIdx.x; k < unit.cells(); k += blockDim.x) d.share[k] /= token_size<A>(unit, k);
  __syncthreads();
  if (maps.gate) {
    for_pixels(p, 0, unit.pixels(), [&](int64_t e, int64_t k) {
      maps.gate[e] = nodes.g_s[k];
      maps.share[e] = d.share[k];
    });
    __syncthreads();
  }

  const A* gates = maps.gate ? maps.gate : nodes.g_s;
  const A* shares = maps.gate ? maps.share : d.share;
  sum_places<A>(
      layout, room,
      [&](int64_t c, int64_t s) {
        const int64_t e = layout.at(c, s);
        const A through_gates = scale * gates[s] * source.product(e);
        return p.sequential ? through_gates + shares[s] * source.value(e) : through_gates;
      },
      [&](int64_t c, A sum) { d.channel[c] = through_gate(sum, nodes.o_c[c]); });
  __syncthreads();
  transform_backward(p, unit.channel_weight, Ring<A>{unit, nodes.z}, heads, d.channel, d.tape, room, d.z, sums);
}

// ---------------------------------------------------------------- the kernels: one block a sample

// Threads of the blocks that take a sample each; a float64 fills two registers.
template <class A>
constexpr int kSampleThreads = sizeof(A) == 8 ? 256 : 512;

template <class A>
int64_t graph_bytes() {
  return shared_bytes<A>(kSampleThreads<A>) + shared_bytes<A>(2 * kHeads);
}

// values: a cell's sums, or x itself where cells are pixels. rows: (N, 2 (C + cells)); gates: (N, C + cells).
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_graph_forward(Unit unit, const T* values, Accumulate<T>* rows, Accumulate<T>* gates) {
  using A = Accumulate<T>;
  SharedMemory shared;
  A* room = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const int64_t n = blockIdx.x, nodes = unit.p.channels + unit.cells();
  const Maps<T> source{values + n * unit.p.channels * unit.cells(), nullptr, nullptr};
  graph_forward<A>(unit, source, Layout<kChannelsLast>{unit.p.channels, unit.cells()},
                   make_nodes(unit, rows + n * 2 * nodes, gates + n * nodes), nullptr, room, heads);
}

// source: StoredSums of cells, or Maps where cells are pixels. grads: (N, grads_count); sums: (N, 4 * heads).
template <class Source, class A, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<A>, 1)
    steam_graph_backward(Unit unit, Source source, const A* saved, A* gates, A* grads, double* sums) {
  SharedMemory shared;
  A* room = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const int64_t n = blockIdx.x, nodes = unit.p.channels + unit.cells();
  graph_backward<A>(unit, source.at(n * unit.p.channels * unit.cells()),
                    Layout<kChannelsLast>{unit.p.channels, unit.cells()},
                    make_nodes(unit, const_cast<A*>(saved) + n * 2 * nodes, gates + n * nodes),
                    make_grads(unit, grads + n * grads_count(unit)), PlaceMaps<A>{nullptr, nullptr}, room, heads,
                    sums + n * 4 * unit.p.num_heads);
}

}  // namespace
}  // namespace steam
