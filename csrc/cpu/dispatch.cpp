// The choice of the variant that runs. This file is compiled for the baseline instruction set, because it runs before
// the choice.
#include <steam/steam.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>

#include "cache.h"
#include "kernels.h"
#include "processor.h"
#include "scratch.h"

namespace steam {
namespace cpu {

#define STEAM_DECLARE(variant)                              \
  std::size_t forward_##variant(const ForwardArgs&, char*); \
  std::size_t backward_##variant(const BackwardArgs&, char*);
STEAM_DECLARE(float64)
#if defined(STEAM_CPU_HAS_GENERIC)
STEAM_DECLARE(generic)
#endif
#if defined(STEAM_CPU_HAS_AVX2)
STEAM_DECLARE(avx2)
#endif
#if defined(STEAM_CPU_HAS_AVX512)
STEAM_DECLARE(avx512)
#endif

namespace {

struct Variant {
  const char* name;
  Forward forward;
  Backward backward;
  bool (*runs_here)();
};

[[maybe_unused]] bool always() { return true; }

// Best first.
constexpr Variant kVariants[] = {
#if defined(STEAM_CPU_HAS_AVX512)
    {"avx512", forward_avx512, backward_avx512, has_avx512},
#endif
#if defined(STEAM_CPU_HAS_AVX2)
    {"avx2", forward_avx2, backward_avx2, has_avx2},
#endif
#if defined(STEAM_CPU_HAS_GENERIC)
    {"generic", forward_generic, backward_generic, always},
#endif
};

const Variant* best() {
  for (const Variant& v : kVariants) {
    if (v.runs_here()) return &v;
  }
  return nullptr;
}

std::atomic<const Variant*> chosen{nullptr};

const Variant& variant() {
  const Variant* v = chosen.load(std::memory_order_relaxed);
  if (v == nullptr) {
    v = best();
    chosen.store(v, std::memory_order_relaxed);
  }
  return *v;
}

// The bytes of the last steam_cpu_set_cache_bytes; -1 if none are set.
std::atomic<int64_t> cache_set{-1};
// Whether outputs are claimed: 0 or 1 in tests, and -1 if the processor decides.
std::atomic<int> claims_set{-1};

const Cache& cache_found() {
  static const Cache found = find_cache();
  return found;
}

}  // namespace

bool usable() { return best() != nullptr; }

Stores stores_of(int64_t threads) {
  static const bool usual = claims_lines();
  const int claims = claims_set.load(std::memory_order_relaxed);
  return stores_of(claims < 0 ? usual : claims != 0, threads, cache_set.load(std::memory_order_relaxed), cache_found());
}

namespace {

template <class Args>
std::size_t run(std::size_t (*kernels)(const Args&, char*), const Args& args) {
  const std::size_t bytes = kernels(args, nullptr);
  if (bytes == 0) return 0;
  const Scratch scratch(bytes, args.parallel.threads);
  if (scratch.data() == nullptr) return bytes;
  kernels(args, scratch.data());
  return 0;
}

}  // namespace

// float64 has the same code on every processor.
std::size_t forward(const ForwardArgs& args) {
  return run(args.problem.dtype == DType::kFloat64 ? forward_float64 : variant().forward, args);
}
std::size_t backward(const BackwardArgs& args) {
  return run(args.problem.dtype == DType::kFloat64 ? backward_float64 : variant().backward, args);
}

void no_memory(std::size_t bytes, const Problem& p, char* text) {
  std::snprintf(text, STEAM_MESSAGE_BYTES,
                "there is no memory for %zu bytes of working space, needed for x of shape (%" PRId64 ", %" PRId64
                ", %" PRId64 ", %" PRId64 ") on a grid of %" PRId64 " x %" PRId64,
                bytes, p.samples, p.channels, p.height, p.width, p.grid_h, p.grid_w);
}

}  // namespace cpu
}  // namespace steam

const char* steam_cpu_supported(void) {
  static const std::string names = [] {
    std::string out;
    for (const auto& v : steam::cpu::kVariants) {
      if (!v.runs_here()) continue;
      if (!out.empty()) out += ',';
      out += v.name;
    }
    return out;
  }();
  return names.c_str();
}

const char* steam_cpu_variant(void) { return steam::cpu::usable() ? steam::cpu::variant().name : ""; }

int steam_cpu_select(const char* name) {
  for (const auto& v : steam::cpu::kVariants) {
    if (std::strcmp(v.name, name) == 0 && v.runs_here()) {
      steam::cpu::chosen.store(&v, std::memory_order_relaxed);
      return 0;
    }
  }
  return 1;
}

int64_t steam_cpu_cache_bytes(void) {
  const int64_t set = steam::cpu::cache_set.load(std::memory_order_relaxed);
  return set >= 0 ? set : steam::cpu::cache_found().counted_on();
}

int steam_cpu_set_cache_bytes(int64_t bytes) {
  if (bytes < 0) return 1;
  steam::cpu::cache_set.store(bytes, std::memory_order_relaxed);
  return 0;
}

void steam_cpu_unset_cache_bytes(void) { steam::cpu::cache_set.store(-1, std::memory_order_relaxed); }

int64_t steam_cpu_reported_cache_bytes(void) { return steam::cpu::cache_found().reported; }
int64_t steam_cpu_processors(void) { return steam::cpu::cache_found().processors; }

// The bytes that a call counts on, for tests: of any machine, not only of the one that they run on.
extern "C" STEAM_API int64_t steam_cpu_probe_cache_share(int64_t reported, int64_t processors) {
  return steam::cpu::Cache{reported, processors}.counted_on();
}
// The bytes above which outputs are streamed, for tests: of any processor, with a cache of which a call counts on
// `share`.
extern "C" STEAM_API int64_t steam_cpu_probe_streams_above(int claims, int64_t threads, int64_t set, int64_t share) {
  return steam::cpu::stores_of(claims != 0, threads, set, {share, INT64_MAX}).streams_above;
}
// Claims outputs or does not, for tests of both ways on any processor; -1 leaves it to the processor again.
extern "C" STEAM_API void steam_cpu_probe_set_claims(int claims) { steam::cpu::claims_set.store(claims); }
// Whether this processor claims outputs, for tests.
extern "C" STEAM_API int steam_cpu_probe_claims(void) { return steam::cpu::stores_of(1).claims; }
// The limit in a text of cgroup's cpu.max, for tests.
extern "C" STEAM_API int64_t steam_cpu_probe_limit(const char* cpu_max) {
  return steam::cpu::processors_of_limit(cpu_max);
}
