"""The graph stage, forward: from sums over cells to tokens, pre-activations and gates.

One program processes a sample. A token that other nodes read is written to global memory and read again after a
barrier, so the number of nodes has no limit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, sizes_of
from .pool import cell_begin, rearrange, upstream
from .transform import Graph, collapse, sigmoid, transform


class Rows(NamedTuple):
    """The vectors of one sample: tokens, pre-activations and gates of the channels and of the cells."""

    z: Any
    o_c: Any
    u: Any
    o_s: Any
    g_c: Any
    g_s: Any


@triton.jit
def rows_of(n, saved, gates, sizes):
    """The vectors of sample n in ``saved``, rows of [z | o_c | u | o_s], and ``gates``, rows of [g_c | g_s]."""
    cells = sizes.grid_h * sizes.grid_w
    z = saved + n * 2 * (sizes.channels + cells)
    o_c = z + sizes.channels
    u = o_c + sizes.channels
    o_s = u + cells
    g_c = gates + n * (sizes.channels + cells)
    g_s = g_c + sizes.channels
    return Rows(z, o_c, u, o_s, g_c, g_s)


@triton.jit
def load_cells(
    x,
    dy,  # None: x are the sums
    y,
    first_channel,
    first_cell,
    sizes,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """A (CHANNELS, CELLS) tile of the sums of a sample, 0 outside. With dy, where each cell is a pixel, of x dy.

    RUN is the length of a run of memory that holds CHANNELS rows of all cells and is sorted on the chip.
    """
    channels, cells = sizes.channels, sizes.grid_h * sizes.grid_w
    # [CHANNELS, 1] and [1, CELLS]
    c = first_channel + tl.arange(0, TILE.CHANNELS)[:, None]
    ij = first_cell + tl.arange(0, TILE.CELLS)[None, :]
    # [CHANNELS, CELLS]
    inside = (c < channels) & (ij < cells)
    if TILE.RUN > 0:
        # [RUN]
        flat = tl.arange(0, TILE.RUN)
        start = cells.to(tl.int64) * first_channel
        read = (flat < TILE.CHANNELS * cells) & (flat < channels.to(tl.int64) * cells - start)
        values = tl.load(x + start + flat, mask=read, other=0.0)
        if dy is not None:
            values = values.to(ACC) * upstream(dy, y, start + flat, read, ACC)
        # [CHANNELS, CELLS]
        index = tl.where(inside, (c - first_channel) * cells + ij, 0)
        tile = rearrange(values, index, inside, TILE.CHANNELS, TILE.CELLS, ACC)
    else:
        if LAYOUT.CHANNELS_LAST:
            offset = ij.to(tl.int64) * channels + c
        else:
            offset = c.to(tl.int64) * cells + ij
        tile = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
        if dy is not None:
            tile *= upstream(dy, y, offset, inside, ACC)
    return tile


@triton.jit
def pixels_of(cell, sizes):
    """The number of pixels of each cell."""
    height = sizes.area // sizes.width
    i = cell // sizes.grid_w
    j = cell % sizes.grid_w
    rows = cell_begin(i + 1, sizes.grid_h, height) - cell_begin(i, sizes.grid_h, height)
    return rows * (cell_begin(j + 1, sizes.grid_w, sizes.width) - cell_begin(j, sizes.grid_w, sizes.width))


@triton.jit
def channel_gate(c, rows, a, b, heads, ring):
    """The gates of channels c, stored with their pre-activations; 0 beyond the channels."""
    node = tl.where(c < ring.nodes, c, 0)
    o = transform(rows.z, node, a, b, heads, ring)
    g, _ = sigmoid(o)
    tl.store(rows.o_c + c, o, mask=c < ring.nodes)
    tl.store(rows.g_c + c, g, mask=c < ring.nodes)
    return tl.where(c < ring.nodes, g, 0.0)


@triton.jit
def store_spatial_tokens(total, ij, rows, sizes, ACC: tl.constexpr):
    """Stores u of cells ij, from (CHANNELS, CELLS) sums over blocks of channels."""
    # [CELLS]
    pixels = pixels_of(ij, sizes).to(ACC)
    cells = sizes.grid_h * sizes.grid_w
    tl.store(rows.u + ij, tl.sum(total, 0) / (pixels * sizes.channels), mask=ij < cells)


@triton.jit
def walk_over_the_ring(
    sums, rows, a, b, heads, ring, sizes, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """z, o_c, g_c and u; the sums are read once.

    One tile has all cells, and the neighbours of a channel are at most one block of channels away. A block stays in
    registers until the tokens of its neighbours are stored: the first block until the end, every other block until the
    next block is read.
    """
    # [CHANNELS, CELLS]
    total = tl.zeros([TILE.CHANNELS, TILE.CELLS], ACC)
    # [CHANNELS]
    c = tl.arange(0, TILE.CHANNELS)
    # [CHANNELS, CELLS]
    head = load_cells(sums, None, None, 0, 0, sizes, LAYOUT, TILE, ACC)
    tl.store(rows.z + c, tl.sum(head, 1) / sizes.area, mask=c < sizes.channels)
    last = head
    for first in range(TILE.CHANNELS, sizes.channels, TILE.CHANNELS):
        c = first + tl.arange(0, TILE.CHANNELS)
        tile = load_cells(sums, None, None, first, 0, sizes, LAYOUT, TILE, ACC)
        tl.store(rows.z + c, tl.sum(tile, 1) / sizes.area, mask=c < sizes.channels)
        tl.debug_barrier()
        if first > TILE.CHANNELS:
            g = channel_gate(c - TILE.CHANNELS, rows, a, b, heads, ring)
            total += last * g[:, None] if OPTIONS.SEQUENTIAL else last
        last = tile
    tl.debug_barrier()
    # [CHANNELS]
    c = tl.arange(0, TILE.CHANNELS)
    if sizes.channels > TILE.CHANNELS:
        first = (sizes.channels - 1) // TILE.CHANNELS * TILE.CHANNELS
        g = channel_gate(first + c, rows, a, b, heads, ring)
        total += last * g[:, None] if OPTIONS.SEQUENTIAL else last
    g = channel_gate(c, rows, a, b, heads, ring)
    total += head * g[:, None] if OPTIONS.SEQUENTIAL else head
    # [CELLS]
    ij = tl.arange(0, TILE.CELLS)
    store_spatial_tokens(total, ij, rows, sizes, ACC)


@triton.jit
def channel_tokens(sums, rows, sizes, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    """z of all channels."""
    for first in range(0, sizes.channels, TILE.CHANNELS):
        # [CHANNELS, CELLS]
        total = tl.zeros([TILE.CHANNELS, TILE.CELLS], ACC)
        for cell in range(0, sizes.grid_h * sizes.grid_w, TILE.CELLS):
            total += load_cells(sums, None, None, first, cell, sizes, LAYOUT, TILE, ACC)
        # [CHANNELS]
        c = first + tl.arange(0, TILE.CHANNELS)
        tl.store(rows.z + c, tl.sum(total, 1) / sizes.area, mask=c < sizes.channels)


@triton.jit
def spatial_tokens(
    sums, rows, sizes, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr
):
    """u of all cells."""
    for cell in range(0, sizes.grid_h * sizes.grid_w, TILE.CELLS):
        # [CHANNELS, CELLS]
        total = tl.zeros([TILE.CHANNELS, TILE.CELLS], ACC)
        for first in range(0, sizes.channels, TILE.CHANNELS):
            tile = load_cells(sums, None, None, first, cell, sizes, LAYOUT, TILE, ACC)
            if OPTIONS.SEQUENTIAL:
                c = first + tl.arange(0, TILE.CHANNELS)
                tile *= tl.load(rows.g_c + c, mask=c < sizes.channels, other=0.0)[:, None]
            total += tile
        # [CELLS]
        ij = cell + tl.arange(0, TILE.CELLS)
        store_spatial_tokens(total, ij, rows, sizes, ACC)


@triton.jit
def spatial_gates(block, rows, a, b, heads, lattice, TILE: tl.constexpr):
    """o_s and g_s of all cells; ``block`` numbers the nodes of one step."""
    for first in range(0, lattice.nodes, TILE.NODES):
        # [NODES], which may be another length than CELLS
        i = first + block
        node = tl.where(i < lattice.nodes, i, 0)
        o = transform(rows.u, node, a, b, heads, lattice)
        tl.store(rows.o_s + i, o, mask=i < lattice.nodes)
        tl.store(rows.g_s + i, sigmoid(o)[0], mask=i < lattice.nodes)


@triton.jit
def ring_of(sizes, ring_first, ring_count, OPTIONS: tl.constexpr):
    """The graph of the channel branch."""
    return Graph(sizes.channels, sizes.channels, ring_first, ring_count, True, OPTIONS.RING_LOOPS, False)


@triton.jit
def lattice_of(sizes, OPTIONS: tl.constexpr):
    """The graph of the spatial branch."""
    cells = sizes.grid_h * sizes.grid_w
    neighbors: tl.constexpr = 9 if OPTIONS.DIAGONAL else 5
    return Graph(cells, sizes.grid_w, 0, neighbors, False, OPTIONS.LATTICE_LOOPS, OPTIONS.DIAGONAL)


@triton.jit
def graph_of(
    n,
    sums,  # over the cells, or x if each cell is a pixel
    saved,
    gates,
    channel_weight,
    spatial_weight,
    sizes,
    ring_first,
    ring_count,
    OPTIONS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Tokens and pre-activations [z | o_c | u | o_s] of sample n, and its gates [g_c | g_s]."""
    cells = sizes.grid_h * sizes.grid_w
    sums += n * sizes.channels * cells
    rows = rows_of(n, saved, gates, sizes)
    ring = ring_of(sizes, ring_first, ring_count, OPTIONS)
    lattice = lattice_of(sizes, OPTIONS)
    # [NODES]
    block = tl.arange(0, TILE.NODES)

    a, b = collapse(channel_weight, TILE, ACC)
    heads = channel_weight.heads
    if TILE.WALK:
        walk_over_the_ring(sums, rows, a, b, heads, ring, sizes, OPTIONS, LAYOUT, TILE, ACC)
    else:
        channel_tokens(sums, rows, sizes, LAYOUT, TILE, ACC)
        tl.debug_barrier()
        for first in range(0, sizes.channels, TILE.NODES):
            channel_gate(first + block, rows, a, b, heads, ring)
        tl.debug_barrier()
        spatial_tokens(sums, rows, sizes, OPTIONS, LAYOUT, TILE, ACC)
    tl.debug_barrier()

    a, b = collapse(spatial_weight, TILE, ACC)
    spatial_gates(block, rows, a, b, heads, lattice, TILE)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph(
    sums,  # over the cells, or x if each cell is a pixel
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
    OPTIONS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is a sample."""
    n = tl.program_id(0).to(tl.int64)
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    channel = Weight(channel_weight, channel_row, channel_column, heads, head_width)
    spatial = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
    graph_of(
        n, sums, saved, gates, channel, spatial, sizes, ring_first, ring_count, OPTIONS, LAYOUT, TILE, ACC
    )  # fmt: skip
