// The tasks of a call on threads.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace steam {
namespace {

// How a thread rounds, and whether it flushes denormal numbers to zero. Results depend on the mode, so all tasks of a
// call run in the mode of the calling thread.
class FloatMode {
 public:
  static FloatMode of_this_thread() {
    FloatMode mode{};
#if defined(__x86_64__) || defined(__i386__)
    mode.bits_ = __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(mode.bits_));
#endif
    return mode;
  }
  void set() const {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_ldmxcsr(bits_);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(bits_));
#endif
  }
  // Flags record past exceptions and are no part of the mode.
  bool same(const FloatMode& other) const { return ((bits_ ^ other.bits_) & ~kFlags) == 0; }

 private:
#if defined(__aarch64__)
  uint64_t bits_;
  static constexpr uint64_t kFlags = 0;
#else
  uint32_t bits_;
  static constexpr uint32_t kFlags = 0x3f;
#endif
};

// Not inline, because the compiler does not know that the mode changes around the call, and could move arithmetic
// across the changes.
template <class F>
__attribute__((noinline)) void run_task(const F& f, int64_t task) {
  f(task);
}

// Calls f(task) for all tasks: on the threads of `parallel`, or, if it is null, one after another.
template <class F>
STEAM_INLINE void for_tasks(const cpu::Parallel* parallel, int64_t tasks, const F& f) {
  if (parallel == nullptr || tasks < 2) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
  struct Shared {
    const F& f;
    FloatMode mode;
  } shared{f, FloatMode::of_this_thread()};
  parallel->run(
      tasks,
      [](void* context, int64_t task) {
        const Shared& given = *static_cast<const Shared*>(context);
        const FloatMode own = FloatMode::of_this_thread();
        if (own.same(given.mode)) return run_task(given.f, task);
        given.mode.set();
        run_task(given.f, task);
        own.set();
      },
      &shared);
}

}  // namespace
}  // namespace steam
