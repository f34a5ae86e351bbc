// The host side of the CUDA kernels: the plan of a call, the sizes of its launches, and checked launches.
#pragma once

#include <climits>
#include <cstdio>
#include <string>

#include "device.cuh"
#include "gate.cuh"
#include "kernels.h"
#include "pool.cuh"
#include "whole.cuh"

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
  // Four lanes on a node: more would make the memory of the backward pass large.
  plan.log2_head_lanes = p.num_heads == 1 ? 0 : p.num_heads == 2 ? 1 : 2;
  // A lane has about eight pixels of a cell.
  const int64_t height = p.height / p.grid_h, width = p.width / p.grid_w;
  plan.cell_lanes.log2_count = smaller(5, floor_log2(larger<int64_t>(1, height * width / 8)));
  plan.cell_lanes.log2_columns = smaller(plan.cell_lanes.log2_count, floor_log2(width));
  return plan;
}

// ---------------------------------------------------------------- the sizes of launches

// The lanes of a cell in NCHW, as a power of two, if the rows of all cells are whole packs, else -1. A lane has about
// eight packs. Cells with more than 64 packs for each lane of a warp are divided among the threads of a block instead.
template <class T>
int cell_log2_lanes(const Plan& plan) {
  const Problem& p = plan.problem;
  if (p.width % (p.grid_w * kPack<T>) != 0) return -1;
  // The kernel has 32-bit arithmetic.
  if (p.channels * plan.cells() > INT_MAX / kWarp || p.height * p.grid_h > INT_MAX) return -1;
  const int64_t packs = ceil_div(p.height, p.grid_h) * (p.width / p.grid_w / kPack<T>);
  return packs > 64 * kWarp ? -1 : smaller(5, floor_log2(larger<int64_t>(1, packs / 8)));
}

// `aligned_maps`: whether every map begins at a 16-byte boundary.
template <class T>
PoolSizes pool_sizes(const Plan& plan, bool aligned_maps) {
  constexpr int kTileBytes = 16384;
  PoolSizes sizes{};
  const int log2_lanes = cell_log2_lanes<T>(plan);
  if (!plan.problem.channels_last && log2_lanes >= 0) {
    sizes.width = aligned_maps ? kPack<T> : 1;
    sizes.log2_lanes = log2_lanes;
    sizes.slices = ceil_div(plan.problem.channels * plan.cells() << log2_lanes, kPoolThreads);
  } else if (!plan.problem.channels_last) {
    const int64_t tile = kTileBytes / static_cast<int64_t>(sizeof(T));
    sizes.channels = static_cast<int32_t>(smaller(plan.problem.channels, larger<int64_t>(1, tile / plan.pixels())));
    sizes.tile = static_cast<int32_t>(smaller(tile, sizes.channels * plan.pixels()));
    sizes.slices = ceil_div(plan.problem.channels, sizes.channels);
  } else {
    sizes.width = aligned_maps && plan.problem.channels % kPack<T> == 0 ? kPack<T> : 1;
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

// The distance of a channel's farthest neighbour.
inline int64_t reach(const Plan& plan) { return larger(-plan.ring.lo, plan.ring.hi); }

// A tile has 16 numbers for each thread, and half of them in float64. A block has at least eight channels, so that a
// row of a tile in channels_last is 16 bytes.
template <class A>
GraphSizes graph_sizes(const Plan& plan) {
  constexpr int64_t kTile = 64 * kGraphThreads / static_cast<int64_t>(sizeof(A));
  const int64_t cells = smaller(plan.cells(), kTile / 8), channels = plan.problem.channels;
  GraphSizes sizes{};
  sizes.channels = kGraphThreads;
  while (sizes.channels > 8 && sizes.channels * cells > kTile) sizes.channels /= 2;
  while (sizes.channels / 2 >= channels) sizes.channels /= 2;
  sizes.cells = static_cast<int32_t>(smaller(plan.cells(), kTile / sizes.channels));
  sizes.blocks = ceil_div(channels, sizes.channels);
  sizes.halo = sizes.blocks == 1 ? 0 : reach(plan);
  return sizes;
}

// The number of blocks that a row of so many packs is divided into. A thread of a block has one pack of a row, and the
// block has as many rows at once as it has threads for. The division leaves the fewest threads without a pack.
inline int64_t row_divisions(int64_t packs) {
  int64_t best = 1, most = 0;
  for (int64_t k = ceil_div(packs, kGateThreads); k <= larger<int64_t>(1, packs / 32); ++k) {
    const int64_t across = ceil_div(packs, k), busy = packs * (kGateThreads / across) * 4096 / k;
    if (busy > most) {
      best = k;
      most = busy;
    }
    if (k >= 64) break;
  }
  return best;
}

// `aligned_maps`: whether every map begins at a 16-byte boundary.
template <class T>
GateSizes gate_sizes(const Plan& plan, bool backward, bool aligned_maps) {
  // An array of factors by column takes at most 16 KB of shared memory. In the backward pass in channels_last there are
  // three such arrays, so each takes at most 8 KB. A100 has the fewest multiprocessors of a large GPU since 2020.
  constexpr int64_t kRows = 512, kElements = 16384, kFewBlocks = 512, kMultiprocessors = 108;
  const bool channels_last = plan.problem.channels_last;
  GateSizes sizes{};
  sizes.group = aligned_maps ? gate_group<T>(plan) : 0;
  sizes.one_cell = packs_have_one_cell<T>(plan.problem);
  sizes.lines = (channels_last ? plan.pixels() : plan.problem.channels) / larger(sizes.group, 1);
  sizes.pitch = (channels_last ? plan.problem.channels : plan.pixels()) * larger(sizes.group, 1);
  int64_t rows;
  // The bits of an element do not depend on the block that writes it, so small batches may have smaller blocks.
  if (sizes.group > 0) {
    const int64_t packs = sizes.pitch / kPack<T>, across = ceil_div(packs, row_divisions(packs));
    const int64_t down = kGateThreads / across, columns = ceil_div(packs, across);
    int64_t steps = kGateSteps;
    while (steps > 1 && plan.problem.samples * columns * ceil_div(sizes.lines, down * steps) < kMultiprocessors) {
      steps /= 2;
    }
    // The factors of the rows take at most 48 KB of shared memory.
    const int64_t most = (channels_last || !backward ? 8192 : 4096) * 4 / static_cast<int64_t>(sizeof(Accumulate<T>));
    rows = smaller(down * steps, most / sizes.group);
    sizes.columns = static_cast<int32_t>(across * kPack<T>);
  } else {
    const int64_t most = (channels_last && backward ? 8192 : 16384) / static_cast<int64_t>(sizeof(Accumulate<T>));
    const int64_t blocks = ceil_div(sizes.pitch, most);
    sizes.columns = static_cast<int32_t>(ceil_div(ceil_div(sizes.pitch, blocks), kPack<T>) * kPack<T>);
    if (blocks == 1) sizes.columns = static_cast<int32_t>(sizes.pitch);
    const bool few = plan.problem.samples * plan.sample_size() < kFewBlocks * kElements;
    rows = smaller(kRows, larger<int64_t>(1, (few ? kElements / 4 : kElements) / sizes.columns));
  }
  sizes.rows = static_cast<int32_t>(smaller(sizes.lines, rows));
  sizes.row_blocks = static_cast<int32_t>(ceil_div(sizes.lines, sizes.rows));
  sizes.column_blocks = static_cast<int32_t>(ceil_div(sizes.pitch, sizes.columns));
  return sizes;
}

// The blocks of the gate's launch.
inline int64_t gate_blocks(const Plan& plan, const GateSizes& sizes) {
  return plan.problem.samples * sizes.row_blocks * sizes.column_blocks;
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

// Calls f.operator()<T, kChannelsLast>(plan, launcher) for the call's dtype and memory format, and returns the
// launcher's error.
template <class Args, class F>
std::string launch_call(const Args& args, void* stream, const F& f) {
  const Plan plan = make_plan(args.problem, args.channel_weight, args.spatial_weight);
  // A window's nodes are counted in 32 bits, and it has four times the reach of a channel beside its own channels.
  if (reach(plan) > (INT_MAX - kGraphThreads) / 4) {
    return "a channel has neighbours that are " + std::to_string(reach(plan)) +
           " channels away, and the kernels take " + std::to_string((INT_MAX - kGraphThreads) / 4);
  }
  Launcher launcher(args.problem, stream);
  with_dtype(args.problem.dtype, [&]<class T>() {
    with_bool(plan.problem.channels_last,
              [&]<bool kChannelsLast>() { f.template operator()<T, kChannelsLast>(plan, launcher); });
  });
  return launcher.error;
}

// The bytes that f.operator()<T>(plan, workspace) takes.
template <class F>
size_t count_workspace(const Problem& problem, const F& f) {
  const Plan plan = make_plan(problem, {}, {});
  Workspace workspace(nullptr);
  with_dtype(problem.dtype, [&]<class T>() { f.template operator()<T>(plan, workspace); });
  return workspace.bytes();
}

// Whether every map begins at a 16-byte boundary.
inline bool aligned(std::initializer_list<const void*> maps) {
  for (const void* map : maps) {
    if (reinterpret_cast<uintptr_t>(map) % kAccessBytes != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace steam
