// A replacement for CUDA's headers. With it a host compiler compiles the unchanged source of the kernels, and the CPU
// runs them (fibres.h).
#pragma once

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::cuda_on_host::thread_index())
#define blockIdx (::cuda_on_host::block_index())
#define blockDim (::cuda_on_host::block_size())
#define __syncthreads() ::cuda_on_host::barrier(::cuda_on_host::Place::current())
#define __shfl_xor_sync(mask, value, step) \
  ::cuda_on_host::shuffle(mask, value, threadIdx.x % ::cuda_on_host::kWarp ^ (step), ::cuda_on_host::Place::current())
#define STEAM_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), ::cuda_on_host::launch(::cuda_on_host::Place::current(), kernel, grid, block, bytes, __VA_ARGS__))

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
template <class V>
V __ldcs(const V* p) {
  return *p;
}
template <class V>
void __stwb(V* p, V v) {
  *p = v;
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if (v != v) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using cudaError_t = cuda_on_host::Error;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = cuda_on_host::kSuccess;
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cuda_on_host::kSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = static_cast<int>(cuda_on_host::shared_memory_limit);
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), int, int bytes) {
  if (bytes > cuda_on_host::shared_memory_limit) return cuda_on_host::last_error = cuda_on_host::kInvalidValue;
  cuda_on_host::shared_memory_of[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

namespace steam {
namespace {
// Replaces the class that the kernels have on a GPU. The k-th call of every thread gets the k-th piece.
class SharedMemory {
 public:
  template <class E>
  E* take(int64_t count, const cuda_on_host::Place& place = cuda_on_host::Place::current()) {
    return reinterpret_cast<E*>(cuda_on_host::take_shared(static_cast<size_t>(count) * sizeof(E), place));
  }
};
}  // namespace
}  // namespace steam
