// Values known at run time as template arguments: each function calls f.operator()<argument>().
#pragma once

#include <type_traits>

#include "../common/problem.h"
#include "vec.h"

namespace steam {
namespace {

template <class F>
STEAM_INLINE void with_bool(bool value, const F& f) {
  if (value) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

// float64 has an object of its own, which is compiled once and not for each instruction set.
template <class F>
STEAM_INLINE void with_dtype(DType dtype, const F& f) {
#if defined(STEAM_CPU_FLOAT64)
  if (dtype == DType::kFloat64) f.template operator()<double>();
#else
  if (dtype == DType::kFloat32) f.template operator()<float>();
  if (dtype == DType::kFloat16) f.template operator()<Float16>();
  if (dtype == DType::kBFloat16) f.template operator()<BFloat16>();
#endif
}

// The vectors of maps of T that a loop holds in registers, of the `wanted` that are fastest. Each number of vectors has
// an instance of the loop, so fewer are compiled in less time. float64 serves gradient checks, and CPUs rarely run
// networks in float16.
template <class T>
constexpr int held_vectors(int wanted) {
  return std::is_same_v<T, double> ? 1 : std::is_same_v<T, Float16> ? smaller(wanted, 4) : wanted;
}

// The argument is n, which is from 1 to kMost.
template <int kMost, class F>
STEAM_INLINE void with_unroll(int64_t n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_unroll<kMost - 1>(n, f);
  }
  f.template operator()<kMost>();
}

// Splits `vectors` into tiles of at most kMost vectors, whose sizes differ by at most one. The argument is the size of
// a tile, and f also takes the tile's first vector.
template <int kMost, class F>
STEAM_INLINE void for_tiles(int64_t vectors, const F& f) {
  int64_t tiles = (vectors + kMost - 1) / kMost;
  for (int64_t v = 0; tiles > 0; --tiles) {
    const int64_t n = (vectors - v + tiles - 1) / tiles;
    with_unroll<kMost>(n, [&]<int kVectors>() { f.template operator()<kVectors>(v); });
    v += n;
  }
}

}  // namespace
}  // namespace steam
