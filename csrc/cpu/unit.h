// What a call works out once from its shape and weights, and how its samples are shared among threads.
#pragma once

#include <type_traits>

#include "../common/graph.h"
#include "../common/problem.h"
#include "gate.h"
#include "graph.h"
#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#include "threads.h"
#include "vec.h"

namespace steam {
namespace {

// How a sample is walked.
enum class Walk {
  kColumns,   // NCHW: column sums of each strip of rows
  kPixels,    // NCHW, small maps or cells one row high: x itself takes the place of column sums
  kChannels,  // channels_last: vectors of channels
  kNarrow,    // channels_last, fewer channels than lanes: a row of W * C numbers is one wide row
};

// Maps up to this many pixels take the walk kPixels: their sums are read again from cache faster than stored.
constexpr int64_t kSmallMap = 256;
// Maps up to this many pixels have their gate spelt out pixel by pixel; it must stay in the first-level cache.
constexpr int64_t kGateMap = 4096;
// Samples with fewer elements are never shared among threads.
constexpr int64_t kShareElements = 16384;

template <class T>
struct Unit {
  using L = Lanes<T>;
  using A = typename L::A;
  static constexpr int64_t lanes = L::kLanes;

  Problem p;
  Walk walk;
  int64_t pixels, cells, sample;  // H * W, gh * gw, C * H * W
  int64_t* row_begin;             // gh + 1
  int64_t* col_begin;             // gw + 1
  Branch<L> ring, lattice;
  Heads<L> channel, spatial;
  A* ones;  // C, padded; what weighs channels where space does not look at the gated map

  // Rows of column sums: `rows` of `length` numbers, each padded to `pitch`.
  int64_t rows, length, pitch;
  // Gate patterns: `runs` a channel, each `period` numbers and their first few again, `run_pitch` apart. Either the
  // whole map is one run, spelt out by pixel, or a row of cells is one, and its period a row of pixels.
  bool by_pixel;
  int64_t runs, period, run_pitch;
  // Blocks of channels: what a thread takes at a time, and within which sums are kept apart.
  int64_t block, blocks;
  int64_t channel_pitch;  // C padded to whole vectors

  int64_t sums() const { return rows * pitch; }
  int64_t row_vectors() const { return (pixels + lanes - 1) / lanes; }
  int64_t cell_size(int64_t i, int64_t j) const {
    return (row_begin[i + 1] - row_begin[i]) * (col_begin[j + 1] - col_begin[j]);
  }
  bool cells_are_pixels() const { return p.grid_h == p.height && p.grid_w == p.width; }
  // First element and length of run k of a channel's map (kNarrow: of the sample).
  int64_t run_begin(int64_t k) const { return by_pixel ? 0 : row_begin[k] * length; }
  int64_t run_length(int64_t k) const { return by_pixel ? period : (row_begin[k + 1] - row_begin[k]) * length; }
};

inline double read_number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat16: return to_double(static_cast<const Float16*>(data)[i]);
    case DType::kBFloat16: return to_double(static_cast<const BFloat16*>(data)[i]);
    default: return static_cast<double>(static_cast<const float*>(data)[i]);
  }
}

inline void write_number(void* data, DType dtype, int64_t i, double value) {
  const VecF v = LanesF::set(static_cast<float>(value));
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = value; return;
    case DType::kFloat16: return store_first(static_cast<Float16*>(data) + i, v, 1);
    case DType::kBFloat16: return store_first(static_cast<BFloat16*>(data) + i, v, 1);
    default: static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

template <class L>
Heads<L> make_heads(const Problem& p, Arena& arena) {
  using A = typename L::A;
  A* a = arena.take<A>(p.num_heads);
  return {a, arena.take<A>(p.num_heads), p.num_heads};
}
template <class L>
void fill_heads(const Heads<L>& heads, const Problem& p, const Weight& weight) {
  using A = typename L::A;
  const auto get = [&](int row, int column) {
    return read_number(weight.data, weight.dtype, row * static_cast<int64_t>(p.embed_dim) + column);
  };
  for (int32_t h = 0; h < p.num_heads; ++h) {
    double slope, gain;
    collapse_head(get, p.embed_dim, p.num_heads, h, slope, gain);
    heads.a[h] = static_cast<A>(slope);
    heads.b[h] = static_cast<A>(gain);
  }
}

// The unit's sizes, and places for what `fill_unit` writes.
template <class T>
Unit<T> make_unit(const Problem& problem, Arena& arena) {
  using U = Unit<T>;
  using L = typename U::L;
  U u{};
  u.p = problem;
  Problem& p = u.p;
  u.pixels = p.height * p.width;
  u.cells = p.grid_h * p.grid_w;
  u.sample = u.pixels * p.channels;
  // Where one axis is 1 both memory orders are one; take the one that vectorises.
  if (p.channels == 1) p.channels_last = false;
  if (u.pixels == 1) p.channels_last = true;
  if (p.channels_last) {
    u.walk = p.channels < U::lanes ? Walk::kNarrow : Walk::kChannels;
  } else {
    u.walk = u.pixels <= kSmallMap || p.grid_h == p.height ? Walk::kPixels : Walk::kColumns;
  }

  u.row_begin = arena.take<int64_t>(p.grid_h + 1);
  u.col_begin = arena.take<int64_t>(p.grid_w + 1);
  u.ring = ring_branch<L>(p, arena);
  u.lattice = lattice_branch<L>(p, arena);
  u.channel = make_heads<L>(p, arena);
  u.spatial = make_heads<L>(p, arena);

  u.rows = u.walk == Walk::kPixels ? 1 : p.grid_h;
  u.length = u.walk == Walk::kPixels ? u.pixels : u.walk == Walk::kNarrow ? p.width * p.channels : p.width;
  u.pitch = round_up(u.length, U::lanes);
  u.by_pixel = u.walk == Walk::kPixels || (u.walk == Walk::kColumns && u.pixels <= kGateMap);
  u.runs = u.by_pixel ? 1 : p.grid_h;
  u.period = u.by_pixel ? u.pixels : u.length;
  u.run_pitch = round_up(u.period + U::lanes, U::lanes);
  // A function of the shape alone: sums must not depend on the number of threads.
  u.block = round_up(larger<int64_t>(16, (p.channels + 31) / 32), 16);
  u.blocks = (p.channels + u.block - 1) / u.block;
  u.channel_pitch = round_up(p.channels, U::lanes);
  if (!p.sequential) u.ones = arena.take<typename U::A>(u.channel_pitch);
  return u;
}

template <class T>
void fill_unit(const Unit<T>& u, const Weight& channel_weight, const Weight& spatial_weight) {
  const Problem& p = u.p;
  for (int64_t i = 0; i <= p.grid_h; ++i) u.row_begin[i] = cell_begin(i, p.grid_h, p.height);
  for (int64_t j = 0; j <= p.grid_w; ++j) u.col_begin[j] = cell_begin(j, p.grid_w, p.width);
  fill_ring(u.ring, p);
  fill_lattice(u.lattice, p);
  fill_heads(u.channel, p, channel_weight);
  fill_heads(u.spatial, p, spatial_weight);
  for (int64_t c = 0; !p.sequential && c < u.channel_pitch; ++c) u.ones[c] = 1;
}

// One branch of one sample, in arrays of branch.size.
template <class L>
struct Nodes {
  typename L::A *token, *o, *gate;
  Nodes(const Branch<L>& branch, Arena& arena)
      : token(arena.take<typename L::A>(branch.size)),
        o(arena.take<typename L::A>(branch.size)),
        gate(arena.take<typename L::A>(branch.size)) {}
};

template <class T>
struct Gates {
  Nodes<Lanes<T>> channel, spatial;
  Gates(const Unit<T>& u, Arena& arena) : channel(u.ring, arena), spatial(u.lattice, arena) {}
};

// Outputs that our share of the last-level cache cannot hold beside their inputs go past it: they would evict what is
// still to be read.
template <class T>
Route output_route(const Unit<T>& u) {
  const int64_t bytes = u.p.samples * u.sample * static_cast<int64_t>(sizeof(T));
  return bytes > cpu::cache_bytes() / 2 ? Route::kStream : Route::kPlain;
}

// ---------------------------------------------------------------- between cells and maps

// cell[at(i, j)] = sum of the map (rows of column sums, or pixels) over the cell, times scale(i, j).
template <class T, class F>
void join_cells(const Unit<T>& u, const typename Unit<T>::A* map, typename Unit<T>::A* cell, const F& scale) {
  const bool by_pixel = u.walk == Walk::kPixels;
  for (int64_t i = 0; i < u.p.grid_h; ++i) {
    const int64_t r0 = by_pixel ? u.row_begin[i] : i, r1 = by_pixel ? u.row_begin[i + 1] : i + 1;
    const int64_t stride = by_pixel ? u.p.width : u.pitch;
    for (int64_t j = 0; j < u.p.grid_w; ++j) {
      double sum = 0;
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t q = u.col_begin[j]; q < u.col_begin[j + 1]; ++q) sum += static_cast<double>(map[r * stride + q]);
      }
      cell[u.lattice.at(i, j)] = static_cast<typename Unit<T>::A>(sum * scale(i, j));
    }
  }
}

// partial[0] += partial[1] + ...: the blocks' sums in their order, whoever formed them.
template <class T>
void join_blocks(const Unit<T>& u, typename Unit<T>::A* partial) {
  for (int64_t b = 1; b < u.blocks; ++b) {
    const auto* more = partial + b * u.sums();
    for (int64_t k = 0; k < u.sums(); k += Unit<T>::lanes) store(partial + k, load(partial + k) + load(more + k));
  }
}

// A cell's number at each of its columns: out[q * repeat + c] = f(i, j, c), for one row of cells.
template <class T, class F>
STEAM_INLINE void spread_row(const Unit<T>& u, int64_t i, int64_t repeat, typename Unit<T>::A* out, const F& f) {
  for (int64_t j = 0; j < u.p.grid_w; ++j) {
    for (int64_t q = u.col_begin[j]; q < u.col_begin[j + 1]; ++q) {
      for (int64_t c = 0; c < repeat; ++c) out[q * repeat + c] = f(i, j, c);
    }
  }
}

// The same in the geometry of column sums: `rows` of `pitch`, zeros in the padding.
template <class T, class F>
void spread_sums(const Unit<T>& u, typename Unit<T>::A* out, const F& f) {
  using A = typename Unit<T>::A;
  for (int64_t i = 0; i < u.p.grid_h; ++i) {
    if (u.walk == Walk::kPixels) {
      A* row = out + u.row_begin[i] * u.p.width;
      spread_row(u, i, 1, row, f);
      for (int64_t r = 1; r < u.row_begin[i + 1] - u.row_begin[i]; ++r) {
        memcpy(row + r * u.p.width, row, sizeof(A) * static_cast<size_t>(u.p.width));
      }
    } else {
      spread_row(u, i, 1, out + i * u.pitch, f);
    }
  }
  for (int64_t i = 0; i < u.rows; ++i) {
    for (int64_t q = u.length; q < u.pitch; ++q) out[i * u.pitch + q] = 0;
  }
}

// And in the geometry of gate patterns: each run once, and then its beginning again.
template <class T, class F>
void spread_runs(const Unit<T>& u, typename Unit<T>::A* out, const F& f) {
  using A = typename Unit<T>::A;
  const int64_t repeat = u.walk == Walk::kNarrow ? u.p.channels : 1;
  for (int64_t i = 0; i < u.p.grid_h; ++i) {
    if (u.by_pixel) {
      A* row = out + u.row_begin[i] * u.p.width;
      spread_row(u, i, repeat, row, f);
      for (int64_t r = 1; r < u.row_begin[i + 1] - u.row_begin[i]; ++r) {
        memcpy(row + r * u.p.width, row, sizeof(A) * static_cast<size_t>(u.p.width));
      }
    } else {
      spread_row(u, i, repeat, out + i * u.run_pitch, f);
    }
  }
  for (int64_t k = 0; k < u.runs; ++k) {
    A* run = out + k * u.run_pitch;
    for (int64_t q = u.period; q < u.run_pitch; ++q) run[q] = run[q - u.period];
  }
}

// channels_last with few channels: cells[j][c] from the wide column sums of one row of cells.
template <class T>
void join_wide(const Unit<T>& u, const typename Unit<T>::A* sums, typename Unit<T>::A* cells) {
  for (int64_t j = 0; j < u.p.grid_w; ++j) {
    for (int64_t c = 0; c < u.p.channels; ++c) {
      double sum = 0;
      for (int64_t q = u.col_begin[j]; q < u.col_begin[j + 1]; ++q) {
        sum += static_cast<double>(sums[q * u.p.channels + c]);
      }
      cells[j * u.channel_pitch + c] = static_cast<typename Unit<T>::A>(sum);
    }
  }
}

// ---------------------------------------------------------------- threads

// How a batch goes to threads: whole samples side by side, and those left over shared by all threads. What is summed
// together never depends on which way a sample went.
struct Sharing {
  int64_t samples, side_by_side, workers, threads;
  // Working memory of a sample on one thread, and of one that is shared.
  std::size_t alone_bytes, shared_bytes;
  char* memory;  // of the workers, or of a shared sample
};

// bytes_of(threads): the working memory of a sample that so many threads share.
template <class T, class F>
Sharing make_sharing(const Unit<T>& u, int64_t threads, Arena& arena, const F& bytes_of) {
  Sharing s{};
  const int64_t n = u.p.samples;
  s.samples = n;
  s.threads = threads;
  const bool tiny = n * u.sample < kShareElements;
  const bool shareable = u.sample >= kShareElements;
  s.side_by_side = threads < 2 || tiny ? n : n / threads * threads;
  const int64_t left = n - s.side_by_side;
  // Sharing a sample costs a few barriers, an idle thread costs its share of a sample.
  if (!shareable || left * 4 >= threads * 3) s.side_by_side = n;
  s.workers = threads < 2 || tiny ? 1 : smaller(threads, s.side_by_side);
  s.alone_bytes = s.side_by_side > 0 ? Arena::slice(bytes_of(1)) : 0;
  s.shared_bytes = s.side_by_side < n ? bytes_of(threads) : 0;
  Arena workers(nullptr);
  workers.take_slices(s.workers, s.alone_bytes);
  s.memory = arena.take_slices(1, larger(workers.used(), s.shared_bytes));
  return s;
}

// sample(n, parallel, memory) for every sample.
template <class F>
void for_samples(const Sharing& s, const cpu::Parallel& parallel, const F& sample) {
  for_tasks(s.workers > 1 ? &parallel : nullptr, s.workers, [&](int64_t w) {
    char* memory = s.memory + static_cast<std::size_t>(w) * s.alone_bytes;
    for (int64_t i = w * s.side_by_side / s.workers; i < (w + 1) * s.side_by_side / s.workers; ++i) {
      sample(i, nullptr, memory);
    }
  });
  for (int64_t i = s.side_by_side; i < s.samples; ++i) sample(i, &parallel, s.memory);
}

// The last stage of a sample, in whichever order its memory is walked: `op` over all elements, outputs to one or two
// sinks. by_pixel(i, j) says what the channels of a pixel in cell (i, j) go by, by_channel(c, k) the same for run k of
// a channel.
template <bool kBackward, class S1, class S2, class T, class G, class P, class C>
void gate_walk(const Unit<T>& u, const G& op, T* out, T* second, Route route, const cpu::Parallel* parallel,
               const P& by_pixel, const C& by_channel) {
  const auto sinks = [&](int64_t begin, int64_t count, const auto& f) STEAM_LAMBDA_INLINE {
    S1 sink(ahead(out, begin), count, route);
    S2 other(ahead(second, begin), count, route);
    f(sink, other);
    sink.finish();
    other.finish();
  };
  if (u.walk == Walk::kChannels) {
    const int64_t tasks = smaller<int64_t>(u.p.height, 32), stride = u.p.width * u.p.channels;
    for_tasks(parallel, tasks, [&](int64_t t) {
      const int64_t begin = t * u.p.height / tasks, end = (t + 1) * u.p.height / tasks;
      sinks(begin * stride, (end - begin) * stride, [&](S1& sink, S2& other) STEAM_LAMBDA_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t i = r * u.p.grid_h / u.p.height;
          for (int64_t j = 0; j < u.p.grid_w; ++j) {
            const auto along = by_pixel(i, j);
            const int64_t q = u.col_begin[j], pixels = u.col_begin[j + 1] - q;
            gate_runs<kBackward, true>(
                op, r * stride + q * u.p.channels, pixels, u.p.channels, [&](int64_t) { return along; }, sink, other);
          }
        }
      });
    });
  } else if (u.walk == Walk::kNarrow) {
    for_tasks(parallel, u.runs, [&](int64_t k) {
      sinks(u.run_begin(k), u.run_length(k), [&](S1& sink, S2& other) STEAM_LAMBDA_INLINE {
        gate_run<kBackward, false>(op, u.run_begin(k), u.run_length(k), by_channel(0, k), sink, other);
      });
    });
  } else {
    for_tasks(parallel, u.blocks, [&](int64_t b) {
      const int64_t begin = b * u.block, count = smaller(u.block, u.p.channels - begin);
      sinks(begin * u.pixels, count * u.pixels, [&](S1& sink, S2& other) STEAM_LAMBDA_INLINE {
        if (u.by_pixel) {
          const auto along = [&](int64_t c) STEAM_LAMBDA_INLINE { return by_channel(begin + c, 0); };
          constexpr int held = kBackward ? kHeldOfTwo : kHeld;
          if (sizeof(typename Unit<T>::A) == 4 && u.row_vectors() <= held) {
            with_unroll<held>(u.row_vectors(), [&]<int U>() {
              gate_short_runs<kBackward, U>(op, begin * u.pixels, count, u.pixels, along, sink, other);
            });
          } else {
            gate_runs<kBackward, false>(op, begin * u.pixels, count, u.pixels, along, sink, other);
          }
          return;
        }
        for (int64_t c = begin; c < begin + count; ++c) {
          for (int64_t k = 0; k < u.runs; ++k) {
            gate_run<kBackward, false>(op, c * u.pixels + u.run_begin(k), u.run_length(k), by_channel(c, k), sink,
                                       other);
          }
        }
      });
    });
  }
}

template <class F>
STEAM_INLINE void with_bool(bool value, const F& f) {
  if (value) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

template <class F>
STEAM_INLINE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float>();
    case DType::kFloat64: return f.template operator()<double>();
    case DType::kFloat16: return f.template operator()<Float16>();
    case DType::kBFloat16: return f.template operator()<BFloat16>();
  }
}

}  // namespace
}  // namespace steam
