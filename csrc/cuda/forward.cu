// The forward pass: pool -> graph -> lattice -> gate. It is one launch if a sample fits into shared memory, else up to
// four.
#include "launch.cuh"

namespace steam {
namespace {

// The numbers of shared memory for the tokens and pre-activations of a sample, and for the factors of its gates after
// they have been stored.
template <class A>
STEAM_HD int64_t row_count(const Plan& plan) {
  return larger(2 * plan.nodes(), whole_gate_bytes<A>(plan, false) / static_cast<int64_t>(sizeof(A)));
}

// All stages in one launch. A block has one sample in shared memory, so that x is read once. saved may be null.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_forward(Plan plan, GateForward<T, true> batch, Accumulate<T>* saved) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x, sample = plan.sample_size();
  SharedMemory shared;
  T* x_memory = shared.take<T>(shared_copy_size<T>(sample));
  A* row = shared.take<A>(row_count<A>(plan));
  A* gates = shared.take<A>(plan.nodes());
  A* pixel_sums = plan.cells_are_pixels() ? nullptr : shared.take<A>(plan.pixels());
  A* scratch = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);

  auto op = batch.at(n * sample);
  const T* x = shared_copy(x_memory, op.x, static_cast<int>(sample));
  __syncthreads();
  const Rows<A> nodes = make_rows(plan, row, gates);
  whole_graph_forward<T, kChannelsLast>(plan, x, nodes, pixel_sums, scratch, heads);
  __syncthreads();
  if (saved) {
    for (int64_t k = threadIdx.x; k < 2 * plan.nodes(); k += blockDim.x) saved[n * 2 * plan.nodes() + k] = row[k];
    __syncthreads();
  }
  op.x = x;
  gate_sample<T, kChannelsLast, false>(plan, op, op.y, {nodes.g_c, nodes.g_s, nullptr, nullptr}, Pieces(row));
}

// The shared memory of a block of steam_forward.
template <class T>
int64_t whole_bytes(const Plan& plan) {
  using A = Accumulate<T>;
  return shared_bytes<T>(shared_copy_size<T>(plan.sample_size())) + shared_bytes<A>(row_count<A>(plan)) +
         shared_bytes<A>(plan.nodes()) + shared_bytes<A>(plan.cells_are_pixels() ? 0 : plan.pixels()) +
         shared_bytes<A>(kSampleThreads<A>) + shared_bytes<A>(2 * kHeads);
}

// The working memory of the general path.
template <class A>
struct Buffers {
  A* sums;  // (N, C * cells), of x over cells; empty if the cells are pixels
  GraphForward<A> graph;
};
template <class A>
Buffers<A> take_buffers(const Plan& plan, Workspace& workspace) {
  const int64_t n = plan.problem.samples, channels = plan.problem.channels;
  const GraphSizes sizes = graph_sizes<A>(plan);
  return {workspace.take<A>(plan.cells_are_pixels() ? 0 : n * channels * plan.cells()),
          {workspace.take<A>(n * 2 * plan.nodes()),  // in place of a `saved` that is null
           workspace.take<A>(n * plan.nodes()),
           workspace.take<A>(windows_count<A>(forward_window(sizes), n * sizes.blocks)),
           workspace.take<A>(n * sizes.blocks * plan.cells())}};
}

template <class T, bool kChannelsLast>
void launch_all(const Plan& plan, const cuda::ForwardArgs& args, Launcher& launch) {
  using A = Accumulate<T>;
  const int64_t n = plan.problem.samples;
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  const int64_t whole = whole_bytes<T>(plan);
  if (whole <= shared_memory_limit()) {
    launch("steam_forward", steam_forward<T, kChannelsLast>, n, kSampleThreads<A>, whole, plan,
           GateForward<T, true>{x, residual, y, plan.problem.relu}, static_cast<A*>(args.saved));
    return;
  }
  Workspace workspace(args.workspace);
  Buffers<A> buffers = take_buffers<A>(plan, workspace);
  if (args.saved) buffers.graph.saved = static_cast<A*>(args.saved);
  const GraphSizes graph = graph_sizes<A>(plan);
  if (plan.cells_are_pixels()) {
    launch("steam_graph_forward", steam_graph_forward<T, kChannelsLast>, n * graph.blocks, kGraphThreads,
           graph_forward_bytes<A>(graph), plan, graph, x, buffers.graph);
  } else {
    const PoolSizes pool = pool_sizes<T>(plan, aligned({x}));
    launch("steam_pool", steam_pool<T, kChannelsLast, false>, n * pool.slices, kPoolThreads,
           pool_bytes<T, false>(plan, pool), plan, pool, Maps<T>{x, nullptr, nullptr}, buffers.sums,
           static_cast<A*>(nullptr));
    launch("steam_graph_forward", steam_graph_forward<A, kChannelsLast>, n * graph.blocks, kGraphThreads,
           graph_forward_bytes<A>(graph), plan, graph, static_cast<const A*>(buffers.sums), buffers.graph);
  }
  launch("steam_lattice_forward", steam_lattice_forward<A>, n, kGraphThreads, lattice_forward_bytes<A>(plan), plan,
         graph, buffers.graph);
  const GateSizes gate = gate_sizes<T>(plan, false, aligned({x, residual, y}));
  launch("steam_gate_forward", steam_gate_forward<T, kChannelsLast>, gate_blocks(plan, gate), kGateThreads,
         gate_bytes<A>(gate, kChannelsLast, false), plan, gate,
         GateForward<T, false>{x, residual, y, plan.problem.relu}, static_cast<const A*>(buffers.graph.gates));
}

}  // namespace

namespace cuda {

size_t forward_workspace_bytes(const Problem& problem) {
  return count_workspace(problem, [&]<class T>(const Plan& plan, Workspace& workspace) {
    if (whole_bytes<T>(plan) > shared_memory_limit()) take_buffers<Accumulate<T>>(plan, workspace);
  });
}

std::string forward(const ForwardArgs& args, void* stream) {
  return launch_call(args, stream, [&]<class T, bool kChannelsLast>(const Plan& plan, Launcher& launcher) {
    launch_all<T, kChannelsLast>(plan, args, launcher);
  });
}

}  // namespace cuda
}  // namespace steam
