// torch's side of the compiled kernels, on LibTorch's stable ABI: the operators of any backend whose kernels take the
// plain structs. Schemas, checks and autograd are Python's (steam_kernels/ops.py).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace steam {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "steam_kernels: dtype must be float32, float64, float16 or bfloat16");
  }
  return DType::kFloat32;
}

using Sizes = std::array<int64_t, 4>;

// Strides of a dense tensor as empty_like would give them.
Sizes strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Where a backend's outputs lie.
struct Place {
  int32_t device_type;
  int32_t device_index;

  template <std::size_t n>
  Tensor empty(const std::array<int64_t, n>& sizes, const std::array<int64_t, n>& strides, ScalarType dtype) const {
    AtenTensorHandle handle;
    const AOTITorchError error = aoti_torch_empty_strided(
        n, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        device_type, device_index, &handle);
    if (error != AOTI_TORCH_SUCCESS) {
      std::string shape;
      for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
      STD_TORCH_CHECK(false, "steam_kernels: PyTorch could not allocate an output of shape (", shape, ")");
    }
    return Tensor(handle);
  }
  Tensor like(const Tensor& t) const {
    return empty<4>({t.size(0), t.size(1), t.size(2), t.size(3)}, strides_of(t), t.scalar_type());
  }
  Tensor nothing(ScalarType dtype) const { return empty<1>({0}, {1}, dtype); }
};

struct Options {
  int64_t num_heads, channel_radius, spatial_neighbors;
  bool self_loops, sequential, relu;
  double scale;
};

// Strides of an axis of length 1 mean nothing.
bool is_dense(const Tensor& t, bool channels_last) {
  const int64_t order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int64_t axis : order[channels_last ? 1 : 0]) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}

Problem problem(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& grid, const Options& o) {
  Problem p{};
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.grid_h = grid[0];
  p.grid_w = grid[1];
  p.channel_radius = o.channel_radius;
  p.embed_dim = static_cast<int32_t>(weight.size(1));
  p.num_heads = static_cast<int32_t>(o.num_heads);
  p.spatial_neighbors = static_cast<int32_t>(o.spatial_neighbors);
  p.self_loops = o.self_loops;
  p.sequential = o.sequential;
  p.relu = o.relu;
  p.scale = o.scale;
  p.dtype = dtype_of(x);
  p.channels_last = !is_dense(x, false);
  STD_TORCH_CHECK(p.samples == 0 || !p.channels_last || is_dense(x, true),
                  "steam_kernels: the operator takes x dense in NCHW or channels_last; steam() makes it so");
  return p;
}

// The kernels know nothing of the map but x's strides: every other map must share them.
void check_same(const Tensor& x, const Tensor& t) {
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(
        t.size(axis) == x.size(axis) && (t.size(axis) == 1 || t.numel() == 0 || t.stride(axis) == x.stride(axis)),
        "steam_kernels: the operator takes all maps with x's sizes and strides; steam() makes them so");
  }
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "steam_kernels: the operator takes all maps in x's dtype");
}

Weight weight_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }

// The operators of a backend B, which gives
//   Place place(const Tensor& x)
//   ForwardArgs, BackwardArgs                       the kernels' structs, up to the last member
//   void forward(const Tensor& x, ForwardArgs)      fill that in and run
//   void backward(const Tensor& x, BackwardArgs)
template <class B>
struct Operators {
  static void run_forward(const Tensor& x, const Tensor& channel_weight, const Tensor& spatial_weight,
                          const std::optional<Tensor>& residual, const Problem& p, void* y, void* saved) {
    if (residual) check_same(x, *residual);
    B::forward(x, {p,
                   weight_of(channel_weight),
                   weight_of(spatial_weight),
                   x.const_data_ptr(),
                   residual ? residual->const_data_ptr() : nullptr,
                   y,
                   saved,
                   {}});
  }

  static std::tuple<Tensor, Tensor> forward(Tensor x, Tensor channel_weight, Tensor spatial_weight,
                                            std::optional<Tensor> residual, std::vector<int64_t> grid,
                                            int64_t num_heads, int64_t channel_radius, int64_t spatial_neighbors,
                                            bool self_loops, bool sequential, double scale, bool relu, bool save) {
    const Problem p = problem(x, channel_weight, grid,
                              {num_heads, channel_radius, spatial_neighbors, self_loops, sequential, relu, scale});
    const Place place = B::place(x);
    Tensor y = place.like(x);
    const ScalarType accumulate = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    const int64_t row = 2 * (p.channels + p.grid_h * p.grid_w);
    Tensor saved = save ? place.empty<2>({p.samples, row}, {row, 1}, accumulate) : place.nothing(accumulate);
    run_forward(x, channel_weight, spatial_weight, residual, p, y.mutable_data_ptr(),
                save ? saved.mutable_data_ptr() : nullptr);
    return {y, saved};
  }

  static void forward_(Tensor x, Tensor channel_weight, Tensor spatial_weight, std::optional<Tensor> residual,
                       std::vector<int64_t> grid, int64_t num_heads, int64_t channel_radius, int64_t spatial_neighbors,
                       bool self_loops, bool sequential, double scale, bool relu) {
    const Problem p = problem(x, channel_weight, grid,
                              {num_heads, channel_radius, spatial_neighbors, self_loops, sequential, relu, scale});
    run_forward(x, channel_weight, spatial_weight, residual, p, x.mutable_data_ptr(), nullptr);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, std::optional<Tensor> y,
                                                             Tensor channel_weight, Tensor spatial_weight, Tensor saved,
                                                             std::vector<int64_t> grid, int64_t num_heads,
                                                             int64_t channel_radius, int64_t spatial_neighbors,
                                                             bool self_loops, bool sequential, double scale,
                                                             bool need_x, bool need_channel_weight,
                                                             bool need_spatial_weight, bool need_residual) {
    const Problem p =
        problem(x, channel_weight, grid,
                {num_heads, channel_radius, spatial_neighbors, self_loops, sequential, y.has_value(), scale});
    check_same(x, dy);
    if (y) check_same(x, *y);
    STD_TORCH_CHECK(y || !need_residual, "steam_kernels: without a ReLU the residual's gradient is dy itself");
    const Place place = B::place(x);
    const auto weight_grad = [&](const Tensor& weight, bool need) {
      return need ? place.empty<2>({4, weight.size(1)}, {weight.size(1), 1}, weight.scalar_type())
                  : place.nothing(weight.scalar_type());
    };
    Tensor dx = need_x ? place.like(x) : place.nothing(x.scalar_type());
    Tensor dresidual = need_residual ? place.like(x) : place.nothing(x.scalar_type());
    Tensor dchannel = weight_grad(channel_weight, need_channel_weight);
    Tensor dspatial = weight_grad(spatial_weight, need_spatial_weight);
    const auto pointer = [](const Tensor& t, bool need) { return need ? t.mutable_data_ptr() : nullptr; };
    B::backward(x, {p,
                    weight_of(channel_weight),
                    weight_of(spatial_weight),
                    dy.const_data_ptr(),
                    x.const_data_ptr(),
                    y ? y->const_data_ptr() : nullptr,
                    saved.const_data_ptr(),
                    pointer(dx, need_x),
                    pointer(dresidual, need_residual),
                    {pointer(dchannel, need_channel_weight), dtype_of(channel_weight)},
                    {pointer(dspatial, need_spatial_weight), dtype_of(spatial_weight)},
                    {}});
    return {dx, dchannel, dspatial, dresidual};
  }
};

}  // namespace
}  // namespace steam
