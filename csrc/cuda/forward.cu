// The forward walk: pool -> graph -> gate, in one launch where a sample fits into shared memory.
#include "launch.cuh"

namespace steam {
namespace {

// A block keeps one sample in shared memory, so that x is read once. saved may be null.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kSampleThreads<Accumulate<T>>, 1)
    steam_forward(Unit unit, GateForward<T> batch, Accumulate<T>* saved) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x, channels = unit.p.channels, pixels = unit.pixels(), sample = unit.sample();
  const int64_t nodes_count = channels + unit.cells();
  const int64_t rows = kChannelsLast ? pixels : channels, columns = kChannelsLast ? channels : pixels;
  SharedMemory shared;
  T* stage_at = shared.take<T>(stage_room<T>(sample));
  A* row = shared.take<A>(2 * nodes_count);
  A* gates = shared.take<A>(nodes_count);
  A* map = shared.take<A>(pixels);
  A* room = shared.take<A>(kSampleThreads<A>);
  const HeadTable<A> heads = take_heads<A>(shared);
  const GateMaps<A, kChannelsLast, false> maps(shared, rows, columns);

  auto op = batch.at(n * sample);
  const T* x = stage(stage_at, op.x, static_cast<int>(sample));
  __syncthreads();
  const Nodes<A> nodes = make_nodes(unit, row, gates);
  graph_forward<A>(unit, Maps<T>{x, nullptr, nullptr}, Layout<kChannelsLast>{channels, pixels}, nodes,
                   unit.cells_are_pixels() ? nullptr : map, room, heads);
  if (saved) {
    for (int64_t k = threadIdx.x; k < 2 * nodes_count; k += blockDim.x) saved[n * 2 * nodes_count + k] = row[k];
  }
  op.x = x;
  const bool whole = is_whole<T>(op, op.y, columns, columns);
  maps.fill(unit, {nodes.g_c, nodes.g_s, nullptr, nullptr}, 0, rows, 0, columns, whole);
  __syncthreads();
  gate_matrix<T>(op, op.y, maps, static_cast<int>(rows), static_cast<int>(columns), columns, whole);
}

template <class T>
int64_t fused_bytes(const Unit& u) {
  using A = Accumulate<T>;
  const int64_t nodes = u.p.channels + u.cells(), pixels = u.pixels();
  const int64_t rows = u.p.channels_last ? pixels : u.p.channels, columns = u.p.channels_last ? u.p.channels : pixels;
  return shared_bytes<T>(stage_room<T>(u.sample())) + shared_bytes<A>(2 * nodes) + shared_bytes<A>(nodes) +
         shared_bytes<A>(pixels) + shared_bytes<A>(kSampleThreads<A>) + shared_bytes<A>(2 * kHeads) +
         gate_maps_bytes<A>(rows, columns, u.p.channels_last, false);
}

// The general path's working memory, in the workspace.
template <class A>
struct Buffers {
  A* sums;   // of cells: (N, C * cells); none where cells are pixels
  A* rows;   // (N, 2 (C + cells)), where no saved is asked for
  A* gates;  // (N, C + cells)
};
template <class A>
Buffers<A> take_buffers(const Unit& u, Workspace& workspace) {
  const int64_t nodes = u.p.channels + u.cells();
  return {workspace.take<A>(u.cells_are_pixels() ? 0 : u.p.samples * u.p.channels * u.cells()),
          workspace.take<A>(u.p.samples * 2 * nodes), workspace.take<A>(u.p.samples * nodes)};
}

template <class T, bool kChannelsLast>
void run(const Unit& u, const cuda::ForwardArgs& args, Launcher& launch) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(args.x);
  const GateForward<T> op{x, static_cast<const T*>(args.residual), static_cast<T*>(args.y), u.p.relu};
  const int64_t fused = fused_bytes<T>(u);
  if (fused <= shared_memory_limit()) {
    launch("steam_forward", steam_forward<T, kChannelsLast>, u.p.samples, kSampleThreads<A>, fused, u, op,
           static_cast<A*>(args.saved));
    return;
  }
  Workspace workspace(args.workspace);
  const Buffers<A> buffers = take_buffers<A>(u, workspace);
  A* rows = args.saved ? static_cast<A*>(args.saved) : buffers.rows;
  if (u.cells_are_pixels()) {
    launch("steam_graph_forward", steam_graph_forward<T, kChannelsLast>, u.p.samples, kSampleThreads<A>,
           graph_bytes<A>(), u, x, rows, buffers.gates);
  } else {
    const PoolPlan pool = pool_plan<T>(u, aligned({x}) && u.p.channels % kPack<T> == 0);
    launch("steam_pool", steam_pool<T, kChannelsLast, false>, u.p.samples * pool.slices, kPoolThreads,
           pool_bytes<T, false>(u, pool), u, pool, Maps<T>{x, nullptr, nullptr}, buffers.sums,
           static_cast<A*>(nullptr));
    launch("steam_graph_forward", steam_graph_forward<A, kChannelsLast>, u.p.samples, kSampleThreads<A>,
           graph_bytes<A>(), u, static_cast<const A*>(buffers.sums), rows, buffers.gates);
  }
  const GatePlan gate = gate_plan<T>(u, false);
  launch("steam_gate_forward", steam_gate_forward<T, kChannelsLast>, u.p.samples * gate.row_blocks * gate.column_blocks,
         kGateThreads, gate_maps_bytes<A>(gate.rows, gate.columns, kChannelsLast, false), u, gate, op,
         static_cast<const A*>(buffers.gates));
}

}  // namespace

namespace cuda {

size_t forward_workspace_bytes(const Problem& problem) {
  const Unit u = make_unit(problem, {}, {});
  return with_dtype(problem.dtype, [&]<class T>() {
    if (fused_bytes<T>(u) <= shared_memory_limit()) return size_t{0};
    Workspace workspace(nullptr);
    take_buffers<Accumulate<T>>(u, workspace);
    return workspace.bytes();
  });
}

std::string forward(const ForwardArgs& args, void* stream) {
  const Unit u = make_unit(args.problem, args.channel_weight, args.spatial_weight);
  Launcher launch(args.problem, stream);
  with_dtype(args.problem.dtype, [&]<class T>() {
    with_bool(u.p.channels_last, [&]<bool kChannelsLast>() { run<T, kChannelsLast>(u, args, launch); });
  });
  return launch.error;
}

}  // namespace cuda
}  // namespace steam
