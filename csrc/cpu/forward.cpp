// The forward pass of one sample: pool, graph and gate while the sample is in cache. Compiled once for each instruction
// set.
#include <limits>

#include "cells.h"
#include "choose.h"
#include "gate.h"
#include "gate_walk.h"
#include "graph.h"
#include "kernels.h"
#include "maps.h"
#include "plan.h"
#include "pool.h"
#include "samples.h"

namespace steam {
namespace {

// Working memory of a range of channels.
template <class T>
struct RangeMemory {
  using A = typename Plan<T>::A;
  A* columns;  // kColumns: the column sums of two blocks
  A* tokens;
  RangeMemory(const Plan<T>& plan, Arena& arena)
      : columns(plan.walk == Walk::kColumns ? arena.take<A>(2 * plan.block, plan.sums()) : nullptr),
        tokens(arena.take<A>(plan.ring.size)) {}
};

// Working memory of one sample that runs on `threads` threads.
template <class T>
struct ForwardMemory {
  using A = typename Plan<T>::A;
  Gates<T> g;
  A* runs = nullptr;     // all walks but kChannels: the gate patterns
  A* partial = nullptr;  // NCHW: the partial sums of the spatial tokens, of each block
  A* columns = nullptr;  // kColumns without ranges: the column sums of all channels
  int64_t ranges = 0;    // NCHW: the ranges of channels, one a task; 0: each step goes over all channels
  std::size_t range_bytes = 0;
  char* range_memory = nullptr;
  A* cells = nullptr;  // channels_last: the sums of the cells, or null if x itself holds them
  A* wide = nullptr;   // kNarrow: wide column sums

  ForwardMemory(const Plan<T>& plan, int64_t threads, Arena& arena) : g(plan, arena) {
    if (plan.walk != Walk::kChannels) runs = arena.take<A>(plan.runs, plan.run_pitch);
    if (plan.channels_last()) {
      if (plan.walk == Walk::kChannels && plan.cells_are_pixels()) return;
      cells = arena.take<A>(plan.cells, plan.channel_pitch);
      if (plan.walk == Walk::kNarrow) wide = arena.take<A>(plan.sums());
      return;
    }
    partial = arena.take<A>(plan.blocks, plan.sums());
    ranges = smaller(threads, plan.blocks);
    const int64_t margin = plan.ring.margin;
    if (margin <= plan.block && 2 * margin * kFewMore * ranges <= plan.problem.channels) {
      Arena range(nullptr);
      RangeMemory<T>(plan, range);
      range_bytes = Arena::slice(range.used());
      range_memory = arena.take_slices(ranges, range_bytes);
    } else {
      ranges = 0;
      if (plan.walk == Walk::kColumns) columns = arena.take<A>(plan.blocks * plan.block, plan.sums());
    }
  }

  // A range also computes the tokens of its neighbours on the ring. That is worth while if a range has this many times
  // more channels than such neighbours.
  static constexpr int64_t kFewMore = 8;
};

// at + n; null, which is the address of memory that a walk does not have, stays null.
template <class A>
STEAM_INLINE A* ahead(A* at, int64_t n) {
  return at ? at + n : nullptr;
}

// The sums of all cells, with the channels of a cell next to each other: cell k begins at sums + k * pitch. `size` is
// the number of elements that can be read.
template <class S>
struct CellSums {
  const S* sums;
  int64_t pitch, size;
};

template <class T>
struct ForwardWalk {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  static constexpr int64_t lanes = L::kLanes;
  using Source = Maps<T, false>;

  const Plan<T>& plan;
  const cpu::ForwardArgs& args;

  void operator()(int64_t n, const cpu::Parallel* parallel, char* memory) const {
    Arena arena(memory);
    const ForwardMemory<T> m(plan, parallel ? parallel->threads : 1, arena);
    const Source x{map(args.x, n), nullptr, plan.sample_size};
    if (!plan.channels_last()) {
      nchw(x, m, parallel);
    } else if (m.cells != nullptr) {
      pool_cells(x, m, parallel);
      channels_last(CellSums<A>{m.cells, plan.channel_pitch, plan.cells * plan.channel_pitch}, m.g, parallel);
    } else {
      // A cell is a pixel, so x itself holds the sums of the cells.
      channels_last(CellSums<T>{x.x, plan.problem.channels, plan.sample_size}, m.g, parallel);
    }
    if (args.saved) save(m.g, n);
    gate(n, m, parallel);
  }

  // Pool and graph, NCHW: one range of channels after another, or, if the ring has too many neighbours, one step after
  // another.
  void nchw(const Source& x, const ForwardMemory<T>& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    if (m.ranges > 0) {
      for_tasks(parallel, m.ranges, [&](int64_t k) { pool_and_graph_range(x, m, k); });
    } else {
      const auto columns_of = [&](int64_t b) { return ahead(m.columns, b * plan.block * plan.sums()); };
      A* z = g.channel.token + plan.ring.first;
      for_tasks(parallel, plan.blocks,
                [&](int64_t b) { pool_channel_tokens(x, plan.block_begin(b), plan.block_end(b), columns_of(b), z); });
      surround(plan.ring, g.channel.token);
      for_tasks(parallel, plan.blocks, [&](int64_t b) {
        graph_ring_block(g, b, g.channel.token);
        pool_spatial_block(x, g, b, columns_of(b), m.partial);
      });
    }
    pool_spatial_tokens(m);
    graph_lattice(g, parallel);
  }

  // Pool and graph, channels_last.
  template <class S>
  void channels_last(const CellSums<S>& cells, const Gates<T>& g, const cpu::Parallel* parallel) const {
    pool_channel_tokens(cells, g, parallel);
    graph_ring(g, parallel);
    pool_spatial_tokens(cells, g, parallel);
    graph_lattice(g, parallel);
  }

  void graph_ring(const Gates<T>& g, const cpu::Parallel* parallel) const {
    graph_forward<L>(plan.ring, plan.channel, g.channel.token, g.channel.o, g.channel.gate, parallel);
  }
  void graph_lattice(const Gates<T>& g, const cpu::Parallel* parallel) const {
    graph_forward<L>(plan.lattice, plan.spatial, g.spatial.token, g.spatial.o, g.spatial.gate, parallel);
  }

  const T* map(const void* base, int64_t n) const { return static_cast<const T*>(base) + n * plan.sample_size; }

  // The factor that makes a sum over the channels of cell (i, j) a mean.
  double token_scale(int64_t i, int64_t j) const {
    return 1.0 / (static_cast<double>(plan.problem.channels) * static_cast<double>(plan.cell_size(i, j)));
  }

  // ---------------------------------------------------------------- NCHW

  // Range k, one block after another, so that the maps of a block are in cache for both pools. The channel tokens go
  // one block ahead of the ring, which reads at most `margin` channels beyond a block.
  void pool_and_graph_range(const Source& x, const ForwardMemory<T>& m, int64_t k) const {
    const Gates<T>& g = m.g;
    const int64_t from = k * plan.blocks / m.ranges, to = (k + 1) * plan.blocks / m.ranges;
    Arena arena(m.range_memory + static_cast<std::size_t>(k) * m.range_bytes);
    const RangeMemory<T> range(plan, arena);
    const int64_t margin = plan.ring.margin, begin = plan.block_begin(from), end = plan.block_end(to - 1);
    const auto columns_of = [&](int64_t b) { return ahead(range.columns, b % 2 * plan.block * plan.sums()); };
    A* tokens = range.tokens;
    A* z = tokens + plan.ring.first;
    // The tokens of the range's neighbours have the same bits as in their own range.
    const auto neighbour_token = [&](int64_t c) {
      const int64_t node = (c + plan.problem.channels) % plan.problem.channels;
      pool_channel_tokens(x, node, node + 1, range.columns, z + c - node);
    };
    for (int64_t c = begin - margin; c < begin; ++c) neighbour_token(c);
    for (int64_t c = end; c < end + margin; ++c) neighbour_token(c);
    for (int64_t c = end + margin; c < round_up(end, lanes) + margin; ++c) z[c] = 0;
    const auto graph_and_pool = [&](int64_t b) {
      graph_ring_block(g, b, tokens);
      pool_spatial_block(x, g, b, columns_of(b), m.partial);
    };
    for (int64_t b = from; b < to; ++b) {
      pool_channel_tokens(x, plan.block_begin(b), plan.block_end(b), columns_of(b), z);
      if (b > from) graph_and_pool(b - 1);
    }
    graph_and_pool(to - 1);
    memcpy(g.channel.token + plan.ring.first + begin, z + begin, sizeof(A) * static_cast<size_t>(end - begin));
  }

  // z[c] for the channels begin ... end - 1, and (kColumns) their column sums.
  void pool_channel_tokens(const Source& source, int64_t begin, int64_t end, A* columns, A* z) const {
    const bool pixels = plan.walk == Walk::kPixels;
    const V mean = L::set(static_cast<A>(1.0 / static_cast<double>(plan.pixels)));
    if (pixels && plan.map_vectors() <= kHeld<T>) {
      const auto tail = L::first(plan.pixels - (plan.map_vectors() - 1) * lanes);
      with_unroll<kHeld<T>>(plan.map_vectors(), [&, x = source]<int kVectors>() {
        sum_channels<L>(begin, end, z, [&](int64_t c) STEAM_LAMBDA_INLINE {
          return sum_short_row<kVectors>(x, c * plan.pixels, tail) * mean;
        });
      });
      return;
    }
    sum_channels<L>(begin, end, z, [&, x = source](int64_t c) {
      V total = L::zero();
      if (pixels) {
        for (int64_t first = 0; first < plan.pixels; first += kTermsPerPartial * lanes) {
          total += sum_run(x, c * plan.pixels + first, smaller(kTermsPerPartial * lanes, plan.pixels - first));
        }
      } else {
        A* out = columns + (c - begin) * plan.sums();
        strip_sums<true>(x, c * plan.pixels, plan.row_begin, plan.sum_rows, plan.problem.width,
                         [&](int64_t i, int64_t q, V v, V) {
                           store(out + i * plan.sum_pitch + q, v);
                           total += v;
                         });
      }
      return total * mean;
    });
  }

  // The gates of the channels of block b.
  void graph_ring_block(const Gates<T>& g, int64_t b, const A* tokens) const {
    const int64_t first = plan.ring.first;
    transform<L>(plan.ring, plan.channel, {first + plan.block_begin(b), first + plan.block_end(b)}, tokens, g.channel.o,
                 g.channel.gate);
  }

  // The sum over the channels of block b of token weight * map: the block's partial sums of the spatial tokens.
  void pool_spatial_block(const Source& source, const Gates<T>& g, int64_t b, const A* columns, A* partial) const {
    const int64_t begin = plan.block_begin(b), count = plan.block_end(b) - begin;
    const A* weight = token_weights(plan, g) + begin;
    A* out = partial + b * plan.sums();
    if (plan.walk == Walk::kPixels) {
      contract_channels(source.x + begin * plan.pixels, plan.sample_size - begin * plan.pixels, count, plan.pixels,
                        weight, plan.sums(), out);
    } else {
      contract_channels(columns, count * plan.sums(), count, plan.sums(), weight, plan.sums(), out);
    }
  }

  void pool_spatial_tokens(const ForwardMemory<T>& m) const {
    join_blocks(plan, m.partial);
    join_cells(plan, m.partial, m.g.spatial.token, [&](int64_t i, int64_t j) { return token_scale(i, j); });
  }

  // ---------------------------------------------------------------- channels_last

  void pool_cells(const Source& x, const ForwardMemory<T>& m, const cpu::Parallel* parallel) const {
    A *cells = m.cells, *wide = m.wide;
    for_tasks(parallel, plan.problem.grid_h, [&](int64_t i) {
      const int64_t stride = plan.problem.width * plan.problem.channels;
      const int64_t r = plan.row_begin[i], rows = plan.row_begin[i + 1] - r;
      A* row = cells + i * plan.problem.grid_w * plan.channel_pitch;
      if (plan.walk == Walk::kNarrow) {
        A* sums = wide + i * plan.sum_pitch;
        strip_sums<true>(x, 0, plan.row_begin + i, 1, stride, [&](int64_t, int64_t q, V v, V) { store(sums + q, v); });
        join_wide(plan, sums, row);
        return;
      }
      for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
        const int64_t q = plan.col_begin[j];
        cell_sums<true>(x, r * stride + q * plan.problem.channels, rows, plan.col_begin[j + 1] - q, stride,
                        plan.problem.channels, row + j * plan.channel_pitch, static_cast<A*>(nullptr));
      }
    });
  }

  template <class S>
  void pool_channel_tokens(const CellSums<S>& sums, const Gates<T>& g, const cpu::Parallel* parallel) const {
    const S* cells = sums.sums;
    const int64_t pitch = sums.pitch, size = sums.size;
    A* z = g.channel.token + plan.ring.first;
    const V mean = L::set(static_cast<A>(1.0 / static_cast<double>(plan.pixels)));
    const auto add = [&]<int kVectors>(int64_t i, int64_t j, int64_t c, V* sum) STEAM_LAMBDA_INLINE {
      const S* at = cells + (i * plan.problem.grid_w + j) * pitch + c;
      if (__builtin_expect(cells + size - at >= kVectors * lanes, 1)) {
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) {
          // Cells lie far apart, so the processor does not prefetch the next tile by itself.
          if (k * lanes * static_cast<int64_t>(sizeof(S)) % kLine == 0) __builtin_prefetch(at + (kVectors + k) * lanes);
          sum[k] += load(at + k * lanes);
        }
      } else {
        for (int k = 0; k < kVectors; ++k) sum[k] += load_until(at + k * lanes, cells + size);
      }
    };
    sum_cells_of_channels<8>(plan, parallel, add, [&](int64_t c, V total) { store(z + c, total * mean); });
  }

  template <class S>
  void pool_spatial_tokens(const CellSums<S>& sums, const Gates<T>& g, const cpu::Parallel* parallel) const {
    const A* weight = token_weights(plan, g);
    const S* end = sums.sums + sums.size;
    for_tasks(parallel, plan.problem.grid_h, [&](int64_t i) {
      for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
        const S* cell = sums.sums + (i * plan.problem.grid_w + j) * sums.pitch;
        const A dot = sum_lanes<L>(sum_vectors<L>(
            plan.problem.channels, [&](int64_t c) STEAM_LAMBDA_INLINE { return load(weight + c) * load(cell + c); },
            [&](int64_t c) { return load(weight + c) * load_until(cell + c, end); }));
        g.spatial.token[plan.lattice.at(i, j)] = static_cast<A>(static_cast<double>(dot) * token_scale(i, j));
      }
    });
  }

  // ---------------------------------------------------------------- both

  void save(const Gates<T>& g, int64_t n) const {
    const int64_t channels = plan.problem.channels;
    A* row = static_cast<A*>(args.saved) + n * 2 * (channels + plan.cells);
    gather_nodes(plan.ring, g.channel.token, row);
    gather_nodes(plan.ring, g.channel.o, row + channels);
    gather_nodes(plan.lattice, g.spatial.token, row + 2 * channels);
    gather_nodes(plan.lattice, g.spatial.o, row + 2 * channels + plan.cells);
  }

  void gate(int64_t n, const ForwardMemory<T>& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const A scale = static_cast<A>(plan.problem.scale);
    A* channel = channel_gates(plan, g);
    for (int64_t c = 0; c < plan.problem.channels; c += lanes) store(channel + c, load(channel + c) * scale);
    if (m.runs) {
      spread_runs(plan, m.runs, [&](int64_t i, int64_t j, int64_t c) {
        const A gate = g.spatial.gate[plan.lattice.at(i, j)];
        return plan.walk == Walk::kNarrow ? channel[c] * gate : gate;
      });
    }
    const Route route = args.y == args.x ? Route::kStaged : output_route(plan, args.parallel.threads);
    T* y = static_cast<T*>(args.y) + n * plan.sample_size;
    const A least = plan.problem.relu ? A{0} : -std::numeric_limits<A>::infinity();
    with_bool(args.residual != nullptr, [&]<bool kResidual>() {
      const T* residual = kResidual ? map(args.residual, n) : nullptr;
      const GateForward<T, kResidual> op{map(args.x, n), residual, least, plan.sample_size};
      gate_sample(op, y, route, channel, g, m.runs, parallel);
    });
  }

  template <class G>
  void gate_sample(const G& op, T* y, Route route, const A* channel, const Gates<T>& g, const A* runs,
                   const cpu::Parallel* parallel) const {
    gate_walk<false>(
        plan, op, y, route, parallel,
        [&](int64_t i, int64_t j) {
          return Along<L>{channel, nullptr, nullptr, plan.channel_pitch, g.spatial.gate[plan.lattice.at(i, j)], 0, 0};
        },
        [&](int64_t c, int64_t k) {
          const A gate = plan.walk == Walk::kNarrow ? A{1} : channel[c];
          return Along<L>{runs + k * plan.run_pitch, nullptr, nullptr, plan.period, gate, 0, 0};
        });
  }
};

}  // namespace

namespace cpu {
std::size_t STEAM_NAME(forward_, STEAM_CPU_VARIANT)(const ForwardArgs& args, char* memory) {
  if (args.problem.samples == 0) return 0;
  Arena arena(memory);
  with_dtype(args.problem.dtype, [&]<class T>() {
    const Plan<T> plan = make_plan<T>(args.problem, arena);
    const Schedule schedule = make_schedule(plan, args.parallel.threads, arena, [&](int64_t threads) {
      Arena sample(nullptr);
      ForwardMemory<T>(plan, threads, sample);
      return sample.used();
    });
    if (arena.counts()) return;
    fill_plan(plan, args.channel_weight, args.spatial_weight);
    for_samples(schedule, args.parallel, ForwardWalk<T>{plan, args});
  });
  return arena.used();
}
}  // namespace cpu
}  // namespace steam
