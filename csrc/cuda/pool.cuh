// The pool stage on CUDA: sums of x (and of dy * x, backwards) over cells, one block per (sample, slice).
//
// A slice is some channels in NCHW, whose map goes through shared memory in one contiguous piece, so that accesses are
// wide whatever the width of a row is; in channels_last it is some (cell, channels) pairs, read straight into
// registers.
#pragma once

#include "device.cuh"

namespace steam {
namespace {

// One sample's maps, of equal layout. dy is masked by the ReLU whose output y is; y is null where there is none.
template <class T>
struct Maps {
  const T* x;
  const T* dy;
  const T* y;
  __device__ __forceinline__ Accumulate<T> value(int64_t e) const { return widen(x[e]); }
  __device__ __forceinline__ Accumulate<T> upstream(int64_t e) const { return y ? masked(dy[e], y[e]) : widen(dy[e]); }
  __device__ __forceinline__ Accumulate<T> product(int64_t e) const { return value(e) * upstream(e); }
  // As PyTorch's: a NaN in y lets the gradient through.
  static __device__ __forceinline__ Accumulate<T> masked(T g, T out) {
    return widen(out) <= 0 ? Accumulate<T>{0} : widen(g);
  }
  __device__ Maps at(int64_t e) const { return {x + e, dy ? dy + e : nullptr, y ? y + e : nullptr}; }
};

struct PoolPlan {
  int64_t slices;    // blocks a sample
  int32_t channels;  // NCHW: channels of a slice
  int32_t tile;      // NCHW: elements in shared memory at a time, whole channels or a part of one
  int32_t width;     // channels_last: channels of one access
  int32_t share;     // channels_last: threads that share a cell's pixels
};

// ---------------------------------------------------------------- NCHW

// Copies a run into `room`, which has space for one pack more, at the run's own phase; returns where it begins.
template <class T>
__device__ T* stage(T* room, const T* from, int count) {
  constexpr int kBatch = 4;
  T* to = room + phase(from);
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

// The same for dy, masked by y where there is one.
template <class T>
__device__ T* stage_masked(T* room, const T* dy, const T* y, int count) {
  if (y == nullptr) return stage(room, dy, count);
  const auto mask = [](T g, T out) {
    T kept;
    narrow(Maps<T>::masked(g, out), kept);
    return kept;
  };
  T* to = room + phase(dy);
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

// Elements in `room` for a run of `count`.
template <class T>
STEAM_HD int64_t stage_room(int64_t count) {
  return count + kPack<T>;
}

// f(pixel - begin) for those of a cell's pixels in [begin, end) that are this lane's.
template <class F>
__device__ __forceinline__ void for_cell(const Cell& cell, int64_t width, int64_t begin, int64_t end, CellShare share,
                                         int lane, const F& f) {
  const int columns = 1 << share.columns, rows = 1 << (share.lanes - share.columns);
  const int64_t r0 = larger(cell.r0, begin / width), r1 = smaller(cell.r1, ceil_div(end, width));
  for (int64_t r = r0 + (lane >> share.columns); r < r1; r += rows) {
    const int64_t row = r * width - begin;
    const int q0 = static_cast<int>(larger(cell.q0, -row)), q1 = static_cast<int>(smaller(cell.q1, end - begin - row));
    for (int q = q0 + (lane & (columns - 1)); q < q1; q += columns) f(static_cast<int>(row) + q);
  }
}

// Adds a tile's pixels [begin, end) of each of `channels` maps, `pixels` apart, to the cells' sums. A cell's sum is set
// by the tile that holds its first pixel. `products` may be null, and `values` where products are not.
template <class A, class Value, class Product>
__device__ void sum_cells(const Unit& unit, int64_t begin, int64_t end, int64_t channels, const Value& value,
                          const Product& product, A* values, A* products) {
  const Problem& p = unit.p;
  const int lanes = 1 << unit.share.lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int groups = static_cast<int>(blockDim.x) >> unit.share.lanes;
  const int group = static_cast<int>(threadIdx.x) >> unit.share.lanes;
  const int64_t i0 = begin / p.width * p.grid_h / p.height, i1 = (end - 1) / p.width * p.grid_h / p.height;
  const int64_t cells = (i1 - i0 + 1) * p.grid_w;
  const int across = static_cast<int>(smaller<int64_t>(cells, groups)), deep = groups / across;
  if (group >= across * deep) return;
  for (int64_t k = group % across; k < cells; k += across) {
    const int64_t i = i0 + k / p.grid_w, j = k % p.grid_w;
    const Cell cell = cell_at(p, i, j);
    const int64_t first = cell.r0 * p.width + cell.q0;
    if (first >= end) continue;
    for (int64_t c = group / across; c < channels; c += deep) {
      A sum{0}, dot{0};
      for_cell(cell, p.width, begin, end, unit.share, lane, [&](int e) {
        if (values) sum += value(c, e);
        if (products) dot += product(c, e);
      });
      sum = sum_lanes(sum, unit.share.lanes);
      dot = sum_lanes(dot, unit.share.lanes);
      if (lane != 0) continue;
      const int64_t at = c * unit.cells() + i * p.grid_w + j;
      if (values) values[at] = first >= begin ? sum : values[at] + sum;
      if (products) products[at] = first >= begin ? dot : products[at] + dot;
    }
  }
}

template <class T, bool kProducts>
__device__ void pool_planar(const Unit& unit, const PoolPlan& plan, const Maps<T>& batch, Accumulate<T>* values,
                            Accumulate<T>* products) {
  using A = Accumulate<T>;
  SharedMemory shared;
  T* room = shared.take<T>(stage_room<T>(plan.tile));
  T* other_room = kProducts ? shared.take<T>(stage_room<T>(plan.tile)) : nullptr;
  const int64_t pixels = unit.pixels(), n = blockIdx.x / plan.slices;
  const int64_t c0 = blockIdx.x % plan.slices * plan.channels;
  const int64_t channels = smaller<int64_t>(plan.channels, unit.p.channels - c0);
  const Maps<T> maps = batch.at((n * unit.p.channels + c0) * pixels);
  const int64_t out = (n * unit.p.channels + c0) * unit.cells();
  const bool whole = pixels <= plan.tile;
  for (int64_t begin = 0; begin < channels * pixels; begin += plan.tile) {
    const int count = static_cast<int>(smaller<int64_t>(plan.tile, channels * pixels - begin));
    if (begin > 0) __syncthreads();
    const T* x = stage(room, maps.x + begin, count);
    const T* dy = nullptr;
    if constexpr (kProducts) {
      dy = stage_masked(other_room, maps.dy + begin, maps.y ? maps.y + begin : nullptr, count);
    }
    __syncthreads();
    const int step = whole ? static_cast<int>(pixels) : 0;
    const auto value = [&](int64_t c, int e) { return widen(x[static_cast<int>(c) * step + e]); };
    const auto product = [&](int64_t c, int e) {
      const int at = static_cast<int>(c) * step + e;
      return widen(x[at]) * widen(dy[at]);
    };
    sum_cells<A>(unit, whole ? 0 : begin, whole ? pixels : begin + count, channels, value, product,
                 values ? values + out : nullptr, kProducts ? products + out : nullptr);
  }
}

template <class T, bool kProducts>
int64_t pool_planar_bytes(const PoolPlan& plan) {
  return (kProducts ? 2 : 1) * shared_bytes<T>(stage_room<T>(plan.tile));
}

// ---------------------------------------------------------------- channels_last

// The offsets of every share-th pixel of a cell, channels_last.
class CellWalk {
 public:
  __device__ CellWalk(const Problem& p, const Cell& cell, int first, int share)
      : across_(static_cast<int>(cell.q1 - cell.q0)), channels_(p.channels), width_(p.width) {
    row_step_ = share / across_;
    column_step_ = share % across_;
    column_ = first % across_;
    at_ = ((cell.r0 + first / across_) * width_ + cell.q0 + column_) * channels_;
  }
  __device__ __forceinline__ int64_t next() {
    const int64_t at = at_;
    column_ += column_step_;
    at_ += (row_step_ * width_ + column_step_) * channels_;
    if (column_ >= across_) {
      column_ -= across_;
      at_ += (width_ - across_) * channels_;
    }
    return at;
  }

 private:
  int across_, row_step_, column_step_, column_;
  int64_t channels_, width_, at_;
};

template <class T, int kWidth, bool kProducts>
__device__ void pool_channels_last(const Unit& unit, const PoolPlan& plan, const Maps<T>& batch, Accumulate<T>* values,
                                   Accumulate<T>* products) {
  using A = Accumulate<T>;
  constexpr int kBatch = kProducts ? 2 : 4;
  const int tasks = static_cast<int>(blockDim.x) / plan.share, t = static_cast<int>(threadIdx.x);
  const int first = t / tasks;
  const int64_t vectors = unit.p.channels / kWidth, n = blockIdx.x / plan.slices;
  const int64_t task = blockIdx.x % plan.slices * tasks + t % tasks;
  const bool active = task < unit.cells() * vectors;
  const int64_t k = active ? task / vectors : 0, c = active ? task % vectors * kWidth : 0;
  const Cell cell = cell_at(unit.p, k / unit.p.grid_w, k % unit.p.grid_w);
  const Maps<T> maps = batch.at(n * unit.sample() + c);
  A sum[kWidth] = {}, dot[kWidth] = {};
  CellWalk walk(unit.p, cell, first, plan.share);
  const int64_t size = active ? cell.size() : 0;
  for (int64_t e = first; e < size;) {
    const int64_t stop = smaller<int64_t>(size, e + kRun * plan.share);
    A part[kWidth] = {}, part_dot[kWidth] = {};
    for (; e < stop; e += kBatch * plan.share) {
      Pack<T, kWidth> x[kBatch], dy[kBatch], y[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t at = walk.next();
        if (e + b * plan.share >= stop) continue;
        x[b] = load_pack<kWidth>(maps.x + at);
        if (kProducts) dy[b] = load_pack<kWidth>(maps.dy + at);
        if (kProducts && maps.y) y[b] = load_pack<kWidth>(maps.y + at);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (e + b * plan.share >= stop) continue;
#pragma unroll
        for (int l = 0; l < kWidth; ++l) {
          const A v = widen(x[b].at[l]);
          part[l] += v;
          if (kProducts) part_dot[l] += v * (maps.y ? Maps<T>::masked(dy[b].at[l], y[b].at[l]) : widen(dy[b].at[l]));
        }
      }
    }
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      sum[l] += part[l];
      dot[l] += part_dot[l];
    }
  }
  if (plan.share > 1) {
    SharedMemory shared;
    A* room = shared.take<A>(2 * kWidth * static_cast<int64_t>(blockDim.x));
    A* mine = room + 2 * kWidth * t;
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      mine[l] = sum[l];
      mine[kWidth + l] = dot[l];
    }
    __syncthreads();
    if (first == 0) {
      for (int s = 1; s < plan.share; ++s) {
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
  const int64_t out = (n * unit.cells() + k) * unit.p.channels + c;
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
int64_t pool_channels_last_bytes(const PoolPlan& plan, int threads) {
  return plan.share > 1 ? shared_bytes<Accumulate<T>>(int64_t{2} * plan.width * threads) : 0;
}

// ---------------------------------------------------------------- the kernel

constexpr int kPoolThreads = 256;

// values and products: (N, C, cells) in NCHW, (N, cells, C) in channels_last; values may be null.
template <class T, bool kChannelsLast, bool kProducts>
__global__ void __launch_bounds__(kPoolThreads, 2)
    steam_pool(Unit unit, PoolPlan plan, Maps<T> batch, Accumulate<T>* values, Accumulate<T>* products) {
  if constexpr (!kChannelsLast) {
    pool_planar<T, kProducts>(unit, plan, batch, values, products);
  } else if (plan.width == 1) {
    pool_channels_last<T, 1, kProducts>(unit, plan, batch, values, products);
  } else {
    pool_channels_last<T, kPack<T>, kProducts>(unit, plan, batch, values, products);
  }
}

}  // namespace
}  // namespace steam
