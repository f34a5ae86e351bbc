// What the CUDA kernels stand on: storage types, wide accesses, shared memory, sums over threads, launches. With
// STEAM_CUDA_ON_HOST a stand-in for CUDA's headers is included, and any C++20 compiler takes the same source.
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

#include "../common/graph.h"
#include "../common/problem.h"

namespace steam {
namespace {

constexpr int kWarp = 32;
// Numbers that one thread adds up before it starts afresh: keeps long sums from losing digits.
constexpr int kRun = 64;
constexpr int kAccessBytes = 16;

template <class I>
STEAM_HD I smaller(I a, I b) {
  return a < b ? a : b;
}
template <class I>
STEAM_HD I larger(I a, I b) {
  return a < b ? b : a;
}
STEAM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- storage and accumulation types

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }
__device__ __forceinline__ void narrow(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// A parameter's element, and a gradient's, in their own dtypes.
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

// n elements that are read and written by one access.
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
// To global memory. An assignment may be taken apart into four stores; the intrinsic is one.
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& v) {
  int4 bits;
  memcpy(&bits, &v, sizeof(bits));
  __stwb(reinterpret_cast<int4*>(p), bits);
}

// Elements between the last 16-byte boundary and p.
template <class T>
STEAM_HD int phase(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kAccessBytes / sizeof(T));
}

// A contiguous run, shared by the block's threads: pack(e) for each 16-byte piece, one(e) for the elements at its ends.
// Where not all maps of the run have one phase, every element is an end.
struct Span {
  int head;   // elements before the first pack
  int packs;  // 16-byte pieces
  int ends;   // elements outside of them
};
template <class T>
__device__ Span make_span(int count, int phase, bool one_phase) {
  const int head = smaller((kPack<T> - phase) % kPack<T>, count);
  const int packs = one_phase ? (count - head) / kPack<T> : 0;
  return {head, packs, count - packs * kPack<T>};
}
template <class T, class F>
__device__ __forceinline__ void for_ends(const Span& span, const F& one) {
  for (int k = static_cast<int>(threadIdx.x); k < span.ends; k += static_cast<int>(blockDim.x)) {
    one(k < span.head ? k : k + span.packs * kPack<T>);
  }
}

// ---------------------------------------------------------------- shared memory

// Bytes that `take` uses up.
template <class E>
STEAM_HD int64_t shared_bytes(int64_t count) {
  return ceil_div(count * static_cast<int64_t>(sizeof(E)), kAccessBytes) * kAccessBytes;
}

#if !defined(STEAM_CUDA_ON_HOST)
// The block's dynamic shared memory, handed out in pieces aligned to 16 bytes. Every thread makes the same calls.
class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(16) unsigned char steam_shared_memory[];
    at_ = steam_shared_memory;
  }
  template <class E>
  __device__ __forceinline__ E* take(int64_t count) {
    E* out = reinterpret_cast<E*>(at_);
    at_ += shared_bytes<E>(count);
    return out;
  }

 private:
  unsigned char* at_;
};
#endif

// ---------------------------------------------------------------- sums over threads, in an order that the shape fixes

// Over 2^log2 neighbouring lanes; every one of them gets the sum.
template <class A>
__device__ __forceinline__ A sum_lanes(A v, int log2) {
  const unsigned lane = threadIdx.x % kWarp, lanes = 1u << log2;
  const unsigned mask = (lanes == kWarp ? 0u : 1u << lanes) - 1u;
  for (unsigned step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(mask << (lane & ~(lanes - 1u)), v, step);
  return v;
}

// f(begin) + f(begin + step) + ... below end.
template <class A, class F>
__device__ __forceinline__ A sum_run(int64_t begin, int64_t end, int64_t step, const F& f) {
  A total{0};
  for (int64_t i = begin; i < end;) {
    const int64_t stop = smaller(end, i + kRun * step);
    A part{0};
#pragma unroll 4
    for (; i < stop; i += step) part += f(i);
    total += part;
  }
  return total;
}

// out(row, sum of f(row, column) over the columns): a warp takes a row.
template <class A, class F, class Out>
__device__ __forceinline__ void sum_rows(int64_t rows, int64_t columns, const F& f, const Out& out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < rows; row += warps) {
    A sum = sum_run<A>(lane, columns, kWarp, [&](int64_t column) { return f(row, column); });
    sum = sum_lanes(sum, 5);
    if (lane == 0) out(row, sum);
  }
}

// out(column, sum of f(row, column) over the rows): neighbouring threads take neighbouring columns. `room` holds one
// number for each thread of the block.
template <class A, class F, class Out>
__device__ __forceinline__ void sum_columns(int64_t rows, int64_t columns, A* room, const F& f, const Out& out) {
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  const int across = static_cast<int>(smaller<int64_t>(columns, threads));
  const int groups = threads / across, group = t / across;
  for (int64_t first = 0; first < columns; first += across) {
    const int64_t column = first + t % across;
    const bool active = group < groups && column < columns;
    room[t] = active ? sum_run<A>(group, rows, groups, [&](int64_t row) { return f(row, column); }) : A{0};
    __syncthreads();
    for (int n = groups; n > 1;) {
      const int half = (n + 1) / 2;
      if (group + half < n) room[t] += room[t + half * across];
      n = half;
      __syncthreads();
    }
    if (active && group == 0) out(column, room[t]);
    __syncthreads();
  }
}

// The sum of v over the block, in thread 0. `room` holds one number for each warp.
template <class A>
__device__ __forceinline__ A sum_block(A v, A* room) {
  const int t = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  v = sum_lanes(v, 5);
  if (t % kWarp == 0) room[t / kWarp] = v;
  __syncthreads();
  A sum{0};
  if (t == 0) {
    for (int k = 0; k < warps; ++k) sum += room[k];
  }
  __syncthreads();
  return sum;
}

// ---------------------------------------------------------------- one unit on one batch, as a kernel is told it

// 2^lanes threads share a cell's pixels, 2^columns of them side by side in a row.
struct CellShare {
  int32_t lanes;
  int32_t columns;
};

struct Unit {
  Problem p;
  Weight channel_weight;
  Weight spatial_weight;
  RingStencil ring;
  int32_t lattice;  // bit 3 * (dr + 1) + dc + 1: a cell has a neighbour dr rows and dc columns away
  CellShare share;

  STEAM_HD int64_t pixels() const { return p.height * p.width; }
  STEAM_HD int64_t cells() const { return p.grid_h * p.grid_w; }
  STEAM_HD int64_t sample() const { return p.channels * pixels(); }
  STEAM_HD bool cells_are_pixels() const { return p.grid_h == p.height && p.grid_w == p.width; }
};

// Rows [r0, r1) and columns [q0, q1) of a cell.
struct Cell {
  int64_t r0, r1, q0, q1;
  __device__ int64_t size() const { return (r1 - r0) * (q1 - q0); }
};
__device__ inline Cell cell_at(const Problem& p, int64_t i, int64_t j) {
  return {cell_begin(i, p.grid_h, p.height), cell_begin(i + 1, p.grid_h, p.height), cell_begin(j, p.grid_w, p.width),
          cell_begin(j + 1, p.grid_w, p.width)};
}

// f(pixel - begin, cell) for every pixel in [begin, end), by the block's threads.
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
