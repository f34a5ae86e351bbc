// The plan of a call: all that follows from its shape, options and weights, and is the same for all samples.
#pragma once

#include "../common/problem.h"
#include "branch.h"
#include "scratch.h"
#include "vec.h"
#include "weights.h"

namespace steam {
namespace {

// The order in which a kernel reads the memory of a sample.
enum class Walk {
  kColumns,   // NCHW: column sums of each strip
  kPixels,    // NCHW, small maps or cells one row high: x itself takes the place of column sums
  kChannels,  // channels_last: vectors of channels
  kNarrow,    // channels_last, fewer channels than lanes: a row of W * C numbers is one wide row
};

// Maps of at most this many pixels take the walk kPixels: a second read of x from cache is faster than stored sums.
constexpr int64_t kSmallMap = 256;
// Maps of at most this many pixels have one gate pattern for the whole map, which must stay in the first-level cache.
constexpr int64_t kPatternMap = 4096;

template <class T>
struct Plan {
  using L = Lanes<T>;
  using A = typename L::A;
  static constexpr int64_t lanes = L::kLanes;

  Problem problem;
  Walk walk;
  int64_t pixels, cells, sample_size;  // H * W, gh * gw, C * H * W
  int64_t* row_begin;  // (gh + 1): row of cells i has the rows of pixels row_begin[i] ... row_begin[i + 1] - 1
  int64_t* col_begin;  // (gw + 1): the same for columns
  Branch<L> ring, lattice;
  Heads<L> channel, spatial;
  A* ones;  // (channel_pitch): the channels' weights in the spatial tokens with order="parallel", else null

  // The sums of one channel: `sum_rows` rows of `sum_length` numbers, each row padded to `sum_pitch`. They are the
  // column sums of each strip, or, with kPixels, one row of all pixels.
  int64_t sum_rows, sum_length, sum_pitch;

  // The gate patterns of one channel (Along in gate.h): `runs` patterns of `period` numbers, `run_pitch` apart. Either
  // the whole map is one run and its period, or each row of cells is a run, with a row of pixels as its period.
  bool run_is_map;
  int64_t runs, period, run_pitch;

  // A block is the channels that a thread takes at a time. Each block has its own partial sums.
  int64_t block, blocks;
  int64_t channel_pitch;  // C, padded to whole vectors

  bool channels_last() const { return walk == Walk::kChannels || walk == Walk::kNarrow; }
  bool cells_are_pixels() const { return problem.grid_h == problem.height && problem.grid_w == problem.width; }
  int64_t sums() const { return sum_rows * sum_pitch; }
  int64_t map_vectors() const { return (pixels + lanes - 1) / lanes; }
  int64_t cell_size(int64_t i, int64_t j) const {
    return (row_begin[i + 1] - row_begin[i]) * (col_begin[j + 1] - col_begin[j]);
  }
  int64_t block_begin(int64_t b) const { return b * block; }
  int64_t block_end(int64_t b) const { return smaller((b + 1) * block, problem.channels); }
  // The first element and the length of run k, in the map of a channel, or (kNarrow) in the sample.
  int64_t run_begin(int64_t k) const { return run_is_map ? 0 : row_begin[k] * sum_length; }
  int64_t run_length(int64_t k) const { return run_is_map ? period : (row_begin[k + 1] - row_begin[k]) * sum_length; }
};

// The sizes of a plan, and memory for the arrays that `fill_plan` writes.
template <class T>
Plan<T> make_plan(const Problem& problem, Arena& arena) {
  using L = typename Plan<T>::L;
  constexpr int64_t lanes = Plan<T>::lanes;
  Plan<T> plan{};
  plan.problem = problem;
  plan.pixels = problem.height * problem.width;
  plan.cells = problem.grid_h * problem.grid_w;
  plan.sample_size = plan.pixels * problem.channels;
  // If C or H * W is 1, both memory formats are the same memory, and the walk is the one with whole vectors.
  bool channels_last = problem.channels_last;
  if (problem.channels == 1) channels_last = false;
  if (plan.pixels == 1) channels_last = true;
  if (channels_last) {
    plan.walk = problem.channels < lanes ? Walk::kNarrow : Walk::kChannels;
  } else {
    plan.walk = plan.pixels <= kSmallMap || problem.grid_h == problem.height ? Walk::kPixels : Walk::kColumns;
  }

  plan.row_begin = arena.take<int64_t>(problem.grid_h + 1);
  plan.col_begin = arena.take<int64_t>(problem.grid_w + 1);
  plan.ring = ring_branch<L>(problem, arena);
  plan.lattice = lattice_branch<L>(problem, arena);
  plan.channel = make_heads<L>(problem, arena);
  plan.spatial = make_heads<L>(problem, arena);

  plan.sum_rows = plan.walk == Walk::kPixels ? 1 : problem.grid_h;
  plan.sum_length = plan.walk == Walk::kPixels   ? plan.pixels
                    : plan.walk == Walk::kNarrow ? problem.width * problem.channels
                                                 : problem.width;
  plan.sum_pitch = round_up(plan.sum_length, lanes);
  plan.run_is_map = plan.walk == Walk::kPixels || (plan.walk == Walk::kColumns && plan.pixels <= kPatternMap);
  plan.runs = plan.run_is_map ? 1 : problem.grid_h;
  plan.period = plan.run_is_map ? plan.pixels : plan.sum_length;
  plan.run_pitch = round_up(plan.period + lanes, lanes);
  // The size of a block follows from the shape alone, because sums must not depend on the number of threads.
  plan.block = round_up(larger<int64_t>(16, (problem.channels + 31) / 32), 16);
  plan.blocks = (problem.channels + plan.block - 1) / plan.block;
  plan.channel_pitch = round_up(problem.channels, lanes);
  if (!problem.sequential) plan.ones = arena.take<typename Plan<T>::A>(plan.channel_pitch);
  return plan;
}

template <class T>
void fill_plan(const Plan<T>& plan, const Weight& channel_weight, const Weight& spatial_weight) {
  const Problem& problem = plan.problem;
  for (int64_t i = 0; i <= problem.grid_h; ++i) plan.row_begin[i] = cell_begin(i, problem.grid_h, problem.height);
  for (int64_t j = 0; j <= problem.grid_w; ++j) plan.col_begin[j] = cell_begin(j, problem.grid_w, problem.width);
  fill_ring(plan.ring, problem);
  fill_lattice(plan.lattice, problem);
  fill_heads(plan.channel, problem, channel_weight);
  fill_heads(plan.spatial, problem, spatial_weight);
  for (int64_t c = 0; !problem.sequential && c < plan.channel_pitch; ++c) plan.ones[c] = 1;
}

// Tokens, pre-activations and gates of both branches of one sample.
template <class T>
struct Gates {
  Nodes<Lanes<T>> channel, spatial;
  Gates(const Plan<T>& plan, Arena& arena) : channel(plan.ring, arena), spatial(plan.lattice, arena) {}
};

// The channel gates of a sample, C numbers.
template <class T>
typename Plan<T>::A* channel_gates(const Plan<T>& plan, const Gates<T>& g) {
  return g.channel.gate + plan.ring.first;
}

// The channels' weights in the spatial tokens: their gates with order="sequential", else 1 (docs/math.md, "Forward").
template <class T>
const typename Plan<T>::A* token_weights(const Plan<T>& plan, const Gates<T>& g) {
  return plan.problem.sequential ? channel_gates(plan, g) : plan.ones;
}

}  // namespace
}  // namespace steam
