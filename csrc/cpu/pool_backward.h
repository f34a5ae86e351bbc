// The pool stage of the backward pass: the gradients of the gates, from sums of dy * x (and of x).
//
// The gradient of a spatial gate is a sum over the channels of dy * x, and the gradient of a channel gate a sum over
// the cells. With order="sequential" the spatial tokens depend on the channel gates, so that gradient has a second
// part, from the shares of the spatial tokens and x.
#pragma once

#include "backward_memory.h"
#include "cells.h"
#include "choose.h"
#include "graph.h"
#include "maps.h"
#include "plan.h"
#include "pool.h"
#include "threads.h"

namespace steam {
namespace {

// The sums of x and of dy * x over one cell, for a vector of channels from c on. They are in memory, or, if a cell is a
// pixel, x and dy * x themselves.
template <class L>
struct StoredCells {
  const typename L::A* values;
  const typename L::A* products;
  int64_t pitch;
  STEAM_INLINE bool inside(int64_t, int64_t) const { return true; }
  template <bool>
  STEAM_INLINE typename L::V value(int64_t cell, int64_t c) const {
    return load(values + cell * pitch + c);
  }
  template <bool>
  STEAM_INLINE typename L::V product(int64_t cell, int64_t c) const {
    return load(products + cell * pitch + c);
  }
  STEAM_INLINE void prefetch(int64_t, int64_t) const {}
};
template <class M>
struct LiveCells {
  M maps;
  int64_t channels;
  // Whether the sample has whole vectors up to channel `end` of the cell.
  STEAM_INLINE bool inside(int64_t cell, int64_t end) const { return cell * channels + end <= maps.size; }
  template <bool kInside>
  STEAM_INLINE typename M::V value(int64_t cell, int64_t c) const {
    const int64_t e = cell * channels + c;
    return kInside ? maps.value(e) : maps.value_until(e);
  }
  template <bool kInside>
  STEAM_INLINE typename M::V product(int64_t cell, int64_t c) const {
    const int64_t e = cell * channels + c;
    return kInside ? maps.value(e) * maps.upstream(e) : maps.value_until(e) * maps.upstream_until(e);
  }
  STEAM_INLINE void prefetch(int64_t cell, int64_t c) const { maps.prefetch(cell * channels + c, 0); }
};

template <class T>
struct PoolBackward {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  static constexpr int64_t lanes = L::kLanes;
  using Source = Maps<T, true>;
  using Memory = BackwardMemory<T>;

  const Plan<T>& plan;

  // The gates of the channels begin ... end - 1 from their saved pre-activations; begin is a multiple of a vector.
  void open_channels(const Gates<T>& g, int64_t begin, int64_t end) const {
    open_gates<L>({plan.ring.first + begin, plan.ring.first + end}, g.channel.o, g.channel.gate);
  }

  // ---------------------------------------------------------------- NCHW

  // The gradients of the spatial gates, and the first part of those of the channel gates.
  void gate_grads(const Source& maps, const Memory& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const bool pixels = plan.walk == Walk::kPixels;
    const A* channel = channel_gates(plan, g);
    A* gate_grad = m.d.channel_gate + plan.ring.first;
    A *spread = m.spread, *partial = m.partial, *columns = m.columns;
    const V scale = L::set(static_cast<A>(plan.problem.scale));
    spread_sums(plan, spread, [&](int64_t i, int64_t j, int64_t) { return g.spatial.gate[plan.lattice.at(i, j)]; });
    for_tasks(parallel, plan.blocks, [&](int64_t b) {
      const int64_t begin = plan.block_begin(b), end = plan.block_end(b);
      open_channels(g, begin, end);
      A* contracted = partial + b * plan.sums();
      memset(contracted, 0, sizeof(A) * static_cast<size_t>(plan.sums()));
      if (pixels && plan.map_vectors() <= kHeldOfTwo<T>) {
        with_unroll<kHeldOfTwo<T>>(plan.map_vectors(), [&]<int kVectors>() {
          short_products<kVectors>(maps, begin, end, channel, spread, contracted, gate_grad);
        });
        return;
      }
      if (pixels) {
        sum_channels<L>(begin, end, gate_grad,
                        [&](int64_t c) { return pixel_products(maps, c, channel, spread, contracted) * scale; });
        return;
      }
      sum_channels<L>(begin, end, gate_grad, [&](int64_t c) {
        V total = L::zero();
        const V w = L::set(channel[c]);
        if (plan.problem.sequential) {
          column_products<true>(maps, c, w, spread, contracted, columns + c * plan.sums(), total);
        } else {
          column_products<false>(maps, c, w, spread, contracted, nullptr, total);
        }
        return total * scale;
      });
    });
    join_blocks(plan, partial);
    join_cells(plan, partial, m.d.spatial_gate, [&](int64_t, int64_t) { return plan.problem.scale; });
  }

  // Adds the second part of the gradients of the channel gates.
  void add_token_grads(const Source& maps, const Memory& m, const cpu::Parallel* parallel) const {
    const bool pixels = plan.walk == Walk::kPixels;
    A* gate_grad = m.d.channel_gate + plan.ring.first;
    A *spread = m.spread, *columns = m.columns, *through_tokens = m.through_tokens;
    spread_sums(plan, spread, [&](int64_t i, int64_t j, int64_t) { return m.d.share(plan, i, j); });
    for_tasks(parallel, plan.blocks, [&](int64_t b) {
      const int64_t begin = plan.block_begin(b), end = plan.block_end(b);
      if (pixels && plan.map_vectors() <= kHeld<T>) {
        with_unroll<kHeld<T>>(plan.map_vectors(), [&]<int kVectors>() {
          short_values<kVectors>(maps, begin, end, spread, through_tokens);
        });
        return add_sums<L>(through_tokens + begin, (end - begin + lanes - 1) / lanes, gate_grad + begin);
      }
      sum_channels<L>(begin, end, through_tokens, [&](int64_t c) {
        if (pixels) {
          const int64_t e = c * plan.pixels;
          return sum_vectors<L>(
              plan.pixels, [&](int64_t k) STEAM_LAMBDA_INLINE { return maps.value(e + k) * load(spread + k); },
              [&](int64_t k) { return maps.value_until(e + k) * load(spread + k); });
        }
        const auto column = [&](int64_t k)
                                STEAM_LAMBDA_INLINE { return load(columns + c * plan.sums() + k) * load(spread + k); };
        return sum_vectors<L>(plan.sums(), column, column);
      });
      add_sums<L>(through_tokens + begin, (end - begin + lanes - 1) / lanes, gate_grad + begin);
    });
  }

  // Maps of kVectors vectors, whose sums stay in registers. `contracted` gets the sum over channels begin ... end - 1
  // of channel * dy * x, and gate_grad the sum over pixels of scale * spread * dy * x.
  template <int kVectors>
  void short_products(const Source& source, int64_t begin, int64_t end, const A* channel, const A* spread,
                      A* contracted, A* gate_grad) const {
    const Source maps = source;
    const int64_t pixels = plan.pixels;
    const auto tail = L::first(pixels - (kVectors - 1) * lanes);
    const V scale = L::set(static_cast<A>(plan.problem.scale));
    V by[kVectors], sum[kVectors];
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) {
      by[k] = load(spread + k * lanes);
      sum[k] = L::zero();
    }
    sum_channels<L>(begin, end, gate_grad, [&](int64_t c) STEAM_LAMBDA_INLINE {
      const int64_t e = c * pixels;
      const bool inside = __builtin_expect(e + kVectors * lanes <= maps.size, 1);
      const V weight = L::set(channel[c]);
      V total = L::zero();
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = e + k * lanes;
        if (k * lanes * static_cast<int64_t>(sizeof(T)) % kLine == 0) maps.prefetch(at);
        V product;
        if (k + 1 < kVectors) {
          product = maps.value(at) * maps.upstream(at);
        } else {
          product = inside ? maps.value(at) * maps.upstream(at) : maps.value_until(at) * maps.upstream_until(at);
          product = L::select(tail, product, L::zero());
        }
        sum[k] += weight * product;
        total += by[k] * product;
      }
      return total * scale;
    });
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) store(contracted + k * lanes, sum[k]);
  }

  // The same maps: `out` gets the sum over pixels of spread * x.
  template <int kVectors>
  void short_values(const Source& source, int64_t begin, int64_t end, const A* spread, A* out) const {
    const Source maps = source;
    const int64_t pixels = plan.pixels;
    const auto tail = L::first(pixels - (kVectors - 1) * lanes);
    V by[kVectors];
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) by[k] = load(spread + k * lanes);
    sum_channels<L>(begin, end, out, [&](int64_t c) STEAM_LAMBDA_INLINE {
      const int64_t e = c * pixels, last = e + (kVectors - 1) * lanes;
      V total = last + lanes <= maps.size ? maps.value(last) : maps.value_until(last);
      total = L::select(tail, total, L::zero()) * by[kVectors - 1];
#pragma GCC unroll 16
      for (int k = 0; k + 1 < kVectors; ++k) total += maps.value(e + k * lanes) * by[k];
      return total;
    });
  }

  // Longer maps without column sums: adds channel * dy * x to `contracted`, and returns the sum of spread * dy * x. One
  // channel at a time, so that x and dy are read in the order of memory.
  STEAM_INLINE V pixel_products(const Source& source, int64_t c, const A* channel, const A* spread,
                                A* contracted) const {
    const Source maps = source;
    const int64_t e = c * plan.pixels, pixels = plan.pixels;
    const V weight = L::set(channel[c]);
    const auto add = [&](int64_t k, V product, V& total) STEAM_LAMBDA_INLINE {
      store(contracted + k, load(contracted + k) + weight * product);
      total += load(spread + k) * product;
    };
    const auto add_whole = [&](int64_t k, V& total)
                               STEAM_LAMBDA_INLINE { add(k, maps.value(e + k) * maps.upstream(e + k), total); };
    V all = L::zero();
    for (int64_t first = 0; first < pixels; first += kTermsPerPartial * lanes) {
      const int64_t end = smaller(first + kTermsPerPartial * lanes, pixels);
      V even = L::zero(), odd = L::zero();
      int64_t k = first;
      for (; k + 2 * lanes <= end; k += 2 * lanes) {
        maps.prefetch(e + k);
        if (2 * lanes * static_cast<int64_t>(sizeof(T)) > kLine) maps.prefetch(e + k + lanes);
        add_whole(k, even);
        add_whole(k + lanes, odd);
      }
      if (k + lanes <= end) {
        add_whole(k, even);
        k += lanes;
      }
      if (k < end) {
        const V product = maps.value_until(e + k) * maps.upstream_until(e + k);
        add(k, L::select(L::first(end - k), product, L::zero()), odd);
      }
      all += even + odd;
    }
    return all;
  }

  // Maps with column sums: the same, and (kValues) the column sums of x into `columns`.
  template <bool kValues>
  void column_products(const Source& maps, int64_t c, V w, const A* spread, A* contracted, A* columns, V& total) const {
    strip_sums<kValues>(maps, c * plan.pixels, plan.row_begin, plan.sum_rows, plan.problem.width,
                        [&](int64_t i, int64_t q, V value, V product) {
                          const int64_t k = i * plan.sum_pitch + q;
                          if (kValues) store(columns + k, value);
                          store(contracted + k, load(contracted + k) + w * product);
                          total += load(spread + k) * product;
                        });
  }

  // ---------------------------------------------------------------- channels_last

  void sum_cells(const Source& maps, const Memory& m, const cpu::Parallel* parallel) const {
    A *products = m.products, *values = m.values, *wide = m.wide;
    for_tasks(parallel, plan.problem.grid_h, [&](int64_t i) {
      const int64_t stride = plan.problem.width * plan.problem.channels;
      const int64_t r = plan.row_begin[i], rows = plan.row_begin[i + 1] - r;
      const int64_t row = i * plan.problem.grid_w * plan.channel_pitch;
      if (plan.walk == Walk::kNarrow) {
        A* wide_products = wide + 2 * i * plan.sum_pitch;
        A* wide_values = wide_products + plan.sum_pitch;
        strip_sums<true>(maps, 0, plan.row_begin + i, 1, stride, [&](int64_t, int64_t q, V value, V product) {
          store(wide_values + q, value);
          store(wide_products + q, product);
        });
        if (values) join_wide(plan, wide_values, values + row);
        join_wide(plan, wide_products, products + row);
        return;
      }
      for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
        const int64_t q = plan.col_begin[j], cell = row + j * plan.channel_pitch;
        const int64_t e = r * stride + q * plan.problem.channels, cols = plan.col_begin[j + 1] - q;
        if (values) {
          cell_sums<true>(maps, e, rows, cols, stride, plan.problem.channels, values + cell, products + cell);
        } else {
          cell_sums<false>(maps, e, rows, cols, stride, plan.problem.channels, static_cast<A*>(nullptr),
                           products + cell);
        }
      }
    });
  }

  template <class Cells>
  void spatial_gate_grads(const Cells& cells, const Memory& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const A* channel = channel_gates(plan, g);
    open_channels(g, 0, plan.problem.channels);
    for_tasks(parallel, plan.problem.grid_h, [&](int64_t i) {
      for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
        const int64_t cell = i * plan.problem.grid_w + j;
        const A dot = sum_lanes<L>(sum_vectors<L>(
            plan.problem.channels,
            [&](int64_t c) STEAM_LAMBDA_INLINE { return load(channel + c) * cells.template product<true>(cell, c); },
            [&](int64_t c) { return load(channel + c) * cells.template product<false>(cell, c); }));
        m.d.spatial_gate[plan.lattice.at(i, j)] = static_cast<A>(static_cast<double>(dot) * plan.problem.scale);
      }
    });
  }

  // Both parts of the gradients of the channel gates.
  template <class Cells>
  void channel_gate_grads(const Cells& cells, const Memory& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    A* gate_grad = m.d.channel_gate + plan.ring.first;
    const auto add_cell = [&]<int kVectors>(int64_t i, int64_t j, int64_t c, V* sum) STEAM_LAMBDA_INLINE {
      const int64_t cell = i * plan.problem.grid_w + j;
      const V gate = L::set(g.spatial.gate[plan.lattice.at(i, j)] * static_cast<A>(plan.problem.scale));
      const V share = L::set(plan.problem.sequential ? m.d.share(plan, i, j) : A{0});
      const auto add = [&]<bool kInside>() STEAM_LAMBDA_INLINE {
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) {
          const int64_t at = c + k * lanes;
          // Cells lie far apart, so the processor does not prefetch the next tile by itself.
          if (k * lanes * static_cast<int64_t>(sizeof(T)) % kLine == 0) cells.prefetch(cell, at + kVectors * lanes);
          sum[k] += gate * cells.template product<kInside>(cell, at);
          if (plan.problem.sequential) sum[k] += share * cells.template value<kInside>(cell, at);
        }
      };
      if (__builtin_expect(cells.inside(cell, c + kVectors * lanes), 1)) {
        add.template operator()<true>();
      } else {
        add.template operator()<false>();
      }
    };
    sum_cells_of_channels<6>(plan, parallel, add_cell, [&](int64_t c, V total) { store(gate_grad + c, total); });
  }
};

}  // namespace
}  // namespace steam
