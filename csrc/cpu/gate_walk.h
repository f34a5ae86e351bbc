// The walk of the gate stage over a sample: the order of its runs, and their tasks.
#pragma once

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

// Applies `op` to all elements of a sample, in the order of memory, and writes its output from `out` on.
// along_channels(i, j) gives the numbers along the channels of a pixel in cell (i, j), and along_run(c, k) those along
// run k of channel c (kNarrow: of all channels, c = 0).
template <bool kBackward, class T, class G, class P, class C>
void gate_walk(const Plan<T>& plan, const G& op, T* out, Route route, const cpu::Parallel* parallel,
               const P& along_channels, const C& along_run) {
  const auto with_sink = [&](int64_t begin, int64_t count, const auto& f) STEAM_LAMBDA_INLINE {
    Sink<T> sink(out + begin, count, route);
    f(sink);
    sink.finish();
  };
  if (plan.walk == Walk::kChannels) {
    const int64_t tasks = smaller<int64_t>(plan.problem.height, kGateTasks),
                  stride = plan.problem.width * plan.problem.channels;
    for_tasks(parallel, tasks, [&](int64_t t) {
      const int64_t begin = t * plan.problem.height / tasks, end = (t + 1) * plan.problem.height / tasks;
      with_sink(begin * stride, (end - begin) * stride, [&](Sink<T>& sink) STEAM_LAMBDA_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t i = r * plan.problem.grid_h / plan.problem.height;
          for (int64_t j = 0; j < plan.problem.grid_w; ++j) {
            const auto along = along_channels(i, j);
            const int64_t q = plan.col_begin[j], pixels = plan.col_begin[j + 1] - q;
            gate_runs<kBackward, true>(
                op, r * stride + q * plan.problem.channels, pixels, plan.problem.channels,
                [&](int64_t) { return along; }, sink);
          }
        }
      });
    });
  } else if (plan.walk == Walk::kNarrow) {
    for_tasks(parallel, plan.runs, [&](int64_t k) {
      with_sink(plan.run_begin(k), plan.run_length(k), [&](Sink<T>& sink) STEAM_LAMBDA_INLINE {
        gate_run<kBackward, false>(op, plan.run_begin(k), plan.run_length(k), along_run(0, k), sink);
      });
    });
  } else {
    for_tasks(parallel, plan.blocks, [&](int64_t b) {
      const int64_t begin = b * plan.block, count = smaller(plan.block, plan.problem.channels - begin);
      with_sink(begin * plan.pixels, count * plan.pixels, [&](Sink<T>& sink) STEAM_LAMBDA_INLINE {
        if (plan.run_is_map) {
          const auto along_map = [&](int64_t c) STEAM_LAMBDA_INLINE { return along_run(begin + c, 0); };
          constexpr int held = kBackward ? kHeldOfTwo<T> : kHeld<T>;
          if (plan.map_vectors() <= held) {
            with_unroll<held>(plan.map_vectors(), [&]<int kVectors>() {
              gate_short_runs<kBackward, kVectors>(op, begin * plan.pixels, count, plan.pixels, along_map, sink);
            });
          } else {
            gate_runs<kBackward, false>(op, begin * plan.pixels, count, plan.pixels, along_map, sink);
          }
          return;
        }
        for (int64_t c = begin; c < begin + count; ++c) {
          for (int64_t k = 0; k < plan.runs; ++k) {
            gate_run<kBackward, false>(op, c * plan.pixels + plan.run_begin(k), plan.run_length(k), along_run(c, k),
                                       sink);
          }
        }
      });
    });
  }
}

}  // namespace
}  // namespace steam
