"""All three stages of a small sample by one program: one launch instead of three. Stages meet at barriers."""

import triton
import triton.language as tl

from .gate import gate_backward_of, gate_of, gate_tiles
from .graph import graph_backward_of, graph_of
from .pool import pool_runs_of, pool_tiles_of
from .sizes import DO_NOT_SPECIALIZE


@triton.jit
def pool_sample(
    n,
    x,
    dy,
    y,
    sums,
    products,
    channels,
    area,
    width,  # in units of WIDTH_UNIT
    grid_h,
    grid_w,
    RUNS: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    RUN: tl.constexpr,
    ACC: tl.constexpr,
):
    """The pool stage of sample n, by runs or by tiles."""
    if RUNS:
        pool_runs_of(
            n, 0, tl.cdiv(channels, CHANNELS), x, dy, y, sums, products, channels, area, width * WIDTH_UNIT,
            grid_h, grid_w, CHANNELS, CELLS, PIXELS, RUN, ACC,
        )  # fmt: skip
    else:
        for t in range(tl.cdiv(channels, CHANNELS) * tl.cdiv(grid_w, CELLS) * grid_h):
            pool_tiles_of(
                n, t, x, dy, y, sums, products, channels, area, width, grid_h, grid_w,
                WIDTH_UNIT, UNIFORM, CHANNELS_LAST, CHANNELS, ROWS, CELLS, COLUMNS, ACC,
            )  # fmt: skip


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def whole(
    x,
    residual,
    y,
    sums,  # None: a cell is a pixel
    saved,
    gates,
    channel_weight,
    spatial_weight,
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    heads,
    head_width,
    ring_first,
    ring_count,
    SCALE: tl.constexpr,
    RELU: tl.constexpr,
    RING_LOOPS: tl.constexpr,
    LATTICE_LOOPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    AREA_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POOL_RUNS: tl.constexpr,
    POOL_UNIFORM: tl.constexpr,
    POOL_CHANNELS: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    POOL_CELLS: tl.constexpr,
    POOL_COLUMNS: tl.constexpr,
    POOL_PIXELS: tl.constexpr,
    POOL_RUN: tl.constexpr,
    GRAPH_CHANNELS: tl.constexpr,
    GRAPH_CELLS: tl.constexpr,
    GRAPH_WALK: tl.constexpr,
    GRAPH_RUN: tl.constexpr,
    GRAPH_NODES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    GATE_RUN: tl.constexpr,
    GATE_STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The forward pass of a sample."""
    n = tl.program_id(0).to(tl.int64)
    channels = channels * CHANNEL_UNIT
    area = area * AREA_UNIT
    pooled = x
    if sums is not None:
        pool_sample(
            n, x, None, None, sums, None, channels, area, width, grid_h, grid_w, POOL_RUNS, WIDTH_UNIT, POOL_UNIFORM,
            CHANNELS_LAST, POOL_CHANNELS, POOL_ROWS, POOL_CELLS, POOL_COLUMNS, POOL_PIXELS, POOL_RUN, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        pooled = sums
    width = width * WIDTH_UNIT
    graph_of(
        n, pooled, saved, gates, channel_weight, spatial_weight, channel_row, channel_column, spatial_row,
        spatial_column, channels, area, width, grid_h, grid_w, heads, head_width, ring_first, ring_count,
        RING_LOOPS, LATTICE_LOOPS, DIAGONAL, SEQUENTIAL, CHANNELS_LAST, GRAPH_CHANNELS, GRAPH_CELLS, GRAPH_WALK,
        GRAPH_RUN, GRAPH_NODES, HEADS, WIDTH, ACC,
    )  # fmt: skip
    tl.debug_barrier()
    row_blocks, run_blocks = gate_tiles(channels, area, GATE_GROUP, GATE_ROWS, GATE_RUN, GATE_STEPS)
    for t in range(row_blocks * run_blocks):
        gate_of(
            n, t, x, residual, y, gates, channels, area, width, grid_h, grid_w, SCALE, RELU, CHANNELS_LAST,
            GATE_GROUP, GATE_ROWS, GATE_RUN, GATE_STEPS, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def whole_backward(
    dy,
    x,
    y,  # None: no ReLU
    dx,  # None: not asked for
    dresidual,  # None: not asked for
    sums,  # None: a cell is a pixel, or nobody asks
    products,  # None: a cell is a pixel
    saved,
    gates,
    flows,
    shifts,
    partials,
    channel_weight,
    spatial_weight,
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    heads,
    head_width,
    ring_first,
    ring_count,
    SCALE: tl.constexpr,
    RING: tl.constexpr,
    RING_LOOPS: tl.constexpr,
    LATTICE_LOOPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    AREA_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POOL_RUNS: tl.constexpr,
    POOL_UNIFORM: tl.constexpr,
    POOL_CHANNELS: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    POOL_CELLS: tl.constexpr,
    POOL_COLUMNS: tl.constexpr,
    POOL_PIXELS: tl.constexpr,
    POOL_RUN: tl.constexpr,
    GRAPH_CHANNELS: tl.constexpr,
    GRAPH_CELLS: tl.constexpr,
    GRAPH_ONCE: tl.constexpr,
    GRAPH_RUN: tl.constexpr,
    GRAPH_NODES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    GATE_RUN: tl.constexpr,
    GATE_STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The backward pass of a sample, up to its terms of the weights' gradients."""
    n = tl.program_id(0).to(tl.int64)
    channels = channels * CHANNEL_UNIT
    area = area * AREA_UNIT
    pooled = x
    if products is not None:
        pool_sample(
            n, x, dy, y, sums, products, channels, area, width, grid_h, grid_w, POOL_RUNS, WIDTH_UNIT, POOL_UNIFORM,
            CHANNELS_LAST, POOL_CHANNELS, POOL_ROWS, POOL_CELLS, POOL_COLUMNS, POOL_PIXELS, POOL_RUN, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        pooled = products if sums is None else sums
    width = width * WIDTH_UNIT
    graph_backward_of(
        n, pooled, products, dy, y, saved, gates, flows, shifts, partials, channel_weight, spatial_weight,
        channel_row, channel_column, spatial_row, spatial_column, channels, area, width, grid_h, grid_w, heads,
        head_width, ring_first, ring_count, SCALE, RING, RING_LOOPS, LATTICE_LOOPS, DIAGONAL, SEQUENTIAL,
        CHANNELS_LAST, GRAPH_CHANNELS, GRAPH_CELLS, GRAPH_ONCE, GRAPH_RUN, GRAPH_NODES, HEADS, WIDTH, ACC,
    )  # fmt: skip
    if dx is not None or dresidual is not None:
        tl.debug_barrier()
        row_blocks, run_blocks = gate_tiles(channels, area, GATE_GROUP, GATE_ROWS, GATE_RUN, GATE_STEPS)
        for t in range(row_blocks * run_blocks):
            gate_backward_of(
                n, t, dy, y, dx, dresidual, gates, shifts, channels, area, width, grid_h, grid_w, SCALE, SEQUENTIAL,
                CHANNELS_LAST, GATE_GROUP, GATE_ROWS, GATE_RUN, GATE_STEPS, ACC,
            )  # fmt: skip
