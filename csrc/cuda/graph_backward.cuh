// The graph stage on CUDA, backward: from the gradients of the gates to the gradients of the tokens, divided by the
// numbers of their elements, and the gradients of the heads' a and b.
//
// There are three steps, because the gradients of the channel gates depend on those of the spatial tokens in the
// sequential order: the sums over blocks of channels, then the lattice, then the ring. Each is a kernel. If the lattice
// is small and the ring is needed, the blocks of the ring compute it themselves, and it has no launch.
#pragma once

#include "graph.cuh"

namespace steam {
namespace {

// The working memory of the graph stage, backward.
template <class A>
struct GraphBackward {
  const A* saved;     // (N, 2 * (C + cells)), of the forward pass
  A* gates;           // (N, C + cells)
  A* shifts;          // (N, C + cells): the gradients of the tokens, divided by the numbers of their elements
  A* gate_grads;      // (N, C): the part of the gradients of the channel gates that comes from dy * x
  A* partials;        // (N, blocks of channels, cells): the gradients of the cells' gates, over the channels of a block
  A* windows;         // of the blocks of channels; empty if they fit into shared memory
  A* cell_windows;    // of the samples; empty if they fit into shared memory
  double* ring_sums;  // (N, blocks of channels, 2, heads): the gradients of the heads' a and b of the channel branch
  double* lattice_sums;  // (N, 2, heads): of the spatial branch
  // The saved rows are only read.
  __device__ Rows<A> at(const Plan& plan, int64_t n) const {
    return make_rows(plan, const_cast<A*>(saved) + n * 2 * plan.nodes(), gates + n * plan.nodes());
  }
  __device__ A* channel_shifts(const Plan& plan, int64_t n) const { return shifts + n * plan.nodes(); }
  __device__ A* cell_shifts(const Plan& plan, int64_t n) const {
    return channel_shifts(plan, n) + plan.problem.channels;
  }
};

// The gradient of a pre-activation from the gradient of its gate.
template <class A>
__device__ __forceinline__ A flow_of(A gate_grad, A o) {
  const Gate<A> gate = sigmoid(o);
  return gate_grad * gate.open * gate.closed;
}

// ---------------------------------------------------------------- sums over a block of channels

template <class A>
int64_t graph_backward_cells_bytes(const GraphSizes& sizes) {
  return shared_bytes<A>(tile_count<A>(sizes)) + shared_bytes<A>(sizes.channels) + shared_bytes<A>(sizes.cells) +
         shared_bytes<A>(kGraphThreads);
}

// The gradients of the gates, without the factor `scale`: those of the cells over a block of channels, and the part of
// the block's own that comes from dy * x. `sample` has the sums of dy * x over cells, or if the cells are pixels the
// maps themselves. Also writes the gates of the channels.
template <class Of, bool kChannelsLast>
__global__ void __launch_bounds__(kGraphThreads, kGraphBlocks<typename Of::A>)
    steam_graph_backward_cells(Plan plan, GraphSizes sizes, Of batch, GraphBackward<typename Of::A> memory) {
  using A = typename Of::A;
  SharedMemory shared;
  A* tile_memory = shared.take<A>(tile_count<A>(sizes));
  A* channel_gates = shared.take<A>(sizes.channels);
  A* cell_gates = shared.take<A>(sizes.cells);
  A* scratch = shared.take<A>(kGraphThreads);
  const Block block = block_of(plan, sizes);
  const Rows<A> rows = memory.at(plan, block.n);
  const Of sample = batch.at(block.n * plan.problem.channels * plan.cells());
  for (int c = static_cast<int>(threadIdx.x); c < block.own; c += static_cast<int>(blockDim.x)) {
    channel_gates[c] = sigmoid(rows.o_c[block.first + c]).open;
    rows.g_c[block.first + c] = channel_gates[c];
  }
  for_tiles(plan.cells(), sizes, [&](int64_t first, int cells) {
    if (first > 0) __syncthreads();
    const auto tile = load_cells<kChannelsLast>(sample, tile_memory, plan, block, first, cells);
    for (int s = static_cast<int>(threadIdx.x); s < cells; s += static_cast<int>(blockDim.x)) {
      cell_gates[s] = sigmoid(rows.o_s[first + s]).open;
    }
    __syncthreads();
    A* partial = memory.partials + block.index * plan.cells() + first;
    sum_channels<kChannelsLast>(
        block.own, cells, scratch, [&](int c, int s) { return channel_gates[c] * tile(c, s); },
        [&](int s, A sum) { partial[s] = sum; });
    A* gate_grad = memory.gate_grads + block.n * plan.problem.channels + block.first;
    sum_places<kChannelsLast>(
        block.own, cells, scratch, [&](int c, int s) { return cell_gates[s] * tile(c, s); },
        [&](int c, A sum) { gate_grad[c] = first > 0 ? gate_grad[c] + sum : sum; });
  });
}

// ---------------------------------------------------------------- the lattice

// The window of a sample: flows, tokens, their gradients and the tape.
STEAM_HD int64_t lattice_window(const Plan& plan) { return 3 * plan.cells() + tape_count(plan, plan.cells()); }
template <class A>
int64_t lattice_backward_bytes(const Plan& plan) {
  return shared_bytes<A>(kGraphThreads) + shared_bytes<A>(2 * kHeads) + window_bytes<A>(lattice_window(plan));
}

// Calls out(k, gradient of spatial token k, divided by the number of its elements) for the cells of sample n. If
// `is_stored`, it also writes the gates of the cells and the gradients of the heads. `window` has lattice_window
// numbers, and is read until a thread's last call of `out`. The heads from 0 on are in the table after the next
// barrier.
template <class A, class Out>
__device__ void lattice_backward(const Plan& plan, const GraphSizes& sizes, const GraphBackward<A>& memory, int64_t n,
                                 bool is_stored, const HeadTable<A>& heads, A* window, A* scratch, const Out& out) {
  const int64_t cells = plan.cells();
  A *flow = window, *u = flow + cells, *gradients = u + cells;
  const GraphTape<A> tape = make_tape(plan, gradients + cells, cells);
  const Rows<A> rows = memory.at(plan, n);
  const A* partials = memory.partials + n * sizes.blocks * cells;
  const A scale = static_cast<A>(plan.problem.scale);
  sum_columns<A>(
      sizes.blocks, cells, scratch, [&](int64_t b, int64_t k) { return partials[b * cells + k]; },
      [&](int64_t k, A sum) {
        flow[k] = flow_of(scale * sum, rows.o_s[k]);
        u[k] = rows.u[k];
        if (is_stored) rows.g_s[k] = sigmoid(rows.o_s[k]).open;
      });
  __syncthreads();
  const Nodes all{0, cells};
  transform_backward(plan, plan.spatial_weight, Lattice<A>{plan, u}, GradNodes{all, all}, heads, flow, tape, scratch,
                     gradients, is_stored ? memory.lattice_sums + n * 2 * plan.problem.num_heads : nullptr);
  for (int64_t k = threadIdx.x; k < cells; k += blockDim.x) out(k, gradients[k] / token_size<A>(plan, k));
}

// The gates and the shifts of the cells of a sample.
template <class A>
__global__ void __launch_bounds__(kGraphThreads, 1)
    steam_lattice_backward(Plan plan, GraphSizes sizes, GraphBackward<A> memory) {
  SharedMemory shared;
  A* scratch = shared.take<A>(kGraphThreads);
  const HeadTable<A> heads = take_heads<A>(shared);
  A* window = take_window<A>(shared, lattice_window(plan), memory.cell_windows);
  A* shifts = memory.cell_shifts(plan, blockIdx.x);
  load_heads(plan.problem, plan.spatial_weight, 0, heads);
  lattice_backward(plan, sizes, memory, blockIdx.x, true, heads, window, scratch,
                   [&](int64_t k, A shift) { shifts[k] = shift; });
}

// ---------------------------------------------------------------- the ring

// The windows of a block of channels. The transform backward needs the flows of a channel's neighbours and the tokens
// of their neighbours, so the halo has twice the reach. Flows, tokens and tape begin at the same place.
struct RingWindow {
  int64_t halo, places;  // of flows and tokens; the tape has only places of half the halo
  STEAM_HD explicit RingWindow(const GraphSizes& sizes) : halo(2 * sizes.halo), places(sizes.channels + 2 * halo) {}
  STEAM_HD int64_t count(const Plan& plan) const { return 2 * places + tape_count(plan, places - halo); }
};

// Whether the blocks of the ring compute the lattice of their sample, each of them alone, which saves a launch. Each
// wave of blocks repeats the work, so it has a bound: on average, a thread has at most two pairs of a cell and a head,
// and at most 16 partials to add up.
STEAM_HD bool ring_has_lattice(const Plan& plan, const GraphSizes& sizes) {
  return sizes.cells == plan.cells() && plan.cells() * plan.problem.num_heads <= 2 * kGraphThreads &&
         plan.cells() * sizes.blocks <= 16 * kGraphThreads;
}
// The numbers of shared memory for the tile, in whose place the window of the lattice is first.
template <class A>
STEAM_HD int64_t tile_or_lattice(const Plan& plan, const GraphSizes& sizes) {
  return larger(tile_count<A>(sizes), ring_has_lattice(plan, sizes) ? lattice_window(plan) : 0);
}
template <class A>
int64_t graph_backward_ring_bytes(const Plan& plan, const GraphSizes& sizes) {
  return shared_bytes<A>(tile_or_lattice<A>(plan, sizes)) + shared_bytes<A>(sizes.channels) +
         shared_bytes<A>(sizes.cells) + shared_bytes<A>(kGraphThreads) + shared_bytes<A>(2 * kHeads) +
         window_bytes<A>(RingWindow(sizes).count(plan));
}

// The shifts of a block of channels. If ring_has_lattice, the first block of a sample also writes what
// steam_lattice_backward would. values has the sums of x over cells, or x itself if the cells are pixels, and is read
// in the sequential order only.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGraphThreads, kGraphBlocks<Accumulate<T>>)
    steam_graph_backward_ring(Plan plan, GraphSizes sizes, const T* values, GraphBackward<Accumulate<T>> memory) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  SharedMemory shared;
  A* tile_memory = shared.take<A>(tile_or_lattice<A>(plan, sizes));
  A* gradients = shared.take<A>(sizes.channels);
  A* shares = shared.take<A>(sizes.cells);
  A* scratch = shared.take<A>(kGraphThreads);
  const HeadTable<A> heads = take_heads<A>(shared);
  const RingWindow window(sizes);
  A* flow = take_window<A>(shared, window.count(plan), memory.windows);
  A* token = flow + window.places;
  const GraphTape<A> tape = make_tape(plan, token + window.places, window.places - window.halo);
  const Block block = block_of(plan, sizes);
  const Rows<A> rows = memory.at(plan, block.n);
  const A* gate_grads = memory.gate_grads + block.n * p.channels;
  A* cell_shifts = memory.cell_shifts(plan, block.n);
  const A scale = static_cast<A>(p.scale);
  const int64_t halo = window.halo, near = sizes.halo;
  const bool has_lattice = ring_has_lattice(plan, sizes), is_first = block.first == 0;

  if (has_lattice && (p.sequential || is_first)) {
    load_heads(p, plan.spatial_weight, 0, heads);
    lattice_backward(plan, sizes, memory, block.n, is_first, heads, tile_memory, scratch, [&](int64_t k, A shift) {
      shares[k] = shift;
      if (is_first) cell_shifts[k] = shift;
    });
    __syncthreads();
  }
  load_heads(p, plan.channel_weight, 0, heads);
  // Other blocks than the first have the shifts of the lattice that they computed in shared memory alone.
  const auto share = [&](int64_t s) { return has_lattice ? shares[s] : cell_shifts[s]; };
  // The flow of the channel at a place of the window, from the sum of its shares.
  const auto write_flow = [&](int64_t place, A sum) {
    const int64_t c = block.channel(place, halo, p.channels);
    flow[place] = flow_of(scale * gate_grads[c] + sum, rows.o_c[c]);
  };
  if (p.sequential) {
    const Terms<T, false> sample{{values + block.n * p.channels * plan.cells(), nullptr, nullptr}};
    for_tiles(plan.cells(), sizes, [&](int64_t first, int cells) {
      if (first > 0) __syncthreads();
      const auto tile = load_cells<kChannelsLast>(sample, tile_memory, plan, block, first, cells);
      for (int s = static_cast<int>(threadIdx.x); !has_lattice && s < cells; s += static_cast<int>(blockDim.x)) {
        shares[s] = cell_shifts[first + s];
      }
      __syncthreads();
      sum_places<kChannelsLast>(
          block.own, cells, scratch, [&](int c, int s) { return shares[s] * tile(c, s); },
          [&](int c, A sum) { gradients[c] = first > 0 ? gradients[c] + sum : sum; });
    });
    __syncthreads();
    for (int64_t c = threadIdx.x; c < block.own; c += blockDim.x) write_flow(halo + c, gradients[c]);
    sum_halo<kChannelsLast>(
        plan, block, near, scratch, [&](int64_t e, int64_t s) { return share(s) * sample.one(e); },
        [&](int64_t place, A sum) { write_flow(halo - near + place, sum); });
  } else {
    for (int64_t i = threadIdx.x; i < block.own + 2 * near; i += blockDim.x) write_flow(halo - near + i, A{0});
  }
  for (int64_t i = threadIdx.x; i < block.own + 2 * halo; i += blockDim.x) {
    token[i] = rows.z[block.channel(i, halo, p.channels)];
  }
  __syncthreads();
  A* shifts = memory.channel_shifts(plan, block.n) + block.first;
  transform_backward(plan, plan.channel_weight, Ring<A>{token, static_cast<int>(block.own + 2 * halo), plan.ring},
                     GradNodes{{halo, halo + block.own}, {halo - near, halo + block.own + near}}, heads, flow, tape,
                     scratch, gradients, memory.ring_sums + block.index * 2 * p.num_heads);
  for (int64_t c = threadIdx.x; c < block.own; c += blockDim.x)
    shifts[c] = gradients[c] / static_cast<A>(plan.pixels());
}

}  // namespace
}  // namespace steam
