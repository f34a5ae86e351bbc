// What the processor that runs this can do. dispatch.cpp asks at run time, and CMake for a library for one processor.
#pragma once

namespace steam {
namespace cpu {

#if defined(__x86_64__)
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// The compiler's x86-64-v3 has more instructions, but every processor with these four has them too.
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
// Intel's processors with AVX-512, of which most are for servers. A core of theirs has few buffers for lines on their
// way to memory, and memory is far, so that streaming stores take longer than ordinary ones whose lines were claimed
// ahead.
inline bool claims_lines() { return __builtin_cpu_is("intel") && has_avx512(); }
#else
inline bool has_avx512() { return false; }
inline bool claims_lines() { return false; }
inline bool has_avx2() { return false; }
#endif

}  // namespace cpu
}  // namespace steam
