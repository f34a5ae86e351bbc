// Work shared among threads.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace steam {
namespace {

// f(task) for all tasks: on the threads of `parallel`, or one after another where there is none.
template <class F>
STEAM_INLINE void for_tasks(const cpu::Parallel* parallel, int64_t tasks, const F& f) {
  if (parallel == nullptr || tasks < 2) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
  parallel->run(
      tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace steam
