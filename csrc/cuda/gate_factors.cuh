// The factors of the gates: y = x * gates, and backward the gradient of x, are affine functions of each element.
#pragma once

#include "device.cuh"

namespace steam {
namespace {

// The numbers of one sample that the gate stage reads.
template <class A>
struct GateInputs {
  const A *g_c, *g_s;
  const A *shift_c, *shift_s;  // backward only
};

// An element becomes element * gate + shift. The shift is 0 in the forward pass.
template <class A>
struct Affine {
  A gate;
  A shift;
};

// The factors of one channel or of one pixel. The gate of an element is the product of the gates of its channel and its
// pixel. Its shift is the product of their shifts, plus `extra` of its channel.
template <class A>
struct Factors {
  A gate, shift, extra;
};
template <bool kBackward, class A>
__device__ __forceinline__ Factors<A> channel_factors(const Problem& p, const GateInputs<A>& inputs, int64_t c) {
  const A gate = inputs.g_c[c];
  Factors<A> f{static_cast<A>(p.scale) * gate, p.sequential ? gate : A{1}, A{0}};
  if constexpr (kBackward) f.extra = inputs.shift_c[c];
  return f;
}
template <bool kBackward, class A>
__device__ __forceinline__ Factors<A> pixel_factors(const GateInputs<A>& inputs, int64_t cell) {
  return {inputs.g_s[cell], kBackward ? inputs.shift_s[cell] : A{0}, A{0}};
}

// The factors of the rows of a block, in shared memory.
template <class A, bool kChannelsLast, bool kBackward>
struct RowFactors {
  A *gate, *shift, *extra;

  // `memory` has the function `take` of SharedMemory.
  template <class Memory>
  __device__ RowFactors(Memory& memory, int64_t rows) : gate(memory.template take<A>(rows)) {
    if constexpr (kBackward) {
      shift = memory.template take<A>(rows);
      if constexpr (!kChannelsLast) extra = memory.template take<A>(rows);
    }
  }
  // Writes the factors of rows [r0, r0 + rows) of the matrix.
  __device__ void fill(const Plan& plan, const GateInputs<A>& inputs, int64_t r0, int64_t rows) const {
    const auto set = [&](int64_t r, const Factors<A>& f) {
      gate[r] = f.gate;
      if constexpr (kBackward) shift[r] = f.shift;
      if constexpr (kBackward && !kChannelsLast) extra[r] = f.extra;
    };
    if constexpr (kChannelsLast) {
      for_pixels(plan.problem, r0, r0 + rows,
                 [&](int64_t r, int64_t cell) { set(r, pixel_factors<kBackward>(inputs, cell)); });
    } else {
      for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) {
        set(r, channel_factors<kBackward>(plan.problem, inputs, r0 + r));
      }
    }
  }
  // The gate and the shift of an element in row r whose column has the factors `column`.
  __device__ __forceinline__ Affine<A> with(int r, const Factors<A>& column) const {
    Affine<A> f{gate[r] * column.gate, A{0}};
    if constexpr (kBackward) f.shift = shift[r] * column.shift + (kChannelsLast ? column.extra : extra[r]);
    return f;
  }
};
template <class A>
STEAM_HD int64_t row_factors_bytes(int64_t rows, bool channels_last, bool backward) {
  return shared_bytes<A>(rows) * (!backward ? 1 : channels_last ? 2 : 3);
}

// The index of a column in an array of factors. Without the gaps, threads that read every fourth or eighth column would
// read from the same bank of shared memory.
STEAM_HD int64_t padded(int64_t column) { return column + column / kWarp; }

// The factors of the rows and columns of a block, in shared memory.
template <class A, bool kChannelsLast, bool kBackward>
struct GateFactors {
  RowFactors<A, kChannelsLast, kBackward> rows;
  A *gate, *shift, *extra;  // of the columns

  template <class Memory>
  __device__ GateFactors(Memory& memory, int64_t row_count, int64_t columns)
      : rows(memory, row_count), gate(memory.template take<A>(padded(columns))) {
    if constexpr (kBackward) {
      shift = memory.template take<A>(padded(columns));
      if constexpr (kChannelsLast) extra = memory.template take<A>(padded(columns));
    }
  }
  // Writes the factors of rows [r0, r0 + row_count) and columns [q0, q0 + columns) of the matrix.
  __device__ void fill(const Plan& plan, const GateInputs<A>& inputs, int64_t r0, int64_t row_count, int64_t q0,
                       int64_t columns) const {
    rows.fill(plan, inputs, r0, row_count);
    const auto set = [&](int64_t q, const Factors<A>& f) {
      gate[padded(q)] = f.gate;
      if constexpr (kBackward) shift[padded(q)] = f.shift;
      if constexpr (kBackward && kChannelsLast) extra[padded(q)] = f.extra;
    };
    if constexpr (kChannelsLast) {
      for (int64_t q = threadIdx.x; q < columns; q += blockDim.x) {
        set(q, channel_factors<kBackward>(plan.problem, inputs, q0 + q));
      }
    } else {
      for_pixels(plan.problem, q0, q0 + columns,
                 [&](int64_t q, int64_t cell) { set(q, pixel_factors<kBackward>(inputs, cell)); });
    }
  }
  __device__ __forceinline__ Affine<A> at(int row, int column) const {
    const int q = static_cast<int>(padded(column));
    Factors<A> f{gate[q], A{0}, A{0}};
    if constexpr (kBackward) f.shift = shift[q];
    if constexpr (kBackward && kChannelsLast) f.extra = extra[q];
    return rows.with(row, f);
  }
};
template <class A>
STEAM_HD int64_t gate_factors_bytes(int64_t rows, int64_t columns, bool channels_last, bool backward) {
  const int64_t column = shared_bytes<A>(padded(columns));
  return row_factors_bytes<A>(rows, channels_last, backward) + column * (!backward ? 1 : channels_last ? 3 : 2);
}

// The factors of the columns of one pack, in a matrix whose rows are `group` rows of a sample.
template <class A, int n, bool kChannelsLast, bool kBackward>
struct ColumnFactors {
  Factors<A> at[n];
  int member[n];  // the row of the group

  __device__ __forceinline__ void find(const Plan& plan, const GateInputs<A>& inputs, int column, bool one_cell) {
    const Problem& p = plan.problem;
    const unsigned width = static_cast<unsigned>(kChannelsLast ? p.channels : p.width);
    const unsigned height = kChannelsLast ? 1u : static_cast<unsigned>(p.height);
    const unsigned grid_h = static_cast<unsigned>(p.grid_h), grid_w = static_cast<unsigned>(p.grid_w);
    const unsigned line = static_cast<unsigned>(column) / width;
    unsigned q = static_cast<unsigned>(column) - line * width, r = line % height;
    int row = static_cast<int>(line / height);
    unsigned cells = kChannelsLast ? 0u : r * grid_h / height * grid_w;
    if (one_cell) {
      const Factors<A> f = pixel_factors<kBackward>(inputs, cells + q * grid_w / width);
#pragma unroll
      for (int l = 0; l < n; ++l) {
        member[l] = row;
        at[l] = f;
      }
      return;
    }
#pragma unroll
    for (int l = 0; l < n; ++l) {
      member[l] = row;
      at[l] = kChannelsLast ? channel_factors<kBackward>(p, inputs, q)
                            : pixel_factors<kBackward>(inputs, cells + q * grid_w / width);
      if (++q < width) continue;
      q = 0;
      if (++r == height) {
        r = 0;
        ++row;
      }
      if (!kChannelsLast) cells = r * grid_h / height * grid_w;
    }
  }
};

}  // namespace
}  // namespace steam
