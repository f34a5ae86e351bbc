// The backward walk: pool' -> graph' -> gate', in one launch where a sample's x and dy fit into shared memory, and the
// parameters' gradients in a last one.
#include "launch.cuh"

namespace steam {
namespace {

// A block keeps one sample's x and masked dy in shared memory, so that each is read once.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_backward(Unit unit, const T* batch_x, GateBackward<T> batch, const Accumulate<T>* saved, double* sums) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x, channels = unit.p.channels, pixels = unit.pixels(), sample = unit.sample();
  const int64_t nodes_count = channels + unit.cells();
  const int64_t rows = kChannelsLast ? pixels : channels, columns = kChannelsLast ? channels : pixels;
  SharedMemory shared;
  T* x_room = shared.take<T>(stage_room<T>(sample));
  T* dy_room = shared.take<T>(stage_room<T>(sample));
  A* row = shared.take<A>(2 * nodes_count);
  A* gates = shared.take<A>(nodes_count);
  A* grads = shared.take<A>(grads_count(unit));
  A* gate_map = shared.take<A>(pixels);
  A* share_map = shared.take<A>(pixels);
  A* room = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const GateMaps<A, kChannelsLast, true> maps(shared, rows, columns);

  auto op = batch.at(n * sample);
  const T* x = stage(x_room, batch_x + n * sample, static_cast<int>(sample));
  const T* dy = stage_masked(dy_room, op.dy, op.y, static_cast<int>(sample));
  for (int64_t k = threadIdx.x; k < 2 * nodes_count; k += blockDim.x) row[k] = saved[n * 2 * nodes_count + k];
  __syncthreads();
  const Nodes<A> nodes = make_nodes(unit, row, gates);
  const Grads<A> d = make_grads(unit, grads);
  const bool spread_out = !unit.cells_are_pixels();
  graph_backward<A>(unit, Maps<T>{x, dy, nullptr}, Layout<kChannelsLast>{channels, pixels}, nodes, d,
                    PlaceMaps<A>{spread_out ? gate_map : nullptr, spread_out ? share_map : nullptr}, room, heads,
                    sums + n * 4 * unit.p.num_heads);
  if (!op.dx && !op.dresidual) return;
  op.dy = dy;
  op.y = nullptr;
  const bool whole = is_whole<T>(op, op.dy, columns, columns);
  maps.fill(unit, {nodes.g_c, nodes.g_s, d.z, d.share}, 0, rows, 0, columns, whole);
  __syncthreads();
  gate_matrix<T>(op, op.dy, maps, static_cast<int>(rows), static_cast<int>(columns), columns, whole);
}

template <class T>
int64_t fused_bytes(const Unit& u) {
  using A = Accumulate<T>;
  const int64_t nodes = u.p.channels + u.cells(), pixels = u.pixels();
  const int64_t rows = u.p.channels_last ? pixels : u.p.channels, columns = u.p.channels_last ? u.p.channels : pixels;
  return 2 * shared_bytes<T>(stage_room<T>(u.sample())) + shared_bytes<A>(2 * nodes) + shared_bytes<A>(nodes) +
         shared_bytes<A>(grads_count(u)) + 2 * shared_bytes<A>(pixels) + shared_bytes<A>(kSampleThreads<A>) +
         shared_bytes<A>(2 * kHeads) + gate_maps_bytes<A>(rows, columns, u.p.channels_last, true);
}

constexpr int kWeightThreads = 256;

// From those of the heads' a and b (math, backward): each row takes its partner's row. One block; samples are added in
// their order. sums: (N, 4 * heads), whose first row receives the totals.
__global__ void __launch_bounds__(kWeightThreads)
    steam_weight_grad(Unit unit, WeightGrad channel_grad, WeightGrad spatial_grad, double* sums) {
  const Problem& p = unit.p;
  const int heads = p.num_heads, width = p.embed_dim / heads, t = static_cast<int>(threadIdx.x);
  const int lane = t % kWarp;
  for (int64_t k = t / kWarp; k < 4 * static_cast<int64_t>(heads); k += kWeightThreads / kWarp) {
    const double sum =
        sum_lanes(sum_run<double>(lane, p.samples, kWarp, [&](int64_t n) { return sums[n * 4 * heads + k]; }), 5);
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
  write(unit.channel_weight, channel_grad, sums);
  write(unit.spatial_weight, spatial_grad, sums + 2 * heads);
}

// Working memory in the workspace: the parameters' gradients by sample, and what only the general path needs.
template <class A>
struct Buffers {
  double* sums;  // (N, 4 * heads), one row where N is 0
  A* values;     // sums of x over cells: (N, C * cells); none in parallel order or where cells are pixels
  A* products;   // and of dy * x; none where cells are pixels
  A* gates;      // (N, C + cells)
  A* grads;      // (N, grads_count)
};
template <class A>
Buffers<A> take_buffers(const Unit& u, bool fused, Workspace& workspace) {
  Buffers<A> b{};
  const int64_t n = u.p.samples, stored = u.cells_are_pixels() ? 0 : n * u.p.channels * u.cells();
  b.sums = workspace.take<double>(larger<int64_t>(n, 1) * 4 * u.p.num_heads);
  if (fused) return b;
  if (u.p.sequential && stored > 0) b.values = workspace.take<A>(stored);
  b.products = workspace.take<A>(stored);
  b.gates = workspace.take<A>(n * (u.p.channels + u.cells()));
  b.grads = workspace.take<A>(n * grads_count(u));
  return b;
}

template <class T, bool kChannelsLast>
void run(const Unit& u, const cuda::BackwardArgs& args, Launcher& launch) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  const T* y = u.p.relu ? static_cast<const T*>(args.y) : nullptr;
  const GateBackward<T> op{dy, y, static_cast<T*>(args.dx), static_cast<T*>(args.dresidual)};
  const A* saved = static_cast<const A*>(args.saved);
  const bool weights = args.channel_grad.data || args.spatial_grad.data, tokens = args.dx || weights;
  const int64_t fused = fused_bytes<T>(u);
  const bool one_launch = fused <= shared_memory_limit();
  Workspace workspace(args.workspace);
  const Buffers<A> b = take_buffers<A>(u, one_launch, workspace);
  if (one_launch && tokens) {
    launch("steam_backward", steam_backward<T, kChannelsLast>, u.p.samples, kSampleThreads<A>, fused, u, x, op, saved,
           b.sums);
  } else {
    if (tokens && u.cells_are_pixels()) {
      launch("steam_graph_backward", steam_graph_backward<Maps<T>, A, kChannelsLast>, u.p.samples, kSampleThreads<A>,
             graph_bytes<A>(), u, Maps<T>{x, dy, y}, saved, b.gates, b.grads, b.sums);
    } else if (tokens) {
      const PoolPlan pool = pool_plan<T>(u, aligned({x, dy, y}) && u.p.channels % kPack<T> == 0);
      launch("steam_pool", steam_pool<T, kChannelsLast, true>, u.p.samples * pool.slices, kPoolThreads,
             pool_bytes<T, true>(u, pool), u, pool, Maps<T>{x, dy, y}, b.values, b.products);
      launch("steam_graph_backward", steam_graph_backward<StoredSums<A>, A, kChannelsLast>, u.p.samples,
             kSampleThreads<A>, graph_bytes<A>(), u, StoredSums<A>{b.values, b.products}, saved, b.gates, b.grads,
             b.sums);
    }
    if (args.dx || args.dresidual) {
      const GatePlan gate = gate_plan<T>(u, true);
      Grads<A> d{};
      if (tokens) d = make_grads(u, b.grads);
      launch("steam_gate_backward", steam_gate_backward<T, kChannelsLast>,
             u.p.samples * gate.row_blocks * gate.column_blocks, kGateThreads,
             gate_maps_bytes<A>(gate.rows, gate.columns, kChannelsLast, true), u, gate, op,
             static_cast<const A*>(b.gates), static_cast<const A*>(d.z), static_cast<const A*>(d.share),
             grads_count(u));
    }
  }
  if (weights) {
    launch("steam_weight_grad", steam_weight_grad, 1, kWeightThreads, 0, u, args.channel_grad, args.spatial_grad,
           b.sums);
  }
}

}  // namespace

namespace cuda {

size_t backward_workspace_bytes(const Problem& problem) {
  const Unit u = make_unit(problem, {}, {});
  return with_dtype(problem.dtype, [&]<class T>() {
    Workspace workspace(nullptr);
    take_buffers<Accumulate<T>>(u, fused_bytes<T>(u) <= shared_memory_limit(), workspace);
    return workspace.bytes();
  });
}

std::string backward(const BackwardArgs& args, void* stream) {
  const Unit u = make_unit(args.problem, args.channel_weight, args.spatial_weight);
  Launcher launch(args.problem, stream);
  with_dtype(args.problem.dtype, [&]<class T>() {
    with_bool(u.p.channels_last, [&]<bool kChannelsLast>() { run<T, kChannelsLast>(u, args, launch); });
  });
  return launch.error;
}

}  // namespace cuda
}  // namespace steam
