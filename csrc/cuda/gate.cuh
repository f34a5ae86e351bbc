// The gate stage on CUDA: y = x * gates (+ residual, ReLU) and its input gradient.
//
// In either memory order a sample is a matrix, channels by pixels or pixels by channels, and what multiplies it is an
// outer product: one factor by row and one by column, both in shared memory. A block takes some rows and columns.
#pragma once

#include "device.cuh"
#include "pool.cuh"

namespace steam {
namespace {

struct GatePlan {
  int32_t rows;     // of a block
  int32_t columns;  // of a block; a multiple of 16 bytes' elements where there is more than one block of columns
  int64_t row_blocks;
  int64_t column_blocks;
};

// Gates and, backwards, the tokens' gradients of one sample.
template <class A>
struct GateNodes {
  const A *g_c, *g_s;
  const A *z, *share;
};

// The factors of a block's rows and columns. Elements of a column map lie at `spread(column)`: threads that read every
// fourth or eighth column would otherwise meet in one bank.
STEAM_HD int64_t spread(int64_t column) { return column + column / kWarp; }

template <class A, bool kChannelsLast, bool kBackward>
struct GateMaps {
  A *row_gate, *column_gate, *row_share, *column_share, *offset;
  struct Factor {
    A gate;
    A shift;
  };

  __device__ GateMaps(SharedMemory& shared, int64_t rows, int64_t columns)
      : row_gate(shared.take<A>(rows)), column_gate(shared.take<A>(spread(columns))) {
    if constexpr (kBackward) {
      row_share = shared.take<A>(rows);
      column_share = shared.take<A>(spread(columns));
      offset = shared.take<A>(kChannelsLast ? spread(columns) : rows);
    }
  }

  // For rows [r0, r0 + rows) and columns [q0, q0 + columns) of a sample; `whole` maps are not spread.
  __device__ void fill(const Unit& unit, const GateNodes<A>& nodes, int64_t r0, int64_t rows, int64_t q0,
                       int64_t columns, bool whole) const {
    const Problem& p = unit.p;
    const A scale = static_cast<A>(p.scale), pixels = static_cast<A>(unit.pixels());
    const auto at = [&](bool by_column, int64_t i) { return by_column && !whole ? spread(i) : i; };
    const int64_t c0 = kChannelsLast ? q0 : r0, channels = kChannelsLast ? columns : rows;
    const int64_t p0 = kChannelsLast ? r0 : q0, places = kChannelsLast ? rows : columns;
    for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
      const int64_t to = at(kChannelsLast, c);
      const A gate = nodes.g_c[c0 + c];
      (kChannelsLast ? column_gate : row_gate)[to] = scale * gate;
      if constexpr (kBackward) {
        (kChannelsLast ? column_share : row_share)[to] = p.sequential ? gate : A{1};
        offset[to] = nodes.z[c0 + c] / pixels;
      }
    }
    for_pixels(p, p0, p0 + places, [&](int64_t e, int64_t cell) {
      const int64_t to = at(!kChannelsLast, e);
      (kChannelsLast ? row_gate : column_gate)[to] = nodes.g_s[cell];
      if constexpr (kBackward) (kChannelsLast ? row_share : column_share)[to] = nodes.share[cell];
    });
  }

  __device__ __forceinline__ Factor at(int row, int column) const {
    const int q = static_cast<int>(spread(column));
    Factor f{row_gate[row] * column_gate[q], A{0}};
    if constexpr (kBackward) f.shift = row_share[row] * column_share[q] + offset[kChannelsLast ? q : row];
    return f;
  }
  // n neighbours in a row of whole maps.
  template <int n>
  __device__ __forceinline__ void at(int row, int column, Factor* f) const {
    constexpr int kStep = n < kPack<A> ? n : kPack<A>;
#pragma unroll
    for (int l = 0; l < n; l += kStep) {
      const Pack<A, kStep> gate = load_pack<kStep>(column_gate + column + l);
      Pack<A, kStep> share, add;
      if constexpr (kBackward) share = load_pack<kStep>(column_share + column + l);
      if constexpr (kBackward && kChannelsLast) add = load_pack<kStep>(offset + column + l);
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        f[l + k].gate = row_gate[row] * gate.at[k];
        if constexpr (kBackward) {
          f[l + k].shift = row_share[row] * share.at[k] + (kChannelsLast ? add.at[k] : offset[row]);
        }
      }
    }
  }
};
template <class A>
int64_t gate_maps_bytes(int64_t rows, int64_t columns, bool channels_last, bool backward) {
  const int64_t row = shared_bytes<A>(rows), column = shared_bytes<A>(spread(columns));
  return backward ? 2 * (row + column) + (channels_last ? column : row) : row + column;
}

// y = relu(x * gate + residual).
template <class T>
struct GateForward {
  using A = Accumulate<T>;
  static constexpr int kBatch = 4;  // packs of a thread under way at a time
  const T* x;
  const T* residual;  // may be null
  T* y;               // may be x
  bool relu;
  struct In {
    Pack<T> x, residual;
  };

  __device__ bool one_phase() const { return phase(x) == phase(y) && (!residual || phase(residual) == phase(y)); }
  __device__ GateForward at(int64_t e) const { return {x + e, residual ? residual + e : nullptr, y + e, relu}; }
  __device__ __forceinline__ In load(int64_t e) const {
    In in;
    in.x = load_pack<kPack<T>>(x + e);
    if (residual) in.residual = load_pack<kPack<T>>(residual + e);
    return in;
  }
  template <class Factor>
  __device__ __forceinline__ void store(int64_t e, const In& in, const Factor* f) const {
    Pack<T> out;
#pragma unroll
    for (int l = 0; l < kPack<T>; ++l) {
      A v = widen(in.x.at[l]) * f[l].gate;
      if (residual) v += widen(in.residual.at[l]);
      narrow(rectified(v), out.at[l]);
    }
    store_pack(y + e, out);
  }
  template <class Factor>
  __device__ __forceinline__ void one(int64_t e, const Factor& f) const {
    A v = widen(x[e]) * f.gate;
    if (residual) v += widen(residual[e]);
    narrow(rectified(v), y[e]);
  }

 private:
  // As PyTorch's: a NaN stays.
  __device__ __forceinline__ A rectified(A v) const { return relu && v < 0 ? A{0} : v; }
};

// dx = dy * gate + shift, and the residual's gradient: dy where the ReLU let it pass.
template <class T>
struct GateBackward {
  static constexpr int kBatch = 2;
  const T* dy;
  const T* y;    // null: no mask
  T* dx;         // may be null
  T* dresidual;  // may be null
  struct In {
    Pack<T> dy, y;
  };

  __device__ bool one_phase() const {
    const auto same = [&](const T* map) { return !map || phase(map) == phase(dy); };
    return same(y) && same(dx) && same(dresidual);
  }
  __device__ GateBackward at(int64_t e) const {
    return {dy + e, y ? y + e : nullptr, dx ? dx + e : nullptr, dresidual ? dresidual + e : nullptr};
  }
  __device__ __forceinline__ In load(int64_t e) const {
    In in;
    in.dy = load_pack<kPack<T>>(dy + e);
    if (y) in.y = load_pack<kPack<T>>(y + e);
    return in;
  }
  template <class Factor>
  __device__ __forceinline__ void store(int64_t e, const In& in, const Factor* f) const {
    Pack<T> out, kept;
#pragma unroll
    for (int l = 0; l < kPack<T>; ++l) {
      const Accumulate<T> g = y ? Maps<T>::masked(in.dy.at[l], in.y.at[l]) : widen(in.dy.at[l]);
      narrow(g * f[l].gate + f[l].shift, out.at[l]);
      narrow(g, kept.at[l]);
    }
    if (dx) store_pack(dx + e, out);
    if (dresidual) store_pack(dresidual + e, kept);
  }
  template <class Factor>
  __device__ __forceinline__ void one(int64_t e, const Factor& f) const {
    const Accumulate<T> g = y ? Maps<T>::masked(dy[e], y[e]) : widen(dy[e]);
    if (dx) narrow(g * f.gate + f.shift, dx[e]);
    if (dresidual) narrow(g, dresidual[e]);
  }
};

// Whether every row of a block begins and ends at a 16-byte boundary of all maps.
template <class T, class G>
__device__ bool is_whole(const G& op, const T* first, int64_t columns, int64_t pitch) {
  return op.one_phase() && phase(first) == 0 && columns % kPack<T> == 0 && pitch % kPack<T> == 0;
}

// A matrix of `rows` by `columns`, `pitch` apart. `first` is one of the operation's maps.
template <class T, class G, class M>
__device__ void gate_matrix(const G& op, const T* first, const M& maps, int rows, int columns, int64_t pitch,
                            bool whole) {
  using Factor = typename M::Factor;
  constexpr int kBatch = G::kBatch, n = kPack<T>;
  const int threads = static_cast<int>(blockDim.x);
  const auto packs = [&](const auto& run, int head, int count, const auto& finish) {
    for (int k = static_cast<int>(threadIdx.x); k < count; k += kBatch * threads) {
      typename G::In in[kBatch];
      int64_t at[kBatch];
      int row[kBatch], column[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (k + b * threads >= count) continue;
        const int e = head + (k + b * threads) * n;
        row[b] = e / columns;
        column[b] = e - row[b] * columns;
        at[b] = whole ? row[b] * pitch + column[b] : e;
        in[b] = run.load(at[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (k + b * threads >= count) continue;
        Factor f[n];
        finish(row[b], column[b], f);
        run.store(at[b], in[b], f);
      }
    }
  };
  if (whole) {
    packs(op, 0, rows * columns / n, [&](int row, int column, Factor* f) { maps.template at<n>(row, column, f); });
    return;
  }
  // Rows that lie one after another are one run.
  const int runs = pitch == columns ? 1 : rows, length = pitch == columns ? rows * columns : columns;
  for (int r = 0; r < runs; ++r) {
    const auto run = op.at(r * pitch);
    const Span span = make_span<T>(length, phase(first + r * pitch), op.one_phase());
    packs(run, span.head, span.packs, [&](int row, int column, Factor* f) {
#pragma unroll
      for (int l = 0; l < n; ++l) {
        f[l] = maps.at(r + row, column);
        if (++column == columns) {
          column = 0;
          ++row;
        }
      }
    });
    for_ends<T>(span, [&](int e) {
      const int row = e / columns;
      run.one(e, maps.at(r + row, e - row * columns));
    });
  }
}

// ---------------------------------------------------------------- the kernels

constexpr int kGateThreads = 256;

struct GateBlock {
  int64_t n, r0, q0, pitch;
  int rows, columns;
};
template <bool kChannelsLast>
__device__ GateBlock gate_block(const Unit& unit, const GatePlan& plan) {
  const int64_t rows = kChannelsLast ? unit.pixels() : unit.p.channels;
  const int64_t columns = kChannelsLast ? unit.p.channels : unit.pixels();
  const int64_t slice = blockIdx.x / plan.column_blocks;
  const int64_t r0 = slice % plan.row_blocks * plan.rows, q0 = blockIdx.x % plan.column_blocks * plan.columns;
  return {slice / plan.row_blocks,
          r0,
          q0,
          columns,
          static_cast<int>(smaller<int64_t>(plan.rows, rows - r0)),
          static_cast<int>(smaller<int64_t>(plan.columns, columns - q0))};
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGateThreads, 2)
    steam_gate_forward(Unit unit, GatePlan plan, GateForward<T> batch, const Accumulate<T>* gates) {
  using A = Accumulate<T>;
  SharedMemory shared;
  const GateMaps<A, kChannelsLast, false> maps(shared, plan.rows, plan.columns);
  const GateBlock b = gate_block<kChannelsLast>(unit, plan);
  const auto op = batch.at(b.n * unit.sample() + b.r0 * b.pitch + b.q0);
  const bool whole = is_whole<T>(op, op.y, b.columns, b.pitch);
  const A* g_c = gates + b.n * (unit.p.channels + unit.cells());
  maps.fill(unit, {g_c, g_c + unit.p.channels, nullptr, nullptr}, b.r0, b.rows, b.q0, b.columns, whole);
  __syncthreads();
  gate_matrix<T>(op, op.y, maps, b.rows, b.columns, b.pitch, whole);
}

// z and share: the tokens' gradients, rows of `grads_pitch` a sample. They and the gates are read where dx is asked
// for.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGateThreads, 2)
    steam_gate_backward(Unit unit, GatePlan plan, GateBackward<T> batch, const Accumulate<T>* gates,
                        const Accumulate<T>* z, const Accumulate<T>* share, int64_t grads_pitch) {
  using A = Accumulate<T>;
  SharedMemory shared;
  const GateMaps<A, kChannelsLast, true> maps(shared, plan.rows, plan.columns);
  const GateBlock b = gate_block<kChannelsLast>(unit, plan);
  const auto op = batch.at(b.n * unit.sample() + b.r0 * b.pitch + b.q0);
  const bool whole = is_whole<T>(op, op.dy, b.columns, b.pitch);
  if (batch.dx) {
    const A* g_c = gates + b.n * (unit.p.channels + unit.cells());
    const GateNodes<A> nodes{g_c, g_c + unit.p.channels, z + b.n * grads_pitch, share + b.n * grads_pitch};
    maps.fill(unit, nodes, b.r0, b.rows, b.q0, b.columns, whole);
  }
  __syncthreads();
  gate_matrix<T>(op, op.dy, maps, b.rows, b.columns, b.pitch, whole);
}

}  // namespace
}  // namespace steam
