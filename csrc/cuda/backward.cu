// The backward pass: pool -> graph -> gate, and the gradients of the weights. The three stages are one launch if x and
// dy of a sample fit into shared memory, else up to three.
#include "launch.cuh"

namespace steam {
namespace {

// All three stages in one launch. A block has x and the masked dy of one sample in shared memory, so that each is read
// once.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_backward(Plan plan, const T* batch_x, GateBackward<T> batch, const Accumulate<T>* saved, double* sums) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x, channels = plan.problem.channels, pixels = plan.pixels(), sample = plan.sample_size();
  const int64_t nodes_count = channels + plan.cells();
  const int64_t rows = kChannelsLast ? pixels : channels, columns = kChannelsLast ? channels : pixels;
  SharedMemory shared;
  T* x_memory = shared.take<T>(shared_copy_size<T>(sample));
  T* dy_memory = shared.take<T>(shared_copy_size<T>(sample));
  A* row = shared.take<A>(2 * nodes_count);
  A* gates = shared.take<A>(nodes_count);
  A* grads = shared.take<A>(grads_count(plan));
  A* pixel_gates = shared.take<A>(pixels);
  A* pixel_shares = shared.take<A>(pixels);
  A* scratch = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const GateFactors<A, kChannelsLast, true> factors(shared, rows, columns);

  auto op = batch.at(n * sample);
  const T* x = shared_copy(x_memory, batch_x + n * sample, static_cast<int>(sample));
  const T* dy = shared_masked_copy(dy_memory, op.dy, op.y, static_cast<int>(sample));
  for (int64_t k = threadIdx.x; k < 2 * nodes_count; k += blockDim.x) row[k] = saved[n * 2 * nodes_count + k];
  __syncthreads();
  const Nodes<A> nodes = make_nodes(plan, row, gates);
  const Grads<A> d = make_grads(plan, grads);
  const bool by_pixel = !plan.cells_are_pixels();
  graph_backward<A>(plan, Maps<T>{x, dy, nullptr}, Layout<kChannelsLast>{channels, pixels}, nodes, d,
                    PerPixel<A>{by_pixel ? pixel_gates : nullptr, by_pixel ? pixel_shares : nullptr}, scratch, heads,
                    sums + n * 4 * plan.problem.num_heads);
  if (!op.dx && !op.dresidual) return;
  op.dy = dy;
  op.y = nullptr;
  const bool aligned_rows = has_aligned_rows<T>(op, op.dy, columns, columns);
  factors.fill(plan, {nodes.g_c, nodes.g_s, d.dz, d.share}, 0, rows, 0, columns, aligned_rows);
  __syncthreads();
  gate_matrix<T>(op, op.dy, factors, static_cast<int>(rows), static_cast<int>(columns), columns, aligned_rows);
}

// The shared memory of a block of steam_backward.
template <class T>
int64_t fused_bytes(const Plan& plan) {
  using A = Accumulate<T>;
  const int64_t channels = plan.problem.channels, nodes = channels + plan.cells(), pixels = plan.pixels();
  const bool channels_last = plan.problem.channels_last;
  const int64_t rows = channels_last ? pixels : channels, columns = channels_last ? channels : pixels;
  return 2 * shared_bytes<T>(shared_copy_size<T>(plan.sample_size())) + shared_bytes<A>(2 * nodes) +
         shared_bytes<A>(nodes) + shared_bytes<A>(grads_count(plan)) + 2 * shared_bytes<A>(pixels) +
         shared_bytes<A>(kSampleThreads<A>) + shared_bytes<A>(2 * kHeads) +
         gate_factors_bytes<A>(rows, columns, channels_last, true);
}

constexpr int kWeightThreads = 256;

// The gradients of the weights from the gradients of the heads' a and b (docs/math.md, "Backward"). The gradient of a
// row is a multiple of its partner: query and key are partners, and so are value and output. One block adds up the
// samples. sums is (N, 4 * heads), and its first row gets the totals.
__global__ void __launch_bounds__(kWeightThreads)
    steam_weight_grad(Plan plan, WeightGrad channel_grad, WeightGrad spatial_grad, double* sums) {
  const Problem& p = plan.problem;
  const int heads = p.num_heads, width = p.embed_dim / heads, t = static_cast<int>(threadIdx.x);
  const int lane = t % kWarp;
  for (int64_t k = t / kWarp; k < 4 * static_cast<int64_t>(heads); k += kWeightThreads / kWarp) {
    const double sum =
        sum_lanes(sum_strided<double>(lane, p.samples, kWarp, [&](int64_t n) { return sums[n * 4 * heads + k]; }), 5);
    if (lane == 0) sums[k] = sum;
  }
  __syncthreads();
  const double root = 1 / sqrt(static_cast<double>(width));
  const auto write = [&](const Weight& weight, const WeightGrad& grad, const double* total) {
    if (grad.data == nullptr) return;
    for (int64_t e = t; e < 4 * static_cast<int64_t>(p.embed_dim); e += kWeightThreads) {
      const int64_t row = e / p.embed_dim, column = e % p.embed_dim, head = column / width;
      const double partner = read_number(weight.data, weight.dtype, (row ^ 1) * p.embed_dim + column);
      write_number(grad.data, grad.dtype, e, (row < 2 ? total[head] * root : total[heads + head]) * partner);
    }
  };
  write(plan.channel_weight, channel_grad, sums);
  write(plan.spatial_weight, spatial_grad, sums + 2 * heads);
}

// The working memory. Only the general path needs the arrays after `sums`.
template <class A>
struct Buffers {
  double* sums;  // (N, 4 * heads), and one row if N is 0: the gradients of the heads' a and b
  A* values;     // (N, C * cells), of x over cells; null with order="parallel" or if the cells are pixels
  A* products;   // (N, C * cells), of dy * x over cells; empty if the cells are pixels
  A* gates;      // (N, C + cells)
  A* grads;      // (N, grads_count)
};
template <class A>
Buffers<A> take_buffers(const Plan& plan, bool fused, Workspace& workspace) {
  Buffers<A> b{};
  const int64_t n = plan.problem.samples,
                stored = plan.cells_are_pixels() ? 0 : n * plan.problem.channels * plan.cells();
  b.sums = workspace.take<double>(larger<int64_t>(n, 1) * 4 * plan.problem.num_heads);
  if (fused) return b;
  if (plan.problem.sequential && stored > 0) b.values = workspace.take<A>(stored);
  b.products = workspace.take<A>(stored);
  b.gates = workspace.take<A>(n * (plan.problem.channels + plan.cells()));
  b.grads = workspace.take<A>(n * grads_count(plan));
  return b;
}

template <class T, bool kChannelsLast>
void launch_all(const Plan& plan, const cuda::BackwardArgs& args, Launcher& launch) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  const T* y = plan.problem.relu ? static_cast<const T*>(args.y) : nullptr;
  const GateBackward<T> op{dy, y, static_cast<T*>(args.dx), static_cast<T*>(args.dresidual)};
  const A* saved = static_cast<const A*>(args.saved);
  // The gradient of the residual alone needs no gradient of a token.
  const bool needs_weights = args.channel_grad.data || args.spatial_grad.data, needs_tokens = args.dx || needs_weights;
  const int64_t fused = fused_bytes<T>(plan);
  const bool one_launch = fused <= shared_memory_limit();
  Workspace workspace(args.workspace);
  const Buffers<A> b = take_buffers<A>(plan, one_launch, workspace);
  if (one_launch && needs_tokens) {
    launch("steam_backward", steam_backward<T, kChannelsLast>, plan.problem.samples, kSampleThreads<A>, fused, plan, x,
           op, saved, b.sums);
  } else {
    if (needs_tokens && plan.cells_are_pixels()) {
      launch("steam_graph_backward", steam_graph_backward<Maps<T>, A, kChannelsLast>, plan.problem.samples,
             kSampleThreads<A>, graph_bytes<A>(), plan, Maps<T>{x, dy, y}, saved, b.gates, b.grads, b.sums);
    } else if (needs_tokens) {
      const PoolSizes pool = pool_sizes<T>(plan, aligned({x, dy, y}) && plan.problem.channels % kPack<T> == 0);
      launch("steam_pool", steam_pool<T, kChannelsLast, true>, plan.problem.samples * pool.slices, kPoolThreads,
             pool_bytes<T, true>(plan, pool), plan, pool, Maps<T>{x, dy, y}, b.values, b.products);
      launch("steam_graph_backward", steam_graph_backward<StoredSums<A>, A, kChannelsLast>, plan.problem.samples,
             kSampleThreads<A>, graph_bytes<A>(), plan, StoredSums<A>{b.values, b.products}, saved, b.gates, b.grads,
             b.sums);
    }
    if (args.dx || args.dresidual) {
      const GateSizes gate = gate_sizes<T>(plan, true);
      Grads<A> d{};
      if (needs_tokens) d = make_grads(plan, b.grads);
      launch("steam_gate_backward", steam_gate_backward<T, kChannelsLast>,
             plan.problem.samples * gate.row_blocks * gate.column_blocks, kGateThreads,
             gate_factors_bytes<A>(gate.rows, gate.columns, kChannelsLast, true), plan, gate, op,
             static_cast<const A*>(b.gates), static_cast<const A*>(d.dz), static_cast<const A*>(d.share),
             grads_count(plan));
    }
  }
  if (needs_weights) {
    launch("steam_weight_grad", steam_weight_grad, 1, kWeightThreads, 0, plan, args.channel_grad, args.spatial_grad,
           b.sums);
  }
}

}  // namespace

namespace cuda {

size_t backward_workspace_bytes(const Problem& problem) {
  const Plan plan = make_plan(problem, {}, {});
  return with_dtype(problem.dtype, [&]<class T>() {
    Workspace workspace(nullptr);
    take_buffers<Accumulate<T>>(plan, fused_bytes<T>(plan) <= shared_memory_limit(), workspace);
    return workspace.bytes();
  });
}

std::string backward(const BackwardArgs& args, void* stream) {
  const Plan plan = make_plan(args.problem, args.channel_weight, args.spatial_weight);
  Launcher launch(args.problem, stream);
  with_dtype(args.problem.dtype, [&]<class T>() {
    with_bool(plan.problem.channels_last,
              [&]<bool kChannelsLast>() { launch_all<T, kChannelsLast>(plan, args, launch); });
  });
  return launch.error;
}

}  // namespace cuda
}  // namespace steam
