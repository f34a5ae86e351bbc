// The gate stage on CUDA: y = x * gates (+ residual, ReLU), and backward the gradient of x.
//
// In both memory formats a sample is a matrix: channels by pixels (NCHW), or pixels by channels (channels_last). The
// gate of an element is the product of a factor of its row and a factor of its column. A block processes some rows and
// columns, and has their factors in shared memory.
#pragma once

#include "device.cuh"
#include "pool.cuh"

namespace steam {
namespace {

// The sizes of the gate's launch.
struct GateSizes {
  int32_t rows;     // rows of a block
  int32_t columns;  // columns of a block; whole packs, unless one block has all columns
  int64_t row_blocks;
  int64_t column_blocks;
};

// The numbers of one sample that the gate stage reads.
template <class A>
struct GateInputs {
  const A *g_c, *g_s;
  const A *dz, *share;  // backward only
};

// The index of a column in an array of factors. Without the gaps, threads that read every fourth or eighth column would
// read from the same bank of shared memory.
STEAM_HD int64_t padded(int64_t column) { return column + column / kWarp; }

// An element becomes element * gate + shift. The shift is 0 in the forward pass.
template <class A>
struct Affine {
  A gate;
  A shift;
};

// The factors of the rows and columns of a block. The gate of an element is row_gate * column_gate. Its shift is the
// spatial part row_shift * column_shift, plus channel_shift, which has one number for each channel.
template <class A, bool kChannelsLast, bool kBackward>
struct GateFactors {
  A *row_gate, *column_gate;
  A *row_shift, *column_shift, *channel_shift;  // backward only

  __device__ GateFactors(SharedMemory& shared, int64_t rows, int64_t columns)
      : row_gate(shared.take<A>(rows)), column_gate(shared.take<A>(padded(columns))) {
    if constexpr (kBackward) {
      row_shift = shared.take<A>(rows);
      column_shift = shared.take<A>(padded(columns));
      channel_shift = shared.take<A>(kChannelsLast ? padded(columns) : rows);
    }
  }

  // Writes the factors of rows [r0, r0 + rows) and columns [q0, q0 + columns) of a sample. With aligned rows the arrays
  // have no gaps, because packs of factors are read at once.
  __device__ void fill(const Plan& plan, const GateInputs<A>& inputs, int64_t r0, int64_t rows, int64_t q0,
                       int64_t columns, bool aligned_rows) const {
    const Problem& p = plan.problem;
    const A scale = static_cast<A>(p.scale), pixels = static_cast<A>(plan.pixels());
    const auto at = [&](bool by_column, int64_t i) { return by_column && !aligned_rows ? padded(i) : i; };
    const int64_t first_channel = kChannelsLast ? q0 : r0, channel_count = kChannelsLast ? columns : rows;
    const int64_t first_pixel = kChannelsLast ? r0 : q0, pixel_count = kChannelsLast ? rows : columns;
    for (int64_t c = threadIdx.x; c < channel_count; c += blockDim.x) {
      const int64_t to = at(kChannelsLast, c);
      const A gate = inputs.g_c[first_channel + c];
      (kChannelsLast ? column_gate : row_gate)[to] = scale * gate;
      if constexpr (kBackward) {
        (kChannelsLast ? column_shift : row_shift)[to] = p.sequential ? gate : A{1};
        channel_shift[to] = inputs.dz[first_channel + c] / pixels;
      }
    }
    for_pixels(p, first_pixel, first_pixel + pixel_count, [&](int64_t e, int64_t cell) {
      const int64_t to = at(!kChannelsLast, e);
      (kChannelsLast ? row_gate : column_gate)[to] = inputs.g_s[cell];
      if constexpr (kBackward) (kChannelsLast ? row_shift : column_shift)[to] = inputs.share[cell];
    });
  }

  // The gate and the shift of one element, from arrays with gaps.
  __device__ __forceinline__ Affine<A> at(int row, int column) const {
    const int q = static_cast<int>(padded(column));
    Affine<A> f{row_gate[row] * column_gate[q], A{0}};
    if constexpr (kBackward) f.shift = row_shift[row] * column_shift[q] + channel_shift[kChannelsLast ? q : row];
    return f;
  }
  // The gates and the shifts of n neighbours in a row, from arrays without gaps.
  template <int n>
  __device__ __forceinline__ void at(int row, int column, Affine<A>* f) const {
    constexpr int kStep = n < kPack<A> ? n : kPack<A>;
#pragma unroll
    for (int l = 0; l < n; l += kStep) {
      const Pack<A, kStep> gate = load_pack<kStep>(column_gate + column + l);
      Pack<A, kStep> spatial, channel;
      if constexpr (kBackward) spatial = load_pack<kStep>(column_shift + column + l);
      if constexpr (kBackward && kChannelsLast) channel = load_pack<kStep>(channel_shift + column + l);
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        f[l + k].gate = row_gate[row] * gate.at[k];
        if constexpr (kBackward) {
          f[l + k].shift = row_shift[row] * spatial.at[k] + (kChannelsLast ? channel.at[k] : channel_shift[row]);
        }
      }
    }
  }
};
template <class A>
int64_t gate_factors_bytes(int64_t rows, int64_t columns, bool channels_last, bool backward) {
  const int64_t row = shared_bytes<A>(rows), column = shared_bytes<A>(padded(columns));
  return backward ? 2 * (row + column) + (channels_last ? column : row) : row + column;
}

// y = relu(x * gate + residual), as an operation on packs and on single elements.
template <class T>
struct GateForward {
  using A = Accumulate<T>;
  static constexpr int kBatch = 4;  // packs that a thread reads before it uses the first
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
  __device__ __forceinline__ void store(int64_t e, const In& in, const Affine<Accumulate<T>>* f) const {
    Pack<T> out;
#pragma unroll
    for (int l = 0; l < kPack<T>; ++l) {
      A v = widen(in.x.at[l]) * f[l].gate;
      if (residual) v += widen(in.residual.at[l]);
      narrow(rectified(v), out.at[l]);
    }
    store_pack(y + e, out);
  }
  __device__ __forceinline__ void one(int64_t e, const Affine<Accumulate<T>>& f) const {
    A v = widen(x[e]) * f.gate;
    if (residual) v += widen(residual[e]);
    narrow(rectified(v), y[e]);
  }

 private:
  // A NaN stays a NaN, as in PyTorch's ReLU.
  __device__ __forceinline__ A rectified(A v) const { return relu && v < 0 ? A{0} : v; }
};

// dx = dy * gate + shift, and the gradient of the residual: dy, masked by the ReLU.
template <class T>
struct GateBackward {
  static constexpr int kBatch = 2;
  const T* dy;
  const T* y;    // null without a ReLU
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
  __device__ __forceinline__ void store(int64_t e, const In& in, const Affine<Accumulate<T>>* f) const {
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
  __device__ __forceinline__ void one(int64_t e, const Affine<Accumulate<T>>& f) const {
    const Accumulate<T> g = y ? Maps<T>::masked(dy[e], y[e]) : widen(dy[e]);
    if (dx) narrow(g * f.gate + f.shift, dx[e]);
    if (dresidual) narrow(g, dresidual[e]);
  }
};

// Whether every row of a block begins and ends at a 16-byte boundary of all maps. `first` is the block's first element
// in one of the maps, and `pitch` is the distance between the beginnings of its rows.
template <class T, class G>
__device__ bool has_aligned_rows(const G& op, const T* first, int64_t columns, int64_t pitch) {
  return op.one_phase() && phase(first) == 0 && columns % kPack<T> == 0 && pitch % kPack<T> == 0;
}

// Applies an operation to a matrix of `rows` by `columns`. `first` is the first element in one of the operation's maps,
// and `pitch` is the distance between the beginnings of rows.
template <class T, class G, class F>
__device__ void gate_matrix(const G& op, const T* first, const F& factors, int rows, int columns, int64_t pitch,
                            bool aligned_rows) {
  using A = Accumulate<T>;
  constexpr int kBatch = G::kBatch, n = kPack<T>;
  const int threads = static_cast<int>(blockDim.x);
  const auto for_packs = [&](const auto& run_op, int head, int count, const auto& factors_at) {
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
        at[b] = aligned_rows ? row[b] * pitch + column[b] : e;
        in[b] = run_op.load(at[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (k + b * threads >= count) continue;
        Affine<A> f[n];
        factors_at(row[b], column[b], f);
        run_op.store(at[b], in[b], f);
      }
    }
  };
  if (aligned_rows) {
    for_packs(op, 0, rows * columns / n,
              [&](int row, int column, Affine<A>* f) { factors.template at<n>(row, column, f); });
    return;
  }
  // Rows without gaps between them are one run.
  const int runs = pitch == columns ? 1 : rows, length = pitch == columns ? rows * columns : columns;
  for (int r = 0; r < runs; ++r) {
    const auto run_op = op.at(r * pitch);
    const Span span = make_span<T>(length, phase(first + r * pitch), op.one_phase());
    for_packs(run_op, span.head, span.packs, [&](int row, int column, Affine<A>* f) {
#pragma unroll
      for (int l = 0; l < n; ++l) {
        f[l] = factors.at(r + row, column);
        if (++column == columns) {
          column = 0;
          ++row;
        }
      }
    });
    for_ends<T>(span, [&](int e) {
      const int row = e / columns;
      run_op.one(e, factors.at(r + row, e - row * columns));
    });
  }
}

// ---------------------------------------------------------------- the kernels

constexpr int kGateThreads = 256;

// The rows and columns of sample n that a block processes.
struct GateBlock {
  int64_t n, r0, q0, pitch;
  int rows, columns;
};
template <bool kChannelsLast>
__device__ GateBlock gate_block(const Plan& plan, const GateSizes& sizes) {
  const int64_t rows = kChannelsLast ? plan.pixels() : plan.problem.channels;
  const int64_t columns = kChannelsLast ? plan.problem.channels : plan.pixels();
  const int64_t slice = blockIdx.x / sizes.column_blocks;
  const int64_t r0 = slice % sizes.row_blocks * sizes.rows, q0 = blockIdx.x % sizes.column_blocks * sizes.columns;
  return {slice / sizes.row_blocks,
          r0,
          q0,
          columns,
          static_cast<int>(smaller<int64_t>(sizes.rows, rows - r0)),
          static_cast<int>(smaller<int64_t>(sizes.columns, columns - q0))};
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGateThreads, 2)
    steam_gate_forward(Plan plan, GateSizes sizes, GateForward<T> batch, const Accumulate<T>* gates) {
  using A = Accumulate<T>;
  SharedMemory shared;
  const GateFactors<A, kChannelsLast, false> factors(shared, sizes.rows, sizes.columns);
  const GateBlock b = gate_block<kChannelsLast>(plan, sizes);
  const auto op = batch.at(b.n * plan.sample_size() + b.r0 * b.pitch + b.q0);
  const bool aligned_rows = has_aligned_rows<T>(op, op.y, b.columns, b.pitch);
  const A* g_c = gates + b.n * (plan.problem.channels + plan.cells());
  factors.fill(plan, {g_c, g_c + plan.problem.channels, nullptr, nullptr}, b.r0, b.rows, b.q0, b.columns, aligned_rows);
  __syncthreads();
  gate_matrix<T>(op, op.y, factors, b.rows, b.columns, b.pitch, aligned_rows);
}

// dz and share have rows of `grads_pitch` numbers, one for each sample. They and the gates are read only if dx is not
// null.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGateThreads, 2)
    steam_gate_backward(Plan plan, GateSizes sizes, GateBackward<T> batch, const Accumulate<T>* gates,
                        const Accumulate<T>* dz, const Accumulate<T>* share, int64_t grads_pitch) {
  using A = Accumulate<T>;
  SharedMemory shared;
  const GateFactors<A, kChannelsLast, true> factors(shared, sizes.rows, sizes.columns);
  const GateBlock b = gate_block<kChannelsLast>(plan, sizes);
  const auto op = batch.at(b.n * plan.sample_size() + b.r0 * b.pitch + b.q0);
  const bool aligned_rows = has_aligned_rows<T>(op, op.dy, b.columns, b.pitch);
  if (batch.dx) {
    const A* g_c = gates + b.n * (plan.problem.channels + plan.cells());
    const GateInputs<A> inputs{g_c, g_c + plan.problem.channels, dz + b.n * grads_pitch, share + b.n * grads_pitch};
    factors.fill(plan, inputs, b.r0, b.rows, b.q0, b.columns, aligned_rows);
  }
  __syncthreads();
  gate_matrix<T>(op, op.dy, factors, b.rows, b.columns, b.pitch, aligned_rows);
}

}  // namespace
}  // namespace steam
