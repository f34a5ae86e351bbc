// The problem of a call, which is the shape of a batch and the options of a unit, and the arguments of a call. Plain
// data, for host and device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#  define STEAM_CONSTEXPR __host__ __device__ constexpr
#else
#  define STEAM_CONSTEXPR constexpr
#endif

namespace steam {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Problem {
  int64_t samples;   // N
  int64_t channels;  // C
  int64_t height;    // H
  int64_t width;     // W
  int64_t grid_h;    // gh <= H
  int64_t grid_w;    // gw <= W
  int64_t channel_radius;
  int32_t embed_dim;          // d, columns of a weight
  int32_t num_heads;          // h, divides d
  int32_t spatial_neighbors;  // 4 or 8
  bool self_loops;
  bool sequential;     // the spatial tokens are means of the channel-gated map
  bool channels_last;  // the memory format of all maps: channels_last, else NCHW
  bool relu;           // y = max(gated x + residual, 0)
  double scale;
  DType dtype;  // of x, residual, y and their gradients
};

// A parameter: four contiguous rows of d numbers (query, key, value, output).
struct Weight {
  const void* data;
  DType dtype;
};

struct WeightGrad {
  void* data;  // may be null, then the gradient is not computed
  DType dtype;
};

// The arguments of a call, without those that only one backend has. All maps are dense in the problem's memory format.
// `saved` is (N, 2 * (C + gh * gw)) in the accumulation type. The row of a sample holds the channel tokens, the channel
// pre-activations, the spatial tokens and the spatial pre-activations.
struct ForwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* x;
  const void* residual;  // may be null
  void* y;               // may be x itself
  void* saved;           // may be null
};

struct BackwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* dy;
  const void* x;
  const void* y;  // read only if problem.relu
  const void* saved;
  void* dx;         // may be null, then it is not computed
  void* dresidual;  // may be null, then it is not computed; null without problem.relu
  WeightGrad channel_grad;
  WeightGrad spatial_grad;
};

// The first row (column) of cell i, because pixel r is in cell floor(r * cells / length).
STEAM_CONSTEXPR int64_t cell_begin(int64_t i, int64_t cells, int64_t length) {
  return (i * length + cells - 1) / cells;
}

}  // namespace steam
