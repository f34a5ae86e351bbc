"""The graph stage, backward: from the gradients of the gates to the shifts of dx and the partials of the weights.

The steps are ``graph_backward_cells``, by blocks of channels, ``lattice_backward``, by samples, and
``graph_backward_ring``, by blocks of channels. The lattice comes before the ring: in the sequential order the gradients
of the channel gates depend on the shares of the cells.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, program_of, sizes_of
from .graph import (
    block_of,
    by_channel,
    halo_node,
    halo_sums,
    lattice_of,
    load_cells,
    pixels_of,
    ring_of,
    rows_of,
    sum_of_cells,
    sum_of_channels,
    sums_of_blocks,
)
from .transform import collapse, sigmoid, transform_backward


class Gradients(NamedTuple):
    """The gradients of one sample, of the channels and of the cells.

    ``dg_c`` is the part of the gradients of the channel gates that comes from the products. The flow of a channel needs
    the shares in the sequential order, and is in the windows of its block and of the neighbouring blocks alone.
    """

    dg_c: Any
    flow_s: Any
    shift_c: Any
    shift_s: Any


@triton.jit
def gradients_of(n, flows, shifts, sizes):
    """The gradients of sample n in ``flows`` and ``shifts``, rows of C + gh gw numbers."""
    at = n * (sizes.channels + sizes.grid_h * sizes.grid_w)
    return Gradients(flows + at, flows + at + sizes.channels, shifts + at, shifts + at + sizes.channels)


@triton.jit
def store_partial(partial, da, db, heads, TILE: tl.constexpr):
    """Stores a row of (2, heads) terms of da and db, from (NODES, HEADS) terms."""
    # [HEADS]
    head = tl.arange(0, TILE.HEADS)
    tl.store(partial + head, tl.sum(da, 0), mask=head < heads)
    tl.store(partial + heads + head, tl.sum(db, 0), mask=head < heads)


# ---- the three steps -------------------------------------------------------------------------------------------------


@triton.jit
def weigh(
    cell, products, dy, y, block_first, gate_c,
    rows, partial, sizes,
    RING: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the sums over a block of channels of g_c R, for CELLS cells from ``cell``; returns the tile of g_s R."""
    cells = sizes.grid_h * sizes.grid_w
    # [CELLS]
    ij = cell + tl.arange(0, TILE.CELLS)
    # [GROUPS, CELLS, LANES]
    tile = load_cells(products, dy, y, block_first, cell, sizes, LAYOUT, TILE, ACC)
    tl.store(partial + ij, sum_of_channels(tile * by_channel(gate_c, TILE)), mask=ij < cells)
    if RING:
        gate_s, _ = sigmoid(tl.load(rows.o_s + ij, mask=ij < cells, other=0.0))
        tile *= gate_s[None, :, None]
    return tile


@triton.jit
def share_of_cells(
    cell, sums, shift_s, block_first, sizes, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr
):
    """The tile of sums times the shares of the cells, for CELLS cells from ``cell``."""
    # [1, CELLS, 1]
    ij = cell + tl.arange(0, TILE.CELLS)[None, :, None]
    # [GROUPS, CELLS, LANES]
    tile = load_cells(sums, None, None, block_first, cell, sizes, LAYOUT, TILE, ACC)
    return tile * tl.load(shift_s + ij, mask=ij < sizes.grid_h * sizes.grid_w, other=0.0)


@triton.jit
def cells_of(
    n, b,
    products,  # or x if each cell is a pixel
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
    saved, gates, flows, partials, sizes,
    SCALE: tl.constexpr, RING: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums over block b of the channels of sample n, of g_c R. If RING, also g_c and dg_c of the block."""
    cells = sizes.grid_h * sizes.grid_w
    products += n * sizes.channels * cells
    if dy is not None:
        dy += n * sizes.channels * cells
    if y is not None:
        y += n * sizes.channels * cells
    rows = rows_of(n, saved, gates, sizes)
    partial = partials + (n * tl.cdiv(sizes.channels, TILE.CHANNELS) + b) * cells
    # [CHANNELS]
    c = b * TILE.CHANNELS + tl.arange(0, TILE.CHANNELS)
    gate_c, _ = sigmoid(tl.load(rows.o_c + c, mask=c < sizes.channels, other=0.0))
    first = b * TILE.CHANNELS
    # [GROUPS, CELLS, LANES]
    total = weigh(0, products, dy, y, first, gate_c, rows, partial, sizes, RING, LAYOUT, TILE, ACC)
    if not TILE.ONCE:
        for cell in range(TILE.CELLS, cells, TILE.CELLS):
            total += weigh(cell, products, dy, y, first, gate_c, rows, partial, sizes, RING, LAYOUT, TILE, ACC)
    if RING:
        dg_c = flows + n * (sizes.channels + cells)
        tl.store(rows.g_c + c, gate_c, mask=c < sizes.channels)
        tl.store(dg_c + c, sum_of_cells(total, TILE) * SCALE, mask=c < sizes.channels)


@triton.jit
def lattice_backward_of(
    n, saved, gates, flows, shifts,
    partials,  # of the blocks of channels
    partials_s, weight, sizes,
    SCALE: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g_s and the shares du / (C n_cell) of sample n, and its terms of the gradient of the spatial weight."""
    cells = sizes.grid_h * sizes.grid_w
    rows = rows_of(n, saved, gates, sizes)
    gradients = gradients_of(n, flows, shifts, sizes)
    blocks = tl.cdiv(sizes.channels, TILE.CHANNELS)
    for cell in range(0, cells, TILE.CELLS):
        # [CELLS]
        ij = cell + tl.arange(0, TILE.CELLS)
        total = sums_of_blocks(partials + n * blocks * cells, cell, blocks, sizes, TILE, ACC)
        gate_s, slope_s = sigmoid(tl.load(rows.o_s + ij, mask=ij < cells, other=0.0))
        tl.store(rows.g_s + ij, gate_s, mask=ij < cells)
        tl.store(gradients.flow_s + ij, total * SCALE * slope_s, mask=ij < cells)
    tl.debug_barrier()

    score, value = collapse(weight, TILE, ACC)
    lattice = lattice_of(sizes, OPTIONS)
    # [NODES, HEADS]
    da = tl.zeros([TILE.NODES, TILE.HEADS], ACC)
    db = tl.zeros([TILE.NODES, TILE.HEADS], ACC)
    for first in range(0, cells, TILE.NODES):
        # [NODES], which may be another length than CELLS
        i = first + tl.arange(0, TILE.NODES)
        node = tl.where(i < cells, i, 0)
        du, da_i, db_i = transform_backward(rows.u, gradients.flow_s, node, score, value, weight.heads, lattice)
        da += tl.where((i < cells)[:, None], da_i, 0.0)
        db += tl.where((i < cells)[:, None], db_i, 0.0)
        tl.store(gradients.shift_s + i, du / (pixels_of(node, sizes).to(ACC) * sizes.channels), mask=i < cells)
    store_partial(partials_s + n * 2 * weight.heads, da, db, weight.heads, TILE)


@triton.jit
def ring_backward_of(
    n, b,
    sums,  # over the cells, or x if each cell is a pixel; None in the parallel order
    saved, flows, shifts, windows, partials_c, weight, sizes, ring_first, ring_count,
    OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The shifts dz / (H W) of block b of the channels of sample n, and its terms of the channel weight's gradient.

    The transform of a node needs the flows of its neighbours and the tokens of their neighbours. ``windows`` are two
    rows of CHANNELS + 4 x reach numbers for each block, flows and tokens, in which a channel has the same place.
    """
    cells = sizes.grid_h * sizes.grid_w
    rows = rows_of(n, saved, saved, sizes)  # The gates are not read.
    gradients = gradients_of(n, flows, shifts, sizes)
    near = block_of(b, sizes, ring_first, ring_count, 1, OPTIONS, TILE)
    block = block_of(b, sizes, ring_first, ring_count, 2, OPTIONS, TILE)
    place = n * tl.cdiv(sizes.channels, TILE.CHANNELS) + b
    length = TILE.CHANNELS + 4 * block.reach
    flow = windows + place * 2 * length
    token = flow + length
    # [CHANNELS]
    i = tl.arange(0, TILE.CHANNELS)
    inside = i < block.own
    c = block.first + i

    gradient = tl.load(gradients.dg_c + c, mask=inside, other=0.0)
    if OPTIONS.SEQUENTIAL:
        sums += n * sizes.channels * cells
        # [GROUPS, CELLS, LANES]
        total = share_of_cells(0, sums, gradients.shift_s, block.first, sizes, LAYOUT, TILE, ACC)
        if not TILE.ONCE:
            for cell in range(TILE.CELLS, cells, TILE.CELLS):
                total += share_of_cells(cell, sums, gradients.shift_s, block.first, sizes, LAYOUT, TILE, ACC)
        # [CHANNELS]
        gradient += sum_of_cells(total, TILE)
    _, slope_c = sigmoid(tl.load(rows.o_c + c, mask=inside, other=0.0))
    tl.store(flow + block.halo + i, gradient * slope_c, mask=inside)
    for first in range(0, 2 * near.halo, TILE.HALO):
        # [HALO]
        h = first + tl.arange(0, TILE.HALO)
        node, c_h = halo_node(h, near, sizes.channels)
        exists = h < 2 * near.halo
        gradient_h = tl.load(gradients.dg_c + c_h, mask=exists, other=0.0)
        if OPTIONS.SEQUENTIAL:
            gradient_h += halo_sums(sums, gradients.shift_s, c_h, exists, sizes, LAYOUT, TILE, ACC)
        gate_h = sigmoid(tl.load(rows.o_c + c_h, mask=exists, other=0.0))
        tl.store(flow + block.halo - near.halo + node, gradient_h * gate_h[1], mask=exists)
    tl.store(token + block.halo + i, tl.load(rows.z + c, mask=inside, other=0.0), mask=inside)
    for first in range(0, 2 * block.halo, TILE.CHANNELS):
        # [CHANNELS]
        h = first + i
        node, c_h = halo_node(h, block, sizes.channels)
        exists = h < 2 * block.halo
        tl.store(token + node, tl.load(rows.z + c_h, mask=exists, other=0.0), mask=exists)
    tl.debug_barrier()

    score, value = collapse(weight, TILE, ACC)
    ring = ring_of(block, ring_first, ring_count, OPTIONS)
    # [CHANNELS]
    node = tl.where(inside, block.halo + i, block.halo)
    dz, da, db = transform_backward(token, flow, node, score, value, weight.heads, ring)
    tl.store(gradients.shift_c + c, dz / sizes.area, mask=inside)
    # [CHANNELS, HEADS]
    da = tl.where(inside[:, None], da, 0.0)
    db = tl.where(inside[:, None], db, 0.0)
    store_partial(partials_c + place * 2 * weight.heads, da, db, weight.heads, TILE)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph_backward_cells(
    products,  # or x if each cell is a pixel
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
    saved, gates, flows, partials,
    channels, area, width, grid_h, grid_w,
    SCALE: tl.constexpr, RING: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is a block of channels of a sample."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, b = program_of(tl.cdiv(sizes.channels, TILE.CHANNELS))
    cells_of(n, b, products, dy, y, saved, gates, flows, partials, sizes, SCALE, RING, LAYOUT, TILE, ACC)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def lattice_backward(
    saved, gates, flows, shifts, partials, partials_s,
    spatial_weight, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width,
    SCALE: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is the cells of a sample."""
    n = tl.program_id(0).to(tl.int64)
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    weight = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
    lattice_backward_of(
        n, saved, gates, flows, shifts, partials, partials_s, weight, sizes, SCALE, OPTIONS, TILE, ACC
    )  # fmt: skip


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph_backward_ring(
    sums,  # over the cells, or x if each cell is a pixel; None in the parallel order
    saved, flows, shifts, windows, partials_c,
    channel_weight, channel_row, channel_column,
    channels, area, width, grid_h, grid_w, heads, head_width, ring_first, ring_count,
    OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is a block of channels of a sample."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, b = program_of(tl.cdiv(sizes.channels, TILE.CHANNELS))
    weight = Weight(channel_weight, channel_row, channel_column, heads, head_width)
    ring_backward_of(
        n, b, sums, saved, flows, shifts, windows, partials_c, weight, sizes, ring_first, ring_count,
        OPTIONS, LAYOUT, TILE, ACC,
    )  # fmt: skip
