// Which instruction set's kernels run. Compiled for the plain target, like everything that runs before the choice.
#include <steam/steam.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>

#include "kernels.h"
#include "scratch.h"

namespace steam {
namespace cpu {

#define STEAM_DECLARE(variant)                \
  void forward_##variant(const ForwardArgs&); \
  void backward_##variant(const BackwardArgs&);
STEAM_DECLARE(generic)
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

#if defined(STEAM_CPU_HAS_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#if defined(STEAM_CPU_HAS_AVX2)
// The compiler's x86-64-v3, but for instructions that no processor with AVX2 and FMA lacks.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#endif
bool always() { return true; }

// Best first.
constexpr Variant kVariants[] = {
#if defined(STEAM_CPU_HAS_AVX512)
    {"avx512", forward_avx512, backward_avx512, has_avx512},
#endif
#if defined(STEAM_CPU_HAS_AVX2)
    {"avx2", forward_avx2, backward_avx2, has_avx2},
#endif
    {"generic", forward_generic, backward_generic, always},
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

}  // namespace

int64_t last_level_cache() {
  static const int64_t bytes = [] {
    // Not sysconf: glibc reports the whole package where several such caches share it.
    long long kilobytes = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
      std::fclose(file);
    }
    return kilobytes > 0 ? static_cast<int64_t>(kilobytes) << 10 : int64_t{24} << 20;
  }();
  return bytes;
}

// The variants are compiled without unwinding: what they took when there was no more memory is given back here.
void forward(const ForwardArgs& args) {
  const Arena arena;
  variant().forward(args);
}
void backward(const BackwardArgs& args) {
  const Arena arena;
  variant().backward(args);
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

const char* steam_cpu_variant(void) { return steam::cpu::variant().name; }

int steam_cpu_select(const char* name) {
  for (const auto& v : steam::cpu::kVariants) {
    if (std::strcmp(v.name, name) == 0 && v.runs_here()) {
      steam::cpu::chosen.store(&v, std::memory_order_relaxed);
      return 0;
    }
  }
  return 1;
}

// The kernels' own address arithmetic, so that a test can reach past 2^31 elements without a tensor of that size.
extern "C" STEAM_API int64_t steam_cpu_probe_offset(int64_t n, int64_t c, int64_t h, int64_t w, int64_t channels,
                                                    int64_t height, int64_t width, int channels_last) {
  steam::Problem p{};
  p.channels = channels;
  p.height = height;
  p.width = width;
  p.channels_last = channels_last != 0;
  return steam::element_offset(p, n, c, h, w);
}
