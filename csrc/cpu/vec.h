// SIMD lanes in GCC/Clang vector extensions: one source for AVX-512, AVX2, SSE2, NEON and other processors with 16-byte
// vectors. Intrinsics are only in streaming stores and conversions of half precision, which the extensions lack.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(__i386__)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

#include "../common/old_glibc.h"
#include "../common/sizes.h"

STEAM_OLD_GLIBC(exp);

namespace steam {
namespace {

#if defined(STEAM_CPU_VECTOR_BYTES)
constexpr int kVectorBytes = STEAM_CPU_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define STEAM_INLINE inline __attribute__((always_inline))
#define STEAM_LAMBDA_INLINE __attribute__((always_inline))

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecL __attribute__((vector_size(kVectorBytes)));

template <class To, class From>
STEAM_INLINE To bit_cast(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &v, sizeof(To));
  return out;
}

// ---------------------------------------------------------------- lanes: the arithmetic in the accumulation type

// Vectors Values of Number, and vectors Mask of integers of the same width.
template <class Number, class Integer, class Values, class Mask>
struct LanesBase {
  using A = Number;
  using I = Integer;
  using V = Values;
  using M = Mask;
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
  static STEAM_INLINE V set(A a) { return a - V{}; }
  static STEAM_INLINE V zero() { return V{}; }
  static STEAM_INLINE V select(M m, V a, V b) { return m ? a : b; }
  static STEAM_INLINE M less(V a, V b) { return a < b; }
  static STEAM_INLINE M iota() {
    M out;
    for (int i = 0; i < kLanes; ++i) out[i] = i;
    return out;
  }
  static STEAM_INLINE M first(int64_t n) { return iota() < static_cast<I>(n); }
};

struct LanesF : LanesBase<float, int32_t, VecF, VecI> {
  static STEAM_INLINE V magnitude(V a) { return bit_cast<V>(bit_cast<M>(a) & 0x7fffffff); }

  static STEAM_INLINE V exp_nonpositive(V x) {
    // Cody-Waite reduction by ln 2, then 1 + r + r^2 q(r) on |r| <= ln(2)/2. q has degree 3 and the least relative
    // error. The relative error of the result is at most 1.8e-7 with all roundings; Taylor's polynomial of degree 6
    // has 2.3e-7.
    const V shifted = x * 1.44269504088896341f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    V r = x - n * 0.693145751953125f;
    r = r - n * 1.428606765330187e-06f;
    V p = r * 0.008312501013278961f + 0.041890330612659454f;
    p = p * r + 0.16667115688323975f;
    p = p * r + 0.499992311000824f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // The low mantissa bits of `shifted` are n, because 12582912 is 1.5 * 2^23. The multiplication keeps a NaN a NaN.
    const V power = bit_cast<V>((bit_cast<M>(shifted) + 127) << 23);
    return select(x < -87.0f, zero(), p * power);
  }
};

struct LanesD : LanesBase<double, int64_t, VecD, VecL> {
  static STEAM_INLINE V magnitude(V a) { return bit_cast<V>(bit_cast<M>(a) & 0x7fffffffffffffffLL); }
  // float64 serves gradient checks, so exp is libm's, which is slower and more exact.
  static STEAM_INLINE V exp_nonpositive(V x) {
    V out;
    for (int i = 0; i < kLanes; ++i) out[i] = exp(x[i]);
    return out;
  }
};

template <class L>
struct Gate {
  typename L::V open;    // sigmoid(o)
  typename L::V closed;  // 1 - sigmoid(o), computed from o, not from the rounded gate
};

template <class L>
STEAM_INLINE Gate<L> sigmoid(typename L::V o) {
  using V = typename L::V;
  const V e = L::exp_nonpositive(-L::magnitude(o));
  const V large = L::set(1) / (e + 1), small = e * large;
  const auto negative = L::less(o, L::zero());
  return {L::select(negative, small, large), L::select(negative, large, small)};
}

// The sum of all lanes, in pairs like those of sum_lanes_of_each, so that both have the same bits.
template <class L>
STEAM_INLINE typename L::A sum_lanes(typename L::V v) {
  typename L::A a[L::kLanes];
  __builtin_memcpy(a, &v, sizeof(v));
  for (int n = L::kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) a[i] = a[2 * i] + a[2 * i + 1];
  }
  return a[0];
}

// The sums of neighbouring lanes: of the pairs of a, then of the pairs of b.
template <class L>
STEAM_INLINE typename L::V add_pairs(typename L::V a, typename L::V b) {
  constexpr int n = L::kLanes;
#if defined(__clang__)
  if constexpr (n == 2) {
    return __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
#else
  typename L::M even;
  for (int i = 0; i < n; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

// Lane i of the result is the sum over the lanes of v[i]. Overwrites v.
template <class L>
STEAM_INLINE typename L::V sum_lanes_of_each(typename L::V* v) {
#pragma GCC unroll 16
  for (int n = L::kLanes; n > 1; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) v[i] = add_pairs<L>(v[2 * i], v[2 * i + 1]);
  }
  return v[0];
}

// ---------------------------------------------------------------- loads and stores: storage type <-> lanes

template <class T>
using Lanes = std::conditional_t<std::is_same_v<T, double>, LanesD, LanesF>;

// __builtin_convertvector does the same, but GCC compiles it to three times as many instructions.
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(STEAM_CPU_VECTOR_BYTES)
STEAM_INLINE VecU extend(VecH h) { return bit_cast<VecU>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h))); }
// The numbers must be below 2^16.
STEAM_INLINE VecH truncate(VecU bits) {
  const __m256i v = bit_cast<__m256i>(bits);
  return bit_cast<VecH>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08)));
}
#else
STEAM_INLINE VecU extend(VecH h) { return __builtin_convertvector(h, VecU); }
STEAM_INLINE VecH truncate(VecU bits) { return __builtin_convertvector(bits, VecH); }
#endif

// bfloat16 is the upper half of a float, so a narrow number is a float rounded to its upper half. A NaN is truncated,
// because rounding could turn it into infinity; the quiet bit, which NaNs of arithmetic have, is in the upper half.
#if defined(__AVX512BW__) && !defined(STEAM_CPU_VECTOR_BYTES)
// Permutations of sixteen-bit halves: into the upper half of each lane, and back.
STEAM_INLINE __m512i to_upper() { return bit_cast<__m512i>(LanesF::iota() << 16); }
STEAM_INLINE __m512i from_upper() { return bit_cast<__m512i>(LanesF::iota() * 0x40004 + 0x30001); }
STEAM_INLINE VecF widen(VecH h, BFloat16) {
  const __m512i wide = _mm512_castsi256_si512(bit_cast<__m256i>(h));
  return bit_cast<VecF>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, to_upper(), wide));
}
STEAM_INLINE __m512i round_upper(VecF v) {
  const __m512 f = bit_cast<__m512>(v);
  const __m512i bits = bit_cast<__m512i>(v);
  const __mmask16 number = _mm512_cmp_ps_mask(f, f, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const __m512i up = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}
STEAM_INLINE VecH narrow(VecF v, BFloat16) {
  return bit_cast<VecH>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(from_upper(), round_upper(v))));
}
#else
STEAM_INLINE VecF widen(VecH h, BFloat16) { return bit_cast<VecF>(extend(h) << 16); }
// The rounded sixteen bits of each lane, in its lower half.
STEAM_INLINE VecU round_bits(VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU bias = ((bits >> 16) & 1) + 0x7fff;
  return (bits + (bias & bit_cast<VecU>(v == v))) >> 16;
}
STEAM_INLINE VecH narrow(VecF v, BFloat16) { return truncate(round_bits(v)); }
#endif

#if defined(__AVX512F__) && !defined(STEAM_CPU_VECTOR_BYTES)
STEAM_INLINE VecF widen(VecH h, Float16) { return bit_cast<VecF>(_mm512_cvtph_ps(bit_cast<__m256i>(h))); }
STEAM_INLINE VecH narrow(VecF v, Float16) {
  return bit_cast<VecH>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__) && defined(__F16C__) && !defined(STEAM_CPU_VECTOR_BYTES)
STEAM_INLINE VecF widen(VecH h, Float16) { return bit_cast<VecF>(_mm256_cvtph_ps(bit_cast<__m128i>(h))); }
STEAM_INLINE VecH narrow(VecF v, Float16) {
  return bit_cast<VecH>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__) && !defined(STEAM_CPU_VECTOR_BYTES)
STEAM_INLINE VecF widen(VecH h, Float16) { return bit_cast<VecF>(vcvt_f32_f16(bit_cast<float16x4_t>(h))); }
STEAM_INLINE VecH narrow(VecF v, Float16) { return bit_cast<VecH>(vcvt_f16_f32(bit_cast<float32x4_t>(v))); }
#else
STEAM_INLINE VecF widen(VecH h, Float16) {
  const VecU half = extend(h);
  VecU bits = (half & 0x7fff) << 13;
  const VecU exponent = bits & (0x7c00u << 13);
  bits += (127u - 15u) << 23;
  // The exponent of infinity and NaN needs a second correction. One exact subtraction normalises subnormal numbers.
  bits += bit_cast<VecU>(exponent == (0x7c00u << 13)) & ((128u - 16u) << 23);
  const VecU magic = VecU{} + (113u << 23);
  const VecF renormalised = bit_cast<VecF>(bits + (1u << 23)) - bit_cast<VecF>(magic);
  const VecU out = bit_cast<VecU>((exponent == 0u) ? bit_cast<VecI>(renormalised) : bit_cast<VecI>(bits));
  return bit_cast<VecF>(out | ((half & 0x8000) << 16));
}
STEAM_INLINE VecH narrow(VecF v, Float16) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU sign = bits & 0x80000000u;
  const VecU m = bits ^ sign;  // the magnitude
  const VecU magic = VecU{} + (((127u - 15u) + (23u - 10u) + 1u) << 23);
  const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(m) + bit_cast<VecF>(magic)) - magic;
  const VecU normal = (m - ((127u - 15u) << 23) + 0xfff + ((m >> 13) & 1)) >> 13;
  const VecI special = (m > (255u << 23)) ? VecI{} + 0x7e00 : VecI{} + 0x7c00;
  VecI out = (m < (113u << 23)) ? bit_cast<VecI>(subnormal) : bit_cast<VecI>(normal);
  out = (m >= ((127u + 16u) << 23)) ? special : out;
  return truncate(bit_cast<VecU>(out) | (sign >> 16));
}
#endif

STEAM_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
STEAM_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class H>
STEAM_INLINE VecF load(const H* p) {
  VecH v;
  __builtin_memcpy(&v, p, sizeof(v));
  return widen(v, H{});
}

STEAM_INLINE VecF pack(VecF v, float) { return v; }
STEAM_INLINE VecD pack(VecD v, double) { return v; }
template <class H>
STEAM_INLINE VecH pack(VecF v, H h) {
  return narrow(v, h);
}

template <class T>
STEAM_INLINE void store(T* p, typename Lanes<T>::V v) {
  const auto bits = pack(v, T{});
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// Two vectors, one after the other in memory.
template <class T>
STEAM_INLINE void store_two(T* p, typename Lanes<T>::V a, typename Lanes<T>::V b) {
#if defined(__AVX512BW__) && !defined(STEAM_CPU_VECTOR_BYTES)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m512i packed = _mm512_permutex2var_epi16(round_upper(a), from_upper(), round_upper(b));
    __builtin_memcpy(p, &packed, sizeof(packed));
    return;
  }
#elif defined(__AVX2__) && !defined(STEAM_CPU_VECTOR_BYTES)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m256i low = bit_cast<__m256i>(round_bits(a)), high = bit_cast<__m256i>(round_bits(b));
    // The instruction packs within halves of a register, so the permutation exchanges the middle quarters.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    __builtin_memcpy(p, &packed, sizeof(packed));
    return;
  }
#endif
  store(p, a);
  store(p + Lanes<T>::kLanes, b);
}

// Only the first n lanes; the other lanes of a load are zero.
template <class T>
__attribute__((noinline)) typename Lanes<T>::V load_first(const T* p, int64_t n) {
  T buffer[Lanes<T>::kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
__attribute__((noinline)) void store_first(T* p, typename Lanes<T>::V v, int64_t n) {
  T buffer[Lanes<T>::kLanes];
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// The elements from p on that lie before `end`, at most a vector of them. Lanes past the end of a run hold elements of
// the next run, which callers ignore.
template <class T>
STEAM_INLINE typename Lanes<T>::V load_until(const T* p, const T* end) {
  const int64_t left = end - p;
  return __builtin_expect(left >= Lanes<T>::kLanes, 1) ? load(p) : load_first(p, larger<int64_t>(left, 0));
}

template <class T>
STEAM_INLINE double to_double(T v) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<double>(load_first(&v, 1)[0]);
  } else {
    return static_cast<double>(v);
  }
}

// ---------------------------------------------------------------- streaming: stores that bypass the caches; and claims

constexpr int kLine = 64;

// 64 bytes to a 64-byte boundary.
STEAM_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  const __m256i* f = static_cast<const __m256i*>(from);
  __m256i* t = static_cast<__m256i*>(to);
  const __m256i a = _mm256_loadu_si256(f), b = _mm256_loadu_si256(f + 1);
  _mm256_stream_si256(t, a);
  _mm256_stream_si256(t + 1, b);
#elif defined(__SSE2__)
  const __m128i* f = static_cast<const __m128i*>(from);
  __m128i* t = static_cast<__m128i*>(to);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(t + i, _mm_loadu_si128(f + i));
#else
  memcpy(to, from, kLine);
#endif
}

// Asks for a line of 64 bytes, to be written soon. Any address is allowed. GCC and Clang use PREFETCHW only if they are
// told that every processor of the variant has it; without it they ask for the line for reading, which gains less. A
// processor without it ignores it.
STEAM_INLINE void claim_line(const char* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*line));
#else
  __builtin_prefetch(line, 1);
#endif
}

// Later stores of a thread may become visible before its streaming stores, so a fence comes before another thread
// reads.
STEAM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace steam
