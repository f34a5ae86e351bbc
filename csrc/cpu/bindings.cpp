// The operators' CPU kernels on LibTorch's stable ABI. Schemas, checks and autograd are Python's
// (steam_kernels/ops.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using steam::DType;
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

template <std::size_t n>
Tensor empty(const std::array<int64_t, n>& sizes, const std::array<int64_t, n>& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      n, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
Tensor output_like(const Tensor& t) {
  return empty<4>({t.size(0), t.size(1), t.size(2), t.size(3)}, strides_of(t), t.scalar_type());
}
Tensor nothing(ScalarType dtype) { return empty<1>({0}, {1}, dtype); }

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

steam::Problem problem(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& grid, const Options& o) {
  steam::Problem p{};
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

steam::Weight weight_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(context, t);
  });
}

steam::cpu::Parallel parallel() { return {static_cast<int64_t>(torch::stable::get_num_threads()), run_tasks}; }

void run_forward(const Tensor& x, const Tensor& channel_weight, const Tensor& spatial_weight,
                 const std::optional<Tensor>& residual, const steam::Problem& p, void* y, void* saved) {
  if (residual) check_same(x, *residual);
  steam::cpu::forward({p, weight_of(channel_weight), weight_of(spatial_weight), x.const_data_ptr(),
                       residual ? residual->const_data_ptr() : nullptr, y, saved, parallel()});
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor channel_weight, Tensor spatial_weight,
                                   std::optional<Tensor> residual, std::vector<int64_t> grid, int64_t num_heads,
                                   int64_t channel_radius, int64_t spatial_neighbors, bool self_loops, bool sequential,
                                   double scale, bool relu, bool save) {
  const steam::Problem p = problem(x, channel_weight, grid,
                                   {num_heads, channel_radius, spatial_neighbors, self_loops, sequential, relu, scale});
  Tensor y = output_like(x);
  const ScalarType accumulate = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const int64_t row = 2 * (p.channels + p.grid_h * p.grid_w);
  Tensor saved = save ? empty<2>({p.samples, row}, {row, 1}, accumulate) : nothing(accumulate);
  run_forward(x, channel_weight, spatial_weight, residual, p, y.mutable_data_ptr(),
              save ? saved.mutable_data_ptr() : nullptr);
  return {y, saved};
}

void forward_(Tensor x, Tensor channel_weight, Tensor spatial_weight, std::optional<Tensor> residual,
              std::vector<int64_t> grid, int64_t num_heads, int64_t channel_radius, int64_t spatial_neighbors,
              bool self_loops, bool sequential, double scale, bool relu) {
  const steam::Problem p = problem(x, channel_weight, grid,
                                   {num_heads, channel_radius, spatial_neighbors, self_loops, sequential, relu, scale});
  run_forward(x, channel_weight, spatial_weight, residual, p, x.mutable_data_ptr(), nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, std::optional<Tensor> y, Tensor channel_weight,
                                                    Tensor spatial_weight, Tensor saved, std::vector<int64_t> grid,
                                                    int64_t num_heads, int64_t channel_radius,
                                                    int64_t spatial_neighbors, bool self_loops, bool sequential,
                                                    double scale, bool need_x, bool need_channel_weight,
                                                    bool need_spatial_weight, bool need_residual) {
  const steam::Problem p =
      problem(x, channel_weight, grid,
              {num_heads, channel_radius, spatial_neighbors, self_loops, sequential, y.has_value(), scale});
  check_same(x, dy);
  if (y) check_same(x, *y);
  STD_TORCH_CHECK(y || !need_residual, "steam_kernels: without a ReLU the residual's gradient is dy itself");
  const auto weight_grad = [](const Tensor& weight, bool need) {
    return need ? empty<2>({4, weight.size(1)}, {weight.size(1), 1}, weight.scalar_type())
                : nothing(weight.scalar_type());
  };
  Tensor dx = need_x ? output_like(x) : nothing(x.scalar_type());
  Tensor dresidual = need_residual ? output_like(x) : nothing(x.scalar_type());
  Tensor dchannel = weight_grad(channel_weight, need_channel_weight);
  Tensor dspatial = weight_grad(spatial_weight, need_spatial_weight);
  const auto pointer = [](const Tensor& t, bool need) { return need ? t.mutable_data_ptr() : nullptr; };
  steam::cpu::backward({p,
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
                        parallel()});
  return {dx, dchannel, dspatial, dresidual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steam_kernels, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_", TORCH_BOX(&forward_));
  m.impl("backward", TORCH_BOX(&backward));
}
