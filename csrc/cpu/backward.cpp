// The backward walk of one sample: pool' -> graph' -> gate' while x and dy are in cache. Compiled once per instruction
// set.
#include "gate.h"
#include "graph.h"
#include "kernels.h"
#include "pool.h"
#include "unit.h"

namespace steam {
namespace {

// Sums over cells of x and dy * x for channels c, c + 1, ... of one cell: from memory, or formed where a cell is a
// pixel.
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
  // Whether whole vectors can be read up to channel `end` of a cell.
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

// Working memory of one sample.
template <class T>
struct BackwardMemory {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;

  // Gradients of gates (then of pre-activations) and tokens, in the branches' arrays.
  struct Grads {
    A *channel_gate, *channel_token, *spatial_gate, *spatial_token;
    A* spatial_share;  // s = du / (C n_ij): what one pixel's token gradient comes to
    GraphTape<L> channel_tape, spatial_tape;
    Grads(const Unit<T>& u, Arena& arena)
        : channel_gate(arena.take<A>(u.ring.size)),
          channel_token(arena.take<A>(u.ring.size)),
          spatial_gate(arena.take<A>(u.lattice.size)),
          spatial_token(arena.take<A>(u.lattice.size)),
          spatial_share(arena.take<A>(u.lattice.size)),
          channel_tape(tape(u.ring, u.channel, arena)),
          spatial_tape(tape(u.lattice, u.spatial, arena)) {}
    static GraphTape<L> tape(const Branch<L>& branch, const Heads<L>& heads, Arena& arena) {
      A* shares = branch.count <= 9 ? arena.take<A>(branch.count, branch.size) : nullptr;
      return {shares, arena.take<V>(node_blocks(branch), 2 * heads.count)};
    }
  };

  Gates<T> g;
  Grads d;
  // NCHW: a number a pixel or column sum, the blocks' sums, all column sums, sums of the channels' token gradients.
  A *spread = nullptr, *partial = nullptr, *columns = nullptr, *through_tokens = nullptr;
  // channels_last: sums over cells, and (kNarrow) over columns before.
  A *products = nullptr, *values = nullptr, *wide = nullptr;
  // A channel's scale * g_c, and dz / (H W); gate patterns.
  A *scaled = nullptr, *offset = nullptr, *runs = nullptr;

  BackwardMemory(const Unit<T>& u, const cpu::BackwardArgs& args, Arena& arena) : g(u, arena), d(u, arena) {
    if (needs_tokens(args)) {
      if (!u.p.channels_last) {
        spread = arena.take<A>(u.sums());
        partial = arena.take<A>(u.blocks, u.sums());
        if (u.p.sequential && u.walk == Walk::kColumns) columns = arena.take<A>(u.p.channels, u.sums());
        if (u.p.sequential) through_tokens = arena.take<A>(u.channel_pitch);
      } else if (u.walk == Walk::kNarrow || !u.cells_are_pixels()) {
        products = arena.take<A>(u.cells, u.channel_pitch);
        if (u.p.sequential) values = arena.take<A>(u.cells, u.channel_pitch);
        if (u.walk == Walk::kNarrow) wide = arena.take<A>(2, u.sums());
      }
    }
    scaled = arena.take<A>(u.channel_pitch);
    offset = arena.take<A>(u.channel_pitch);
    if (u.walk != Walk::kChannels) runs = arena.take<A>(2 * u.runs, u.run_pitch);
  }
  static bool needs_tokens(const cpu::BackwardArgs& args) {
    return args.dx || args.channel_grad.data || args.spatial_grad.data;
  }
};

template <class T, bool kRelu>
struct BackwardWalk {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  static constexpr int64_t lanes = L::kLanes;
  using Source = Maps<T, true, kRelu>;
  using Memory = BackwardMemory<T>;
  using Grads = typename Memory::Grads;

  const Unit<T>& u;
  const cpu::BackwardArgs& args;
  double* sums;  // (N, 4 * heads): a sample's gradients of the channel branch's a and b, then of the spatial branch's

  const T* map(const void* base, int64_t n) const { return static_cast<const T*>(base) + n * u.sample; }

  void operator()(int64_t n, const cpu::Parallel* parallel, char* memory) const {
    Arena arena(memory);
    const Memory m(u, args, arena);
    const Source maps{map(args.x, n), map(args.dy, n), kRelu ? map(args.y, n) : nullptr, u.sample};
    if (Memory::needs_tokens(args)) {
      restore(m.g, n);
      if (u.p.channels_last) {
        pool_channels_last(maps, m, n, parallel);
      } else {
        pool_planar(maps, m, n, parallel);
      }
    }
    if (args.dx || args.dresidual) gate(n, maps, m, parallel);
  }

  void restore(const Gates<T>& g, int64_t n) const {
    const A* row = static_cast<const A*>(args.saved) + n * 2 * (u.p.channels + u.cells);
    scatter_nodes(u.ring, row, g.channel.token);
    scatter_nodes(u.ring, row + u.p.channels, g.channel.o);
    scatter_nodes(u.lattice, row + 2 * u.p.channels, g.spatial.token);
    scatter_nodes(u.lattice, row + 2 * u.p.channels + u.cells, g.spatial.o);
    open_gates<L>({u.lattice.first, u.lattice.first + u.lattice.span}, g.spatial.o, g.spatial.gate);
  }

  // The gates of channels begin ... end - 1, by whichever task needs them first; begin is a multiple of a vector.
  void open_channels(const Gates<T>& g, int64_t begin, int64_t end) const {
    open_gates<L>({u.ring.first + begin, u.ring.first + end}, g.channel.o, g.channel.gate);
  }

  const A* channel_gate(const Gates<T>& g) const { return g.channel.gate + u.ring.first; }
  // The channels' weights in the spatial tokens (math step 4).
  const A* token_weights(const Gates<T>& g) const { return u.p.sequential ? channel_gate(g) : u.ones; }
  A token_share(const Grads& d, int64_t i, int64_t j) const { return d.spatial_share[u.lattice.at(i, j)]; }

  void spatial_backward(const Gates<T>& g, const Grads& d, int64_t n, const cpu::Parallel* parallel) const {
    graph_backward<L>(u.lattice, u.spatial, g.spatial.token, g.spatial.o, d.spatial_gate, d.spatial_token,
                      d.spatial_tape, sums + n * 4 * u.channel.count + 2 * u.channel.count, parallel);
    for (int64_t i = 0; i < u.p.grid_h; ++i) {
      for (int64_t j = 0; j < u.p.grid_w; ++j) {
        const int64_t at = u.lattice.at(i, j);
        d.spatial_share[at] =
            static_cast<A>(static_cast<double>(d.spatial_token[at]) /
                           (static_cast<double>(u.p.channels) * static_cast<double>(u.cell_size(i, j))));
      }
    }
  }
  void channel_backward(const Gates<T>& g, const Grads& d, int64_t n, const cpu::Parallel* parallel) const {
    graph_backward<L>(u.ring, u.channel, g.channel.token, g.channel.o, d.channel_gate, d.channel_token, d.channel_tape,
                      sums + n * 4 * u.channel.count, parallel);
  }

  void pool_planar(const Source& maps, const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const Grads& d = m.d;
    const bool by_pixel = u.walk == Walk::kPixels;
    const A* channel = channel_gate(g);
    A* gate_grad = d.channel_gate + u.ring.first;
    A *spread = m.spread, *partial = m.partial, *columns = m.columns;
    const V scale = L::set(static_cast<A>(u.p.scale));
    spread_sums(u, spread, [&](int64_t i, int64_t j, int64_t) { return g.spatial.gate[u.lattice.at(i, j)]; });
    for_tasks(parallel, u.blocks, [&](int64_t b) {
      const int64_t begin = b * u.block, end = smaller(begin + u.block, u.p.channels);
      open_channels(g, begin, end);
      A* contracted = partial + b * u.sums();
      memset(contracted, 0, sizeof(A) * static_cast<size_t>(u.sums()));
      if (by_pixel && u.row_vectors() <= kHeldOfTwo) {
        with_unroll<kHeldOfTwo>(u.row_vectors(), [&]<int U>() {
          short_products<U>(maps, begin, end, channel, spread, contracted, gate_grad);
        });
        return;
      }
      if (by_pixel) {
        sum_channels<L>(begin, end, gate_grad,
                        [&](int64_t c) { return pixel_products(maps, c, channel, spread, contracted) * scale; });
        return;
      }
      sum_channels<L>(begin, end, gate_grad, [&](int64_t c) {
        V total = L::zero();
        const V w = L::set(channel[c]);
        if (u.p.sequential) {
          column_products<true>(maps, c, w, spread, contracted, columns + c * u.sums(), total);
        } else {
          column_products<false>(maps, c, w, spread, contracted, nullptr, total);
        }
        return total * scale;
      });
    });
    join_blocks(u, partial);
    join_cells(u, partial, d.spatial_gate, [&](int64_t, int64_t) { return u.p.scale; });
    spatial_backward(g, d, n, parallel);
    if (u.p.sequential) {
      spread_sums(u, spread, [&](int64_t i, int64_t j, int64_t) { return token_share(d, i, j); });
      A* through_tokens = m.through_tokens;
      for_tasks(parallel, u.blocks, [&](int64_t b) {
        const int64_t begin = b * u.block, end = smaller(begin + u.block, u.p.channels);
        if (by_pixel && u.row_vectors() <= kHeld) {
          with_unroll<kHeld>(u.row_vectors(),
                             [&]<int U>() { short_shares<U>(maps, begin, end, spread, through_tokens); });
          return add_sums<L>(through_tokens + begin, (end - begin + lanes - 1) / lanes, gate_grad + begin);
        }
        sum_channels<L>(begin, end, through_tokens, [&](int64_t c) {
          if (by_pixel) {
            const int64_t e = c * u.pixels;
            return sum_vectors<L>(
                u.pixels, [&](int64_t k) STEAM_LAMBDA_INLINE { return maps.value(e + k) * load(spread + k); },
                [&](int64_t k) { return maps.value_until(e + k) * load(spread + k); });
          }
          const auto column = [&](int64_t k)
                                  STEAM_LAMBDA_INLINE { return load(columns + c * u.sums() + k) * load(spread + k); };
          return sum_vectors<L>(u.sums(), column, column);
        });
        add_sums<L>(through_tokens + begin, (end - begin + lanes - 1) / lanes, gate_grad + begin);
      });
    }
    channel_backward(g, d, n, parallel);
  }

  // Channels begin ... end - 1 of short maps: the sum of channel * dy * x over them, and into gate_grad each one's sum
  // of scale * spread * dy * x.
  template <int U>
  void short_products(const Source& source, int64_t begin, int64_t end, const A* channel, const A* spread,
                      A* contracted, A* gate_grad) const {
    const Source maps = source;
    const int64_t pixels = u.pixels;
    const auto tail = L::first(pixels - (U - 1) * lanes);
    const V scale = L::set(static_cast<A>(u.p.scale));
    V by[U], sum[U];
#pragma GCC unroll 16
    for (int k = 0; k < U; ++k) {
      by[k] = load(spread + k * lanes);
      sum[k] = L::zero();
    }
    sum_channels<L>(begin, end, gate_grad, [&](int64_t c) STEAM_LAMBDA_INLINE {
      const int64_t e = c * pixels;
      const bool inside = __builtin_expect(e + U * lanes <= maps.size, 1);
      const V weight = L::set(channel[c]);
      V total = L::zero();
#pragma GCC unroll 16
      for (int k = 0; k < U; ++k) {
        const int64_t at = e + k * lanes;
        if (k * lanes * static_cast<int64_t>(sizeof(T)) % kLine == 0) maps.prefetch(at);
        V product;
        if (k + 1 < U) {
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
    for (int k = 0; k < U; ++k) store(contracted + k * lanes, sum[k]);
  }

  // And each one's sum of spread * x.
  template <int U>
  void short_shares(const Source& source, int64_t begin, int64_t end, const A* spread, A* out) const {
    const Source maps = source;
    const int64_t pixels = u.pixels;
    const auto tail = L::first(pixels - (U - 1) * lanes);
    V by[U];
#pragma GCC unroll 16
    for (int k = 0; k < U; ++k) by[k] = load(spread + k * lanes);
    sum_channels<L>(begin, end, out, [&](int64_t c) STEAM_LAMBDA_INLINE {
      const int64_t e = c * pixels, last = e + (U - 1) * lanes;
      V total = last + lanes <= maps.size ? maps.value(last) : maps.value_until(last);
      total = L::select(tail, total, L::zero()) * by[U - 1];
#pragma GCC unroll 16
      for (int k = 0; k + 1 < U; ++k) total += maps.value(e + k * lanes) * by[k];
      return total;
    });
  }

  // Where x itself stands for column sums: adds channel * dy * x to `contracted`, and gives the sum of spread * dy * x.
  // One channel at a time, so that x and dy are read in the order of memory.
  STEAM_INLINE V pixel_products(const Source& source, int64_t c, const A* channel, const A* spread,
                                A* contracted) const {
    const Source maps = source;
    const int64_t e = c * u.pixels, pixels = u.pixels;
    const V weight = L::set(channel[c]);
    const auto add = [&](int64_t k, V product, V& total) STEAM_LAMBDA_INLINE {
      store(contracted + k, load(contracted + k) + weight * product);
      total += load(spread + k) * product;
    };
    const auto add_whole = [&](int64_t k, V& total)
                               STEAM_LAMBDA_INLINE { add(k, maps.value(e + k) * maps.upstream(e + k), total); };
    V all = L::zero();
    for (int64_t run = 0; run < pixels; run += kRun * lanes) {
      const int64_t end = smaller(run + kRun * lanes, pixels);
      V even = L::zero(), odd = L::zero();
      int64_t k = run;
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

  template <bool kValues>
  void column_products(const Source& maps, int64_t c, V w, const A* spread, A* contracted, A* columns, V& total) const {
    strip_sums<kValues>(maps, c * u.pixels, u.row_begin, u.rows, u.p.width,
                        [&](int64_t i, int64_t q, V value, V product) {
                          const int64_t k = i * u.pitch + q;
                          if (kValues) store(columns + k, value);
                          store(contracted + k, load(contracted + k) + w * product);
                          total += load(spread + k) * product;
                        });
  }

  void pool_channels_last(const Source& maps, const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    if (m.products == nullptr) {
      return pool_cells(LiveCells<Source>{maps, u.p.channels}, m.g, m.d, n, parallel);
    }
    A *products = m.products, *values = m.values, *wide = m.wide;
    for_tasks(parallel, u.p.grid_h, [&](int64_t i) {
      const int64_t stride = u.p.width * u.p.channels;
      const int64_t r = u.row_begin[i], rows = u.row_begin[i + 1] - r;
      const int64_t row = i * u.p.grid_w * u.channel_pitch;
      if (u.walk == Walk::kNarrow) {
        A* wide_products = wide + 2 * i * u.pitch;
        A* wide_values = wide_products + u.pitch;
        strip_sums<true>(maps, 0, u.row_begin + i, 1, stride, [&](int64_t, int64_t q, V value, V product) {
          store(wide_values + q, value);
          store(wide_products + q, product);
        });
        if (values) join_wide(u, wide_values, values + row);
        join_wide(u, wide_products, products + row);
        return;
      }
      for (int64_t j = 0; j < u.p.grid_w; ++j) {
        const int64_t q = u.col_begin[j], cell = row + j * u.channel_pitch;
        const int64_t e = r * stride + q * u.p.channels, cols = u.col_begin[j + 1] - q;
        if (values) {
          cell_sums<true>(maps, e, rows, cols, stride, u.p.channels, values + cell, products + cell);
        } else {
          cell_sums<false>(maps, e, rows, cols, stride, u.p.channels, static_cast<A*>(nullptr), products + cell);
        }
      }
    });
    pool_cells(StoredCells<L>{values, products, u.channel_pitch}, m.g, m.d, n, parallel);
  }

  template <class Cells>
  void pool_cells(const Cells& cells, const Gates<T>& g, const Grads& d, int64_t n,
                  const cpu::Parallel* parallel) const {
    const A* channel = channel_gate(g);
    A* gate_grad = d.channel_gate + u.ring.first;
    open_channels(g, 0, u.p.channels);
    for_tasks(parallel, u.p.grid_h, [&](int64_t i) {
      for (int64_t j = 0; j < u.p.grid_w; ++j) {
        const int64_t cell = i * u.p.grid_w + j;
        const A dot = sum_lanes<L>(sum_vectors<L>(
            u.p.channels,
            [&](int64_t c) STEAM_LAMBDA_INLINE { return load(channel + c) * cells.template product<true>(cell, c); },
            [&](int64_t c) { return load(channel + c) * cells.template product<false>(cell, c); }));
        d.spatial_gate[u.lattice.at(i, j)] = static_cast<A>(static_cast<double>(dot) * u.p.scale);
      }
    });
    spatial_backward(g, d, n, parallel);
    const int64_t vectors = u.channel_pitch / lanes, share = 16;
    for_tasks(parallel, (vectors + share - 1) / share, [&](int64_t t) {
      for_tiles<L, 6>(smaller(share, vectors - t * share), [&]<int U>(int64_t v) {
        const int64_t c = (t * share + v) * lanes;
        V total[U];
        for (int k = 0; k < U; ++k) total[k] = L::zero();
        for (int64_t i = 0; i < u.p.grid_h; ++i) {
          V sum[U];
          for (int k = 0; k < U; ++k) sum[k] = L::zero();
          for (int64_t j = 0; j < u.p.grid_w; ++j) {
            const int64_t cell = i * u.p.grid_w + j;
            const V gate = L::set(g.spatial.gate[u.lattice.at(i, j)] * static_cast<A>(u.p.scale));
            const V token = L::set(u.p.sequential ? token_share(d, i, j) : A{0});
            const auto add = [&]<bool kInside>() STEAM_LAMBDA_INLINE {
#pragma GCC unroll 16
              for (int k = 0; k < U; ++k) {
                const int64_t at = c + k * lanes;
                // The next tile's, as forwards.
                if (k * lanes * static_cast<int64_t>(sizeof(T)) % kLine == 0) cells.prefetch(cell, at + U * lanes);
                sum[k] += gate * cells.template product<kInside>(cell, at);
                if (u.p.sequential) sum[k] += token * cells.template value<kInside>(cell, at);
              }
            };
            if (__builtin_expect(cells.inside(cell, c + U * lanes), 1)) {
              add.template operator()<true>();
            } else {
              add.template operator()<false>();
            }
          }
#pragma GCC unroll 16
          for (int k = 0; k < U; ++k) total[k] += sum[k];
        }
#pragma GCC unroll 16
        for (int k = 0; k < U; ++k) store(gate_grad + c + k * lanes, total[k]);
      });
    });
    channel_backward(g, d, n, parallel);
  }

  void gate(int64_t n, const Source& maps, const Memory& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const Grads& d = m.d;
    const bool input = args.dx != nullptr;
    A *scaled = m.scaled, *offset = m.offset, *runs = m.runs;
    if (input) {
      const A scale = static_cast<A>(u.p.scale), mean = static_cast<A>(1.0 / static_cast<double>(u.pixels));
      for (int64_t c = 0; c < u.p.channels; c += lanes) {
        store(scaled + c, load(channel_gate(g) + c) * scale);
        store(offset + c, load(d.channel_token + u.ring.first + c) * mean);
      }
      if (u.walk != Walk::kChannels) {
        const A* share = token_weights(g);
        const bool narrow = u.walk == Walk::kNarrow;
        spread_runs(u, runs, [&](int64_t i, int64_t j, int64_t c) {
          const A gate = g.spatial.gate[u.lattice.at(i, j)];
          return narrow ? scaled[c] * gate : gate;
        });
        spread_runs(u, runs + u.runs * u.run_pitch, [&](int64_t i, int64_t j, int64_t c) {
          const A token = token_share(d, i, j);
          return narrow ? share[c] * token + offset[c] : token;
        });
      }
    }
    T* dx = input ? static_cast<T*>(args.dx) + n * u.sample : nullptr;
    T* dresidual = args.dresidual ? static_cast<T*>(args.dresidual) + n * u.sample : nullptr;
    const Outputs out{dx, dresidual, scaled, offset, runs};
    // Without a ReLU the residual's gradient is dy itself, and nobody asks for it.
    if (!kRelu || dresidual == nullptr) {
      gate_sample<true, false>(maps, out, g, d, parallel);
    } else if constexpr (kRelu) {
      with_bool(input, [&]<bool kInput>() { gate_sample<kInput, true>(maps, out, g, d, parallel); });
    }
  }

  struct Outputs {
    T *dx, *dresidual;
    const A *scaled, *offset, *runs;
  };

  template <bool kInput, bool kResidual>
  void gate_sample(const Source& maps, const Outputs& out, const Gates<T>& g, const Grads& d,
                   const cpu::Parallel* parallel) const {
    const A* share = token_weights(g);
    const int64_t tokens = u.runs * u.run_pitch;
    gate_walk<true, std::conditional_t<kInput, Sink<T>, NoSink<T>>, std::conditional_t<kResidual, Sink<T>, NoSink<T>>>(
        u, GateBackward<Source, kInput, kResidual>{maps, u.sample}, out.dx, out.dresidual, output_route(u), parallel,
        [&](int64_t i, int64_t j) {
          const A gate = kInput ? g.spatial.gate[u.lattice.at(i, j)] : A{0};
          return Along<L>{out.scaled, share, out.offset, u.channel_pitch, gate, kInput ? token_share(d, i, j) : A{0},
                          0};
        },
        [&](int64_t c, int64_t k) {
          const A* run = out.runs + k * u.run_pitch;
          return u.walk == Walk::kNarrow
                     ? Along<L>{run, run + tokens, nullptr, u.period, 1, 1, 0}
                     : Along<L>{run, run + tokens, nullptr, u.period, out.scaled[c], share[c], out.offset[c]};
        });
  }
};

// A weight's gradient from those of its heads' a and b (math, backward): each row takes its partner's row.
inline void write_weight_grad(const Problem& p, const Weight& weight, const WeightGrad& grad, const double* a_grad,
                              const double* b_grad) {
  if (grad.data == nullptr) return;
  const int64_t dim = p.embed_dim, width = dim / p.num_heads;
  const double root = 1 / sqrt(static_cast<double>(width));
  for (int64_t j = 0; j < dim; ++j) {
    const double a = a_grad[j / width] * root, b = b_grad[j / width];
    for (int64_t row = 0; row < 4; ++row) {
      const double partner = read_number(weight.data, weight.dtype, (row ^ 1) * dim + j);
      write_number(grad.data, grad.dtype, row * dim + j, (row < 2 ? a : b) * partner);
    }
  }
}

}  // namespace

namespace cpu {
std::size_t STEAM_NAME(backward_, STEAM_CPU_VARIANT)(const BackwardArgs& args, char* memory) {
  const Problem& p = args.problem;
  const int64_t heads = p.num_heads;
  Arena arena(memory);
  double* sums = arena.take<double>(larger<int64_t>(p.samples, 1), 4 * heads);
  if (memory) memset(sums, 0, sizeof(double) * static_cast<size_t>(larger<int64_t>(p.samples, 1) * 4 * heads));
  with_dtype(p.dtype, [&]<class T>() {
    if (p.samples == 0) return;
    const Unit<T> unit = make_unit<T>(p, arena);
    const Sharing sharing = make_sharing(unit, args.parallel.threads, arena, [&](int64_t) {
      Arena sample(nullptr);
      BackwardMemory<T>(unit, args, sample);
      return sample.used();
    });
    if (arena.counts()) return;
    fill_unit(unit, args.channel_weight, args.spatial_weight);
    with_bool(p.relu,
              [&]<bool kRelu>() { for_samples(sharing, args.parallel, BackwardWalk<T, kRelu>{unit, args, sums}); });
  });
  if (arena.counts()) return arena.used();
  // Samples in their order, whoever computed them.
  for (int64_t n = 1; n < p.samples; ++n) {
    for (int64_t k = 0; k < 4 * heads; ++k) sums[k] += sums[n * 4 * heads + k];
  }
  write_weight_grad(p, args.channel_weight, args.channel_grad, sums, sums + heads);
  write_weight_grad(p, args.spatial_weight, args.spatial_grad, sums + 2 * heads, sums + 3 * heads);
  return arena.used();
}
}  // namespace cpu
}  // namespace steam
