// Values known at run time as template arguments: each function calls f.operator()<argument>().
#pragma once

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

template <class F>
STEAM_INLINE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float>();
    case DType::kFloat64: return f.template operator()<double>();
    case DType::kFloat16: return f.template operator()<Float16>();
    case DType::kBFloat16: return f.template operator()<BFloat16>();
  }
}

// The argument is n, which is from 1 to kMost.
template <int kMost, class F>
STEAM_INLINE void with_unroll(int64_t n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_unroll<kMost - 1>(n, f);
  }
  f.template operator()<kMost>();
}

// Splits `vectors` into tiles of at most kWant vectors, whose sizes differ by at most one. The argument is the size of
// a tile, and f also takes the tile's first vector. A float64 tile is one vector: float64 serves gradient checks, and
// fewer instances keep the library small.
template <class L, int kWant, class F>
STEAM_INLINE void for_tiles(int64_t vectors, const F& f) {
  constexpr int kMost = sizeof(typename L::A) == 8 ? 1 : kWant;
  int64_t tiles = (vectors + kMost - 1) / kMost;
  for (int64_t v = 0; tiles > 0; --tiles) {
    const int64_t n = (vectors - v + tiles - 1) / tiles;
    with_unroll<kMost>(n, [&]<int kVectors>() { f.template operator()<kVectors>(v); });
    v += n;
  }
}

}  // namespace
}  // namespace steam
