// The backward pass of one sample: pool, graph and gate while x and dy are in cache. Compiled once for each instruction
// set.
#include "backward_memory.h"
#include "cells.h"
#include "choose.h"
#include "gate.h"
#include "gate_walk.h"
#include "graph.h"
#include "kernels.h"
#include "maps.h"
#include "plan.h"
#include "pool_backward.h"
#include "samples.h"
#include "weights.h"

namespace steam {
namespace {

template <class T>
struct BackwardWalk {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  static constexpr int64_t lanes = L::kLanes;
  using Source = Maps<T, true>;
  using Memory = BackwardMemory<T>;

  const Plan<T>& plan;
  const cpu::BackwardArgs& args;
  double* sums;  // (N, 4 * heads): a sample's gradients of the channel branch's a and b, then of the spatial branch's

  void operator()(int64_t n, const cpu::Parallel* parallel, char* memory) const {
    Arena arena(memory);
    const Memory m(plan, args, arena);
    const T* dy = plan.problem.relu ? mask(n, m, parallel) : map(args.dy, n);
    const Source maps{map(args.x, n), dy, plan.sample_size};
    if (Memory::needs_tokens(args)) {
      restore(m.g, n);
      if (!plan.channels_last()) {
        nchw(maps, m, n, parallel);
      } else if (m.products != nullptr) {
        PoolBackward<T>{plan}.sum_cells(maps, m, parallel);
        channels_last(StoredCells<L>{m.values, m.products, plan.channel_pitch}, m, n, parallel);
      } else {
        // A cell is a pixel, so x and dy * x are the sums of the cells.
        channels_last(LiveCells<Source>{maps, plan.problem.channels}, m, n, parallel);
      }
    }
    if (args.dx) gate(n, maps, m, parallel);
  }

  // With a ReLU: dy where the output is positive, else 0. This is the gradient of the residual, and the dy of all that
  // follows. Where the caller does not ask for it, it is in the memory of dx or in working memory.
  const T* mask(int64_t n, const Memory& m, const cpu::Parallel* parallel) const {
    const T *dy = map(args.dy, n), *y = map(args.y, n);
    T* out = args.dresidual ? output(args.dresidual, n) : args.dx ? output(args.dx, n) : m.masked;
    // A NaN in y lets the gradient through, as in PyTorch's ReLU.
    const auto masked = [](V g, V made) STEAM_LAMBDA_INLINE { return L::select(made <= L::zero(), L::zero(), g); };
    const int64_t vectors = plan.sample_size / lanes, rest = plan.sample_size % lanes;
    const int64_t tasks = smaller(kGateTasks, larger<int64_t>(vectors, 1));
    for_tasks(parallel, tasks, [&](int64_t t) {
      const int64_t end = (t + 1) * vectors / tasks * lanes;
      for (int64_t e = t * vectors / tasks * lanes; e < end; e += lanes)
        store(out + e, masked(load(dy + e), load(y + e)));
    });
    const int64_t e = vectors * lanes;
    if (rest) store_first(out + e, masked(load_first(dy + e, rest), load_first(y + e, rest)), rest);
    return out;
  }

  // Pool and graph, NCHW.
  void nchw(const Source& maps, const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const PoolBackward<T> pool{plan};
    pool.gate_grads(maps, m, parallel);
    graph_lattice(m, n, parallel);
    if (plan.problem.sequential) pool.add_token_grads(maps, m, parallel);
    graph_ring(m, n, parallel);
  }

  // Pool and graph, channels_last.
  template <class Cells>
  void channels_last(const Cells& cells, const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const PoolBackward<T> pool{plan};
    pool.spatial_gate_grads(cells, m, parallel);
    graph_lattice(m, n, parallel);
    pool.channel_gate_grads(cells, m, parallel);
    graph_ring(m, n, parallel);
  }

  const T* map(const void* base, int64_t n) const { return static_cast<const T*>(base) + n * plan.sample_size; }
  T* output(void* base, int64_t n) const { return static_cast<T*>(base) + n * plan.sample_size; }

  // The saved tokens and pre-activations, and the spatial gates. Tasks of the pool stage open the channel gates.
  void restore(const Gates<T>& g, int64_t n) const {
    const int64_t channels = plan.problem.channels;
    const A* row = static_cast<const A*>(args.saved) + n * 2 * (channels + plan.cells);
    scatter_nodes(plan.ring, row, g.channel.token);
    scatter_nodes(plan.ring, row + channels, g.channel.o);
    scatter_nodes(plan.lattice, row + 2 * channels, g.spatial.token);
    scatter_nodes(plan.lattice, row + 2 * channels + plan.cells, g.spatial.o);
    open_gates<L>({plan.lattice.first, plan.lattice.first + plan.lattice.span}, g.spatial.o, g.spatial.gate);
  }

  // From the gradients of the spatial gates to those of the spatial tokens, and to the shares.
  void graph_lattice(const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const Grads<T>& d = m.d;
    const int64_t heads = plan.channel.count;
    graph_backward<L>(plan.lattice, plan.spatial, g.spatial.token, g.spatial.o, d.spatial_gate, d.spatial_token,
                      d.spatial_tape, sums + n * 4 * heads + 2 * heads, parallel);
    for (int64_t i = 0; i < plan.problem.grid_h; ++i) {
      for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
        const int64_t at = plan.lattice.at(i, j);
        d.spatial_share[at] =
            static_cast<A>(static_cast<double>(d.spatial_token[at]) /
                           (static_cast<double>(plan.problem.channels) * static_cast<double>(plan.cell_size(i, j))));
      }
    }
  }

  // From the gradients of the channel gates to those of the channel tokens.
  void graph_ring(const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const Grads<T>& d = m.d;
    graph_backward<L>(plan.ring, plan.channel, g.channel.token, g.channel.o, d.channel_gate, d.channel_token,
                      d.channel_tape, sums + n * 4 * plan.channel.count, parallel);
  }

  void gate(int64_t n, const Source& maps, const Memory& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    A *scaled = m.scaled, *channel_shift = m.channel_shift, *runs = m.runs;
    const A* weight = token_weights(plan, g);
    const A scale = static_cast<A>(plan.problem.scale), mean = static_cast<A>(1.0 / static_cast<double>(plan.pixels));
    for (int64_t c = 0; c < plan.problem.channels; c += lanes) {
      store(scaled + c, load(channel_gates(plan, g) + c) * scale);
      store(channel_shift + c, load(m.d.channel_token + plan.ring.first + c) * mean);
    }
    const int64_t shifts = plan.runs * plan.run_pitch;  // from a pattern of gates to its pattern of spatial shifts
    const bool narrow = plan.walk == Walk::kNarrow;
    if (plan.walk != Walk::kChannels) {
      spread_runs(plan, runs, [&](int64_t i, int64_t j, int64_t c) {
        const A gate = g.spatial.gate[plan.lattice.at(i, j)];
        return narrow ? scaled[c] * gate : gate;
      });
      spread_runs(plan, runs + shifts, [&](int64_t i, int64_t j, int64_t c) {
        const A share = m.d.share(plan, i, j);
        return narrow ? weight[c] * share + channel_shift[c] : share;
      });
    }
    T* dx = output(args.dx, n);
    gate_walk<true>(
        plan, GateBackward<Source>{maps, plan.sample_size}, dx,
        maps.dy == dx ? Route::kStaged : output_route(plan, args.parallel.threads), parallel,
        [&](int64_t i, int64_t j) {
          return Along<L>{scaled,
                          weight,
                          channel_shift,
                          plan.channel_pitch,
                          g.spatial.gate[plan.lattice.at(i, j)],
                          m.d.share(plan, i, j),
                          0};
        },
        [&](int64_t c, int64_t k) {
          const A* run = runs + k * plan.run_pitch;
          return narrow ? Along<L>{run, run + shifts, nullptr, plan.period, 1, 1, 0}
                        : Along<L>{run, run + shifts, nullptr, plan.period, scaled[c], weight[c], channel_shift[c]};
        });
  }
};

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
    const Plan<T> plan = make_plan<T>(p, arena);
    const Schedule schedule = make_schedule(plan, args.parallel.threads, arena, [&](int64_t) {
      Arena sample(nullptr);
      BackwardMemory<T>(plan, args, sample);
      return sample.used();
    });
    if (arena.counts()) return;
    fill_plan(plan, args.channel_weight, args.spatial_weight);
    for_samples(schedule, args.parallel, BackwardWalk<T>{plan, args, sums});
  });
  if (arena.counts()) return arena.used();
  // The sum over samples has the order of the samples, on any number of threads.
  for (int64_t n = 1; n < p.samples; ++n) {
    for (int64_t k = 0; k < 4 * heads; ++k) sums[k] += sums[n * 4 * heads + k];
  }
  write_weight_grad(p, args.channel_weight, args.channel_grad, sums, sums + heads);
  write_weight_grad(p, args.spatial_weight, args.spatial_grad, sums + 2 * heads, sums + 3 * heads);
  return arena.used();
}
}  // namespace cpu
}  // namespace steam
