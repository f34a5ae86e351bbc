// The backward pass of one sample: pool, graph and gate while x and dy are in cache. Compiled once for each instruction
// set.
#include <type_traits>

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

template <class T, bool kRelu>
struct BackwardWalk {
  using L = Lanes<T>;
  using A = typename L::A;
  static constexpr int64_t lanes = L::kLanes;
  using Source = Maps<T, true, kRelu>;
  using Memory = BackwardMemory<T>;

  const Plan<T>& plan;
  const cpu::BackwardArgs& args;
  double* sums;  // (N, 4 * heads): a sample's gradients of the channel branch's a and b, then of the spatial branch's

  void operator()(int64_t n, const cpu::Parallel* parallel, char* memory) const {
    Arena arena(memory);
    const Memory m(plan, args, arena);
    const Source maps{map(args.x, n), map(args.dy, n), kRelu ? map(args.y, n) : nullptr, plan.sample_size};
    if (Memory::needs_tokens(args)) {
      restore(m.g, n);
      if (!plan.channels_last()) {
        nchw(maps, m, n, parallel);
      } else if (m.products != nullptr) {
        PoolBackward<T, kRelu>{plan}.sum_cells(maps, m, parallel);
        channels_last(StoredCells<L>{m.values, m.products, plan.channel_pitch}, m, n, parallel);
      } else {
        // A cell is a pixel, so x and dy * x are the sums of the cells.
        channels_last(LiveCells<Source>{maps, plan.problem.channels}, m, n, parallel);
      }
    }
    if (args.dx || args.dresidual) gate(n, maps, m, parallel);
  }

  // Pool and graph, NCHW.
  void nchw(const Source& maps, const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const PoolBackward<T, kRelu> pool{plan};
    pool.gate_grads(maps, m, parallel);
    graph_lattice(m, n, parallel);
    if (plan.problem.sequential) pool.add_token_grads(maps, m, parallel);
    graph_ring(m, n, parallel);
  }

  // Pool and graph, channels_last.
  template <class Cells>
  void channels_last(const Cells& cells, const Memory& m, int64_t n, const cpu::Parallel* parallel) const {
    const PoolBackward<T, kRelu> pool{plan};
    pool.spatial_gate_grads(cells, m, parallel);
    graph_lattice(m, n, parallel);
    pool.channel_gate_grads(cells, m, parallel);
    graph_ring(m, n, parallel);
  }

  const T* map(const void* base, int64_t n) const { return static_cast<const T*>(base) + n * plan.sample_size; }

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
    const bool input = args.dx != nullptr;
    A *scaled = m.scaled, *channel_shift = m.channel_shift, *runs = m.runs;
    if (input) {
      const A scale = static_cast<A>(plan.problem.scale), mean = static_cast<A>(1.0 / static_cast<double>(plan.pixels));
      for (int64_t c = 0; c < plan.problem.channels; c += lanes) {
        store(scaled + c, load(channel_gates(plan, g) + c) * scale);
        store(channel_shift + c, load(m.d.channel_token + plan.ring.first + c) * mean);
      }
      if (plan.walk != Walk::kChannels) {
        const A* weight = token_weights(plan, g);
        const bool narrow = plan.walk == Walk::kNarrow;
        spread_runs(plan, runs, [&](int64_t i, int64_t j, int64_t c) {
          const A gate = g.spatial.gate[plan.lattice.at(i, j)];
          return narrow ? scaled[c] * gate : gate;
        });
        spread_runs(plan, runs + plan.runs * plan.run_pitch, [&](int64_t i, int64_t j, int64_t c) {
          const A share = m.d.share(plan, i, j);
          return narrow ? weight[c] * share + channel_shift[c] : share;
        });
      }
    }
    T* dx = input ? static_cast<T*>(args.dx) + n * plan.sample_size : nullptr;
    T* dresidual = args.dresidual ? static_cast<T*>(args.dresidual) + n * plan.sample_size : nullptr;
    // Without a ReLU the gradient of the residual is dy itself, and args.dresidual is null.
    if (!kRelu || dresidual == nullptr) {
      gate_sample<true, false>(maps, dx, dresidual, m, parallel);
    } else if constexpr (kRelu) {
      with_bool(input, [&]<bool kInput>() { gate_sample<kInput, true>(maps, dx, dresidual, m, parallel); });
    }
  }

  template <bool kInput, bool kResidual>
  void gate_sample(const Source& maps, T* dx, T* dresidual, const Memory& m, const cpu::Parallel* parallel) const {
    const Gates<T>& g = m.g;
    const A* weight = token_weights(plan, g);
    const int64_t shifts = plan.runs * plan.run_pitch;  // from a pattern of gates to its pattern of spatial shifts
    gate_walk<true, std::conditional_t<kInput, Sink<T>, NoSink<T>>, std::conditional_t<kResidual, Sink<T>, NoSink<T>>>(
        plan, GateBackward<Source, kInput, kResidual>{maps, plan.sample_size}, dx, dresidual, output_route(plan),
        parallel,
        [&](int64_t i, int64_t j) {
          const A gate = kInput ? g.spatial.gate[plan.lattice.at(i, j)] : A{0};
          const A share = kInput ? m.d.share(plan, i, j) : A{0};
          return Along<L>{m.scaled, weight, m.channel_shift, plan.channel_pitch, gate, share, 0};
        },
        [&](int64_t c, int64_t k) {
          const A* run = m.runs + k * plan.run_pitch;
          return plan.walk == Walk::kNarrow
                     ? Along<L>{run, run + shifts, nullptr, plan.period, 1, 1, 0}
                     : Along<L>{run, run + shifts, nullptr, plan.period, m.scaled[c], weight[c], m.channel_shift[c]};
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
    with_bool(p.relu,
              [&]<bool kRelu>() { for_samples(schedule, args.parallel, BackwardWalk<T, kRelu>{plan, args, sums}); });
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
