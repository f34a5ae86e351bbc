// The host side of the CUDA kernels: what a call works out from its shape, and how a kernel is launched and checked.
#pragma once

#include <climits>
#include <cstdio>
#include <string>

#include "device.cuh"
#include "gate.cuh"
#include "graph.cuh"
#include "kernels.h"
#include "pool.cuh"

namespace steam {
namespace {

template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64: return f.template operator()<double>();
    case DType::kFloat16: return f.template operator()<__half>();
    case DType::kBFloat16: return f.template operator()<__nv_bfloat16>();
    default: return f.template operator()<float>();
  }
}
template <class F>
auto with_bool(bool value, const F& f) {
  return value ? f.template operator()<true>() : f.template operator()<false>();
}

inline int floor_log2(int64_t n) {
  int log2 = 0;
  while (n >> (log2 + 1)) ++log2;
  return log2;
}

inline Unit make_unit(const Problem& problem, const Weight& channel_weight, const Weight& spatial_weight) {
  Unit u{};
  u.p = problem;
  Problem& p = u.p;
  u.channel_weight = channel_weight;
  u.spatial_weight = spatial_weight;
  // Where one axis is 1 both memory orders are one; take the one with the longer rows.
  if (p.channels == 1) p.channels_last = false;
  if (u.pixels() == 1) p.channels_last = true;
  u.ring = ring_stencil(p.channels, p.channel_radius, p.self_loops);
  const LatticeStencil lattice = lattice_stencil(p.grid_h, p.grid_w, p.spatial_neighbors, p.self_loops);
  for (int k = 0; k < lattice.count; ++k) u.lattice |= 1 << (3 * (lattice.dr[k] + 1) + lattice.dc[k] + 1);
  // Some eight pixels a lane.
  const int64_t height = p.height / p.grid_h, width = p.width / p.grid_w;
  u.share.lanes = smaller(5, floor_log2(larger<int64_t>(1, height * width / 8)));
  u.share.columns = smaller(u.share.lanes, floor_log2(width));
  return u;
}

// ---------------------------------------------------------------- plans

template <class T>
PoolPlan pool_plan(const Unit& u, bool wide) {
  constexpr int kTileBytes = 16384;
  PoolPlan plan{};
  if (!u.p.channels_last) {
    const int64_t tile = kTileBytes / static_cast<int64_t>(sizeof(T));
    plan.channels = static_cast<int32_t>(smaller(u.p.channels, larger<int64_t>(1, tile / u.pixels())));
    plan.tile = static_cast<int32_t>(smaller(tile, plan.channels * u.pixels()));
    plan.slices = ceil_div(u.p.channels, plan.channels);
  } else {
    plan.width = wide ? kPack<T> : 1;
    const int64_t pixels = u.p.height / u.p.grid_h * (u.p.width / u.p.grid_w);
    plan.share = 1 << smaller(5, floor_log2(larger<int64_t>(1, pixels / 8)));
    plan.slices = ceil_div(u.cells() * (u.p.channels / plan.width), kPoolThreads / plan.share);
  }
  return plan;
}

template <class T, bool kProducts>
int64_t pool_bytes(const Unit& u, const PoolPlan& plan) {
  return u.p.channels_last ? pool_channels_last_bytes<T>(plan, kPoolThreads) : pool_planar_bytes<T, kProducts>(plan);
}

template <class T>
GatePlan gate_plan(const Unit& u, bool backward) {
  constexpr int64_t kRows = 512, kElements = 16384, kFewBlocks = 512;
  // The column maps take 16 KB each in NCHW, which has two of them backwards, and 8 KB in channels_last.
  const int64_t most = (u.p.channels_last && backward ? 8192 : 16384) / static_cast<int64_t>(sizeof(Accumulate<T>));
  const int64_t rows = u.p.channels_last ? u.pixels() : u.p.channels;
  const int64_t columns = u.p.channels_last ? u.p.channels : u.pixels();
  GatePlan plan{};
  plan.column_blocks = ceil_div(columns, most);
  plan.columns = static_cast<int32_t>(ceil_div(ceil_div(columns, plan.column_blocks), kPack<T>) * kPack<T>);
  if (plan.column_blocks == 1) plan.columns = static_cast<int32_t>(columns);
  plan.column_blocks = ceil_div(columns, plan.columns);
  // Which block writes an element changes no bit of it, so that small batches may have smaller blocks.
  const bool few = u.p.samples * u.sample() < kFewBlocks * kElements;
  const int64_t wanted = (few ? kElements / 4 : kElements) / plan.columns;
  plan.rows = static_cast<int32_t>(smaller(rows, smaller(kRows, larger<int64_t>(1, wanted))));
  plan.row_blocks = ceil_div(rows, plan.rows);
  return plan;
}

// ---------------------------------------------------------------- launches

// Shared memory that a block may ask for on the current device; what every GPU has where there is none.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    cudaGetLastError();
    bytes = 48 << 10;
  }
  return bytes;
}

// Queues one call's kernels in order; after a failure it queues no more, and `error` says which kernel it was.
class Launcher {
 public:
  Launcher(const Problem& problem, void* stream) : p_(problem), stream_(static_cast<cudaStream_t>(stream)) {}

  template <class... Parameters, class... Args>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                  const Args&... args) {
    if (!error.empty() || blocks == 0) return;
    if (blocks > INT_MAX) return fail(name, blocks, shared, "more blocks than a grid can have");
    cudaError_t status = cudaSuccess;
    if (shared > 48 << 10) {
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    if (status == cudaSuccess) {
      STEAM_LAUNCH(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
                   stream_, args...);
    }
    // Reads and clears it, whichever of the two it came from.
    status = cudaGetLastError();
    if (status != cudaSuccess) fail(name, blocks, shared, cudaGetErrorString(status));
  }

  std::string error;

 private:
  void fail(const char* name, int64_t blocks, int64_t shared, const char* reason) {
    char text[512];
    std::snprintf(
        text, sizeof(text),
        "kernel %s failed to launch for x of shape (%lld, %lld, %lld, %lld) in %s with a grid of (%lld, %lld) "
        "(%lld blocks, %lld bytes of shared memory): %s",
        name, as_long(p_.samples), as_long(p_.channels), as_long(p_.height), as_long(p_.width),
        p_.channels_last ? "channels_last" : "NCHW", as_long(p_.grid_h), as_long(p_.grid_w), as_long(blocks),
        as_long(shared), reason);
    error = text;
  }
  static long long as_long(int64_t n) { return n; }

  const Problem p_;
  const cudaStream_t stream_;
};

// Hands out a workspace piece by piece. From null it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class E>
  E* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += shared_bytes<E>(count);
    return base_ ? reinterpret_cast<E*>(base_ + at) : nullptr;
  }
  size_t bytes() const { return static_cast<size_t>(bytes_); }

 private:
  unsigned char* base_;
  int64_t bytes_ = 0;
};

// Whether every map begins at a 16-byte boundary.
inline bool aligned(std::initializer_list<const void*> maps) {
  for (const void* map : maps) {
    if (reinterpret_cast<uintptr_t>(map) % kAccessBytes != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace steam
