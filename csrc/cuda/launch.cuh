// The host side of the CUDA kernels: the plan of a call, the sizes of its launches, and checked launches.
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

inline Plan make_plan(const Problem& problem, const Weight& channel_weight, const Weight& spatial_weight) {
  Plan plan{};
  plan.problem = problem;
  Problem& p = plan.problem;
  plan.channel_weight = channel_weight;
  plan.spatial_weight = spatial_weight;
  // If C or H * W is 1, both memory formats are the same memory. The kernels use the one with the longer rows.
  if (p.channels == 1) p.channels_last = false;
  if (plan.pixels() == 1) p.channels_last = true;
  plan.ring = ring_stencil(p.channels, p.channel_radius, p.self_loops);
  const LatticeStencil lattice = lattice_stencil(p.grid_h, p.grid_w, p.spatial_neighbors, p.self_loops);
  for (int k = 0; k < lattice.count; ++k) plan.lattice |= 1 << (3 * (lattice.dr[k] + 1) + lattice.dc[k] + 1);
  // A lane has about eight pixels of a cell.
  const int64_t height = p.height / p.grid_h, width = p.width / p.grid_w;
  plan.cell_lanes.log2_count = smaller(5, floor_log2(larger<int64_t>(1, height * width / 8)));
  plan.cell_lanes.log2_columns = smaller(plan.cell_lanes.log2_count, floor_log2(width));
  return plan;
}

// ---------------------------------------------------------------- the sizes of launches

// `wide`: whether every pixel begins at a 16-byte boundary and has whole packs of channels (channels_last).
template <class T>
PoolSizes pool_sizes(const Plan& plan, bool wide) {
  constexpr int kTileBytes = 16384;
  PoolSizes sizes{};
  if (!plan.problem.channels_last) {
    const int64_t tile = kTileBytes / static_cast<int64_t>(sizeof(T));
    sizes.channels = static_cast<int32_t>(smaller(plan.problem.channels, larger<int64_t>(1, tile / plan.pixels())));
    sizes.tile = static_cast<int32_t>(smaller(tile, sizes.channels * plan.pixels()));
    sizes.slices = ceil_div(plan.problem.channels, sizes.channels);
  } else {
    sizes.width = wide ? kPack<T> : 1;
    const int64_t pixels = plan.problem.height / plan.problem.grid_h * (plan.problem.width / plan.problem.grid_w);
    sizes.threads_per_cell = 1 << smaller(5, floor_log2(larger<int64_t>(1, pixels / 8)));
    sizes.slices =
        ceil_div(plan.cells() * (plan.problem.channels / sizes.width), kPoolThreads / sizes.threads_per_cell);
  }
  return sizes;
}

template <class T, bool kProducts>
int64_t pool_bytes(const Plan& plan, const PoolSizes& sizes) {
  return plan.problem.channels_last ? pool_channels_last_bytes<T>(sizes, kPoolThreads)
                                    : pool_nchw_bytes<T, kProducts>(sizes);
}

template <class T>
GateSizes gate_sizes(const Plan& plan, bool backward) {
  constexpr int64_t kRows = 512, kElements = 16384, kFewBlocks = 512;
  // An array of factors by column takes at most 16 KB of shared memory. In the backward pass in channels_last there are
  // three such arrays, so each takes at most 8 KB.
  const int64_t most =
      (plan.problem.channels_last && backward ? 8192 : 16384) / static_cast<int64_t>(sizeof(Accumulate<T>));
  const int64_t rows = plan.problem.channels_last ? plan.pixels() : plan.problem.channels;
  const int64_t columns = plan.problem.channels_last ? plan.problem.channels : plan.pixels();
  GateSizes sizes{};
  sizes.column_blocks = ceil_div(columns, most);
  sizes.columns = static_cast<int32_t>(ceil_div(ceil_div(columns, sizes.column_blocks), kPack<T>) * kPack<T>);
  if (sizes.column_blocks == 1) sizes.columns = static_cast<int32_t>(columns);
  sizes.column_blocks = ceil_div(columns, sizes.columns);
  // The bits of an element do not depend on the block that writes it, so small batches may have smaller blocks.
  const bool few = plan.problem.samples * plan.sample_size() < kFewBlocks * kElements;
  const int64_t wanted = (few ? kElements / 4 : kElements) / sizes.columns;
  sizes.rows = static_cast<int32_t>(smaller(rows, smaller(kRows, larger<int64_t>(1, wanted))));
  sizes.row_blocks = ceil_div(rows, sizes.rows);
  return sizes;
}

// ---------------------------------------------------------------- launches

// The bytes of shared memory that a block may request on the current device. Without a device it is 48 KB, which every
// GPU has.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    cudaGetLastError();
    bytes = 48 << 10;
  }
  return bytes;
}

// Queues the kernels of one call in order. After a failure it queues no more kernels, and `error` names the kernel.
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
    // The error is of the attribute or of the launch. Reading it also clears it.
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

// Gives a workspace out in pieces. If the base is null, it only counts their bytes.
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
