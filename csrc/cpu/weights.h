// The weights on the CPU: numbers of any dtype, the collapsed heads, and the gradients of the weights.
#pragma once

#include "../common/graph.h"
#include "../common/problem.h"
#include "scratch.h"
#include "vec.h"

namespace steam {
namespace {

inline double read_number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat16: return to_double(static_cast<const Float16*>(data)[i]);
    case DType::kBFloat16: return to_double(static_cast<const BFloat16*>(data)[i]);
    default: return static_cast<double>(static_cast<const float*>(data)[i]);
  }
}

inline void write_number(void* data, DType dtype, int64_t i, double value) {
  const VecF v = LanesF::set(static_cast<float>(value));
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = value; return;
    case DType::kFloat16: return store_first(static_cast<Float16*>(data) + i, v, 1);
    case DType::kBFloat16: return store_first(static_cast<BFloat16*>(data) + i, v, 1);
    default: static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// The slope a and the gain b of each head of a branch (docs/math.md, "It collapses").
template <class L>
struct Heads {
  typename L::A* a;
  typename L::A* b;
  int64_t count;
};

template <class L>
Heads<L> make_heads(const Problem& problem, Arena& arena) {
  using A = typename L::A;
  A* a = arena.take<A>(problem.num_heads);
  return {a, arena.take<A>(problem.num_heads), problem.num_heads};
}

template <class L>
void fill_heads(const Heads<L>& heads, const Problem& problem, const Weight& weight) {
  using A = typename L::A;
  const auto get = [&](int row, int column) {
    return read_number(weight.data, weight.dtype, row * static_cast<int64_t>(problem.embed_dim) + column);
  };
  for (int32_t h = 0; h < problem.num_heads; ++h) {
    double slope, gain;
    collapse_head(get, problem.embed_dim, problem.num_heads, h, slope, gain);
    heads.a[h] = static_cast<A>(slope);
    heads.b[h] = static_cast<A>(gain);
  }
}

// The gradient of a weight from the gradients of its heads' a and b (docs/math.md, "Backward"). The gradient of the
// query row is a multiple of the key row, and the other way round; the value and output rows are such a pair too.
inline void write_weight_grad(const Problem& problem, const Weight& weight, const WeightGrad& grad,
                              const double* a_grad, const double* b_grad) {
  if (grad.data == nullptr) return;
  const int64_t dim = problem.embed_dim, width = dim / problem.num_heads;
  const double root = 1 / sqrt(static_cast<double>(width));
  for (int64_t j = 0; j < dim; ++j) {
    const double a = a_grad[j / width] * root, b = b_grad[j / width];
    for (int64_t row = 0; row < 4; ++row) {
      const double partner = read_number(weight.data, weight.dtype, (row ^ 1) * dim + j);
      write_number(grad.data, grad.dtype, row * dim + j, (row < 2 ? a : b) * partner);
    }
  }
}

}  // namespace
}  // namespace steam
