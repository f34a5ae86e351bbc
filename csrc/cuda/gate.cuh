// The gate stage on CUDA: y = x * gates (+ residual, ReLU), and backward the gradient of x.
//
// In both memory formats a sample is a matrix: channels by pixels (NCHW), or pixels by channels (channels_last). The
// gate of an element is the product of a factor of its row and a factor of its column. A block processes some rows and
// columns. The factors of its rows are in shared memory. If a few rows together are whole packs, a thread has the
// factors of its columns in registers and walks down the rows. Else the factors of the columns are in shared memory
// too.
#pragma once

#include "gate_factors.cuh"
#include "pool.cuh"
#include "weights.cuh"

namespace steam {
namespace {

// The sizes of the gate's launch.
struct GateSizes {
  int32_t group;    // consecutive rows of the matrix that are one row here, whole packs; 0: rows are not whole packs
  int32_t rows;     // rows of a block
  int32_t columns;  // columns of a block; whole packs, unless one block has all columns
  int32_t row_blocks;
  int32_t column_blocks;
  int64_t lines;  // rows of the matrix of whole packs, or of the sample
  int64_t pitch;  // between the beginnings of these rows
  bool one_cell;  // NCHW: all pixels of a pack are in one cell
};

// Whether a pack of a row of pixels never has pixels of two cells.
template <class T>
STEAM_HD bool packs_have_one_cell(const Problem& p) {
  return !p.channels_last && p.width % (p.grid_w * kPack<T>) == 0;
}

// The fewest rows of the matrix that together are whole packs, or 0 if a sample is not whole packs, or too large for
// the 32-bit arithmetic of `ColumnFactors`.
template <class T>
STEAM_HD int gate_group(const Plan& plan) {
  const Problem& p = plan.problem;
  const int64_t columns = p.channels_last ? p.channels : plan.pixels(), limit = 1 << 27;
  if (plan.sample_size() % kPack<T> != 0 || columns > limit ||
      larger(p.height * p.grid_h, p.width * p.grid_w) > limit) {
    return 0;
  }
  int group = 1;
  while (group * columns % kPack<T> != 0) group *= 2;
  return group;
}

// The address so many bytes after p. A loop that counts bytes computes an address by one addition.
template <class T>
__device__ __forceinline__ T* after(T* p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);
}

// y = relu(x * gate + residual), as an operation on packs and on single elements. x is in shared memory if kShared.
template <class T, bool kShared>
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

  __device__ bool needs_gates() const { return true; }
  __device__ const T* first() const { return y; }
  __device__ bool one_phase() const { return phase(x) == phase(y) && (!residual || phase(residual) == phase(y)); }
  __device__ GateForward at(int64_t e) const { return {x + e, residual ? residual + e : nullptr, y + e, relu}; }
  __device__ __forceinline__ In load(int64_t bytes) const {
    In in;
    // No later kernel of this call reads x, so the cache should give it up first.
    in.x = kShared ? load_pack<kPack<T>>(after(x, bytes)) : load_streaming(after(x, bytes));
    if (residual) in.residual = load_pack<kPack<T>>(after(residual, bytes));
    return in;
  }
  __device__ __forceinline__ void store(int64_t bytes, const In& in, const Affine<A>* f) const {
    A v[kPack<T>];
#pragma unroll
    for (int l = 0; l < kPack<T>; ++l) v[l] = widen(in.x.at[l]) * f[l].gate;
    if (residual || relu) {
#pragma unroll
      for (int l = 0; l < kPack<T>; ++l) v[l] = rectified(residual ? v[l] + widen(in.residual.at[l]) : v[l]);
    }
    Pack<T> out;
#pragma unroll
    for (int l = 0; l < kPack<T>; ++l) narrow(v[l], out.at[l]);
    store_pack(after(y, bytes), out);
  }
  __device__ __forceinline__ void one(int64_t e, const Affine<A>& f) const {
    const A v = widen(x[e]) * f.gate;
    narrow(rectified(residual ? v + widen(residual[e]) : v), y[e]);
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

  __device__ bool needs_gates() const { return dx != nullptr; }
  __device__ const T* first() const { return dy; }
  __device__ bool one_phase() const {
    const auto same = [&](const T* map) { return !map || phase(map) == phase(dy); };
    return same(y) && same(dx) && same(dresidual);
  }
  __device__ GateBackward at(int64_t e) const {
    return {dy + e, y ? y + e : nullptr, dx ? dx + e : nullptr, dresidual ? dresidual + e : nullptr};
  }
  __device__ __forceinline__ In load(int64_t bytes) const {
    In in;
    in.dy = load_pack<kPack<T>>(after(dy, bytes));
    if (y) in.y = load_pack<kPack<T>>(after(y, bytes));
    return in;
  }
  __device__ __forceinline__ void store(int64_t bytes, const In& in, const Affine<Accumulate<T>>* f) const {
    Pack<T> out, kept;
#pragma unroll
    for (int l = 0; l < kPack<T>; ++l) {
      const Accumulate<T> g = y ? Maps<T>::masked(in.dy.at[l], in.y.at[l]) : widen(in.dy.at[l]);
      narrow(g * f[l].gate + f[l].shift, out.at[l]);
      narrow(g, kept.at[l]);
    }
    if (dx) store_pack(after(dx, bytes), out);
    if (dresidual) store_pack(after(dresidual, bytes), kept);
  }
  __device__ __forceinline__ void one(int64_t e, const Affine<Accumulate<T>>& f) const {
    const Accumulate<T> g = y ? Maps<T>::masked(dy[e], y[e]) : widen(dy[e]);
    if (dx) narrow(g * f.gate + f.shift, dx[e]);
    if (dresidual) narrow(g, dresidual[e]);
  }
};

// Some packs of a matrix of whole packs: `rows` rows, and in each of them `packs` packs from `column` on.
struct PackRange {
  int rows, column, packs;
  int64_t pitch;  // between the beginnings of rows
  int group;      // the rows of the sample that are a row of the matrix
  bool one_cell;
};

// Applies an operation to a range of packs. A thread has some columns, whose factors it finds once, and every `down`-th
// row. kGrouped: a row of the matrix is several rows of the sample.
template <class T, bool kGrouped, bool kChannelsLast, bool kBackward, class G>
__device__ void gate_lines(const Plan& plan, const G& op, const GateInputs<Accumulate<T>>& inputs,
                           const RowFactors<Accumulate<T>, kChannelsLast, kBackward>& row_factors,
                           const PackRange& range) {
  using A = Accumulate<T>;
  constexpr int kBatch = G::kBatch, n = kPack<T>;
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int across = smaller(range.packs, threads), down = threads / across, first = t / across;
  if (first >= down) return;
  const int64_t size = sizeof(T), step = down * range.pitch * size;
  for (int k = t - first * across; k < range.packs; k += across) {
    ColumnFactors<A, n, kChannelsLast, kBackward> columns;
    if (op.needs_gates()) columns.find(plan, inputs, range.column + k * n, range.one_cell);
    int64_t at = (first * range.pitch + k * n) * size;
    for (int r = first; r < range.rows; r += kBatch * down) {
      typename G::In in[kBatch];
      const int64_t begins = at;
#pragma unroll
      for (int b = 0; b < kBatch; ++b, at += step) {
        if (r + b * down < range.rows) in[b] = op.load(at);
      }
      at = begins;
#pragma unroll
      for (int b = 0; b < kBatch; ++b, at += step) {
        const int row = r + b * down;
        if (row >= range.rows) continue;
        Affine<A> f[n] = {};
        if (op.needs_gates()) {
#pragma unroll
          for (int l = 0; l < n; ++l) {
            f[l] = row_factors.with(kGrouped ? row * range.group + columns.member[l] : row, columns.at[l]);
          }
        }
        op.store(at, in[b], f);
      }
    }
  }
}
template <class T, bool kChannelsLast, bool kBackward, class G>
__device__ void gate_packs(const Plan& plan, const G& op, const GateInputs<Accumulate<T>>& inputs,
                           const RowFactors<Accumulate<T>, kChannelsLast, kBackward>& row_factors,
                           const PackRange& range) {
  if (range.group == 1) {
    gate_lines<T, false>(plan, op, inputs, row_factors, range);
  } else {
    gate_lines<T, true>(plan, op, inputs, row_factors, range);
  }
}

// Applies an operation to a matrix of `rows` by `columns` of any alignment. `first` is the first element in one of the
// operation's maps, and `pitch` is the distance between the beginnings of rows. A thread has the packs of a run. Rows
// without gaps between them are one run.
template <class T, class G, class F>
__device__ void gate_runs(const G& op, const T* first, const F& factors, int rows, int columns, int64_t pitch) {
  using A = Accumulate<T>;
  constexpr int kBatch = G::kBatch, n = kPack<T>;
  const int threads = static_cast<int>(blockDim.x);
  const int64_t size = sizeof(T);
  const auto factors_at = [&](int row, int column) {
    return op.needs_gates() ? factors.at(row, column) : Affine<A>{A{0}, A{0}};
  };
  const int runs = pitch == columns ? 1 : rows, length = pitch == columns ? rows * columns : columns;
  for (int r = 0; r < runs; ++r) {
    const auto run = op.at(r * pitch);
    const Span span = make_span<T>(length, phase(first + r * pitch), op.one_phase());
    for (int k = static_cast<int>(threadIdx.x); k < span.packs; k += kBatch * threads) {
      typename G::In in[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (k + b * threads < span.packs) in[b] = run.load((span.head + (k + b * threads) * n) * size);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (k + b * threads >= span.packs) continue;
        const int e = span.head + (k + b * threads) * n;
        int row = e / columns, column = e - row * columns;
        Affine<A> f[n];
#pragma unroll
        for (int l = 0; l < n; ++l) {
          f[l] = factors_at(r + row, column);
          if (++column == columns) {
            column = 0;
            ++row;
          }
        }
        run.store(e * size, in[b], f);
      }
    }
    for_ends<T>(span, [&](int e) {
      const int row = e / columns;
      run.one(e, factors_at(r + row, e - row * columns));
    });
  }
}

// Applies an operation to a whole sample, by a block that has all of its numbers in shared memory. `first` is the first
// element in one of the operation's maps. `memory` has whole_gate_bytes.
template <class T, bool kChannelsLast, bool kBackward, class G>
__device__ void gate_sample(const Plan& plan, const G& op, const T* first, const GateInputs<Accumulate<T>>& inputs,
                            Pieces memory) {
  using A = Accumulate<T>;
  const int rows = static_cast<int>(kChannelsLast ? plan.pixels() : plan.problem.channels);
  const int columns = static_cast<int>(kChannelsLast ? plan.problem.channels : plan.pixels());
  const int group = gate_group<T>(plan);
  if (group > 0 && phase(first) == 0 && op.one_phase()) {
    const RowFactors<A, kChannelsLast, kBackward> factors(memory, rows);
    factors.fill(plan, inputs, 0, rows);
    __syncthreads();
    const int line = group * columns;
    gate_packs<T>(plan, op, inputs, factors,
                  {rows / group, 0, line / kPack<T>, line, group, packs_have_one_cell<T>(plan.problem)});
  } else {
    const GateFactors<A, kChannelsLast, kBackward> factors(memory, rows, columns);
    factors.fill(plan, inputs, 0, rows, 0, columns);
    __syncthreads();
    gate_runs<T>(op, first, factors, rows, columns, columns);
  }
}
template <class A>
STEAM_HD int64_t whole_gate_bytes(const Plan& plan, bool backward) {
  const bool channels_last = plan.problem.channels_last;
  const int64_t rows = channels_last ? plan.pixels() : plan.problem.channels;
  const int64_t columns = channels_last ? plan.problem.channels : plan.pixels();
  return gate_factors_bytes<A>(rows, columns, channels_last, backward);
}

// ---------------------------------------------------------------- the kernels

constexpr int kGateThreads = 256;
// The rows that a thread has at most, of packs whose columns are the same.
constexpr int kGateSteps = 8;

// The rows and columns of sample n that a block processes. The first block has the last sample: the cache may still
// hold the samples that the pool stage read last.
struct GateBlock {
  int64_t n, r0, q0;
  int rows, columns;
};
__device__ inline GateBlock gate_block(const Plan& plan, const GateSizes& sizes, int index) {
  const int slice = index / sizes.column_blocks, back = slice / sizes.row_blocks;
  const int64_t r0 = static_cast<int64_t>(slice - back * sizes.row_blocks) * sizes.rows;
  const int64_t q0 = static_cast<int64_t>(index - slice * sizes.column_blocks) * sizes.columns;
  return {plan.problem.samples - 1 - back, r0, q0, static_cast<int>(smaller<int64_t>(sizes.rows, sizes.lines - r0)),
          static_cast<int>(smaller<int64_t>(sizes.columns, sizes.pitch - q0))};
}

// Applies an operation to the rows and columns of a block. `gates` and `shifts` have a row for each sample; the shifts
// are null in the forward pass. If has_other_task() after the block has taken its shared memory, the block does no
// more.
template <class T, bool kChannelsLast, bool kBackward, class G, class F>
__device__ void gate(const Plan& plan, const GateSizes& sizes, const G& batch, const Accumulate<T>* gates,
                     const Accumulate<T>* shifts, int index, const F& has_other_task) {
  using A = Accumulate<T>;
  SharedMemory shared;
  const auto task = [&](const auto& factors, const auto& apply) {
    if (has_other_task()) return;
    const GateBlock b = gate_block(plan, sizes, index);
    const auto op = batch.at(b.n * plan.sample_size() + b.r0 * sizes.pitch + b.q0);
    const int64_t row = b.n * plan.nodes(), channels = plan.problem.channels;
    GateInputs<A> inputs{};
    if (op.needs_gates()) {
      inputs = {gates + row, gates + row + channels, nullptr, nullptr};
      if constexpr (kBackward) inputs.shift_c = shifts + row;
      if constexpr (kBackward) inputs.shift_s = shifts + row + channels;
    }
    apply(factors, op, b, inputs);
  };
  if (sizes.group > 0) {
    const RowFactors<A, kChannelsLast, kBackward> all(shared, sizes.rows * sizes.group);
    task(all, [&](const auto& factors, const G& op, const GateBlock& b, const GateInputs<A>& inputs) {
      if (op.needs_gates()) factors.fill(plan, inputs, b.r0 * sizes.group, b.rows * sizes.group);
      __syncthreads();
      gate_packs<T>(plan, op, inputs, factors,
                    {b.rows, static_cast<int>(b.q0), b.columns / kPack<T>, sizes.pitch, sizes.group, sizes.one_cell});
    });
  } else {
    const GateFactors<A, kChannelsLast, kBackward> all(shared, sizes.rows, sizes.columns);
    task(all, [&](const auto& factors, const G& op, const GateBlock& b, const GateInputs<A>& inputs) {
      if (op.needs_gates()) factors.fill(plan, inputs, b.r0, b.rows, b.q0, b.columns);
      __syncthreads();
      gate_runs<T>(op, op.first(), factors, b.rows, b.columns, sizes.pitch);
    });
  }
}
template <class A>
int64_t gate_bytes(const GateSizes& sizes, bool channels_last, bool backward) {
  return sizes.group > 0 ? row_factors_bytes<A>(sizes.rows * sizes.group, channels_last, backward)
                         : gate_factors_bytes<A>(sizes.rows, sizes.columns, channels_last, backward);
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGateThreads, 2)
    steam_gate_forward(Plan plan, GateSizes sizes, GateForward<T, false> batch, const Accumulate<T>* gates) {
  gate<T, kChannelsLast, false>(plan, sizes, batch, gates, nullptr, static_cast<int>(blockIdx.x), [] { return false; });
}

// gates and shifts have a row for each sample, and are read only if dx is not null. If a gradient of a weight is
// needed, one more block, the first, computes both.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGateThreads, 2)
    steam_gate_backward(Plan plan, GateSizes sizes, GateBackward<T> batch, const Accumulate<T>* gates,
                        const Accumulate<T>* shifts, WeightGrads weights) {
  const bool one_more = weights.needed();
  gate<T, kChannelsLast, true>(plan, sizes, batch, gates, shifts, static_cast<int>(blockIdx.x) - (one_more ? 1 : 0),
                               [&] {
                                 if (!one_more || blockIdx.x > 0) return false;
                                 weight_grads(plan.problem, weights);
                                 return true;
                               });
}

}  // namespace
}  // namespace steam
