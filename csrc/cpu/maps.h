// The maps of one sample, as the pool and the gate stage read them.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace steam {
namespace {

// Rows (or pixels) that one lane adds up before it starts afresh: keeps long sums from losing digits.
constexpr int64_t kTermsPerPartial = 128;

// How far ahead of the reads to prefetch, in bytes.
constexpr int64_t kAhead = 4096;

// One sample's maps, of equal layout. product = dy * x, where dy is masked by the ReLU whose output y is.
template <class T, bool kProducts, bool kRelu>
struct Maps {
  using Type = T;
  using L = Lanes<T>;
  using V = typename L::V;
  static constexpr bool products = kProducts;
  const T* x;
  const T* dy;
  const T* y;
  int64_t size;  // elements of the sample

  STEAM_INLINE V value(int64_t e) const { return load(x + e); }
  STEAM_INLINE V value_until(int64_t e) const { return load_until(x + e, x + size); }
  STEAM_INLINE V upstream(int64_t e) const {
    return masked<kRelu>(load(dy + e), [&] { return load(y + e); });
  }
  STEAM_INLINE V upstream_until(int64_t e) const {
    return masked<kRelu>(load_until(dy + e, dy + size), [&] { return load_until(y + e, y + size); });
  }
  STEAM_INLINE void prefetch(int64_t e, int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T))) const {
    __builtin_prefetch(x + e + ahead);
    if (kProducts) __builtin_prefetch(dy + e + ahead);
    if (kProducts && kRelu) __builtin_prefetch(y + e + ahead);
  }

 private:
  template <bool kMask, class F>
  static STEAM_INLINE V masked(V g, const F& output) {
    if constexpr (kMask) {
      const V out = output();
      // As PyTorch's: a NaN in y lets the gradient through.
      return L::select(out <= L::zero(), L::zero(), g);
    } else {
      return g;
    }
  }
};

}  // namespace
}  // namespace steam
