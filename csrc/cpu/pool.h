// The pool stage on the CPU: sums of x (and of dy * x, backwards) over cells, in the pieces that each memory order
// wants.
//
// NCHW keeps column sums: for each channel and each strip of rows that shares a cell row, one sum per column. They cost
// one vertical addition per element; columns are joined into cells once per sample, after the channels have been
// contracted. channels_last sums whole cells, vectorised over channels.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace steam {
namespace {

// Rows (or pixels) that one lane adds up before it starts afresh: keeps long sums from losing digits.
constexpr int64_t kRun = 128;

// How far ahead of the reads to prefetch, in bytes.
constexpr int64_t kAhead = 2048;

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
  STEAM_INLINE void prefetch(int64_t e) const {
    constexpr int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T));
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

// `f.run<U>()` with U = n, for 1 <= n <= kMost.
template <int kMost, class F>
STEAM_INLINE void with_unroll(int64_t n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_unroll<kMost - 1>(n, f);
  }
  f.template operator()<kMost>();
}

// Splits `vectors` into tiles of at most kMost, as even as they can be, and calls f<U>(first vector) for each.
// float64 serves gradient checks: it goes one vector at a time, which keeps the library small.
template <class L, int kWant, class F>
STEAM_INLINE void for_tiles(int64_t vectors, const F& f) {
  constexpr int kMost = sizeof(typename L::A) == 8 ? 1 : kWant;
  int64_t tiles = (vectors + kMost - 1) / kMost;
  for (int64_t v = 0; tiles > 0; --tiles) {
    const int64_t n = (vectors - v + tiles - 1) / tiles;
    with_unroll<kMost>(n, [&]<int U>() { f.template operator()<U>(v); });
    v += n;
  }
}

// Where the rows of a strip lie: `rows` rows, `stride` elements apart, from element e on.
struct Strip {
  int64_t e, rows, stride;
  // Whether `width` elements can be read from every row without leaving the sample.
  STEAM_INLINE bool inside(int64_t width, int64_t size) const { return e + (rows - 1) * stride + width <= size; }
};

// Sums of U vectors over a strip that is short and lies inside the sample.
template <int U, bool kValues, class S>
STEAM_INLINE void add_rows(const S& s, const Strip& strip, typename S::V* values, typename S::V* products) {
  using V = typename S::V;
  constexpr int64_t lanes = S::L::kLanes;
  int64_t at = strip.e;
  for (int64_t r = 0; r < strip.rows; ++r, at += strip.stride) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      if (u * lanes * static_cast<int64_t>(sizeof(*s.x)) % kLine == 0) s.prefetch(at + u * lanes);
      const V x = s.value(at + u * lanes);
      if (kValues) values[u] += x;
      if (S::products) products[u] += x * s.upstream(at + u * lanes);
    }
  }
}

// Any strip: long ones in runs, and what would be read past the sample's end as zeros.
template <int U, bool kValues, class S>
__attribute__((noinline)) void add_any_rows(const S& s, const Strip& strip, typename S::V* values,
                                            typename S::V* products) {
  using L = typename S::L;
  using V = typename S::V;
  constexpr int64_t lanes = L::kLanes;
  for (int64_t done = 0; done < strip.rows; done += kRun) {
    const Strip run{strip.e + done * strip.stride, smaller(strip.rows - done, kRun), strip.stride};
    V sum[U], product[U];
    for (int u = 0; u < U; ++u) sum[u] = product[u] = L::zero();
    if (run.inside(U * lanes, s.size)) {
      add_rows<U, kValues>(s, run, sum, product);
    } else {
      for (int64_t r = 0; r < run.rows; ++r) {
        for (int u = 0; u < U; ++u) {
          const int64_t at = run.e + r * run.stride + u * lanes;
          const V x = s.value_until(at);
          if (kValues) sum[u] += x;
          if (S::products) product[u] += x * s.upstream_until(at);
        }
      }
    }
    for (int u = 0; u < U; ++u) {
      if (kValues) values[u] += sum[u];
      if (S::products) products[u] += product[u];
    }
  }
}

// Vectors of columns that a pass over wide rows goes along: their sums stay in the first-level cache.
constexpr int kWide = 64;

// Sums of kRows rows of a strip that is too wide for registers, from element e on, onto those in memory.
template <int kRows, bool kValues, class S>
STEAM_INLINE void add_wide_rows(const S& s, int64_t e, int64_t stride, int64_t vectors, typename S::V* values,
                                typename S::V* products) {
  using V = typename S::V;
  constexpr int64_t lanes = S::L::kLanes;
  const auto add = [&](int64_t v, const auto& value, const auto& upstream) STEAM_LAMBDA_INLINE {
    V sum = kValues ? values[v] : S::L::zero(), product = S::products ? products[v] : S::L::zero();
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = e + r * stride + v * lanes;
      const V x = value(at);
      if (kValues) sum += x;
      if (S::products) product += x * upstream(at);
    }
    if (kValues) values[v] = sum;
    if (S::products) products[v] = product;
  };
  const bool inside = e + (kRows - 1) * stride + vectors * lanes <= s.size;
  const int64_t whole = inside ? vectors : vectors - 1;
  for (int64_t v = 0; v < whole; ++v) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) s.prefetch(e + r * stride + v * lanes);
    add(v, [&](int64_t at) STEAM_LAMBDA_INLINE { return s.value(at); },
        [&](int64_t at) STEAM_LAMBDA_INLINE { return s.upstream(at); });
  }
  if (!inside) {
    add(whole, [&](int64_t at) STEAM_LAMBDA_INLINE { return s.value_until(at); },
        [&](int64_t at) STEAM_LAMBDA_INLINE { return s.upstream_until(at); });
  }
}

// Sums of `vectors` <= kWide vectors over any strip, two rows at a time: memory is read in its order.
template <bool kValues, class S>
__attribute__((noinline)) void wide_strip_sums(const S& source, const Strip& strip, int64_t vectors,
                                               typename S::V* values, typename S::V* products) {
  using V = typename S::V;
  const S s = source;
  V more_values[kWide], more_products[kWide];
  for (int64_t done = 0; done < strip.rows; done += kRun) {
    V *value = done ? more_values : values, *product = done ? more_products : products;
    for (int64_t v = 0; v < vectors; ++v) value[v] = product[v] = S::L::zero();
    const int64_t rows = smaller(strip.rows - done, kRun);
    int64_t r = 0, at = strip.e + done * strip.stride;
    for (; r + 2 <= rows; r += 2, at += 2 * strip.stride) {
      add_wide_rows<2, kValues>(s, at, strip.stride, vectors, value, product);
    }
    if (r < rows) add_wide_rows<1, kValues>(s, at, strip.stride, vectors, value, product);
    for (int64_t v = 0; done && v < vectors; ++v) {
      values[v] += value[v];
      products[v] += product[v];
    }
  }
}

// Column sums of strips of rows of `length` elements: f(i, column, value vector, product vector) for each vector of
// columns of each strip, with zeros past the row's end. Strip i has the rows begin[i] ... begin[i + 1] - 1, counted
// from element e.
template <bool kValues, class S, class F>
STEAM_INLINE void strip_sums(const S& s, int64_t e, const int64_t* begin, int64_t strips, int64_t length, const F& f) {
  using L = typename S::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  // float64 serves gradient checks: it does without the tiles, which keeps the library small.
  constexpr int kMost = sizeof(typename L::A) == 8 ? 1 : kValues && S::products ? 5 : 8;
  const int64_t vectors = (length + lanes - 1) / lanes;
  const auto strip_from = [&](int64_t i, int64_t v) {
    return Strip{e + begin[i] * length + v * lanes, begin[i + 1] - begin[i], length};
  };
  const auto cut = [&](V& value, V& product) {
    if (length % lanes == 0) return;
    value = L::select(L::first(length % lanes), value, L::zero());
    product = L::select(L::first(length % lanes), product, L::zero());
  };
  if (vectors <= kMost) {
    // Choose the tile once for all strips: those of narrow maps are short.
    with_unroll<kMost>(vectors, [&]<int U>() {
      for (int64_t i = 0; i < strips; ++i) {
        const Strip strip = strip_from(i, 0);
        V values[U], products[U];
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) values[u] = products[u] = L::zero();
        if (strip.rows <= kRun && strip.inside(U * lanes, s.size)) {
          add_rows<U, kValues>(s, strip, values, products);
        } else {
          V more_values[U], more_products[U];
          for (int u = 0; u < U; ++u) more_values[u] = more_products[u] = L::zero();
          add_any_rows<U, kValues>(s, strip, more_values, more_products);
          for (int u = 0; u < U; ++u) {
            values[u] = more_values[u];
            products[u] = more_products[u];
          }
        }
        cut(values[U - 1], products[U - 1]);
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) f(i, u * lanes, values[u], products[u]);
      }
    });
    return;
  }
  V values[kWide], products[kWide];
  for (int64_t i = 0; i < strips; ++i) {
    for (int64_t v = 0; v < vectors; v += kWide) {
      const int64_t n = smaller<int64_t>(vectors - v, kWide);
      wide_strip_sums<kValues>(s, strip_from(i, v), n, values, products);
      if (v + n == vectors) cut(values[n - 1], products[n - 1]);
      for (int64_t k = 0; k < n; ++k) f(i, (v + k) * lanes, values[k], products[k]);
    }
  }
}

// out[k] = sum over channels of weight[c] * source[c * stride + k] for k < length, a whole number of vectors.
// `source` may be x itself or column sums; nothing is read past its `size` elements.
template <class S>
void contract_channels(const S* source, int64_t size, int64_t channels, int64_t stride,
                       const typename Lanes<S>::A* weight, int64_t length, typename Lanes<S>::A* out) {
  using L = Lanes<S>;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  for_tiles<L, 12>(length / lanes, [&]<int U>(int64_t v) {
    const int64_t k = v * lanes;
    V total[U];
    for (int u = 0; u < U; ++u) total[u] = L::zero();
    for (int64_t done = 0; done < channels; done += kRun) {
      const int64_t n = smaller(channels - done, kRun);
      int64_t at = done * stride + k;
      const int64_t room = size - U * lanes - at;
      const int64_t whole = room >= (n - 1) * stride ? n : room < 0 ? 0 : room / stride + 1;
      V sum[U];
      for (int u = 0; u < U; ++u) sum[u] = L::zero();
      int64_t c = 0;
      for (; c < whole; ++c, at += stride) {
        const V w = L::set(weight[done + c]);
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) sum[u] += w * load(source + at + u * lanes);
      }
      for (; c < n; ++c, at += stride) {
        const V w = L::set(weight[done + c]);
        for (int u = 0; u < U; ++u) sum[u] += w * load_until(source + at + u * lanes, source + size);
      }
#pragma GCC unroll 16
      for (int u = 0; u < U; ++u) total[u] += sum[u];
    }
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) store(out + k + u * lanes, total[u]);
  });
}

// Sum of whole(k) over the vectors of k < length, in four chains, and of rest(k) where the last one is not whole.
template <class L, class F, class R>
STEAM_INLINE typename L::V sum_vectors(int64_t length, const F& whole, const R& rest) {
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  V a = L::zero(), b = L::zero(), c = L::zero(), d = L::zero();
  int64_t k = 0;
  for (; k + 4 * lanes <= length; k += 4 * lanes) {
    a += whole(k);
    b += whole(k + lanes);
    c += whole(k + 2 * lanes);
    d += whole(k + 3 * lanes);
  }
  if (k + 2 * lanes <= length) {
    a += whole(k);
    b += whole(k + lanes);
    k += 2 * lanes;
  }
  if (k + lanes <= length) {
    c += whole(k);
    k += lanes;
  }
  if (k < length) d += L::select(L::first(length - k), rest(k), L::zero());
  return (a + b) + (c + d);
}

// Sum of `length` elements from element e on, in lanes.
template <class S>
STEAM_INLINE typename S::V sum_run(const S& source, int64_t e, int64_t length) {
  using L = typename S::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const S s = source;
  V a = L::zero(), b = L::zero(), c = L::zero(), d = L::zero();
  int64_t k = 0;
  for (; k + 4 * lanes <= length; k += 4 * lanes) {
    s.prefetch(e + k);
    a += s.value(e + k);
    b += s.value(e + k + lanes);
    if (2 * lanes * static_cast<int64_t>(sizeof(*s.x)) >= kLine) s.prefetch(e + k + 2 * lanes);
    c += s.value(e + k + 2 * lanes);
    d += s.value(e + k + 3 * lanes);
  }
  for (; k + lanes <= length; k += lanes) {
    s.prefetch(e + k);
    a += s.value(e + k);
  }
  if (k < length) b += L::select(L::first(length - k), s.value_until(e + k), L::zero());
  return (a + b) + (c + d);
}

// Vectors of a short row that are kept in registers: of one map, and of two.
constexpr int kHeld = kVectorBytes >= 32 ? 8 : 4;
constexpr int kHeldOfTwo = kVectorBytes >= 64 ? 8 : 4;

// The same for rows of U vectors, `tail` of the last one's lanes being part of it.
template <int U, class S>
STEAM_INLINE typename S::V sum_short_row(const S& s, int64_t e, typename S::L::M tail) {
  using L = typename S::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const bool inside = __builtin_expect(e + U * lanes <= s.size, 1);
  V v[U];
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) {
    if (u * lanes * static_cast<int64_t>(sizeof(*s.x)) % kLine == 0) s.prefetch(e + u * lanes);
    v[u] = u + 1 < U || inside ? s.value(e + u * lanes) : s.value_until(e + u * lanes);
  }
  v[U - 1] = L::select(tail, v[U - 1], L::zero());
#pragma GCC unroll 4
  for (int step = 1; step < U; step *= 2) {
#pragma GCC unroll 16
    for (int u = 0; u + step < U; u += 2 * step) v[u] += v[u + step];
  }
  return v[0];
}

// Adds up a function of each channel, kGroup channels at a time: f<n>(c, each) gives vectors for c ... c + n - 1, whose
// lanes are summed into out[c] ...
template <class L, int kGroup, class F>
STEAM_INLINE void sum_channel_groups(int64_t begin, int64_t end, typename L::A* out, const F& f) {
  using V = typename L::V;
  constexpr int n = smaller<int>(kGroup, L::kLanes);
  int64_t c = begin;
  for (; c + L::kLanes <= end; c += L::kLanes) {
    V each[L::kLanes];
    for (int i = 0; i < L::kLanes; i += n) f.template operator()<n>(c + i, each + i);
    store(out + c, sum_lanes_of_each<L>(each));
  }
  for (; c < end; ++c) {
    V one[1];
    f.template operator()<1>(c, one);
    out[c] = sum_lanes<L>(one[0]);
  }
}

// The same one by one: f(c) gives the vector.
template <class L, class F>
STEAM_INLINE void sum_channels(int64_t begin, int64_t end, typename L::A* out, const F& f) {
  sum_channel_groups<L, 1>(begin, end, out,
                           [&]<int>(int64_t c, typename L::V* each) STEAM_LAMBDA_INLINE { each[0] = f(c); });
}

// channels_last: sums over rows x cols pixels from element e on, into `values` and `products` (rows of `channels`
// numbers, padded to whole vectors; what lies in the padding is undefined).
template <bool kValues, class S>
void cell_sums(const S& s, int64_t e, int64_t rows, int64_t cols, int64_t row_stride, int64_t channels,
               typename S::L::A* values, typename S::L::A* products) {
  using L = typename S::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  constexpr int kMost = kValues && S::products ? 5 : 8;
  const int64_t vectors = (channels + lanes - 1) / lanes;
  // Blocks of pixels that stay in the first-level cache while the tiles of channels pass over them.
  const int64_t pixel_bytes = channels * static_cast<int64_t>(sizeof(*s.x));
  const int64_t block_cols = larger<int64_t>(1, smaller(smaller(cols, kRun), 16384 / pixel_bytes));
  const int64_t block_rows = larger<int64_t>(1, smaller(kRun / block_cols, 16384 / (pixel_bytes * block_cols)));
  bool fresh = true;
  for (int64_t r0 = 0; r0 < rows; r0 += block_rows) {
    const int64_t nr = smaller(block_rows, rows - r0);
    for (int64_t q0 = 0; q0 < cols; q0 += block_cols, fresh = false) {
      const int64_t nq = smaller(block_cols, cols - q0);
      const int64_t origin = e + r0 * row_stride + q0 * channels;
      const int64_t last = origin + (nr - 1) * row_stride + (nq - 1) * channels;
      for_tiles<typename S::L, kMost>(vectors, [&]<int U>(int64_t v) {
        const int64_t c = v * lanes;
        V sum[U], product[U];
        for (int u = 0; u < U; ++u) sum[u] = product[u] = L::zero();
        const bool inside = last + c + U * lanes <= s.size;
        for (int64_t r = 0; r < nr; ++r) {
          int64_t at = origin + r * row_stride + c;
          if (__builtin_expect(inside, 1)) {
            for (int64_t q = 0; q < nq; ++q, at += channels) {
#pragma GCC unroll 16
              for (int u = 0; u < U; ++u) {
                if (u * lanes * static_cast<int64_t>(sizeof(*s.x)) % kLine == 0) s.prefetch(at + u * lanes);
                const V x = s.value(at + u * lanes);
                if (kValues) sum[u] += x;
                if (S::products) product[u] += x * s.upstream(at + u * lanes);
              }
            }
          } else {
            for (int64_t q = 0; q < nq; ++q, at += channels) {
              for (int u = 0; u < U; ++u) {
                const V x = s.value_until(at + u * lanes);
                if (kValues) sum[u] += x;
                if (S::products) product[u] += x * s.upstream_until(at + u * lanes);
              }
            }
          }
        }
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) {
          const int64_t k = c + u * lanes;
          if (kValues) store(values + k, fresh ? sum[u] : load(values + k) + sum[u]);
          if (S::products) store(products + k, fresh ? product[u] : load(products + k) + product[u]);
        }
      });
    }
  }
}

}  // namespace
}  // namespace steam
