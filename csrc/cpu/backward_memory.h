// The working memory of one sample in the backward pass.
#pragma once

#include "graph.h"
#include "kernels.h"
#include "plan.h"
#include "scratch.h"

namespace steam {
namespace {

// The gradients of the gates (later of the pre-activations) and of the tokens, in the arrays of their branches.
template <class T>
struct Grads {
  using L = Lanes<T>;
  using A = typename L::A;
  A *channel_gate, *channel_token, *spatial_gate, *spatial_token;
  A* spatial_share;  // the shares s of docs/math.md
  GraphTape<L> channel_tape, spatial_tape;

  Grads(const Plan<T>& plan, Arena& arena)
      : channel_gate(arena.take<A>(plan.ring.size)),
        channel_token(arena.take<A>(plan.ring.size)),
        spatial_gate(arena.take<A>(plan.lattice.size)),
        spatial_token(arena.take<A>(plan.lattice.size)),
        spatial_share(arena.take<A>(plan.lattice.size)),
        channel_tape(make_tape(plan.ring, plan.channel, arena)),
        spatial_tape(make_tape(plan.lattice, plan.spatial, arena)) {}

  A share(const Plan<T>& plan, int64_t i, int64_t j) const { return spatial_share[plan.lattice.at(i, j)]; }
};

template <class T>
struct BackwardMemory {
  using A = typename Lanes<T>::A;

  Gates<T> g;
  Grads<T> d;
  // NCHW.
  A* spread = nullptr;          // a number of each cell, in the form of a channel's sums
  A* partial = nullptr;         // the partial sums of dy * x over channels, of each block
  A* columns = nullptr;         // kColumns, order="sequential": the column sums of x, of all channels
  A* through_tokens = nullptr;  // order="sequential": the channel gates' gradients through the spatial tokens
  // channels_last, unless x and dy themselves hold the sums of the cells.
  A* products = nullptr;  // the sums of dy * x over the cells
  A* values = nullptr;    // order="sequential": the sums of x over the cells
  A* wide = nullptr;      // kNarrow: wide column sums of both
  T* masked = nullptr;    // dy masked by the ReLU, if no output is asked for that can hold it
  // The gate stage.
  A* scaled = nullptr;         // scale * g_c of each channel
  A* channel_shift = nullptr;  // dz / (H * W) of each channel
  A* runs = nullptr;           // all walks but kChannels: the patterns of the gates, and then of the spatial shifts

  BackwardMemory(const Plan<T>& plan, const cpu::BackwardArgs& args, Arena& arena) : g(plan, arena), d(plan, arena) {
    if (plan.problem.relu && !args.dx && !args.dresidual) masked = arena.take<T>(plan.sample_size);
    if (needs_tokens(args)) {
      if (!plan.channels_last()) {
        spread = arena.take<A>(plan.sums());
        partial = arena.take<A>(plan.blocks, plan.sums());
        if (plan.problem.sequential && plan.walk == Walk::kColumns) {
          columns = arena.take<A>(plan.problem.channels, plan.sums());
        }
        if (plan.problem.sequential) through_tokens = arena.take<A>(plan.channel_pitch);
      } else if (plan.walk == Walk::kNarrow || !plan.cells_are_pixels()) {
        products = arena.take<A>(plan.cells, plan.channel_pitch);
        if (plan.problem.sequential) values = arena.take<A>(plan.cells, plan.channel_pitch);
        if (plan.walk == Walk::kNarrow) wide = arena.take<A>(2, plan.sums());
      }
    }
    scaled = arena.take<A>(plan.channel_pitch);
    channel_shift = arena.take<A>(plan.channel_pitch);
    if (plan.walk != Walk::kChannels) runs = arena.take<A>(2 * plan.runs, plan.run_pitch);
  }

  // The gradient of the residual alone needs no gradient of a token.
  static bool needs_tokens(const cpu::BackwardArgs& args) {
    return args.dx || args.channel_grad.data || args.spatial_grad.data;
  }
};

}  // namespace
}  // namespace steam
