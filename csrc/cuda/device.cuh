// The base of the CUDA kernels: storage types, wide accesses, shared memory, sums over threads, and the plan of a call.
// With STEAM_CUDA_ON_HOST a header of the tests replaces CUDA's headers, and any C++20 compiler compiles the code.
#pragma once

#if defined(STEAM_CUDA_ON_HOST)
#  include "cuda_on_host.h"
#else
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  include <cuda_runtime.h>
#  define STEAM_LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/graph.h"
#include "../common/problem.h"
#include "../common/sizes.h"

namespace steam {
namespace {

constexpr int kWarp = 32;
// Terms that a thread adds up before it starts a new partial sum. A longer sum would lose digits.
constexpr int kTermsPerPartial = 64;
constexpr int kAccessBytes = 16;

STEAM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- storage and accumulation types

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }
__device__ __forceinline__ void narrow(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// An element of a parameter or of its gradient, in its own dtype.
__device__ inline double read_number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat16: return static_cast<double>(widen(static_cast<const __half*>(data)[i]));
    case DType::kBFloat16: return static_cast<double>(widen(static_cast<const __nv_bfloat16*>(data)[i]));
    default: return static_cast<double>(static_cast<const float*>(data)[i]);
  }
}
__device__ inline void write_number(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = value; return;
    case DType::kFloat16: return narrow(static_cast<float>(value), static_cast<__half*>(data)[i]);
    case DType::kBFloat16: return narrow(static_cast<float>(value), static_cast<__nv_bfloat16*>(data)[i]);
    default: static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// n elements that one access reads or writes.
template <class T, int n = kAccessBytes / static_cast<int>(sizeof(T))>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};
template <class T>
constexpr int kPack = kAccessBytes / static_cast<int>(sizeof(T));

template <int n, class T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, n>*>(p);
}
// The type of the intrinsics below whose registers a pack of T needs.
template <class T>
using PackBits =
    std::conditional_t<std::is_same_v<T, float>, float4, std::conditional_t<std::is_same_v<T, double>, double2, int4>>;
// Loads from global memory data that the cache may give up first.
template <class T>
__device__ __forceinline__ Pack<T> load_streaming(const T* p) {
  const PackBits<T> bits = __ldcs(reinterpret_cast<const PackBits<T>*>(p));
  Pack<T> v;
  memcpy(&v, &bits, sizeof(bits));
  return v;
}
// Stores to global memory. The compiler may split an assignment into four stores, but not the intrinsic.
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& v) {
  PackBits<T> bits;
  memcpy(&bits, &v, sizeof(bits));
  __stwb(reinterpret_cast<PackBits<T>*>(p), bits);
}

// The elements between the last 16-byte boundary and p. Arrays of equal phase have their wide accesses at the same
// elements.
template <class T>
STEAM_HD int phase(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kAccessBytes / sizeof(T));
}

// A run, divided into packs of 16 bytes and single elements at both ends. If the maps of the run differ in phase, there
// are no packs.
struct Span {
  int head;   // elements before the first pack
  int packs;  // packs of 16 bytes
  int ends;   // elements outside the packs
};
template <class T>
__device__ Span make_span(int count, int phase, bool one_phase) {
  const int head = smaller((kPack<T> - phase) % kPack<T>, count);
  const int packs = one_phase ? (count - head) / kPack<T> : 0;
  return {head, packs, count - packs * kPack<T>};
}
// Calls one(e) for each element outside the packs, by the threads of the block.
template <class T, class F>
__device__ __forceinline__ void for_ends(const Span& span, const F& one) {
  for (int k = static_cast<int>(threadIdx.x); k < span.ends; k += static_cast<int>(blockDim.x)) {
    one(k < span.head ? k : k + span.packs * kPack<T>);
  }
}

// ---------------------------------------------------------------- shared memory

// The bytes that one call of `take` uses.
template <class E>
STEAM_HD int64_t shared_bytes(int64_t count) {
  return ceil_div(count * static_cast<int64_t>(sizeof(E)), kAccessBytes) * kAccessBytes;
}

// Memory in pieces aligned to 16 bytes.
class Pieces {
 public:
  __device__ __forceinline__ explicit Pieces(void* at) : at_(static_cast<unsigned char*>(at)) {}
  template <class E>
  __device__ __forceinline__ E* take(int64_t count) {
    E* out = reinterpret_cast<E*>(at_);
    at_ += shared_bytes<E>(count);
    return out;
  }

 private:
  unsigned char* at_;
};

#if !defined(STEAM_CUDA_ON_HOST)
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char steam_shared_memory[];
  return steam_shared_memory;
}
// The block's dynamic shared memory. Every thread makes the same calls.
class SharedMemory : public Pieces {
 public:
  __device__ __forceinline__ SharedMemory() : Pieces(dynamic_shared_memory()) {}
};
#endif

// ---------------------------------------------------------------- sums over threads, in an order given by the shape

// The sum of v over 2^log2 neighbouring lanes. Each of them gets the sum.
template <class A>
__device__ __forceinline__ A sum_lanes(A v, int log2) {
  const unsigned lane = threadIdx.x % kWarp, lanes = 1u << log2;
  const unsigned mask = (lanes == kWarp ? 0u : 1u << lanes) - 1u;
  for (unsigned step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(mask << (lane & ~(lanes - 1u)), v, step);
  return v;
}

// f(begin) + f(begin + step) + ..., up to but without f(end).
template <class A, class I, class F>
__device__ __forceinline__ A sum_strided(I begin, I end, I step, const F& f) {
  A total{0};
  for (I i = begin; i < end;) {
    const I stop = end - i < kTermsPerPartial * step ? end : i + kTermsPerPartial * step;
    A partial{0};
#pragma unroll 8
    for (; i < stop; i += step) partial += f(i);
    total += partial;
  }
  return total;
}

// Calls out(row, sum of f(row, column) over the columns). 1 to 32 lanes sum a row, so that a warp has up to 32 rows at
// a time. A lane has about eight columns, or fewer if there would be threads without a row.
template <class A, class I, class F, class Out>
__device__ __forceinline__ void sum_rows(I rows, I columns, const F& f, const Out& out) {
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int log2 = 0;
  while (log2 < 5 && (16 << log2 <= columns || rows <= threads >> (log2 + 1))) ++log2;
  for (I row = t >> log2; row < rows; row += threads >> log2) {
    A sum = sum_strided<A, I>(t & ((1 << log2) - 1), columns, 1 << log2, [&](I column) { return f(row, column); });
    sum = sum_lanes(sum, log2);
    if ((t & ((1 << log2) - 1)) == 0) out(row, sum);
  }
}

// Calls out(column, sum of f(row, column) over the rows). Neighbouring threads sum neighbouring columns, so that their
// reads are contiguous. `scratch` has one number for each thread of the block.
template <class A, class I, class F, class Out>
__device__ __forceinline__ void sum_columns(I rows, I columns, A* scratch, const F& f, const Out& out) {
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  const int across = static_cast<int>(smaller<I>(columns, threads));
  const int groups = threads / across, group = t / across;
  for (I first = 0; first < columns; first += across) {
    const I column = first + t % across;
    const bool active = group < groups && column < columns;
    scratch[t] = active ? sum_strided<A, I>(group, rows, groups, [&](I row) { return f(row, column); }) : A{0};
    __syncthreads();
    for (int n = groups; n > 1;) {
      const int half = (n + 1) / 2;
      if (group + half < n) scratch[t] += scratch[t + half * across];
      n = half;
      __syncthreads();
    }
    if (active && group == 0) out(column, scratch[t]);
    __syncthreads();
  }
}

// The sum of v over the threads of the block whose index has the same last log2 bits. Thread t < 2^log2 gets the sum
// for its bits, and the other threads get 0. `scratch` has 2^log2 numbers for each warp.
template <class A>
__device__ __forceinline__ A sum_block(A v, int log2, A* scratch) {
  const int t = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp, kinds = 1 << log2;
  for (int step = kWarp / 2; step >= kinds; step /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, static_cast<unsigned>(step));
  if (t % kWarp < kinds) scratch[t / kWarp * kinds + t % kWarp] = v;
  __syncthreads();
  A sum{0};
  if (t < kinds) {
    for (int k = 0; k < warps; ++k) sum += scratch[k * kinds + t];
  }
  __syncthreads();
  return sum;
}

// ---------------------------------------------------------------- the plan of a call

// The lanes that sum one cell: 2^log2_count lanes, of which 2^log2_columns read neighbouring pixels of a row.
struct CellLanes {
  int32_t log2_count;
  int32_t log2_columns;
};

// The plan of a call, an argument of every kernel: the problem, the weights, and the values that follow from the
// problem.
struct Plan {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  RingStencil ring;
  int32_t lattice;  // bit 3 * (dr + 1) + dc + 1: a cell attends to the cell dr rows and dc columns away
  CellLanes cell_lanes;
  int32_t log2_head_lanes;  // 2^log2_head_lanes lanes work on one node, each on other heads

  STEAM_HD int64_t pixels() const { return problem.height * problem.width; }
  STEAM_HD int64_t cells() const { return problem.grid_h * problem.grid_w; }
  STEAM_HD int64_t sample_size() const { return problem.channels * pixels(); }
  STEAM_HD bool cells_are_pixels() const { return problem.grid_h == problem.height && problem.grid_w == problem.width; }
  // The channels and cells of a sample.
  STEAM_HD int64_t nodes() const { return problem.channels + cells(); }
};

// A cell: the pixels of rows [r0, r1) and columns [q0, q1).
struct Cell {
  int64_t r0, r1, q0, q1;
  __device__ int64_t size() const { return (r1 - r0) * (q1 - q0); }
};
__device__ inline Cell cell_at(const Problem& p, int64_t i, int64_t j) {
  return {cell_begin(i, p.grid_h, p.height), cell_begin(i + 1, p.grid_h, p.height), cell_begin(j, p.grid_w, p.width),
          cell_begin(j + 1, p.grid_w, p.width)};
}

// Calls f(pixel - begin, cell) for every pixel in [begin, end), by the threads of the block.
template <class F>
__device__ __forceinline__ void for_pixels(const Problem& p, int64_t begin, int64_t end, const F& f) {
  const int across = static_cast<int>(smaller<int64_t>(p.width, blockDim.x));
  const int down = static_cast<int>(blockDim.x) / across, row = static_cast<int>(threadIdx.x) / across;
  if (row >= down) return;
  for (int64_t q = static_cast<int>(threadIdx.x) % across; q < p.width; q += across) {
    const int64_t j = q * p.grid_w / p.width;
    int64_t r = begin / p.width + row;
    int64_t i = r * p.grid_h / p.height, next = cell_begin(i + 1, p.grid_h, p.height);
    for (; r * p.width < end; r += down) {
      while (r >= next) next = cell_begin(++i + 1, p.grid_h, p.height);
      const int64_t pixel = r * p.width + q;
      if (pixel >= begin && pixel < end) f(pixel - begin, i * p.grid_w + j);
    }
  }
}

}  // namespace
}  // namespace steam
