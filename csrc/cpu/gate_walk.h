// The walk of the gate stage over a sample: the order of its runs, and their tasks.
#pragma once

#include <type_traits>

#include "choose.h"
#include "gate.h"
#include "plan.h"
#include "pool.h"
#include "sink.h"
#include "threads.h"

namespace steam {
namespace {

// kChannels: the tasks of a sample, at most.
constexpr int64_t kGateTasks = 32;

// Applies `op` to all elements of a sample, in the order of memory, and writes its outputs from `out` and `second` on.
// along_channels(i, j) gives the numbers along the channels of a pixel in cell (i, j), and along_run(c, k) those along
// run k of channel c (kNarrow: of all channels, c = 0).
template <bool kBackward, class S1, class S2, class T, class G, class P, class C>
void gate_walk(const Plan<T>& plan, const G& op, T* out, T* second, Route route, const cpu::Parallel* parallel,
               const P& along_channels, const C& along_run) {
  const auto sinks = [&](int64_t begin, int64_t count, const auto& f) STEAM_LAMBDA_INLINE {
    S1 sink(ahead(out, begin), count, route);
    S2 other(ahead(second, begin), count, route);
    f(sink, other);
    sink.finish();
    other.finish();
  };
  if (plan.walk == Walk::kChannels) {
    const int64_t tasks = smaller<int64_t>(plan.problem.height, kGateTasks),
                  stride = plan.problem.width * plan.problem.channels;
    for_tasks(parallel, tasks, [&](int64_t t) {
      const int64_t begin = t * plan.problem.height / tasks, end = (t + 1) * plan.problem.height / tasks;
      sinks(begin * stride, (end - begin) * stride, [&](S1& sink, S2& other) STEAM_LAMBDA_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t i = r * plan.problem.grid_h / plan.problem.height;
          for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
            const auto along = along_channels(i, j);
            const int64_t q = plan.col_begin[j], pixels = plan.col_begin[j + 1] - q;
            gate_runs<kBackward, true>(
                op, r * stride + q * plan.problem.channels, pixels, plan.problem.channels,
                [&](int64_t) { return along; }, sink, other);
          }
        }
      });
    });
  } else if (plan.walk == Walk::kNarrow) {
    for_tasks(parallel, plan.runs, [&](int64_t k) {
      sinks(plan.run_begin(k), plan.run_length(k), [&](S1& sink, S2& other) STEAM_LAMBDA_INLINE {
        gate_run<kBackward, false>(op, plan.run_begin(k), plan.run_length(k), along_run(0, k), sink, other);
      });
    });
  } else {
    for_tasks(parallel, plan.blocks, [&](int64_t b) {
      const int64_t begin = b * plan.block, count = smaller(plan.block, plan.problem.channels - begin);
      sinks(begin * plan.pixels, count * plan.pixels, [&](S1& sink, S2& other) STEAM_LAMBDA_INLINE {
        if (plan.run_is_map) {
          const auto along_map = [&](int64_t c) STEAM_LAMBDA_INLINE { return along_run(begin + c, 0); };
          constexpr int held = kBackward ? kHeldOfTwo<T> : kHeld<T>;
          if (plan.map_vectors() <= held) {
            with_unroll<held>(plan.map_vectors(), [&]<int kVectors>() {
              gate_short_runs<kBackward, kVectors>(op, begin * plan.pixels, count, plan.pixels, along_map, sink, other);
            });
          } else {
            gate_runs<kBackward, false>(op, begin * plan.pixels, count, plan.pixels, along_map, sink, other);
          }
          return;
        }
        for (int64_t c = begin; c < begin + count; ++c) {
          for (int64_t k = 0; k < plan.runs; ++k) {
            gate_run<kBackward, false>(op, c * plan.pixels + plan.run_begin(k), plan.run_length(k), along_run(c, k),
                                       sink, other);
          }
        }
      });
    });
  }
}

}  // namespace
}  // namespace steam
