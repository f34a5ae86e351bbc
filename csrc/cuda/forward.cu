// The forward pass: pool -> graph -> gate. It is one launch if a sample fits into shared memory, else up to three.
#include "launch.cuh"

namespace steam {
namespace {

// All three stages in one launch. A block has one sample in shared memory, so that x is read once. saved may be null.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_forward(Plan plan, GateForward<T> batch, Accumulate<T>* saved) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x, channels = plan.problem.channels, pixels = plan.pixels(), sample = plan.sample_size();
  const int64_t nodes_count = channels + plan.cells();
  const int64_t rows = kChannelsLast ? pixels : channels, columns = kChannelsLast ? channels : pixels;
  SharedMemory shared;
  T* x_memory = shared.take<T>(shared_copy_size<T>(sample));
  A* row = shared.take<A>(2 * nodes_count);
  A* gates = shared.take<A>(nodes_count);
  A* pixel_sums = shared.take<A>(pixels);
  A* scratch = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const GateFactors<A, kChannelsLast, false> factors(shared, rows, columns);

  auto op = batch.at(n * sample);
  const T* x = shared_copy(x_memory, op.x, static_cast<int>(sample));
  __syncthreads();
  const Nodes<A> nodes = make_nodes(plan, row, gates);
  graph_forward<A>(plan, Maps<T>{x, nullptr, nullptr}, Layout<kChannelsLast>{channels, pixels}, nodes,
                   plan.cells_are_pixels() ? nullptr : pixel_sums, scratch, heads);
  if (saved) {
    for (int64_t k = threadIdx.x; k < 2 * nodes_count; k += blockDim.x) saved[n * 2 * nodes_count + k] = row[k];
  }
  op.x = x;
  const bool aligned_rows = has_aligned_rows<T>(op, op.y, columns, columns);
  factors.fill(plan, {nodes.g_c, nodes.g_s, nullptr, nullptr}, 0, rows, 0, columns, aligned_rows);
  __syncthreads();
  gate_matrix<T>(op, op.y, factors, static_cast<int>(rows), static_cast<int>(columns), columns, aligned_rows);
}

// The shared memory of a block of steam_forward.
template <class T>
int64_t fused_bytes(const Plan& plan) {
  using A = Accumulate<T>;
  const int64_t channels = plan.problem.channels, nodes = channels + plan.cells(), pixels = plan.pixels();
  const bool channels_last = plan.problem.channels_last;
  const int64_t rows = channels_last ? pixels : channels, columns = channels_last ? channels : pixels;
  return shared_bytes<T>(shared_copy_size<T>(plan.sample_size())) + shared_bytes<A>(2 * nodes) +
         shared_bytes<A>(nodes) + shared_bytes<A>(pixels) + shared_bytes<A>(kSampleThreads<A>) +
         shared_bytes<A>(2 * kHeads) + gate_factors_bytes<A>(rows, columns, channels_last, false);
}

// The working memory of the general path.
template <class A>
struct Buffers {
  A* sums;   // (N, C * cells), of x over cells; empty if the cells are pixels
  A* saved;  // (N, 2 * (C + cells)), in place of a `saved` that is null
  A* gates;  // (N, C + cells)
};
template <class A>
Buffers<A> take_buffers(const Plan& plan, Workspace& workspace) {
  const int64_t nodes = plan.problem.channels + plan.cells();
  return {workspace.take<A>(plan.cells_are_pixels() ? 0 : plan.problem.samples * plan.problem.channels * plan.cells()),
          workspace.take<A>(plan.problem.samples * 2 * nodes), workspace.take<A>(plan.problem.samples * nodes)};
}

template <class T, bool kChannelsLast>
void launch_all(const Plan& plan, const cuda::ForwardArgs& args, Launcher& launch) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(args.x);
  const GateForward<T> op{x, static_cast<const T*>(args.residual), static_cast<T*>(args.y), plan.problem.relu};
  const int64_t fused = fused_bytes<T>(plan);
  if (fused <= shared_memory_limit()) {
    launch("steam_forward", steam_forward<T, kChannelsLast>, plan.problem.samples, kSampleThreads<A>, fused, plan, op,
           static_cast<A*>(args.saved));
    return;
  }
  Workspace workspace(args.workspace);
  const Buffers<A> buffers = take_buffers<A>(plan, workspace);
  A* saved = args.saved ? static_cast<A*>(args.saved) : buffers.saved;
  if (plan.cells_are_pixels()) {
    launch("steam_graph_forward", steam_graph_forward<T, kChannelsLast>, plan.problem.samples, kSampleThreads<A>,
           graph_bytes<A>(), plan, x, saved, buffers.gates);
  } else {
    const PoolSizes pool = pool_sizes<T>(plan, aligned({x}) && plan.problem.channels % kPack<T> == 0);
    launch("steam_pool", steam_pool<T, kChannelsLast, false>, plan.problem.samples * pool.slices, kPoolThreads,
           pool_bytes<T, false>(plan, pool), plan, pool, Maps<T>{x, nullptr, nullptr}, buffers.sums,
           static_cast<A*>(nullptr));
    launch("steam_graph_forward", steam_graph_forward<A, kChannelsLast>, plan.problem.samples, kSampleThreads<A>,
           graph_bytes<A>(), plan, static_cast<const A*>(buffers.sums), saved, buffers.gates);
  }
  const GateSizes gate = gate_sizes<T>(plan, false);
  launch("steam_gate_forward", steam_gate_forward<T, kChannelsLast>,
         plan.problem.samples * gate.row_blocks * gate.column_blocks, kGateThreads,
         gate_factors_bytes<A>(gate.rows, gate.columns, kChannelsLast, false), plan, gate, op,
         static_cast<const A*>(buffers.gates));
}

}  // namespace

namespace cuda {

size_t forward_workspace_bytes(const Problem& problem) {
  const Plan plan = make_plan(problem, {}, {});
  return with_dtype(problem.dtype, [&]<class T>() {
    if (fused_bytes<T>(plan) <= shared_memory_limit()) return size_t{0};
    Workspace workspace(nullptr);
    take_buffers<Accumulate<T>>(plan, workspace);
    return workspace.bytes();
  });
}

std::string forward(const ForwardArgs& args, void* stream) {
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
