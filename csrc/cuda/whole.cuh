// The graph stage of a sample whose maps are in shared memory: a block computes all of it.
#pragma once

#include "graph_backward.cuh"

namespace steam {
namespace {

// The threads of a block that processes one sample. A float64 needs two registers, so such a block has fewer threads.
template <class A>
constexpr int kSampleThreads = sizeof(A) == 8 ? 256 : 512;

// Calls out(cell, sum over the pixels of the cell). `pixels` has a number for each pixel.
template <class A, class Out>
__device__ void sum_pixels(const Plan& plan, const A* pixels, const Out& out) {
  const int lanes = 1 << plan.cell_lanes.log2_count, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t groups = blockDim.x >> plan.cell_lanes.log2_count;
  for (int64_t k = threadIdx.x >> plan.cell_lanes.log2_count; k < plan.cells(); k += groups) {
    A sum{0};
    const Cell cell = cell_at(plan.problem, k / plan.problem.grid_w, k % plan.problem.grid_w);
    for_cell(cell, plan.problem.width, 0, plan.pixels(), plan.cell_lanes, lane, [&](int e) { sum += pixels[e]; });
    sum = sum_lanes(sum, plan.cell_lanes.log2_count);
    if (lane == 0) out(k, sum);
  }
}

// Calls out(cell, sum of f(c, s) over the channels and the pixels of the cell). `pixels` has a number for each pixel,
// and is null if the cells are pixels.
template <bool kChannelsLast, class A, class F, class Out>
__device__ void sum_channels_of_cells(const Plan& plan, A* pixels, A* scratch, const F& f, const Out& out) {
  sum_channels<kChannelsLast>(static_cast<int>(plan.problem.channels), static_cast<int>(plan.pixels()), scratch, f,
                              [&](int s, A sum) {
                                if (pixels) {
                                  pixels[s] = sum;
                                } else {
                                  out(s, sum);
                                }
                              });
  if (pixels) {
    __syncthreads();
    sum_pixels(plan, pixels, out);
  }
}

// Fills `rows` from x. `pixel_sums` has a number for each pixel, and is null if the cells are pixels.
template <class T, bool kChannelsLast>
__device__ void whole_graph_forward(const Plan& plan, const T* x, const Rows<Accumulate<T>>& rows,
                                    Accumulate<T>* pixel_sums, Accumulate<T>* scratch,
                                    const HeadTable<Accumulate<T>>& heads) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const Tile<T, kChannelsLast> tile{x, static_cast<int>(p.channels), static_cast<int>(plan.pixels())};
  const A pixels = static_cast<A>(plan.pixels());
  load_heads(p, plan.channel_weight, 0, heads);
  sum_places<kChannelsLast>(tile.channels, tile.cells, scratch, tile, [&](int c, A sum) { rows.z[c] = sum / pixels; });
  __syncthreads();
  transform(plan, plan.channel_weight, Ring<A>{rows.z, static_cast<int>(p.channels), plan.ring}, Nodes{0, p.channels},
            heads, rows.o_c, [&](int64_t c, A gate) { rows.g_c[c] = gate; });
  replace_heads(p, plan.spatial_weight, 0, heads);
  sum_channels_of_cells<kChannelsLast>(
      plan, pixel_sums, scratch, [&](int c, int s) { return p.sequential ? rows.g_c[c] * tile(c, s) : tile(c, s); },
      [&](int64_t k, A sum) { rows.u[k] = sum / token_size<A>(plan, k); });
  __syncthreads();
  lattice_gates(plan, rows, rows.u, heads);
}

// The gradients of one sample.
template <class A>
struct Grads {
  A *flow_c, *flow_s;    // (C) and (cells)
  A *shift_c, *shift_s;  // (C) and (cells): the gradients of the tokens, divided by the numbers of their elements
};
template <class A>
__device__ Grads<A> make_grads(const Plan& plan, A* row) {
  const int64_t c = plan.problem.channels, nodes = plan.nodes();
  return {row, row + c, row + nodes, row + nodes + c};
}

// The gradients of the heads' a and b, (2, heads) for each branch.
struct HeadGrads {
  double *ring, *lattice;
};

// The gate and the shift of each pixel, copied from its cell, so that a sum over pixels need not compute the cell of
// each pixel. Before that, `gate` has sums over the channels. Both are null if the cells are pixels.
template <class A>
struct PerPixel {
  A* gate;
  A* shift;
};

// Fills `d` from x and the masked dy, and computes g_c and g_s again from the pre-activations. `tape` has tape_count of
// max(C, cells) numbers.
template <class T, bool kChannelsLast>
__device__ void whole_graph_backward(const Plan& plan, const T* x, const T* dy, const Rows<Accumulate<T>>& rows,
                                     const Grads<Accumulate<T>>& d, Accumulate<T>* tape,
                                     const PerPixel<Accumulate<T>>& per_pixel, Accumulate<T>* scratch,
                                     const HeadTable<Accumulate<T>>& heads, const HeadGrads& sums) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const int channels = static_cast<int>(p.channels), pixels = static_cast<int>(plan.pixels());
  const Nodes all_channels{0, p.channels}, all_cells{0, plan.cells()};
  const Tile<T, kChannelsLast> x_tile{x, channels, pixels}, dy_tile{dy, channels, pixels};
  const A scale = static_cast<A>(p.scale);
  const auto product = [&](int c, int s) { return x_tile(c, s) * dy_tile(c, s); };
  load_heads(p, plan.spatial_weight, 0, heads);
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) rows.g_c[c] = sigmoid(rows.o_c[c]).open;
  for (int64_t k = threadIdx.x; k < plan.cells(); k += blockDim.x) rows.g_s[k] = sigmoid(rows.o_s[k]).open;
  __syncthreads();
  sum_channels_of_cells<kChannelsLast>(
      plan, per_pixel.gate, scratch, [&](int c, int s) { return rows.g_c[c] * product(c, s); },
      [&](int64_t k, A sum) { d.flow_s[k] = flow_of(scale * sum, rows.o_s[k]); });
  __syncthreads();
  transform_backward(plan, plan.spatial_weight, Lattice<A>{plan, rows.u}, GradNodes{all_cells, all_cells}, heads,
                     d.flow_s, make_tape(plan, tape, plan.cells()), scratch, d.shift_s, sums.lattice);
  for (int64_t k = threadIdx.x; k < plan.cells(); k += blockDim.x) d.shift_s[k] /= token_size<A>(plan, k);
  replace_heads(p, plan.channel_weight, 0, heads);
  if (per_pixel.gate) {
    for_pixels(p, 0, plan.pixels(), [&](int64_t e, int64_t k) {
      per_pixel.gate[e] = rows.g_s[k];
      per_pixel.shift[e] = d.shift_s[k];
    });
    __syncthreads();
  }
  const A* gates = per_pixel.gate ? per_pixel.gate : rows.g_s;
  const A* shifts = per_pixel.gate ? per_pixel.shift : d.shift_s;
  sum_places<kChannelsLast>(
      channels, pixels, scratch,
      [&](int c, int s) {
        const A through_gates = scale * gates[s] * product(c, s);
        return p.sequential ? through_gates + shifts[s] * x_tile(c, s) : through_gates;
      },
      [&](int c, A sum) { d.flow_c[c] = flow_of(sum, rows.o_c[c]); });
  __syncthreads();
  transform_backward(plan, plan.channel_weight, Ring<A>{rows.z, static_cast<int>(p.channels), plan.ring},
                     GradNodes{all_channels, all_channels}, heads, d.flow_c, make_tape(plan, tape, p.channels), scratch,
                     d.shift_c, sums.ring);
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) d.shift_c[c] /= static_cast<A>(pixels);
}

}  // namespace
}  // namespace steam
