// The graph stage on CUDA, forward: from sums over cells to tokens, pre-activations and gates.
//
// A block of steam_graph_forward has some channels of a sample. The tokens of the neighbouring channels, which belong
// to other blocks, it computes itself from the sums of a halo of channels on either side (docs/cuda.md, "Blocks of
// channels, and the halo"). A block of steam_lattice_forward has the cells of a sample.
#pragma once

#include "device.cuh"
#include "pool.cuh"
#include "transform.cuh"

namespace steam {
namespace {

// ---------------------------------------------------------------- between maps and tokens

// The order of the numbers of a sample in memory, one for each channel c and place s. A place is a cell or a pixel.
template <bool kChannelsLast>
struct Layout {
  int64_t channels, places;
  __device__ __forceinline__ int64_t at(int64_t c, int64_t s) const {
    return kChannelsLast ? s * channels + c : c * places + s;
  }
};

// Calls out(c, sum of f(c, s) over the places).
template <bool kChannelsLast, class A, class I, class F, class Out>
__device__ void sum_places(I channels, I places, A* scratch, const F& f, const Out& out) {
  if constexpr (kChannelsLast) {
    sum_columns<A>(places, channels, scratch, [&](I s, I c) { return f(c, s); }, out);
  } else {
    sum_rows<A>(channels, places, f, out);
  }
}
// Calls out(s, sum of f(c, s) over the channels).
template <bool kChannelsLast, class A, class I, class F, class Out>
__device__ void sum_channels(I channels, I places, A* scratch, const F& f, const Out& out) {
  if constexpr (kChannelsLast) {
    sum_rows<A>(places, channels, [&](I s, I c) { return f(c, s); }, out);
  } else {
    sum_columns<A>(channels, places, scratch, f, out);
  }
}

// C * n_ij, the number of elements in the mean of spatial token k.
template <class A>
__device__ A token_size(const Plan& plan, int64_t k) {
  const Cell cell = cell_at(plan.problem, k / plan.problem.grid_w, k % plan.problem.grid_w);
  return static_cast<A>(plan.problem.channels) * static_cast<A>(cell.size());
}

// The numbers of a sample that the graph stage sums: those of `maps.x`, or with kProducts x * dy.
template <class T, bool kProducts>
struct Terms {
  using Stored = T;
  using A = Accumulate<T>;
  static constexpr int kBatch = kProducts ? 2 : 4;  // packs of each map that a thread reads before it uses the first
  Maps<T> maps;
  struct In {
    Pack<T> x, dy, y;
  };
  __device__ Terms at(int64_t e) const { return {maps.at(e)}; }
  __device__ const T* first() const { return maps.x; }
  __device__ bool one_phase() const {
    return !kProducts || (phase(maps.dy) == phase(maps.x) && (!maps.y || phase(maps.y) == phase(maps.x)));
  }
  __device__ __forceinline__ A one(int64_t e) const { return kProducts ? maps.product(e) : maps.value(e); }
  __device__ __forceinline__ In load(int64_t e) const {
    In in;
    in.x = load_pack<kPack<T>>(maps.x + e);
    if constexpr (kProducts) {
      in.dy = load_pack<kPack<T>>(maps.dy + e);
      if (maps.y) in.y = load_pack<kPack<T>>(maps.y + e);
    }
    return in;
  }
  __device__ __forceinline__ A of(const In& in, int l) const {
    const A v = widen(in.x.at[l]);
    if constexpr (!kProducts) return v;
    return v * (maps.y ? Maps<T>::masked(in.dy.at[l], in.y.at[l]) : widen(in.dy.at[l]));
  }
};

// Copies a matrix of terms into shared memory, and returns the beginning of the copy, whose rows have no gaps. `memory`
// has tile_count numbers. `pitch` is the distance between the beginnings of rows. The copy is ready after the next
// barrier.
template <class Of>
__device__ typename Of::A* load_tile(const Of& terms, typename Of::A* memory, int rows, int columns, int64_t pitch) {
  using T = typename Of::Stored;
  using A = typename Of::A;
  constexpr int n = kPack<T>, kBatch = Of::kBatch;
  const int threads = static_cast<int>(blockDim.x), count = rows * columns, begins = phase(terms.first());
  const bool is_run = pitch == columns;
  const bool aligned_rows = begins == 0 && columns % n == 0 && pitch % n == 0;
  // Wide accesses on both sides: the copy of a run has the phase of the run.
  A* tile = memory + (is_run ? begins : 0);
  const Span span = make_span<T>(count, begins, (is_run || aligned_rows) && terms.one_phase());
  const auto from = [&](int e) { return is_run ? e : e / columns * pitch + e % columns; };
  for (int k = static_cast<int>(threadIdx.x); k < span.packs; k += kBatch * threads) {
    typename Of::In in[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (k + b * threads < span.packs) in[b] = terms.load(from(span.head + (k + b * threads) * n));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (k + b * threads >= span.packs) continue;
#pragma unroll
      for (int l = 0; l < n; l += kPack<A>) {
        Pack<A> out;
#pragma unroll
        for (int i = 0; i < kPack<A>; ++i) out.at[i] = terms.of(in[b], l + i);
        *reinterpret_cast<Pack<A>*>(tile + span.head + (k + b * threads) * n + l) = out;
      }
    }
  }
  for_ends<T>(span, [&](int e) { tile[e] = terms.one(from(e)); });
  return tile;
}

// ---------------------------------------------------------------- blocks of channels, and windows of the ring

// The threads of a block of the graph stage.
constexpr int kGraphThreads = 256;
// The blocks of channels that a multiprocessor should run at a time. The compiler limits the registers of a thread for
// it.
template <class A>
constexpr int kGraphBlocks = sizeof(A) == 8 ? 1 : 2;
// The numbers of a block's windows that fit into shared memory. Longer windows are in the workspace.
template <class A>
constexpr int64_t kSharedWindow = 16384 / sizeof(A);

// The sizes of the graph stage's launches. They depend on the shape and the dtype, and not on the number of samples,
// because they decide the order of sums.
struct GraphSizes {
  int32_t channels;  // of a block, a power of two
  int32_t cells;     // of a tile
  int64_t blocks;    // of a sample
  int64_t halo;      // the distance of a channel's farthest neighbour, or 0 if one block has all channels
};

// The numbers of a tile in shared memory: the phase of a run needs up to one pack more.
template <class A>
STEAM_HD int64_t tile_count(const GraphSizes& sizes) {
  return int64_t{sizes.channels} * sizes.cells + kAccessBytes / 2;
}

// The channels [first, first + own) of a sample. A window has the channels of the block in the middle, and a halo of
// channels on both sides: place i of a window is channel first - halo + i of the ring.
struct Block {
  int64_t n, index;  // index: of the block among the blocks of all samples
  int64_t first;
  int own;
  __device__ __forceinline__ int64_t channel(int64_t place, int64_t halo, int64_t channels) const {
    const int64_t c = first - halo + place;
    return c < 0 ? c + channels : c < channels ? c : c - channels;
  }
};
__device__ inline Block block_of(const Plan& plan, const GraphSizes& sizes) {
  const int64_t n = blockIdx.x / sizes.blocks, first = blockIdx.x % sizes.blocks * sizes.channels;
  return {n, blockIdx.x, first, static_cast<int>(smaller<int64_t>(sizes.channels, plan.problem.channels - first))};
}

// `count` numbers of shared memory if they fit there, else the numbers of this block in the workspace.
template <class A>
__device__ A* take_window(SharedMemory& shared, int64_t count, A* windows) {
  return count <= kSharedWindow<A> ? shared.take<A>(count) : windows + blockIdx.x * count;
}
// The shared memory of a block for its window, and the numbers of the workspace for the windows of all blocks.
template <class A>
int64_t window_bytes(int64_t count) {
  return count <= kSharedWindow<A> ? shared_bytes<A>(count) : 0;
}
template <class A>
int64_t windows_count(int64_t count, int64_t blocks) {
  return count <= kSharedWindow<A> ? 0 : blocks * count;
}

// Calls f(first cell, cells) for the tiles of cells of a sample, in order.
template <class F>
__device__ void for_tiles(int64_t cells, const GraphSizes& sizes, const F& f) {
  for (int64_t first = 0; first < cells; first += sizes.cells) {
    f(first, static_cast<int>(smaller<int64_t>(sizes.cells, cells - first)));
  }
}

// A matrix of channels and cells in shared memory.
template <class T, bool kChannelsLast>
struct Tile {
  const T* numbers;
  int channels, cells;
  __device__ __forceinline__ Accumulate<T> operator()(int c, int s) const {
    return widen(numbers[kChannelsLast ? s * channels + c : c * cells + s]);
  }
};
template <bool kChannelsLast, class Of>
__device__ Tile<typename Of::A, kChannelsLast> load_cells(const Of& sample, typename Of::A* memory, const Plan& plan,
                                                          const Block& block, int64_t first_cell, int cells) {
  const Layout<kChannelsLast> layout{plan.problem.channels, plan.cells()};
  const Of terms = sample.at(layout.at(block.first, first_cell));
  return {kChannelsLast ? load_tile(terms, memory, cells, block.own, layout.channels)
                        : load_tile(terms, memory, block.own, cells, layout.places),
          block.own, cells};
}

// Calls out(place, sum of f(e, s) over the cells) for the 2 * halo channels beside a block, by their places in a window
// with this halo. e is the offset of cell s in the sample.
template <bool kChannelsLast, class A, class F, class Out>
__device__ void sum_halo(const Plan& plan, const Block& block, int64_t halo, A* scratch, const F& f, const Out& out) {
  const Layout<kChannelsLast> layout{plan.problem.channels, plan.cells()};
  if (halo == 0) return;
  const auto place = [&](int64_t h) { return h < halo ? h : h + block.own; };
  sum_places<kChannelsLast>(
      2 * halo, layout.places, scratch,
      [&](int64_t h, int64_t s) { return f(layout.at(block.channel(place(h), halo, layout.channels), s), s); },
      [&](int64_t h, A sum) { out(place(h), sum); });
}

// ---------------------------------------------------------------- one sample

// The tokens and pre-activations of a sample, in the order of a row of `saved`, and its gates.
template <class A>
struct Rows {
  A *z, *o_c, *u, *o_s;
  A *g_c, *g_s;
};
template <class A>
__device__ Rows<A> make_rows(const Plan& plan, A* row, A* gates) {
  const int64_t c = plan.problem.channels, cells = plan.cells();
  return {row, row + c, row + 2 * c, row + 2 * c + cells, gates, gates + c};
}

// o_s and the gates of the cells from the spatial tokens, after a barrier.
template <class A>
__device__ void lattice_gates(const Plan& plan, const Rows<A>& rows, const A* u, const HeadTable<A>& heads) {
  transform(plan, plan.spatial_weight, Lattice<A>{plan, u}, Nodes{0, plan.cells()}, heads, rows.o_s,
            [&](int64_t k, A gate) { rows.g_s[k] = gate; });
}

// ---------------------------------------------------------------- the kernels

// The working memory of the graph stage, forward.
template <class A>
struct GraphForward {
  A* saved;     // (N, 2 * (C + cells))
  A* gates;     // (N, C + cells)
  A* windows;   // a window for each block of channels; empty if the windows fit into shared memory
  A* partials;  // (N, blocks of channels, cells): the terms of u, added up over the channels of a block
  __device__ Rows<A> at(const Plan& plan, int64_t n) const {
    return make_rows(plan, saved + n * 2 * plan.nodes(), gates + n * plan.nodes());
  }
};

STEAM_HD int64_t forward_window(const GraphSizes& sizes) { return sizes.channels + 2 * sizes.halo; }
template <class A>
int64_t graph_forward_bytes(const GraphSizes& sizes) {
  return shared_bytes<A>(tile_count<A>(sizes)) + shared_bytes<A>(sizes.channels) + shared_bytes<A>(kGraphThreads) +
         shared_bytes<A>(2 * kHeads) + window_bytes<A>(forward_window(sizes));
}

// z, o_c and g_c of a block of channels, and its terms of u. values has the sums over cells, or x itself if the cells
// are pixels.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGraphThreads, kGraphBlocks<Accumulate<T>>)
    steam_graph_forward(Plan plan, GraphSizes sizes, const T* values, GraphForward<Accumulate<T>> memory) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  SharedMemory shared;
  A* tile_memory = shared.take<A>(tile_count<A>(sizes));
  A* gates = shared.take<A>(sizes.channels);
  A* scratch = shared.take<A>(kGraphThreads);
  const HeadTable<A> heads = take_heads<A>(shared);
  A* window = take_window<A>(shared, forward_window(sizes), memory.windows);
  const Block block = block_of(plan, sizes);
  const Rows<A> rows = memory.at(plan, block.n);
  const Terms<T, false> sample{{values + block.n * p.channels * plan.cells(), nullptr, nullptr}};
  const A pixels = static_cast<A>(plan.pixels());

  load_heads(p, plan.channel_weight, 0, heads);
  Tile<A, kChannelsLast> tile{};
  for_tiles(plan.cells(), sizes, [&](int64_t first, int cells) {
    if (first > 0) __syncthreads();
    tile = load_cells<kChannelsLast>(sample, tile_memory, plan, block, first, cells);
    __syncthreads();
    sum_places<kChannelsLast>(block.own, cells, scratch, tile, [&](int c, A sum) {
      A* z = window + sizes.halo + c;
      *z = first > 0 ? *z + sum : sum;
    });
  });
  sum_halo<kChannelsLast>(
      plan, block, sizes.halo, scratch, [&](int64_t e, int64_t) { return sample.one(e); },
      [&](int64_t place, A sum) { window[place] = sum; });
  __syncthreads();
  for (int64_t i = threadIdx.x; i < block.own + 2 * sizes.halo; i += blockDim.x) {
    const A z = window[i] / pixels;
    window[i] = z;
    if (i >= sizes.halo && i < sizes.halo + block.own) rows.z[block.first + i - sizes.halo] = z;
  }
  __syncthreads();
  transform(plan, plan.channel_weight, Ring<A>{window, static_cast<int>(block.own + 2 * sizes.halo), plan.ring},
            Nodes{sizes.halo, sizes.halo + block.own}, heads, rows.o_c + block.first, [&](int64_t c, A gate) {
              gates[c] = gate;
              rows.g_c[block.first + c] = gate;
            });
  __syncthreads();
  for_tiles(plan.cells(), sizes, [&](int64_t first, int cells) {
    // The first read left the last tile in shared memory, which is the only one for at most `sizes.cells` cells.
    if (plan.cells() > sizes.cells) {
      if (first > 0) __syncthreads();
      tile = load_cells<kChannelsLast>(sample, tile_memory, plan, block, first, cells);
      __syncthreads();
    }
    A* partial = memory.partials + block.index * plan.cells() + first;
    sum_channels<kChannelsLast>(
        block.own, cells, scratch, [&](int c, int s) { return p.sequential ? gates[c] * tile(c, s) : tile(c, s); },
        [&](int s, A sum) { partial[s] = sum; });
  });
}

template <class A>
int64_t lattice_forward_bytes(const Plan& plan) {
  return shared_bytes<A>(kGraphThreads) + shared_bytes<A>(2 * kHeads) + window_bytes<A>(plan.cells());
}

// u, o_s and g_s of a sample, from the terms of its blocks of channels.
template <class A>
__global__ void __launch_bounds__(kGraphThreads, 1)
    steam_lattice_forward(Plan plan, GraphSizes sizes, GraphForward<A> memory) {
  SharedMemory shared;
  A* scratch = shared.take<A>(kGraphThreads);
  const HeadTable<A> heads = take_heads<A>(shared);
  const int64_t n = blockIdx.x, cells = plan.cells();
  const Rows<A> rows = memory.at(plan, n);
  A* u = cells <= kSharedWindow<A> ? shared.take<A>(cells) : rows.u;
  const A* partials = memory.partials + n * sizes.blocks * cells;
  load_heads(plan.problem, plan.spatial_weight, 0, heads);
  sum_columns<A>(
      sizes.blocks, cells, scratch, [&](int64_t b, int64_t k) { return partials[b * cells + k]; },
      [&](int64_t k, A sum) {
        u[k] = sum / token_size<A>(plan, k);
        rows.u[k] = u[k];
      });
  __syncthreads();
  lattice_gates(plan, rows, u, heads);
}

}  // namespace
}  // namespace steam
