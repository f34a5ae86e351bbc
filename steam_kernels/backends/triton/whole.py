"""All three stages of a small sample in one program and one launch, with barriers between the stages."""

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Sizes, sizes_of, weights_of
from .gate import gate_backward_of, gate_of, gate_tiles
from .graph import graph_of, lattice_gates, partials_of, rows_of
from .graph_backward import cells_of, gradients_of, lattice_jacobian, lattice_shares, ring_backward_of
from .pool import pool_runs_of, pool_tiles_of


@triton.jit
def with_whole_width(sizes, LAYOUT: tl.constexpr):
    """The sizes with the width itself, in place of the width divided by WIDTH_MULTIPLE."""
    return Sizes(sizes.channels, sizes.area, sizes.width * LAYOUT.WIDTH_MULTIPLE, sizes.grid_h, sizes.grid_w)


@triton.jit
def steps_of_sample(sizes, TILE: tl.constexpr):
    """The steps with which one block of rows of the gate stage has all channels, and its blocks of columns."""
    steps = tl.cdiv(tl.cdiv(sizes.channels, TILE.GROUP), TILE.ROWS)
    _, run_blocks = gate_tiles(sizes, steps, TILE)
    return steps, run_blocks


@triton.jit
def pool_sample(
    n, x, dy, y, sums, products, sizes, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The pool stage of sample n, by runs or by tiles. The arguments are those of ``pool_tiles_of``."""
    if TILE.RUNS:
        blocks = tl.cdiv(sizes.channels, TILE.CHANNELS)
        pool_runs_of(n, 0, blocks, x, dy, y, sums, products, with_whole_width(sizes, LAYOUT), TILE, ACC)
    else:
        for t in range(tl.cdiv(sizes.channels, TILE.CHANNELS) * tl.cdiv(sizes.grid_w, TILE.CELLS) * sizes.grid_h):
            pool_tiles_of(n, t, x, dy, y, sums, products, sizes, LAYOUT, TILE, ACC)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def whole(
    x,
    residual,  # None: no residual
    y,
    sums,  # None: each cell is a pixel
    saved, gates, windows, partials,
    channel_weight, spatial_weight, channel_row, channel_column, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width, ring_first, ring_count,
    SCALE: tl.constexpr, RELU: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, POOL: tl.constexpr,
    GRAPH: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The forward pass of a sample."""
    n = tl.program_id(0).to(tl.int64)
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    channel, spatial = weights_of(
        channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column, heads, head_width
    )  # fmt: skip
    pooled = x
    if sums is not None:
        pool_sample(n, x, None, None, sums, None, sizes, LAYOUT, POOL, ACC)
        tl.debug_barrier()
        pooled = sums
    sizes = with_whole_width(sizes, LAYOUT)
    for b in range(tl.cdiv(sizes.channels, GRAPH.CHANNELS)):
        graph_of(
            n, b, pooled, saved, gates, windows, partials, channel, sizes, ring_first, ring_count,
            OPTIONS, LAYOUT, GRAPH, ACC,
        )  # fmt: skip
    tl.debug_barrier()
    rows = rows_of(n, saved, gates, sizes)
    partials = partials_of(n, partials, sizes, GRAPH)
    lattice_gates(partials, rows.u, rows.o_s, rows.g_s, None, True, spatial, sizes, OPTIONS, GRAPH, ACC)
    tl.debug_barrier()
    steps, run_blocks = steps_of_sample(sizes, GATE)
    for t in range(run_blocks):
        gate_of(n, t, x, residual, y, rows.g_c, rows.g_s, sizes, steps, SCALE, RELU, LAYOUT, GATE, ACC)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def whole_backward(
    dy, x,
    y,  # None: no ReLU
    dx,  # None: not needed
    dresidual,  # None: not needed
    sums,  # None: each cell is a pixel, or not needed
    products,  # None: each cell is a pixel
    saved, gates, flows, shifts,
    jacobian_c,  # None: not RING
    jacobian_s, windows,
    partials,  # of the blocks of channels
    partials_c, partials_s,
    channel_weight, spatial_weight, channel_row, channel_column, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width, ring_first, ring_count,
    SCALE: tl.constexpr, RING: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, POOL: tl.constexpr,
    GRAPH: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The backward pass of a sample, up to its partials of the gradients of the weights."""
    n = tl.program_id(0).to(tl.int64)
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    channel, spatial = weights_of(
        channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column, heads, head_width
    )  # fmt: skip
    pooled = x
    if products is not None:
        pool_sample(n, x, dy, y, sums, products, sizes, LAYOUT, POOL, ACC)
        tl.debug_barrier()
        pooled = sums
    factor = x if products is None else products
    dy_of_cells = dy if products is None else None
    y_of_cells = y if products is None else None
    if not OPTIONS.SEQUENTIAL:
        pooled = None
    sizes = with_whole_width(sizes, LAYOUT)
    blocks = tl.cdiv(sizes.channels, GRAPH.CHANNELS)
    for b in range(blocks):
        cells_of(
            n, b, factor, dy_of_cells, y_of_cells, saved, gates, flows, jacobian_c, partials, channel, sizes,
            ring_first, ring_count, SCALE, RING, OPTIONS, LAYOUT, GRAPH, ACC,
        )  # fmt: skip
    lattice_jacobian(n, saved, gates, jacobian_s, spatial, sizes, OPTIONS, GRAPH, ACC)
    tl.debug_barrier()
    of = gradients_of(n, flows, shifts, sizes)
    lattice_shares(
        n, True, of.flow_s, of.shift_s, None, saved, jacobian_s, partials, partials_s, sizes, heads,
        SCALE, OPTIONS, GRAPH, ACC,
    )  # fmt: skip
    if RING:
        tl.debug_barrier()
        for b in range(blocks):
            ring_backward_of(
                n, b, pooled, of.shift_s, saved, flows, shifts, jacobian_c, windows, partials_c, sizes, heads,
                ring_first, ring_count, OPTIONS, LAYOUT, GRAPH, ACC,
            )  # fmt: skip
    if dx is not None or dresidual is not None:
        tl.debug_barrier()
        steps, run_blocks = steps_of_sample(sizes, GATE)
        for t in range(run_blocks):
            gate_backward_of(
                n, t, dy, y, dx, dresidual, gates, shifts, sizes, steps, SCALE, OPTIONS.SEQUENTIAL, LAYOUT, GATE, ACC
            )  # fmt: skip
