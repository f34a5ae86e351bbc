// The gradients of the weights from the gradients of the heads' a and b.
#pragma once

#include "device.cuh"

namespace steam {
namespace {

// The gradient of one branch's weight. Each row of `sums` has 2 * heads numbers, the gradients of the heads' a and b of
// a block of channels or of a sample. The first row gets the totals.
struct BranchGrad {
  Weight weight;
  WeightGrad grad;  // its data may be null
  double* sums;
  int64_t rows;
};

// The gradients of both weights, by one block.
struct WeightGrads {
  BranchGrad channel, spatial;
  STEAM_HD bool needed() const { return channel.grad.data != nullptr || spatial.grad.data != nullptr; }
};

// Adds up the rows of the sums, and computes the gradient of a weight from the totals (docs/math.md, "Backward"). The
// gradient of a row of the weight is a multiple of its partner: query and key are partners, and so are value and
// output.
__device__ inline void branch_grad(const Problem& p, const BranchGrad& branch) {
  if (branch.grad.data == nullptr) return;
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = t % kWarp;
  const int heads = p.num_heads, width = p.embed_dim / heads;
  const int64_t columns = 2 * static_cast<int64_t>(heads);
  for (int64_t k = t / kWarp; k < columns; k += threads / kWarp) {
    const double sum =
        sum_lanes(sum_strided<double, int64_t>(lane, branch.rows, kWarp,
                                               [&](int64_t row) { return branch.sums[row * columns + k]; }),
                  5);
    if (lane == 0) branch.sums[k] = sum;
  }
  __syncthreads();
  const double root = 1 / sqrt(static_cast<double>(width));
  for (int64_t e = t; e < 4 * static_cast<int64_t>(p.embed_dim); e += threads) {
    const int64_t row = e / p.embed_dim, column = e % p.embed_dim, head = column / width;
    const double partner = read_number(branch.weight.data, branch.weight.dtype, (row ^ 1) * p.embed_dim + column);
    const double multiple = row < 2 ? branch.sums[head] * root : branch.sums[heads + head];
    write_number(branch.grad.data, branch.grad.dtype, e, multiple * partner);
  }
}
__device__ inline void weight_grads(const Problem& p, const WeightGrads& grads) {
  branch_grad(p, grads.channel);
  branch_grad(p, grads.spatial);
}

}  // namespace
}  // namespace steam
