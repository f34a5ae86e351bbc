// The backward pass: pool -> the gradients of the gates -> lattice -> ring -> gate, and the gradients of the weights.
// It is one launch if x and dy of a sample fit into shared memory, and one for the weights, else up to four: the ring's
// launch computes the lattice too. A large lattice has one more.
#include "launch.cuh"

namespace steam {
namespace {

// The numbers of shared memory for the tape of a graph, and for the factors of the gates after it.
template <class A>
STEAM_HD int64_t tape_or_factors(const Plan& plan) {
  return larger(tape_count(plan, larger(plan.problem.channels, plan.cells())),
                whole_gate_bytes<A>(plan, true) / static_cast<int64_t>(sizeof(A)));
}

// All stages in one launch. A block has x and the masked dy of one sample in shared memory, so that each is read once.
// ring_sums and lattice_sums are (N, 2, heads).
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_backward(Plan plan, const T* batch_x, GateBackward<T> batch, const Accumulate<T>* saved, double* ring_sums,
                   double* lattice_sums) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x, pixels = plan.pixels(), sample = plan.sample_size();
  const bool by_pixel = !plan.cells_are_pixels();
  SharedMemory shared;
  T* x_memory = shared.take<T>(shared_copy_size<T>(sample));
  T* dy_memory = shared.take<T>(shared_copy_size<T>(sample));
  A* row = shared.take<A>(2 * plan.nodes());
  A* gates = shared.take<A>(plan.nodes());
  A* grads = shared.take<A>(2 * plan.nodes());
  A* tape = shared.take<A>(tape_or_factors<A>(plan));
  A* pixel_gates = by_pixel ? shared.take<A>(pixels) : nullptr;
  A* pixel_shifts = by_pixel ? shared.take<A>(pixels) : nullptr;
  A* scratch = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);

  auto op = batch.at(n * sample);
  const T* x = shared_copy(x_memory, batch_x + n * sample, static_cast<int>(sample));
  const T* dy = shared_masked_copy(dy_memory, op.dy, op.y, static_cast<int>(sample));
  for (int64_t k = threadIdx.x; k < 2 * plan.nodes(); k += blockDim.x) row[k] = saved[n * 2 * plan.nodes() + k];
  __syncthreads();
  const Rows<A> nodes = make_rows(plan, row, gates);
  const Grads<A> d = make_grads(plan, grads);
  const int64_t sums = n * 2 * plan.problem.num_heads;
  whole_graph_backward<T, kChannelsLast>(plan, x, dy, nodes, d, tape, PerPixel<A>{pixel_gates, pixel_shifts}, scratch,
                                         heads, HeadGrads{ring_sums + sums, lattice_sums + sums});
  if (!op.dx && !op.dresidual) return;
  __syncthreads();
  op.dy = dy;
  op.y = nullptr;
  gate_sample<T, kChannelsLast, true>(plan, op, op.dy, {nodes.g_c, nodes.g_s, d.shift_c, d.shift_s}, Pieces(tape));
}

// The shared memory of a block of steam_backward.
template <class T>
int64_t whole_bytes(const Plan& plan) {
  using A = Accumulate<T>;
  const int64_t pixels = plan.pixels();
  return 2 * shared_bytes<T>(shared_copy_size<T>(plan.sample_size())) + 2 * shared_bytes<A>(2 * plan.nodes()) +
         shared_bytes<A>(plan.nodes()) + shared_bytes<A>(tape_or_factors<A>(plan)) +
         2 * shared_bytes<A>(plan.cells_are_pixels() ? 0 : pixels) + shared_bytes<A>(kSampleThreads<A>) +
         shared_bytes<A>(2 * kHeads);
}

constexpr int kWeightThreads = 256;

// The gradients of the weights, if no launch of the gate stage computes them.
__global__ void __launch_bounds__(kWeightThreads) steam_weight_grad(Plan plan, WeightGrads grads) {
  weight_grads(plan.problem, grads);
}

// The working memory. A whole sample needs only the sums of the graph stage.
template <class A>
struct Buffers {
  A* values;    // (N, C * cells), of x over cells; null with order="parallel" or if the cells are pixels
  A* products;  // (N, C * cells), of dy * x over cells; empty if the cells are pixels
  GraphBackward<A> graph;
};
template <class A>
Buffers<A> take_buffers(const Plan& plan, bool whole, Workspace& workspace) {
  Buffers<A> b{};
  const int64_t n = plan.problem.samples, channels = plan.problem.channels, heads = plan.problem.num_heads;
  const int64_t stored = plan.cells_are_pixels() ? 0 : n * channels * plan.cells();
  const GraphSizes sizes = graph_sizes<A>(plan);
  // A call without samples has one row of totals.
  const int64_t blocks = n * sizes.blocks, rows = larger<int64_t>(whole ? n : blocks, 1);
  b.graph.ring_sums = workspace.take<double>(rows * 2 * heads);
  b.graph.lattice_sums = workspace.take<double>(larger<int64_t>(n, 1) * 2 * heads);
  if (whole) return b;
  if (plan.problem.sequential && stored > 0) b.values = workspace.take<A>(stored);
  b.products = workspace.take<A>(stored);
  b.graph.gates = workspace.take<A>(n * plan.nodes());
  b.graph.shifts = workspace.take<A>(n * plan.nodes());
  b.graph.gate_grads = workspace.take<A>(n * channels);
  b.graph.partials = workspace.take<A>(blocks * plan.cells());
  b.graph.windows = workspace.take<A>(windows_count<A>(RingWindow(sizes).count(plan), blocks));
  b.graph.cell_windows = workspace.take<A>(windows_count<A>(lattice_window(plan), n));
  return b;
}

// The pool and graph stages of the general path.
template <class T, bool kChannelsLast>
void launch_graph(const Plan& plan, const Maps<T>& maps, const Buffers<Accumulate<T>>& b, bool needs_ring,
                  Launcher& launch) {
  using A = Accumulate<T>;
  const GraphSizes sizes = graph_sizes<A>(plan);
  const int64_t blocks = plan.problem.samples * sizes.blocks, bytes = graph_backward_cells_bytes<A>(sizes);
  const int64_t ring_bytes = graph_backward_ring_bytes<A>(plan, sizes);
  const auto launch_cells = [&]<class Of>(const Of& terms) {
    launch("steam_graph_backward_cells", steam_graph_backward_cells<Of, kChannelsLast>, blocks, kGraphThreads, bytes,
           plan, sizes, terms, b.graph);
  };
  const auto launch_ring = [&]<class E>(const E* values) {
    launch("steam_graph_backward_ring", steam_graph_backward_ring<E, kChannelsLast>, blocks, kGraphThreads, ring_bytes,
           plan, sizes, values, b.graph);
  };
  if (plan.cells_are_pixels()) {
    launch_cells(Terms<T, true>{maps});
  } else {
    const PoolSizes pool = pool_sizes<T>(plan, aligned({maps.x, maps.dy, maps.y}));
    launch("steam_pool", steam_pool<T, kChannelsLast, true>, plan.problem.samples * pool.slices, kPoolThreads,
           pool_bytes<T, true>(plan, pool), plan, pool, maps, b.values, b.products);
    launch_cells(Terms<A, false>{{b.products, nullptr, nullptr}});
  }
  if (!needs_ring || !ring_has_lattice(plan, sizes)) {
    launch("steam_lattice_backward", steam_lattice_backward<A>, plan.problem.samples, kGraphThreads,
           lattice_backward_bytes<A>(plan), plan, sizes, b.graph);
  }
  if (!needs_ring) return;
  if (plan.cells_are_pixels()) {
    launch_ring(maps.x);
  } else {
    launch_ring(static_cast<const A*>(b.values));
  }
}

template <class T, bool kChannelsLast>
void launch_all(const Plan& plan, const cuda::BackwardArgs& args, Launcher& launch) {
  using A = Accumulate<T>;
  const int64_t n = plan.problem.samples;
  const Maps<T> maps{static_cast<const T*>(args.x), static_cast<const T*>(args.dy),
                     plan.problem.relu ? static_cast<const T*>(args.y) : nullptr};
  const GateBackward<T> op{maps.dy, maps.y, static_cast<T*>(args.dx), static_cast<T*>(args.dresidual)};
  const int64_t bytes = whole_bytes<T>(plan);
  const bool whole = bytes <= shared_memory_limit();
  Workspace workspace(args.workspace);
  Buffers<A> b = take_buffers<A>(plan, whole, workspace);
  b.graph.saved = static_cast<const A*>(args.saved);
  const WeightGrads weights{
      {args.channel_weight, args.channel_grad, b.graph.ring_sums, whole ? n : n * graph_sizes<A>(plan).blocks},
      {args.spatial_weight, args.spatial_grad, b.graph.lattice_sums, n}};
  // The gradient of the residual alone needs no gradient of a token.
  const bool needs_tokens = args.dx || weights.needed();
  if (whole && needs_tokens) {
    launch("steam_backward", steam_backward<T, kChannelsLast>, n, kSampleThreads<A>, bytes, plan, maps.x, op,
           b.graph.saved, b.graph.ring_sums, b.graph.lattice_sums);
  } else {
    if (needs_tokens) {
      launch_graph<T, kChannelsLast>(plan, maps, b, args.dx || args.channel_grad.data, launch);
    }
    if (args.dx || args.dresidual) {
      const bool is_aligned = aligned({op.dy, op.y, op.dx, op.dresidual});
      const GateSizes gate = gate_sizes<T>(plan, true, is_aligned);
      launch("steam_gate_backward", steam_gate_backward<T, kChannelsLast>,
             gate_blocks(plan, gate) + (weights.needed() ? 1 : 0), kGateThreads,
             gate_bytes<A>(gate, kChannelsLast, true), plan, gate, op, static_cast<const A*>(b.graph.gates),
             static_cast<const A*>(b.graph.shifts), weights);
      return;
    }
  }
  if (weights.needed()) launch("steam_weight_grad", steam_weight_grad, 1, kWeightThreads, 0, plan, weights);
}

}  // namespace

namespace cuda {

size_t backward_workspace_bytes(const Problem& problem) {
  return count_workspace(problem, [&]<class T>(const Plan& plan, Workspace& workspace) {
    take_buffers<Accumulate<T>>(plan, whole_bytes<T>(plan) <= shared_memory_limit(), workspace);
  });
}

std::string backward(const BackwardArgs& args, void* stream) {
  return launch_call(args, stream, [&]<class T, bool kChannelsLast>(const Plan& plan, Launcher& launcher) {
    launch_all<T, kChannelsLast>(plan, args, launcher);
  });
}

}  // namespace cuda
}  // namespace steam
