// torch's operators on compiled kernels, by LibTorch's stable ABI, for every backend whose kernels take the plain
// structs. Python has the schemas (steam_kernels/schemas.py), the checks of a call and autograd (steam_kernels/ops.py).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "old_glibc.h"
#include "problem.h"

STEAM_OLD_GLIBC(dlsym);

namespace steam {
namespace {

// The version of the operators' schemas, equal to OPERATORS in steam_kernels/backends/native.py. The package refuses a
// library of another version, because its operators would misread their arguments.
constexpr int kOperators = 2;

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

Sizes sizes_of(const Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }
Sizes strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Whether the elements of a map fill their memory without gaps, in NCHW or in channels_last. The stride of an axis of
// length 1 does not matter.
bool is_dense(const Tensor& t, bool channels_last) {
  const int64_t order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int64_t axis : order[channels_last ? 1 : 0]) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}
bool is_dense(const Tensor& t) { return is_dense(t, false) || is_dense(t, true); }

// The device of a backend's outputs.
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
  // Like torch.empty_like, which keeps the strides of a dense map. Without elements the strides do not matter.
  Tensor like(const Tensor& t) const {
    return is_dense(t) ? empty<4>(sizes_of(t), strides_of(t), t.scalar_type()) : torch::stable::empty_like(t);
  }
  Tensor nothing(ScalarType dtype) const { return empty<1>({0}, {1}, dtype); }

  void check(const char* name, const Tensor& t) const {
    int32_t type = 0;
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    STD_TORCH_CHECK(type == device_type && (index == device_index || type == aoti_torch_device_type_cpu()),
                    "steam_kernels: ", name, " must be on x's device");
  }
};

// The arguments of an operator, in the order of its schema. next() also frees the argument, so an operator must take
// all of them.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count, uint64_t expected) : next_(stack) {
    STD_TORCH_CHECK(count == expected, "steam_kernels: an operator of ", expected, " arguments has a schema of ", count,
                    ": the library and the package are of different versions");
  }
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

template <class... T>
void give(StableIValue* stack, const T&... results) {
  ((*stack++ = torch::stable::detail::from<T>(results)), ...);
}

// The grid and the options: the last arguments of every operator, in the order of config.Arguments in Python.
struct Options {
  static constexpr uint64_t kCount = 8;

  std::vector<int64_t> grid;
  int64_t num_heads, channel_radius, spatial_neighbors;
  bool self_loops, sequential;
  double scale;
  bool relu;

  explicit Options(Arguments& a)
      : grid(a.next<std::vector<int64_t>>()),
        num_heads(a.next<int64_t>()),
        channel_radius(a.next<int64_t>()),
        spatial_neighbors(a.next<int64_t>()),
        self_loops(a.next<bool>()),
        sequential(a.next<bool>()),
        scale(a.next<double>()),
        relu(a.next<bool>()) {}
};

// The problem of a call with a dense x. The kernels compute offsets from its numbers, so this function checks all
// numbers that an offset depends on.
Problem problem(const Tensor& x, const Tensor& weight, const Options& o) {
  Problem p{};
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  STD_TORCH_CHECK(p.channels > 0 && p.height > 0 && p.width > 0,
                  "steam_kernels: x must have C, H and W of at least 1, got ", p.channels, ", ", p.height, " and ",
                  p.width);
  const std::vector<int64_t>& grid = o.grid;
  STD_TORCH_CHECK(grid.size() == 2 && grid[0] > 0 && grid[0] <= p.height && grid[1] > 0 && grid[1] <= p.width,
                  "steam_kernels: grid must be two numbers of cells, from 1 to H and from 1 to W");
  p.grid_h = grid[0];
  p.grid_w = grid[1];
  STD_TORCH_CHECK(o.channel_radius >= 0, "steam_kernels: channel_radius must be at least 0, got ", o.channel_radius);
  STD_TORCH_CHECK(o.spatial_neighbors == 4 || o.spatial_neighbors == 8,
                  "steam_kernels: spatial_neighbors must be 4 or 8, got ", o.spatial_neighbors);
  STD_TORCH_CHECK(weight.dim() == 2, "steam_kernels: channel_weight must have shape (4, embed_dim)");
  p.channel_radius = o.channel_radius;
  p.embed_dim = static_cast<int32_t>(weight.size(1));
  STD_TORCH_CHECK(weight.size(1) == p.embed_dim && p.embed_dim > 0 && o.num_heads > 0 && p.embed_dim % o.num_heads == 0,
                  "steam_kernels: num_heads must divide the weights' columns, got ", o.num_heads, " and ",
                  weight.size(1));
  p.num_heads = static_cast<int32_t>(o.num_heads);
  p.spatial_neighbors = static_cast<int32_t>(o.spatial_neighbors);
  p.self_loops = o.self_loops;
  p.sequential = o.sequential;
  p.relu = o.relu;
  p.scale = o.scale;
  p.dtype = dtype_of(x);
  p.channels_last = !is_dense(x, false);
  return p;
}

ScalarType accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Operators take tensors of any strides, like the operators of steam_kernels/memory.py. The next three functions return
// a tensor with the strides that the kernels need: the given tensor if it has such strides, else a copy.

// x in NCHW or channels_last.
Tensor dense(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "steam_kernels: x must have 4 dimensions (N, C, H, W), got ", x.dim());
  return is_dense(x) ? x : torch::stable::contiguous(x);
}

// Another map of the call, with the strides of the dense x.
Tensor match_strides(const char* name, const Tensor& t, const Tensor& x, const Place& place) {
  place.check(name, t);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "steam_kernels: ", name, " must be of x's dtype");
  STD_TORCH_CHECK(t.dim() == 4 && sizes_of(t) == sizes_of(x), "steam_kernels: ", name, " must be of x's shape");
  bool same = true;
  for (int64_t axis = 0; axis < 4; ++axis) same &= t.size(axis) == 1 || t.stride(axis) == x.stride(axis);
  if (same || x.numel() == 0) return t;
  Tensor copy = place.like(x);
  return torch::stable::copy_(copy, t);
}

// Whether a matrix has contiguous rows without gaps between them.
bool is_plain(const Tensor& t) {
  return (t.size(1) == 1 || t.stride(1) == 1) && (t.size(0) == 1 || t.stride(0) == t.size(1));
}

// A contiguous matrix: a weight, or `saved`.
Tensor contiguous(const char* name, const Tensor& t, int64_t rows, int64_t columns, const Place& place) {
  place.check(name, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "steam_kernels: ", name,
                  " must have shape (", rows, ", ", columns, ")");
  return is_plain(t) ? t : torch::stable::contiguous(t);
}

// A contiguous weight, and the tensor that keeps its memory.
struct Rows {
  Tensor tensor;
  Weight weight;
};

Rows rows_of(const char* name, const Tensor& t, int64_t columns, const Tensor& x, const Place& place) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == x.scalar_type(), "steam_kernels: ", name,
                  " must be of dtype float32 or x's");
  Tensor rows = contiguous(name, t, 4, columns, place);
  const void* data = rows.const_data_ptr();
  return {rows, {data, dtype_of(t)}};
}

// The gradient of a weight, with the strides of torch.empty_like(weight).
Tensor like_weight(const Tensor& gradient, const Tensor& weight, bool asked) {
  if (!asked || is_plain(weight)) return gradient;
  Tensor out = torch::stable::empty_like(weight);
  return torch::stable::copy_(out, gradient);
}

// Whether two elements of a map may have the same address. The answer is also true for some strides that interleave the
// elements without an overlap.
bool overlaps_itself(const Tensor& t) {
  std::array<std::array<int64_t, 2>, 4> axes;
  for (int64_t axis = 0; axis < 4; ++axis) axes[axis] = {t.stride(axis), t.size(axis)};
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : axes) {
    if (size < 2) continue;
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

bool share_memory(const Tensor& a, const Tensor& b) {
  const auto* first = static_cast<const char*>(a.const_data_ptr());
  const auto* second = static_cast<const char*>(b.const_data_ptr());
  const int64_t bytes = a.numel() * static_cast<int64_t>(a.element_size());
  return first < second + bytes && second < first + bytes;
}

// The operators of a backend B, which has
//   Place place(const Tensor& x)
//   void forward(const Tensor& x, const ForwardArgs&)      adds the arguments that only B has, and calls the kernels
//   void backward(const Tensor& x, const BackwardArgs&)
// The dispatcher gives an operator a stack with its arguments. The operator writes its results to the same stack.
template <class B>
struct Operators {
  // Registers the operators under their names, which begin with `prefix`.
  template <class Library>
  static void add_to(Library& library, const std::string& prefix) {
    library.impl((prefix + "forward").c_str(), &Operators::forward);
    library.impl((prefix + "forward_").c_str(), &Operators::forward_);
    library.impl((prefix + "backward").c_str(), &Operators::backward);
  }

  static void forward(StableIValue* stack, uint64_t count, uint64_t) {
    Arguments a(stack, count, 5 + Options::kCount);
    const Forward given(a);
    const bool save = a.next<bool>();
    const Options options(a);

    const Tensor x = dense(given.x);
    const Problem p = problem(x, given.channel_weight, options);
    const Place place = B::place(x);
    std::optional<Tensor> residual;
    if (given.residual) residual = match_strides("residual", *given.residual, x, place);
    Tensor y = place.like(x);
    const ScalarType accumulate = accumulation_dtype(x);
    const int64_t row = 2 * (p.channels + p.grid_h * p.grid_w);
    Tensor saved = save ? place.empty<2>({p.samples, row}, {row, 1}, accumulate) : place.nothing(accumulate);
    run_forward(given, x, residual, p, y.mutable_data_ptr(), save ? saved.mutable_data_ptr() : nullptr);
    give(stack, y, saved);
  }

  static void forward_(StableIValue* stack, uint64_t count, uint64_t) {
    Arguments a(stack, count, 4 + Options::kCount);
    Forward given(a);
    const Options options(a);

    const Tensor x = dense(given.x);
    const bool copied = x.get() != given.x.get();
    STD_TORCH_CHECK(!copied || x.numel() == 0 || !overlaps_itself(given.x),
                    "steam_kernels: x must not overlap itself in memory");
    const Problem p = problem(x, given.channel_weight, options);
    std::optional<Tensor> residual;
    if (given.residual) {
      residual = match_strides("residual", *given.residual, x, B::place(x));
      STD_TORCH_CHECK(!share_memory(x, *residual), "steam_kernels: residual must not share memory with x");
    }
    run_forward(given, x, residual, p, x.mutable_data_ptr(), nullptr);
    if (copied) torch::stable::copy_(given.x, x);
  }

  static void backward(StableIValue* stack, uint64_t count, uint64_t) {
    Arguments a(stack, count, 7 + Options::kCount);
    Tensor dy = a.next<Tensor>();
    const Tensor x = dense(a.next<Tensor>());
    std::optional<Tensor> y = a.next<std::optional<Tensor>>();
    const Tensor channel_weight = a.next<Tensor>();
    const Tensor spatial_weight = a.next<Tensor>();
    Tensor saved = a.next<Tensor>();
    const std::vector<bool> needs = a.next<std::vector<bool>>();
    const Options options(a);

    STD_TORCH_CHECK(needs.size() == 4, "steam_kernels: needs must be four flags, got ", needs.size());
    const bool need_x = needs[0], need_channel_weight = needs[1], need_spatial_weight = needs[2];
    const bool need_residual = needs[3];
    const Problem p = problem(x, channel_weight, options);
    const Place place = B::place(x);
    dy = match_strides("dy", dy, x, place);
    STD_TORCH_CHECK(y.has_value() == options.relu, "steam_kernels: y must be given if and only if relu is true");
    if (y) y = match_strides("y", *y, x, place);
    STD_TORCH_CHECK(y || !need_residual, "steam_kernels: without a ReLU the residual's gradient is dy itself");
    STD_TORCH_CHECK(saved.scalar_type() == accumulation_dtype(x),
                    "steam_kernels: saved must be of float32, or of float64 if x is of float64");
    saved = contiguous("saved", saved, p.samples, 2 * (p.channels + p.grid_h * p.grid_w), place);
    const Rows channel = rows_of("channel_weight", channel_weight, p.embed_dim, x, place);
    const Rows spatial = rows_of("spatial_weight", spatial_weight, p.embed_dim, x, place);
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
                    channel.weight,
                    spatial.weight,
                    dy.const_data_ptr(),
                    x.const_data_ptr(),
                    y ? y->const_data_ptr() : nullptr,
                    saved.const_data_ptr(),
                    pointer(dx, need_x),
                    pointer(dresidual, need_residual),
                    {pointer(dchannel, need_channel_weight), channel.weight.dtype},
                    {pointer(dspatial, need_spatial_weight), spatial.weight.dtype}});
    give(stack, dx, like_weight(dchannel, channel_weight, need_channel_weight),
         like_weight(dspatial, spatial_weight, need_spatial_weight), dresidual);
  }

 private:
  // The first arguments of both forward operators.
  struct Forward {
    Tensor x, channel_weight, spatial_weight;
    std::optional<Tensor> residual;

    explicit Forward(Arguments& a)
        : x(a.next<Tensor>()),
          channel_weight(a.next<Tensor>()),
          spatial_weight(a.next<Tensor>()),
          residual(a.next<std::optional<Tensor>>()) {}
  };

  // `x` is the dense form of given.x. `residual` and y have its strides.
  static void run_forward(const Forward& given, const Tensor& x, const std::optional<Tensor>& residual,
                          const Problem& p, void* y, void* saved) {
    const Place place = B::place(x);
    const Rows channel = rows_of("channel_weight", given.channel_weight, p.embed_dim, x, place);
    const Rows spatial = rows_of("spatial_weight", given.spatial_weight, p.embed_dim, x, place);
    B::forward(x, {p, channel.weight, spatial.weight, x.const_data_ptr(),
                   residual ? residual->const_data_ptr() : nullptr, y, saved});
  }
};

}  // namespace
}  // namespace steam
