// Between cells and maps: numbers of cells from sums of maps (join), and maps from numbers of cells (spread).
#pragma once

#include "plan.h"

namespace steam {
namespace {

// cell[lattice.at(i, j)] = scale(i, j) times the sum of `sums` over cell (i, j). `sums` is in the form of a channel's
// sums (Plan::sum_rows).
template <class T, class F>
void join_cells(const Plan<T>& plan, const typename Plan<T>::A* sums, typename Plan<T>::A* cell, const F& scale) {
  const bool pixels = plan.walk == Walk::kPixels;
  for (int64_t i = 0; i < plan.problem.grid_h; ++i) {
    const int64_t r0 = pixels ? plan.row_begin[i] : i, r1 = pixels ? plan.row_begin[i + 1] : i + 1;
    const int64_t stride = pixels ? plan.problem.width : plan.sum_pitch;
    for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
      double sum = 0;
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t q = plan.col_begin[j]; q < plan.col_begin[j + 1]; ++q) {
          sum += static_cast<double>(sums[r * stride + q]);
        }
      }
      cell[plan.lattice.at(i, j)] = static_cast<typename Plan<T>::A>(sum * scale(i, j));
    }
  }
}

// partial[0] += partial[1] + ...: the partial sums of the blocks, always in the order of the blocks.
template <class T>
void join_blocks(const Plan<T>& plan, typename Plan<T>::A* partial) {
  for (int64_t b = 1; b < plan.blocks; ++b) {
    const auto* more = partial + b * plan.sums();
    for (int64_t k = 0; k < plan.sums(); k += Plan<T>::lanes) store(partial + k, load(partial + k) + load(more + k));
  }
}

// kNarrow: cells[j * channel_pitch + c] = the sum over cell j and channel c of one row of cells, from its wide column
// sums.
template <class T>
void join_wide(const Plan<T>& plan, const typename Plan<T>::A* sums, typename Plan<T>::A* cells) {
  for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
    for (int64_t c = 0; c < plan.problem.channels; ++c) {
      double sum = 0;
      for (int64_t q = plan.col_begin[j]; q < plan.col_begin[j + 1]; ++q) {
        sum += static_cast<double>(sums[q * plan.problem.channels + c]);
      }
      cells[j * plan.channel_pitch + c] = static_cast<typename Plan<T>::A>(sum);
    }
  }
}

// out[q * repeat + c] = f(i, j, c) for the columns q of each cell j: one row of pixels in row i of cells.
template <class T, class F>
STEAM_INLINE void spread_row(const Plan<T>& plan, int64_t i, int64_t repeat, typename Plan<T>::A* out, const F& f) {
  for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
    for (int64_t q = plan.col_begin[j]; q < plan.col_begin[j + 1]; ++q) {
      for (int64_t c = 0; c < repeat; ++c) out[q * repeat + c] = f(i, j, c);
    }
  }
}

// All rows of pixels in row i of cells, into a whole map.
template <class T, class F>
STEAM_INLINE void spread_strip(const Plan<T>& plan, int64_t i, int64_t repeat, typename Plan<T>::A* map, const F& f) {
  using A = typename Plan<T>::A;
  A* row = map + plan.row_begin[i] * plan.problem.width;
  spread_row(plan, i, repeat, row, f);
  for (int64_t r = 1; r < plan.row_begin[i + 1] - plan.row_begin[i]; ++r) {
    memcpy(row + r * plan.problem.width, row, sizeof(A) * static_cast<size_t>(plan.problem.width));
  }
}

// f(i, j, 0) in the form of a channel's sums (Plan::sum_rows), with zeros in the padding.
template <class T, class F>
void spread_sums(const Plan<T>& plan, typename Plan<T>::A* out, const F& f) {
  for (int64_t i = 0; i < plan.problem.grid_h; ++i) {
    if (plan.walk == Walk::kPixels) {
      spread_strip(plan, i, 1, out, f);
    } else {
      spread_row(plan, i, 1, out + i * plan.sum_pitch, f);
    }
  }
  for (int64_t i = 0; i < plan.sum_rows; ++i) {
    for (int64_t q = plan.sum_length; q < plan.sum_pitch; ++q) out[i * plan.sum_pitch + q] = 0;
  }
}

// f(i, j, c) in the form of gate patterns (Plan::runs): one period, and then its beginning again. c is the channel with
// kNarrow, else 0.
template <class T, class F>
void spread_runs(const Plan<T>& plan, typename Plan<T>::A* out, const F& f) {
  using A = typename Plan<T>::A;
  const int64_t repeat = plan.walk == Walk::kNarrow ? plan.problem.channels : 1;
  for (int64_t i = 0; i < plan.problem.grid_h; ++i) {
    if (plan.run_is_map) {
      spread_strip(plan, i, repeat, out, f);
    } else {
      spread_row(plan, i, repeat, out + i * plan.run_pitch, f);
    }
  }
  for (int64_t k = 0; k < plan.runs; ++k) {
    A* run = out + k * plan.run_pitch;
    for (int64_t q = plan.period; q < plan.run_pitch; ++q) run[q] = run[q - plan.period];
  }
}

}  // namespace
}  // namespace steam
