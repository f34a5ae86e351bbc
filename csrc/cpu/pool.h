// The pool stage on the CPU: sums of values (x) and, backward, of products (dy * x).
//
// NCHW has column sums: for each strip, one sum per column. They cost one vertical addition per element. The columns
// are joined into cells once per sample (cells.h), after the sum over channels. channels_last has sums of whole cells,
// in vectors of channels.
#pragma once

#include "choose.h"
#include "maps.h"
#include "vec.h"

namespace steam {
namespace {

// The first element and the rows of a strip, or of any pieces `stride` elements apart.
struct Strip {
  int64_t e, rows, stride;
  // Whether the sample has `width` elements from the beginning of every row on.
  STEAM_INLINE bool inside(int64_t width, int64_t size) const { return e + (rows - 1) * stride + width <= size; }
};

// Adds kVectors vectors of each row of a short strip, which lies inside the sample.
template <int kVectors, bool kValues, class S>
STEAM_INLINE void add_rows(const S& s, const Strip& strip, typename S::V* values, typename S::V* products) {
  using V = typename S::V;
  constexpr int64_t lanes = S::L::kLanes;
  int64_t at = strip.e;
  for (int64_t r = 0; r < strip.rows; ++r, at += strip.stride) {
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) {
      if (k * lanes * static_cast<int64_t>(sizeof(*s.x)) % kLine == 0) s.prefetch(at + k * lanes);
      const V x = s.value(at + k * lanes);
      if (kValues) values[k] += x;
      if (S::products) products[k] += x * s.upstream(at + k * lanes);
    }
  }
}

// The same for any strip: a long one in pieces, and with zeros for elements past the end of the sample.
template <int kVectors, bool kValues, class S>
__attribute__((noinline)) void add_any_rows(const S& s, const Strip& strip, typename S::V* values,
                                            typename S::V* products) {
  using L = typename S::L;
  using V = typename S::V;
  constexpr int64_t lanes = L::kLanes;
  for (int64_t done = 0; done < strip.rows; done += kTermsPerPartial) {
    const Strip piece{strip.e + done * strip.stride, smaller(strip.rows - done, kTermsPerPartial), strip.stride};
    V sum[kVectors], product[kVectors];
    for (int k = 0; k < kVectors; ++k) sum[k] = product[k] = L::zero();
    if (piece.inside(kVectors * lanes, s.size)) {
      add_rows<kVectors, kValues>(s, piece, sum, product);
    } else {
      for (int64_t r = 0; r < piece.rows; ++r) {
        for (int k = 0; k < kVectors; ++k) {
          const int64_t at = piece.e + r * piece.stride + k * lanes;
          const V x = s.value_until(at);
          if (kValues) sum[k] += x;
          if (S::products) product[k] += x * s.upstream_until(at);
        }
      }
    }
    for (int k = 0; k < kVectors; ++k) {
      if (kValues) values[k] += sum[k];
      if (S::products) products[k] += product[k];
    }
  }
}

// Adds kRows rows that are too wide for registers, which begin at the elements `at`, to sums in memory. With kFresh the
// sums do not exist yet.
template <int kRows, bool kFresh, bool kValues, class S, class A>
STEAM_INLINE void add_wide_rows(const S& s, const int64_t* at, int64_t ahead, int64_t vectors, A* values, A* products) {
  using V = typename S::V;
  constexpr int64_t lanes = S::L::kLanes;
  const auto add = [&](int64_t v, const auto& value, const auto& upstream) STEAM_LAMBDA_INLINE {
    V sum = kFresh || !kValues ? S::L::zero() : load(values + v * lanes);
    V product = kFresh || !S::products ? S::L::zero() : load(products + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = value(at[r] + v * lanes);
      if (kValues) sum += x;
      if (S::products) product += x * upstream(at[r] + v * lanes);
    }
    if (kValues) store(values + v * lanes, sum);
    if (S::products) store(products + v * lanes, product);
  };
  const auto add_whole = [&](int64_t v) STEAM_LAMBDA_INLINE {
    add(
        v, [&](int64_t e) STEAM_LAMBDA_INLINE { return s.value(e); },
        [&](int64_t e) STEAM_LAMBDA_INLINE { return s.upstream(e); });
  };
  constexpr int64_t a_line = larger<int64_t>(1, kLine / (lanes * static_cast<int64_t>(sizeof(*s.x))));
  const bool inside = at[kRows - 1] + vectors * lanes <= s.size;
  const int64_t whole = inside ? vectors : vectors - 1;
  int64_t v = 0;
  for (; v + a_line <= whole; v += a_line) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) s.prefetch(at[r] + v * lanes, ahead);
#pragma GCC unroll 16
    for (int64_t k = 0; k < a_line; ++k) add_whole(v + k);
  }
  for (; v < whole; ++v) add_whole(v);
  if (!inside) {
    add(
        whole, [&](int64_t e) STEAM_LAMBDA_INLINE { return s.value_until(e); },
        [&](int64_t e) STEAM_LAMBDA_INLINE { return s.upstream_until(e); });
  }
}

// Sums of `vectors` vectors over rows that are too wide for registers, kGroup rows at a time. next() returns the first
// element of the next row, in the order of memory; rows are at least `stride` elements apart.
template <int kGroup, bool kValues, class S, class A, class F>
STEAM_INLINE void sum_wide_rows(const S& s, int64_t rows, int64_t stride, int64_t vectors, A* values, A* products,
                                const F& next) {
  constexpr int64_t near = kAhead / static_cast<int64_t>(sizeof(*s.x));
  // The rows of a group are read together, so a prefetch into another of them would be too late. Narrow rows therefore
  // prefetch beyond their group.
  const int64_t ahead = stride > near ? near : larger(near, kGroup * stride);
  for (int64_t done = 0; done < rows; done += kGroup) {
    with_unroll<kGroup>(smaller<int64_t>(rows - done, kGroup), [&]<int n>() STEAM_LAMBDA_INLINE {
      int64_t at[n];
      for (int r = 0; r < n; ++r) at[r] = next();
      if (done == 0) {
        add_wide_rows<n, true, kValues>(s, at, ahead, vectors, values, products);
      } else {
        add_wide_rows<n, false, kValues>(s, at, ahead, vectors, values, products);
      }
    });
  }
}

// channels_last: vectors of channels that a task takes at a time.
constexpr int64_t kTaskVectors = 16;

// channels_last: out(c, sum) for each vector of channels c. `add` adds the terms of cell (i, j) to the sums of kVectors
// vectors, which begin at channel c. The rows of cells are summed apart, so that a long sum loses fewer digits.
template <int kMost, class T, class Add, class Out>
STEAM_INLINE void sum_cells_of_channels(const Plan<T>& plan, const cpu::Parallel* parallel, const Add& add,
                                        const Out& out) {
  using L = Lanes<T>;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const int64_t vectors = plan.channel_pitch / lanes;
  for_tasks(parallel, (vectors + kTaskVectors - 1) / kTaskVectors, [&](int64_t t) {
    for_tiles<held_vectors<T>(kMost)>(smaller(kTaskVectors, vectors - t * kTaskVectors), [&]<int kVectors>(int64_t v) {
      const int64_t c = (t * kTaskVectors + v) * lanes;
      V total[kVectors];
      for (int k = 0; k < kVectors; ++k) total[k] = L::zero();
      for (int64_t i = 0; i < plan.problem.grid_h; ++i) {
        V sum[kVectors];
        for (int k = 0; k < kVectors; ++k) sum[k] = L::zero();
        for (int64_t j = 0; j < plan.problem.grid_w; ++j) add.template operator()<kVectors>(i, j, c, sum);
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) total[k] += sum[k];
      }
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) out(c + k * lanes, total[k]);
    });
  });
}

// sums += more, both of whole vectors.
template <class L>
STEAM_INLINE void add_sums(const typename L::A* more, int64_t vectors, typename L::A* sums) {
  for (int64_t k = 0; k < vectors * L::kLanes; k += L::kLanes) store(sums + k, load(sums + k) + load(more + k));
}

// Vectors of a wide row that one pass sums: their sums stay in the first-level cache.
constexpr int64_t kWide = 64;

// The same for a strip of any number of rows, with vectors <= kWide.
template <bool kValues, class S>
__attribute__((noinline)) void wide_strip_sums(const S& source, const Strip& strip, int64_t vectors,
                                               typename S::L::A* values, typename S::L::A* products) {
  using A = typename S::L::A;
  alignas(kLine) A more_values[kWide * S::L::kLanes], more_products[kWide * S::L::kLanes];
  const S s = source;
  int64_t at = strip.e;
  for (int64_t done = 0; done < strip.rows; done += kTermsPerPartial) {
    A *value = done ? more_values : values, *product = done ? more_products : products;
    sum_wide_rows<1, kValues>(s, smaller(strip.rows - done, kTermsPerPartial), strip.stride, vectors, value, product,
                              [&] {
                                const int64_t row = at;
                                at += strip.stride;
                                return row;
                              });
    if (done && kValues) add_sums<typename S::L>(value, vectors, values);
    if (done && S::products) add_sums<typename S::L>(product, vectors, products);
  }
}

// Column sums of strips of rows of `length` elements. Calls f(i, column, value vector, product vector) for each vector
// of columns of each strip; the vectors have zeros past the end of the row. Strip i has the rows begin[i] ... begin[i +
// 1] - 1, counted from element e.
template <bool kValues, class S, class F>
STEAM_INLINE void strip_sums(const S& s, int64_t e, const int64_t* begin, int64_t strips, int64_t length, const F& f) {
  using L = typename S::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  constexpr int kMost = held_vectors<typename S::Type>(kValues && S::products ? 7 : 8);
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
    // The tile is chosen once for all strips, because strips of narrow maps are short.
    with_unroll<kMost>(vectors, [&]<int kVectors>() {
      for (int64_t i = 0; i < strips; ++i) {
        const Strip strip = strip_from(i, 0);
        V values[kVectors], products[kVectors];
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) values[k] = products[k] = L::zero();
        if (strip.rows <= kTermsPerPartial && strip.inside(kVectors * lanes, s.size)) {
          add_rows<kVectors, kValues>(s, strip, values, products);
        } else {
          V more_values[kVectors], more_products[kVectors];
          for (int k = 0; k < kVectors; ++k) more_values[k] = more_products[k] = L::zero();
          add_any_rows<kVectors, kValues>(s, strip, more_values, more_products);
          for (int k = 0; k < kVectors; ++k) {
            values[k] = more_values[k];
            products[k] = more_products[k];
          }
        }
        cut(values[kVectors - 1], products[kVectors - 1]);
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) f(i, k * lanes, values[k], products[k]);
      }
    });
    return;
  }
  alignas(kLine) typename L::A values[kWide * lanes] = {}, products[kWide * lanes] = {};
  for (int64_t i = 0; i < strips; ++i) {
    for (int64_t v = 0; v < vectors; v += kWide) {
      const int64_t n = smaller(vectors - v, kWide);
      wide_strip_sums<kValues>(s, strip_from(i, v), n, values, products);
      for (int64_t k = 0; k < n; ++k) {
        V value = load(values + k * lanes), product = load(products + k * lanes);
        if (v + k + 1 == vectors) cut(value, product);
        f(i, (v + k) * lanes, value, product);
      }
    }
  }
}

// out[k] = sum over the channels of weight[c] * source[c * stride + k], for k < length, which is a whole number of
// vectors. `source` is x itself or column sums, and has `size` elements.
template <class S>
void contract_channels(const S* source, int64_t size, int64_t channels, int64_t stride,
                       const typename Lanes<S>::A* weight, int64_t length, typename Lanes<S>::A* out) {
  using L = Lanes<S>;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  for_tiles<held_vectors<S>(12)>(length / lanes, [&]<int kVectors>(int64_t v) {
    const int64_t column = v * lanes;
    V total[kVectors];
    for (int k = 0; k < kVectors; ++k) total[k] = L::zero();
    for (int64_t done = 0; done < channels; done += kTermsPerPartial) {
      const int64_t n = smaller(channels - done, kTermsPerPartial);
      int64_t at = done * stride + column;
      const int64_t room = size - kVectors * lanes - at;
      const int64_t whole = room >= (n - 1) * stride ? n : room < 0 ? 0 : room / stride + 1;
      V sum[kVectors];
      for (int k = 0; k < kVectors; ++k) sum[k] = L::zero();
      int64_t c = 0;
      for (; c < whole; ++c, at += stride) {
        const V w = L::set(weight[done + c]);
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) sum[k] += w * load(source + at + k * lanes);
      }
      for (; c < n; ++c, at += stride) {
        const V w = L::set(weight[done + c]);
        for (int k = 0; k < kVectors; ++k) sum[k] += w * load_until(source + at + k * lanes, source + size);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) total[k] += sum[k];
    }
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) store(out + column + k * lanes, total[k]);
  });
}

// The sum of the vectors whole(k) for k < length, in four chains; rest(k) is the last vector if it is not whole.
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

// The sum of a run of `length` elements from element e on, still in lanes.
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

// Vectors of a short map of T that stay in registers, if a loop has one pattern, and if it has two.
template <class T>
constexpr int kHeld = held_vectors<T>(kVectorBytes >= 32 ? 8 : 4);
template <class T>
constexpr int kHeldOfTwo = held_vectors<T>(kVectorBytes >= 64 ? 8 : 4);

// The same for a run of kVectors vectors. `tail` masks the lanes of the last vector that belong to the run.
template <int kVectors, class S>
STEAM_INLINE typename S::V sum_short_row(const S& s, int64_t e, typename S::L::M tail) {
  using L = typename S::L;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  const bool inside = __builtin_expect(e + kVectors * lanes <= s.size, 1);
  V v[kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) {
    if (k * lanes * static_cast<int64_t>(sizeof(*s.x)) % kLine == 0) s.prefetch(e + k * lanes);
    v[k] = k + 1 < kVectors || inside ? s.value(e + k * lanes) : s.value_until(e + k * lanes);
  }
  v[kVectors - 1] = L::select(tail, v[kVectors - 1], L::zero());
#pragma GCC unroll 4
  for (int step = 1; step < kVectors; step *= 2) {
#pragma GCC unroll 16
    for (int k = 0; k + step < kVectors; k += 2 * step) v[k] += v[k + step];
  }
  return v[0];
}

// out[c] = the sum over the lanes of f(c), for the channels begin ... end - 1.
template <class L, class F>
STEAM_INLINE void sum_channels(int64_t begin, int64_t end, typename L::A* out, const F& f) {
  int64_t c = begin;
  for (; c + L::kLanes <= end; c += L::kLanes) {
    typename L::V each[L::kLanes];
    for (int i = 0; i < L::kLanes; ++i) each[i] = f(c + i);
    store(out + c, sum_lanes_of_each<L>(each));
  }
  for (; c < end; ++c) out[c] = sum_lanes<L>(f(c));
}

// channels_last: the sums over a cell of rows x cols pixels from element e on. `values` and `products` get a number of
// each channel, and undefined numbers in the padding to whole vectors.
template <bool kValues, class S>
void cell_sums(const S& source, int64_t e, int64_t rows, int64_t cols, int64_t row_stride, int64_t channels,
               typename S::L::A* values, typename S::L::A* products) {
  using L = typename S::L;
  using A = typename L::A;
  using V = typename L::V;
  constexpr int64_t lanes = L::kLanes;
  constexpr int kMost = held_vectors<typename S::Type>(kValues && S::products ? 5 : 8);
  const S s = source;
  const int64_t vectors = (channels + lanes - 1) / lanes;
  alignas(kLine) A more_values[kWide * lanes], more_products[kWide * lanes];
  for (int64_t v = 0; v < vectors; v += kWide) {
    const int64_t n = smaller(vectors - v, kWide);
    // Each block of pixels has its own partial sums.
    const int64_t block_cols = smaller(cols, kTermsPerPartial), block_rows = kTermsPerPartial / block_cols;
    for (int64_t r = 0; r < rows; r += block_rows) {
      for (int64_t q = 0; q < cols; q += block_cols) {
        const int64_t nr = smaller(block_rows, rows - r), nq = smaller(block_cols, cols - q);
        const int64_t first = e + r * row_stride + q * channels + v * lanes;
        A *value = r + q ? more_values : values + v * lanes, *product = r + q ? more_products : products + v * lanes;
        if (vectors <= kMost) {
          with_unroll<kMost>(vectors, [&]<int kVectors>() {
            V held_values[kVectors], held_products[kVectors];
#pragma GCC unroll 16
            for (int k = 0; k < kVectors; ++k) held_values[k] = held_products[k] = L::zero();
            for (int64_t i = 0; i < nr; ++i) {
              const Strip pixels{first + i * row_stride, nq, channels};
              if (__builtin_expect(pixels.inside(kVectors * lanes, s.size), 1)) {
                add_rows<kVectors, kValues>(s, pixels, held_values, held_products);
              } else {
                V last_values[kVectors], last_products[kVectors];
                for (int k = 0; k < kVectors; ++k) last_values[k] = last_products[k] = L::zero();
                add_any_rows<kVectors, kValues>(s, pixels, last_values, last_products);
                for (int k = 0; k < kVectors; ++k) {
                  held_values[k] += last_values[k];
                  held_products[k] += last_products[k];
                }
              }
            }
#pragma GCC unroll 16
            for (int k = 0; k < kVectors; ++k) {
              if (kValues) store(value + k * lanes, held_values[k]);
              if (S::products) store(product + k * lanes, held_products[k]);
            }
          });
        } else {
          int64_t at = first, left = nq;
          const auto next = [&] {
            const int64_t pixel = at;
            at += channels;
            if (--left == 0) {
              left = nq;
              at += row_stride - nq * channels;
            }
            return pixel;
          };
          // A cell of at most four pixels takes one pass. A larger cell is read in the order of memory.
          if (nr * nq <= 4) {
            sum_wide_rows<4, kValues>(s, nr * nq, channels, n, value, product, next);
          } else {
            sum_wide_rows<1, kValues>(s, nr * nq, channels, n, value, product, next);
          }
        }
        if (r + q && kValues) add_sums<L>(value, n, values + v * lanes);
        if (r + q && S::products) add_sums<L>(product, n, products + v * lanes);
      }
    }
  }
}

}  // namespace
}  // namespace steam
