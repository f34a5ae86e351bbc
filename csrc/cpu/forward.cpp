// The forward walk of one sample: pool -> graph -> gate while the sample is in cache. Compiled once per instruction
// set.
#include "gate.h"
#include "graph.h"
#include "kernels.h"
#include "pool.h"
#include "unit.h"

namespace steam {
namespace {

// Working memory of a range of channels.
template <class T>
struct RangeMemory {
  using A = typename Unit<T>::A;
  A* columns;  // of two blocks, where the walk has column sums
  A* tokens;
  RangeMemory(const Unit<T>& u, Arena& arena)
      : columns(u.walk == Walk::kColumns ? arena.take<A>(2 * u.block, u.sums()) : nullptr),
        tokens(arena.take<A>(u.ring.size)) {}
};

// Working memory of one sample that `threads` threads share.
template <class T>
struct ForwardMemory {
  using A = typename Unit<T>::A;
  Gates<T> g;
  A* runs = nullptr;     // gate patterns, where the walk has them
  A* partial = nullptr;  // NCHW: the blocks' parts of the spatial tokens
  A* columns = nullptr;  // NCHW: column sums of all channels, where the walk has them and no ranges
  int64_t ranges = 0;    // NCHW: ranges of channels; 0 where three steps go over all channels
  std::size_t range_bytes = 0;
  char* range_memory = nullptr;
  A* cells = nullptr;  // channels_last: the cells' sums
  A* wide = nullptr;   // kNarrow: wide column sums

  ForwardMemory(const Unit<T>& u, int64_t threads, Arena& arena) : g(u, arena) {
    if (u.walk != Walk::kChannels) runs = arena.take<A>(u.runs, u.run_pitch);
    if (u.p.channels_last) {
      if (u.walk == Walk::kChannels && u.cells_are_pixels()) return;
      cells = arena.take<A>(u.cells, u.channel_pitch);
      if (u.walk == Walk::kNarrow) wide = arena.take<A>(u.sums());
      return;
    }
    partial = arena.take<A>(u.blocks, u.sums());
    ranges = smaller(threads, u.blocks);
    const int64_t margin = u.ring.margin;
    if (margin <= u.block && 2 * margin * kFewMore * ranges <= u.p.channels) {
      Arena range(nullptr);
      RangeMemory<T>(u, range);
      range_bytes = Arena::slice(range.used());
      range_memory = arena.take_slices(ranges, range_bytes);
    } else {
      ranges = 0;
      if (u.walk == Walk::kColumns) columns = arena.take<A>(u.blocks * u.block, u.sums());
    }
  }

  // A range of channels is worth its own tokens of the neighbours beyond it where they are this many times fewer.
  static constexpr int64_t kFewMore = 8;
};

template <class T>
struct ForwardWalk {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  static constexpr int64_t lanes = L::kLanes;
  using Source = Maps<T, false, false>;

  const Unit<T>& u;
  const cpu::ForwardArgs& args;

  const T* map(const void* base, int64_t n) const { return static_cast<const T*>(base) + n * u.sample; }

  void operator()(int64_t n, const cpu::Parallel* parallel, char* memory) const {
    Arena arena(memory);
    const ForwardMemory<T> m(u, parallel ? parallel->threads : 1, arena);
    const Source x{map(args.x, n), nullptr, nullptr, u.sample};
    if (u.p.channels_last) {
      pool_channels_last(x, m, parallel);
    } else {
      pool_planar(x, m, parallel);
    }
    if (args.saved) save(m.g, n);
    gate(n, m, parallel);
  }

  // What space looks at: the channel gates, or nothing (math step 4).
  const A* token_weights(const Gates<T>& g) const { return u.p.sequential ? g.channel.gate + u.ring.first : u.ones; }
  double token_scale(int64_t i, int64_t j) const {
    return 1.0 / (static_cast<double>(u.p.channels) * static_cast<double>(u.cell_size(i, j)));
  }

  // NCHW, block by block of channels: tokens, then the ring and the blocks' part of the spatial tokens.
  void pool_planar(const Source& source, const ForwardMemory<T>& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    A* partial = m.partial;
    if (m.ranges > 0) {
      for_tasks(parallel, m.ranges, [&](int64_t k) { pool_range(source, m, k); });
    } else {
      const auto columns_of = [&](int64_t b) { return ahead(m.columns, b * u.block * u.sums()); };
      A* z = g.channel.token + u.ring.first;
      for_tasks(parallel, u.blocks,
                [&](int64_t b) { channel_tokens(source, block_begin(b), block_end(b), columns_of(b), z); });
      surround(u.ring, g.channel.token);
      for_tasks(parallel, u.blocks,
                [&](int64_t b) { look_at_block(source, g, b, columns_of(b), g.channel.token, partial); });
    }
    join_blocks(u, partial);
    join_cells(u, partial, g.spatial.token, [&](int64_t i, int64_t j) { return token_scale(i, j); });
    graph_forward<L>(u.lattice, u.spatial, g.spatial.token, g.spatial.o, g.spatial.gate, parallel);
  }

  int64_t block_begin(int64_t b) const { return b * u.block; }
  int64_t block_end(int64_t b) const { return smaller((b + 1) * u.block, u.p.channels); }

  // The blocks of range k, each while its maps are in cache; tokens go one block ahead of the ring, which looks at
  // them, `margin` channels at most.
  void pool_range(const Source& source, const ForwardMemory<T>& m, int64_t k) const {
    const Gates<T>& g = m.g;
    const int64_t from = k * u.blocks / m.ranges, to = (k + 1) * u.blocks / m.ranges;
    Arena arena(m.range_memory + static_cast<std::size_t>(k) * m.range_bytes);
    const RangeMemory<T> range(u, arena);
    const int64_t margin = u.ring.margin, begin = block_begin(from), end = block_end(to - 1);
    const auto columns_of = [&](int64_t b) { return ahead(range.columns, b % 2 * u.block * u.sums()); };
    A* tokens = range.tokens;
    A* z = tokens + u.ring.first;
    // The neighbours beyond the range, to the bit as whoever has them in its range.
    const auto beyond = [&](int64_t c) {
      const int64_t node = (c + u.p.channels) % u.p.channels;
      channel_tokens(source, node, node + 1, range.columns, z + c - node);
    };
    for (int64_t c = begin - margin; c < begin; ++c) beyond(c);
    for (int64_t c = end; c < end + margin; ++c) beyond(c);
    for (int64_t c = end + margin; c < round_up(end, lanes) + margin; ++c) z[c] = 0;
    for (int64_t b = from; b < to; ++b) {
      channel_tokens(source, block_begin(b), block_end(b), columns_of(b), z);
      if (b > from) look_at_block(source, g, b - 1, columns_of(b - 1), tokens, m.partial);
    }
    look_at_block(source, g, to - 1, columns_of(to - 1), tokens, m.partial);
    memcpy(g.channel.token + u.ring.first + begin, z + begin, sizeof(A) * static_cast<size_t>(end - begin));
  }

  // z[c] for channels begin ... end - 1, and their column sums where the walk has them.
  void channel_tokens(const Source& source, int64_t begin, int64_t end, A* columns, A* z) const {
    const bool by_pixel = u.walk == Walk::kPixels;
    const V mean = L::set(static_cast<A>(1.0 / static_cast<double>(u.pixels)));
    if (by_pixel && u.row_vectors() <= kHeld) {
      const auto tail = L::first(u.pixels - (u.row_vectors() - 1) * lanes);
      with_unroll<kHeld>(u.row_vectors(), [&, x = source]<int U>() {
        sum_channels<L>(begin, end, z,
                        [&](int64_t c) STEAM_LAMBDA_INLINE { return sum_short_row<U>(x, c * u.pixels, tail) * mean; });
      });
      return;
    }
    sum_channels<L>(begin, end, z, [&, x = source](int64_t c) {
      V total = L::zero();
      if (by_pixel) {
        for (int64_t run = 0; run < u.pixels; run += kRun * lanes) {
          total += sum_run(x, c * u.pixels + run, smaller(kRun * lanes, u.pixels - run));
        }
      } else {
        A* out = columns + (c - begin) * u.sums();
        strip_sums<true>(x, c * u.pixels, u.row_begin, u.rows, u.p.width, [&](int64_t i, int64_t q, V v, V) {
          store(out + i * u.pitch + q, v);
          total += v;
        });
      }
      return total * mean;
    });
  }

  // The gates of a block's channels, and the sum over them of what space looks at.
  void look_at_block(const Source& source, const Gates<T>& g, int64_t b, const A* columns, const A* tokens,
                     A* partial) const {
    const int64_t begin = block_begin(b), count = block_end(b) - begin, at = u.ring.first + begin;
    transform<L>(u.ring, u.channel, {at, at + count}, tokens, g.channel.o, g.channel.gate);
    const A* weight = token_weights(g) + begin;
    A* out = partial + b * u.sums();
    if (u.walk == Walk::kPixels) {
      contract_channels(source.x + begin * u.pixels, u.sample - begin * u.pixels, count, u.pixels, weight, u.sums(),
                        out);
    } else {
      contract_channels(columns, count * u.sums(), count, u.sums(), weight, u.sums(), out);
    }
  }

  void pool_channels_last(const Source& x, const ForwardMemory<T>& m, const cpu::Parallel* parallel) const {
    // Where a cell is a pixel, x itself holds the cells' sums.
    if (m.cells == nullptr) return pool_cells(x.x, u.p.channels, u.sample, m.g, parallel);
    A *cells = m.cells, *wide = m.wide;
    for_tasks(parallel, u.p.grid_h, [&](int64_t i) {
      const int64_t stride = u.p.width * u.p.channels;
      const int64_t r = u.row_begin[i], rows = u.row_begin[i + 1] - r;
      A* row = cells + i * u.p.grid_w * u.channel_pitch;
      if (u.walk == Walk::kNarrow) {
        A* sums = wide + i * u.pitch;
        strip_sums<true>(x, 0, u.row_begin + i, 1, stride, [&](int64_t, int64_t q, V v, V) { store(sums + q, v); });
        join_wide(u, sums, row);
        return;
      }
      for (int64_t j = 0; j < u.p.grid_w; ++j) {
        const int64_t q = u.col_begin[j];
        cell_sums<true>(x, r * stride + q * u.p.channels, rows, u.col_begin[j + 1] - q, stride, u.p.channels,
                        row + j * u.channel_pitch, static_cast<A*>(nullptr));
      }
    });
    pool_cells(cells, u.channel_pitch, u.cells * u.channel_pitch, m.g, parallel);
  }

  // Tokens from the cells' sums, channels contiguous, `pitch` apart.
  template <class S>
  void pool_cells(const S* cells, int64_t pitch, int64_t size, const Gates<T>& g, const cpu::Parallel* parallel) const {
    A* z = g.channel.token + u.ring.first;
    const V mean = L::set(static_cast<A>(1.0 / static_cast<double>(u.pixels)));
    const int64_t vectors = u.channel_pitch / lanes, share = 16;
    for_tasks(parallel, (vectors + share - 1) / share, [&](int64_t t) {
      for_tiles<L, 8>(smaller(share, vectors - t * share), [&]<int U>(int64_t v) {
        const int64_t c = (t * share + v) * lanes;
        V total[U];
        for (int k = 0; k < U; ++k) total[k] = L::zero();
        for (int64_t i = 0; i < u.p.grid_h; ++i) {
          V sum[U];
          for (int k = 0; k < U; ++k) sum[k] = L::zero();
          for (int64_t j = 0; j < u.p.grid_w; ++j) {
            const S* at = cells + (i * u.p.grid_w + j) * pitch + c;
            if (__builtin_expect(cells + size - at >= U * lanes, 1)) {
#pragma GCC unroll 16
              for (int k = 0; k < U; ++k) {
                // The next tile's: cells lie too far apart for the processor to see where this goes.
                if (k * lanes * static_cast<int64_t>(sizeof(S)) % kLine == 0) {
                  __builtin_prefetch(at + (U + k) * lanes);
                }
                sum[k] += load(at + k * lanes);
              }
            } else {
              for (int k = 0; k < U; ++k) sum[k] += load_until(at + k * lanes, cells + size);
            }
          }
#pragma GCC unroll 16
          for (int k = 0; k < U; ++k) total[k] += sum[k];
        }
#pragma GCC unroll 16
        for (int k = 0; k < U; ++k) store(z + c + k * lanes, total[k] * mean);
      });
    });
    graph_forward<L>(u.ring, u.channel, g.channel.token, g.channel.o, g.channel.gate, parallel);
    const A* weight = token_weights(g);
    for_tasks(parallel, u.p.grid_h, [&](int64_t i) {
      for (int64_t j = 0; j < u.p.grid_w; ++j) {
        const S* cell = cells + (i * u.p.grid_w + j) * pitch;
        const A dot = sum_lanes<L>(sum_vectors<L>(
            u.p.channels, [&](int64_t c) STEAM_LAMBDA_INLINE { return load(weight + c) * load(cell + c); },
            [&](int64_t c) { return load(weight + c) * load_until(cell + c, cells + size); }));
        g.spatial.token[u.lattice.at(i, j)] = static_cast<A>(static_cast<double>(dot) * token_scale(i, j));
      }
    });
    graph_forward<L>(u.lattice, u.spatial, g.spatial.token, g.spatial.o, g.spatial.gate, parallel);
  }

  void save(const Gates<T>& g, int64_t n) const {
    A* row = static_cast<A*>(args.saved) + n * 2 * (u.p.channels + u.cells);
    gather_nodes(u.ring, g.channel.token, row);
    gather_nodes(u.ring, g.channel.o, row + u.p.channels);
    gather_nodes(u.lattice, g.spatial.token, row + 2 * u.p.channels);
    gather_nodes(u.lattice, g.spatial.o, row + 2 * u.p.channels + u.cells);
  }

  void gate(int64_t n, const ForwardMemory<T>& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const A scale = static_cast<A>(u.p.scale);
    A* channel = g.channel.gate + u.ring.first;
    for (int64_t c = 0; c < u.p.channels; c += lanes) store(channel + c, load(channel + c) * scale);
    if (m.runs) {
      spread_runs(u, m.runs, [&](int64_t i, int64_t j, int64_t c) {
        const A gate = g.spatial.gate[u.lattice.at(i, j)];
        return u.walk == Walk::kNarrow ? channel[c] * gate : gate;
      });
    }
    const Route route = args.y == args.x ? Route::kStaged : output_route(u);
    T* y = static_cast<T*>(args.y) + n * u.sample;
    with_bool(args.residual != nullptr, [&]<bool kResidual>() {
      with_bool(u.p.relu, [&]<bool kRelu>() {
        const T* residual = kResidual ? map(args.residual, n) : nullptr;
        const GateForward<T, kResidual, kRelu> f{map(args.x, n), residual, u.sample};
        gate_sample(f, y, route, channel, g, m.runs, parallel);
      });
    });
  }

  template <class F>
  void gate_sample(const F& f, T* y, Route route, const A* channel, const Gates<T>& g, const A* runs,
                   const cpu::Parallel* parallel) const {
    gate_walk<false, Sink<T>, NoSink<T>>(
        u, f, y, static_cast<T*>(nullptr), route, parallel,
        [&](int64_t i, int64_t j) {
          return Along<L>{channel, nullptr, nullptr, u.channel_pitch, g.spatial.gate[u.lattice.at(i, j)], 0, 0};
        },
        [&](int64_t c, int64_t k) {
          const A gate = u.walk == Walk::kNarrow ? A{1} : channel[c];
          return Along<L>{runs + k * u.run_pitch, nullptr, nullptr, u.period, gate, 0, 0};
        });
  }
};

}  // namespace

namespace cpu {
std::size_t STEAM_NAME(forward_, STEAM_CPU_VARIANT)(const ForwardArgs& args, char* memory) {
  if (args.problem.samples == 0) return 0;
  Arena arena(memory);
  with_dtype(args.problem.dtype, [&]<class T>() {
    const Unit<T> unit = make_unit<T>(args.problem, arena);
    const Sharing sharing = make_sharing(unit, args.parallel.threads, arena, [&](int64_t threads) {
      Arena sample(nullptr);
      ForwardMemory<T>(unit, threads, sample);
      return sample.used();
    });
    if (arena.counts()) return;
    fill_unit(unit, args.channel_weight, args.spatial_weight);
    for_samples(sharing, args.parallel, ForwardWalk<T>{unit, args});
  });
  return arena.used();
}
}  // namespace cpu
}  // namespace steam
