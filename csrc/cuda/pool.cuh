// The pool stage on CUDA: sums of x over cells, and backward also of dy * x. There is one block per (sample, slice).
//
// In NCHW, if the rows of cells are whole packs, a slice is some cells of some channels, and each cell has a few lanes,
// which read its packs straight into registers. Else a slice is some channels. The block copies them to shared memory
// as one run, so that its accesses are wide for any width of a row. In channels_last a slice is some pairs of a cell
// and a vector of channels, and the threads read the pixels straight into registers.
#pragma once

#include "device.cuh"

namespace steam {
namespace {

// The maps of one sample, with equal strides. `upstream` is dy, masked by the ReLU whose output is y. Without a ReLU y
// is null.
template <class T>
struct Maps {
  const T* x;
  const T* dy;
  const T* y;
  __device__ __forceinline__ Accumulate<T> value(int64_t e) const { return widen(x[e]); }
  __device__ __forceinline__ Accumulate<T> upstream(int64_t e) const { return y ? masked(dy[e], y[e]) : widen(dy[e]); }
  __device__ __forceinline__ Accumulate<T> product(int64_t e) const { return value(e) * upstream(e); }
  // A NaN in y lets the gradient through, as in PyTorch's ReLU.
  static __device__ __forceinline__ Accumulate<T> masked(T g, T out) {
    return widen(out) <= 0 ? Accumulate<T>{0} : widen(g);
  }
  __device__ Maps at(int64_t e) const { return {x + e, dy ? dy + e : nullptr, y ? y + e : nullptr}; }
};

// The sizes of the pool's launch.
struct PoolSizes {
  int64_t slices;            // slices of a sample
  int32_t channels;          // NCHW: channels of a slice
  int32_t tile;              // NCHW: elements in shared memory at a time, of whole channels or of one channel; 0: none
  int32_t log2_lanes;        // NCHW without a tile: 2^log2_lanes lanes sum one cell
  int32_t width;             // elements of one access to maps, if there is no tile
  int32_t threads_per_cell;  // channels_last: threads that sum one cell for the same channels
};

// ---------------------------------------------------------------- packs of a cell

// The offsets of every step-th pack of a cell, from pack `first` on. The packs are in rows of `across`, with
// `row_pitch` elements between the beginnings of rows and `pitch` elements between the beginnings of packs.
class CellOffsets {
 public:
  __device__ CellOffsets(int64_t at, int across, int64_t row_pitch, int64_t pitch, int first, int step)
      : across_(across), column_step_(step % across), column_(first % across) {
    at_ = at + first / across * row_pitch + column_ * pitch;
    step_ = step / across * row_pitch + column_step_ * pitch;
    wrap_ = row_pitch - across * pitch;
  }
  __device__ __forceinline__ int64_t next() {
    const int64_t at = at_;
    column_ += column_step_;
    at_ += step_;
    if (column_ >= across_) {
      column_ -= across_;
      at_ += wrap_;
    }
    return at;
  }

 private:
  int across_, column_step_, column_;
  int64_t at_, step_, wrap_;
};

// n elements at any address.
template <int n, class T>
__device__ __forceinline__ Pack<T, n> load_elements(const T* p) {
  Pack<T, n> v;
#pragma unroll
  for (int l = 0; l < n; ++l) v.at[l] = p[l];
  return v;
}

// Adds up packs `first`, `first` + step, ... of the `size` packs of a cell: the l-th elements in sum[l], and if
// kProducts the products in dot[l]. If the maps are not aligned, a pack is several accesses, and the sums are the same.
template <class T, int kWidth, bool kProducts>
__device__ void sum_packs(const Maps<T>& maps, CellOffsets offsets, bool aligned, int64_t first, int64_t size, int step,
                          Accumulate<T>* sum, Accumulate<T>* dot) {
  using A = Accumulate<T>;
  constexpr int kBatch = kProducts ? 2 : 4;
  for (int64_t e = first; e < size;) {
    const int64_t stop = smaller<int64_t>(size, e + kTermsPerPartial * step);
    A partial[kWidth] = {}, partial_dot[kWidth] = {};
    for (; e < stop; e += kBatch * step) {
      Pack<T, kWidth> x[kBatch], dy[kBatch], y[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t at = offsets.next();
        if (e + b * step >= stop) continue;
        const auto load = [&](const T* map) {
          return aligned ? load_pack<kWidth>(map + at) : load_elements<kWidth>(map + at);
        };
        x[b] = load(maps.x);
        if (kProducts) dy[b] = load(maps.dy);
        if (kProducts && maps.y) y[b] = load(maps.y);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (e + b * step >= stop) continue;
#pragma unroll
        for (int l = 0; l < kWidth; ++l) {
          const A v = widen(x[b].at[l]);
          partial[l] += v;
          if (kProducts) partial_dot[l] += v * (maps.y ? Maps<T>::masked(dy[b].at[l], y[b].at[l]) : widen(dy[b].at[l]));
        }
      }
    }
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      sum[l] += partial[l];
      dot[l] += partial_dot[l];
    }
  }
}

// ---------------------------------------------------------------- NCHW

// Copies a run into `memory`, which has shared_copy_size(count) elements, and returns the beginning of the copy. The
// copy has the phase of the run, so that both sides of the copy have wide accesses.
template <class T>
__device__ T* shared_copy(T* memory, const T* from, int count) {
  constexpr int kBatch = 4;
  T* to = memory + phase(from);
  const Span span = make_span<T>(count, phase(from), true);
  const int threads = static_cast<int>(blockDim.x);
  const int4* source = reinterpret_cast<const int4*>(from + span.head);
  int4* packs = reinterpret_cast<int4*>(to + span.head);
  for (int k = static_cast<int>(threadIdx.x); k < span.packs; k += kBatch * threads) {
    int4 v[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (k + b * threads < span.packs) v[b] = source[k + b * threads];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (k + b * threads < span.packs) packs[k + b * threads] = v[b];
    }
  }
  for_ends<T>(span, [&](int e) { to[e] = from[e]; });
  return to;
}

// Like shared_copy, for dy, masked by the ReLU whose output is y. Without a ReLU y is null.
template <class T>
__device__ T* shared_masked_copy(T* memory, const T* dy, const T* y, int count) {
  if (y == nullptr) return shared_copy(memory, dy, count);
  const auto mask = [](T g, T out) {
    T kept;
    narrow(Maps<T>::masked(g, out), kept);
    return kept;
  };
  T* to = memory + phase(dy);
  const Span span = make_span<T>(count, phase(dy), phase(dy) == phase(y));
  for (int k = static_cast<int>(threadIdx.x); k < span.packs; k += static_cast<int>(blockDim.x)) {
    const int e = span.head + k * kPack<T>;
    const Pack<T> g = load_pack<kPack<T>>(dy + e), out = load_pack<kPack<T>>(y + e);
    Pack<T> kept;
#pragma unroll
    for (int b = 0; b < kPack<T>; ++b) kept.at[b] = mask(g.at[b], out.at[b]);
    *reinterpret_cast<Pack<T>*>(to + e) = kept;
  }
  for_ends<T>(span, [&](int e) { to[e] = mask(dy[e], y[e]); });
  return to;
}

// The elements of shared memory for the copy of a run of `count` elements: the phase needs up to one pack more.
template <class T>
STEAM_HD int64_t shared_copy_size(int64_t count) {
  return count + kPack<T>;
}

// Calls f(pixel - begin) for the pixels of a cell that are in [begin, end) and belong to this lane.
template <class F>
__device__ __forceinline__ void for_cell(const Cell& cell, int64_t width, int64_t begin, int64_t end, CellLanes lanes,
                                         int lane, const F& f) {
  const int columns = 1 << lanes.log2_columns, rows = 1 << (lanes.log2_count - lanes.log2_columns);
  const int64_t r0 = larger(cell.r0, begin / width), r1 = smaller(cell.r1, ceil_div(end, width));
  for (int64_t r = r0 + (lane >> lanes.log2_columns); r < r1; r += rows) {
    const int64_t row = r * width - begin;
    const int q0 = static_cast<int>(larger(cell.q0, -row)), q1 = static_cast<int>(smaller(cell.q1, end - begin - row));
    for (int q = q0 + (lane & (columns - 1)); q < q1; q += columns) f(static_cast<int>(row) + q);
  }
}

// Adds the pixels [begin, end) of each of `channels` channels to the sums of their cells. The tile with the first pixel
// of a cell sets the sum of the cell. `products` may be null, and `values` may be null if `products` is not.
template <class A, class Value, class Product>
__device__ void sum_cells(const Plan& plan, int64_t begin, int64_t end, int64_t channels, const Value& value,
                          const Product& product, A* values, A* products) {
  const Problem& p = plan.problem;
  const int lanes = 1 << plan.cell_lanes.log2_count, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int groups = static_cast<int>(blockDim.x) >> plan.cell_lanes.log2_count;
  const int group = static_cast<int>(threadIdx.x) >> plan.cell_lanes.log2_count;
  const int64_t i0 = begin / p.width * p.grid_h / p.height, i1 = (end - 1) / p.width * p.grid_h / p.height;
  const int64_t cells = (i1 - i0 + 1) * p.grid_w;
  const int cells_at_once = static_cast<int>(smaller<int64_t>(cells, groups));
  const int channels_at_once = groups / cells_at_once;
  if (group >= cells_at_once * channels_at_once) return;
  for (int64_t k = group % cells_at_once; k < cells; k += cells_at_once) {
    const int64_t i = i0 + k / p.grid_w, j = k % p.grid_w;
    const Cell cell = cell_at(p, i, j);
    const int64_t first = cell.r0 * p.width + cell.q0;
    if (first >= end) continue;
    for (int64_t c = group / cells_at_once; c < channels; c += channels_at_once) {
      A sum{0}, dot{0};
      for_cell(cell, p.width, begin, end, plan.cell_lanes, lane, [&](int e) {
        if (values) sum += value(c, e);
        if (products) dot += product(c, e);
      });
      sum = sum_lanes(sum, plan.cell_lanes.log2_count);
      dot = sum_lanes(dot, plan.cell_lanes.log2_count);
      if (lane != 0) continue;
      const int64_t at = c * plan.cells() + i * p.grid_w + j;
      if (values) values[at] = first >= begin ? sum : values[at] + sum;
      if (products) products[at] = first >= begin ? dot : products[at] + dot;
    }
  }
}

// The sum of n numbers, by pairs.
template <int n, class A>
__device__ __forceinline__ A sum_pairs(A* v) {
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2) {
#pragma unroll
    for (int l = 0; l < half; ++l) v[l] += v[l + half];
  }
  return v[0];
}

// The rows of cells are whole packs. A group of lanes sums a cell of one channel, and neighbouring groups sum
// neighbouring cells of a row, then the next rows of cells, then the next channels.
template <class T, bool kProducts>
__device__ void pool_cells(const Plan& plan, const PoolSizes& sizes, const Maps<T>& batch, Accumulate<T>* values,
                           Accumulate<T>* products) {
  using A = Accumulate<T>;
  constexpr int n = kPack<T>;
  const Problem& p = plan.problem;
  const int t = static_cast<int>(threadIdx.x), lanes = 1 << sizes.log2_lanes, lane = t & (lanes - 1);
  // The sizes are so small here that 32 bits are enough.
  const unsigned grid_h = static_cast<unsigned>(p.grid_h), grid_w = static_cast<unsigned>(p.grid_w);
  const unsigned tasks = static_cast<unsigned>(p.channels) * grid_h * grid_w;
  const unsigned slice = blockIdx.x % static_cast<unsigned>(sizes.slices);
  const int64_t sample = blockIdx.x / static_cast<unsigned>(sizes.slices);
  const unsigned task = (slice * blockDim.x + threadIdx.x) >> sizes.log2_lanes;
  if (task >= tasks) return;
  const unsigned j = task % grid_w, i = task / grid_w % grid_h, c = task / grid_w / grid_h;
  const unsigned height = static_cast<unsigned>(p.height);
  const unsigned r0 = (i * height + grid_h - 1) / grid_h, r1 = ((i + 1) * height + grid_h - 1) / grid_h;
  const int across = static_cast<int>(static_cast<unsigned>(p.width) / grid_w / n);
  const CellOffsets offsets((c * p.height + r0) * p.width + int64_t{j} * across * n, across, p.width, n, lane, lanes);
  A sum[n] = {}, dot[n] = {};
  sum_packs<T, n, kProducts>(batch.at(sample * plan.sample_size()), offsets, sizes.width == n, lane,
                             int64_t{r1 - r0} * across, lanes, sum, dot);
  const A value = sum_lanes(sum_pairs<n>(sum), sizes.log2_lanes);
  const A product = kProducts ? sum_lanes(sum_pairs<n>(dot), sizes.log2_lanes) : A{0};
  if (lane != 0) return;
  const int64_t out = sample * tasks + task;
  if (values) values[out] = value;
  if (kProducts) products[out] = product;
}

template <class T, bool kProducts>
__device__ void pool_nchw(const Plan& plan, const PoolSizes& sizes, const Maps<T>& batch, Accumulate<T>* values,
                          Accumulate<T>* products) {
  using A = Accumulate<T>;
  SharedMemory shared;
  T* x_memory = shared.take<T>(shared_copy_size<T>(sizes.tile));
  T* dy_memory = kProducts ? shared.take<T>(shared_copy_size<T>(sizes.tile)) : nullptr;
  const int64_t pixels = plan.pixels(), n = blockIdx.x / sizes.slices;
  const int64_t c0 = blockIdx.x % sizes.slices * sizes.channels;
  const int64_t channels = smaller<int64_t>(sizes.channels, plan.problem.channels - c0);
  const Maps<T> maps = batch.at((n * plan.problem.channels + c0) * pixels);
  const int64_t out = (n * plan.problem.channels + c0) * plan.cells();
  const bool whole_channels = pixels <= sizes.tile;
  for (int64_t begin = 0; begin < channels * pixels; begin += sizes.tile) {
    const int count = static_cast<int>(smaller<int64_t>(sizes.tile, channels * pixels - begin));
    if (begin > 0) __syncthreads();
    const T* x = shared_copy(x_memory, maps.x + begin, count);
    const T* dy = nullptr;
    if constexpr (kProducts) {
      dy = shared_masked_copy(dy_memory, maps.dy + begin, maps.y ? maps.y + begin : nullptr, count);
    }
    __syncthreads();
    const int step = whole_channels ? static_cast<int>(pixels) : 0;
    const auto value = [&](int64_t c, int e) { return widen(x[static_cast<int>(c) * step + e]); };
    const auto product = [&](int64_t c, int e) {
      const int at = static_cast<int>(c) * step + e;
      return widen(x[at]) * widen(dy[at]);
    };
    sum_cells<A>(plan, whole_channels ? 0 : begin, whole_channels ? pixels : begin + count, channels, value, product,
                 values ? values + out : nullptr, kProducts ? products + out : nullptr);
  }
}

template <class T, bool kProducts>
int64_t pool_nchw_bytes(const PoolSizes& sizes) {
  return sizes.tile == 0 ? 0 : (kProducts ? 2 : 1) * shared_bytes<T>(shared_copy_size<T>(sizes.tile));
}

// ---------------------------------------------------------------- channels_last

template <class T, int kWidth, bool kProducts>
__device__ void pool_channels_last(const Plan& plan, const PoolSizes& sizes, const Maps<T>& batch,
                                   Accumulate<T>* values, Accumulate<T>* products) {
  using A = Accumulate<T>;
  // A task is one cell and one vector of channels. Neighbouring threads have neighbouring tasks. If several threads sum
  // a cell, each thread reads every threads_per_cell-th pixel, from pixel `first` on.
  const int tasks = static_cast<int>(blockDim.x) / sizes.threads_per_cell, t = static_cast<int>(threadIdx.x);
  const int first = t / tasks;
  const int64_t vectors = plan.problem.channels / kWidth, n = blockIdx.x / sizes.slices;
  const int64_t task = blockIdx.x % sizes.slices * tasks + t % tasks;
  const bool active = task < plan.cells() * vectors;
  const int64_t k = active ? task / vectors : 0, c = active ? task % vectors * kWidth : 0;
  const Cell cell = cell_at(plan.problem, k / plan.problem.grid_w, k % plan.problem.grid_w);
  const Maps<T> maps = batch.at(n * plan.sample_size() + c);
  A sum[kWidth] = {}, dot[kWidth] = {};
  const int64_t channels = plan.problem.channels, row_pitch = plan.problem.width * channels;
  const CellOffsets offsets(cell.r0 * row_pitch + cell.q0 * channels, static_cast<int>(cell.q1 - cell.q0), row_pitch,
                            channels, first, sizes.threads_per_cell);
  sum_packs<T, kWidth, kProducts>(maps, offsets, true, first, active ? cell.size() : 0, sizes.threads_per_cell, sum,
                                  dot);
  if (sizes.threads_per_cell > 1) {
    SharedMemory shared;
    A* scratch = shared.take<A>(2 * kWidth * static_cast<int64_t>(blockDim.x));
    A* mine = scratch + 2 * kWidth * t;
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      mine[l] = sum[l];
      mine[kWidth + l] = dot[l];
    }
    __syncthreads();
    if (first == 0) {
      for (int s = 1; s < sizes.threads_per_cell; ++s) {
        const A* other = mine + 2 * kWidth * s * tasks;
#pragma unroll
        for (int l = 0; l < kWidth; ++l) {
          sum[l] += other[l];
          dot[l] += other[kWidth + l];
        }
      }
    }
  }
  if (!active || first != 0) return;
  const int64_t out = (n * plan.cells() + k) * plan.problem.channels + c;
  const auto write = [&](A* to, const A* sums) {
    if constexpr (kWidth == 1) {
      *to = *sums;
    } else {
#pragma unroll
      for (int l = 0; l < kWidth; l += kPack<A>) {
        Pack<A> v;
#pragma unroll
        for (int e = 0; e < kPack<A>; ++e) v.at[e] = sums[l + e];
        store_pack(to + l, v);
      }
    }
  };
  if (values) write(values + out, sum);
  if (kProducts) write(products + out, dot);
}

template <class T>
int64_t pool_channels_last_bytes(const PoolSizes& sizes, int threads) {
  return sizes.threads_per_cell > 1 ? shared_bytes<Accumulate<T>>(int64_t{2} * sizes.width * threads) : 0;
}

// ---------------------------------------------------------------- the kernel

constexpr int kPoolThreads = 256;

// values and products have the shape (N, C, cells) in NCHW, and (N, cells, C) in channels_last. values may be null.
template <class T, bool kChannelsLast, bool kProducts>
__global__ void __launch_bounds__(kPoolThreads, 2)
    steam_pool(Plan plan, PoolSizes sizes, Maps<T> batch, Accumulate<T>* values, Accumulate<T>* products) {
  if constexpr (!kChannelsLast) {
    if (sizes.tile == 0) return pool_cells<T, kProducts>(plan, sizes, batch, values, products);
    pool_nchw<T, kProducts>(plan, sizes, batch, values, products);
  } else if (sizes.width == 1) {
    pool_channels_last<T, 1, kProducts>(plan, sizes, batch, values, products);
  } else {
    pool_channels_last<T, kPack<T>, kProducts>(plan, sizes, batch, values, products);
  }
}

}  // namespace
}  // namespace steam
