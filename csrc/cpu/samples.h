// How the samples of a batch go to threads.
#pragma once

#include "plan.h"
#include "scratch.h"
#include "threads.h"

namespace steam {
namespace {

// Threads never share a sample of fewer elements.
constexpr int64_t kSharedElements = 16384;

// The first `alone` samples run on one thread each. All threads share each of the others. The order of every sum is the
// same in both cases.
struct Schedule {
  int64_t samples, alone, workers, threads;
  // Bytes of working memory of a sample that runs on one thread, and of a shared one.
  std::size_t alone_bytes, shared_bytes;
  char* memory;  // of all workers, or of one shared sample
};

// bytes_of(threads) is the working memory of a sample that runs on so many threads.
template <class T, class F>
Schedule make_schedule(const Plan<T>& plan, int64_t threads, Arena& arena, const F& bytes_of) {
  Schedule s{};
  const int64_t n = plan.problem.samples;
  s.samples = n;
  s.threads = threads;
  const bool tiny = n * plan.sample_size < kSharedElements;
  const bool shareable = plan.sample_size >= kSharedElements;
  s.alone = threads < 2 || tiny ? n : n / threads * threads;
  const int64_t left = n - s.alone;
  // A shared sample costs a few barriers. A thread without a sample costs its part of the time of a sample.
  if (!shareable || left * 4 >= threads * 3) s.alone = n;
  s.workers = threads < 2 || tiny ? 1 : smaller(threads, s.alone);
  s.alone_bytes = s.alone > 0 ? Arena::slice(bytes_of(1)) : 0;
  s.shared_bytes = s.alone < n ? bytes_of(threads) : 0;
  Arena workers(nullptr);
  workers.take_slices(s.workers, s.alone_bytes);
  s.memory = arena.take_slices(1, larger(workers.used(), s.shared_bytes));
  return s;
}

// Calls sample(n, parallel, memory) for every sample; `parallel` is null if the sample has one thread.
template <class F>
void for_samples(const Schedule& s, const cpu::Parallel& parallel, const F& sample) {
  for_tasks(s.workers > 1 ? &parallel : nullptr, s.workers, [&](int64_t w) {
    char* memory = s.memory + static_cast<std::size_t>(w) * s.alone_bytes;
    for (int64_t n = w * s.alone / s.workers; n < (w + 1) * s.alone / s.workers; ++n) sample(n, nullptr, memory);
  });
  for (int64_t n = s.alone; n < s.samples; ++n) sample(n, &parallel, s.memory);
}

}  // namespace
}  // namespace steam
