// The maps of one sample, as the pool and the gate stage read them.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace steam {
namespace {

// Terms that a lane adds up before it starts a new partial sum. A longer sum would lose digits.
constexpr int64_t kTermsPerPartial = 128;

// Bytes from a read to its prefetch.
constexpr int64_t kAhead = 4096;

// The maps of one sample. A value is x, and a product is dy * x. `_until` reads the part of a vector that lies before
// the end of the sample.
template <class T, bool kProducts>
struct Maps {
  using Type = T;
  using L = Lanes<T>;
  using V = typename L::V;
  static constexpr bool products = kProducts;
  const T* x;
  const T* dy;
  int64_t size;  // elements of the sample

  STEAM_INLINE V value(int64_t e) const { return load(x + e); }
  STEAM_INLINE V value_until(int64_t e) const { return load_until(x + e, x + size); }
  STEAM_INLINE V upstream(int64_t e) const { return load(dy + e); }
  STEAM_INLINE V upstream_until(int64_t e) const { return load_until(dy + e, dy + size); }
  STEAM_INLINE void prefetch(int64_t e, int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T))) const {
    __builtin_prefetch(x + e + ahead);
    if (kProducts) __builtin_prefetch(dy + e + ahead);
  }
};

}  // namespace
}  // namespace steam
