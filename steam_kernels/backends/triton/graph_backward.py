"""The graph stage, backward: from the gradients of the gates to the shifts of dx and the partials of the weights.

One program processes a sample. Numbers that other nodes read go through global memory and a barrier, as in the forward
stage. The lattice comes first: in the sequential order the gradients of the channel gates depend on its shares.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, sizes_of
from .graph import lattice_of, load_cells, pixels_of, ring_of, rows_of
from .transform import collapse, sigmoid, transform_backward


class Gradients(NamedTuple):
    """The gradients of one sample: flows and shifts of the channels and of the cells, and (4, heads) partials.

    The partials are the terms of da and db of the ring, then of the lattice; ``partial`` points to the first row.
    """

    flow_c: Any
    flow_s: Any
    shift_c: Any
    shift_s: Any
    partial: Any


@triton.jit
def gradients_of(n, flows, shifts, partials, heads, sizes, TILE: tl.constexpr):
    """The gradients of sample n in ``flows`` and ``shifts``, rows of C + gh gw numbers, and ``partials``."""
    cells = sizes.grid_h * sizes.grid_w
    flow_c = flows + n * (sizes.channels + cells)
    flow_s = flow_c + sizes.channels
    shift_c = shifts + n * (sizes.channels + cells)
    shift_s = shift_c + sizes.channels
    # [HEADS]
    head = tl.arange(0, TILE.HEADS)
    partial = partials + n * 4 * heads + head
    return Gradients(flow_c, flow_s, shift_c, shift_s, partial)


@triton.jit
def lattice_flows(
    factor, dy, y, rows, gradients, sizes, SCALE: tl.constexpr, RING: tl.constexpr, LAYOUT: tl.constexpr,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g_s, and the flows of the cells. If RING and ONCE, shift_c receives the sums over the cells of the channels."""
    cells = sizes.grid_h * sizes.grid_w
    for cell in range(0, cells, TILE.CELLS):
        # [CELLS]
        ij = cell + tl.arange(0, TILE.CELLS)
        gate_s, slope_s = sigmoid(tl.load(rows.o_s + ij, mask=ij < cells, other=0.0))
        tl.store(rows.g_s + ij, gate_s, mask=ij < cells)
        # [CHANNELS, CELLS]
        total = tl.zeros([TILE.CHANNELS, TILE.CELLS], ACC)
        for first in range(0, sizes.channels, TILE.CHANNELS):
            tile = load_cells(factor, dy, y, first, cell, sizes, LAYOUT, TILE, ACC)
            # [CHANNELS]
            c = first + tl.arange(0, TILE.CHANNELS)
            gate_c, _ = sigmoid(tl.load(rows.o_c + c, mask=c < sizes.channels, other=0.0))
            total += tile * gate_c[:, None]
            if RING and TILE.ONCE:
                tl.store(
                    gradients.shift_c + c, tl.sum(tile * gate_s[None, :], 1) * SCALE, mask=c < sizes.channels
                )  # fmt: skip
        tl.store(gradients.flow_s + ij, tl.sum(total, 0) * SCALE * slope_s, mask=ij < cells)


@triton.jit
def lattice_shifts(block, rows, gradients, weight, lattice, sizes, TILE: tl.constexpr, ACC: tl.constexpr):
    """The shares of the cells, and the partials of the spatial weight; ``block`` numbers the nodes of one step."""
    a, b = collapse(weight, TILE, ACC)
    # [NODES, HEADS]
    da = tl.zeros([TILE.NODES, TILE.HEADS], ACC)
    db = tl.zeros([TILE.NODES, TILE.HEADS], ACC)
    for first in range(0, lattice.nodes, TILE.NODES):
        # [NODES]
        ij = first + block
        node = tl.where(ij < lattice.nodes, ij, 0)
        du, da_i, db_i = transform_backward(rows.u, gradients.flow_s, node, a, b, weight.heads, lattice)
        da += tl.where((ij < lattice.nodes)[:, None], da_i, 0.0)
        db += tl.where((ij < lattice.nodes)[:, None], db_i, 0.0)
        pixels = pixels_of(node, sizes).to(ACC)
        tl.store(gradients.shift_s + ij, du / (pixels * sizes.channels), mask=ij < lattice.nodes)
    head = tl.arange(0, TILE.HEADS)
    tl.store(gradients.partial + 2 * weight.heads, tl.sum(da, 0), mask=head < weight.heads)
    tl.store(gradients.partial + 3 * weight.heads, tl.sum(db, 0), mask=head < weight.heads)


@triton.jit
def ring_flows(
    sums, factor, dy, y, rows, gradients, sizes, SCALE: tl.constexpr, SEQUENTIAL: tl.constexpr, LAYOUT: tl.constexpr,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g_c, and the flows of the channels. If ONCE, shift_c already has the sums of the products."""
    cells = sizes.grid_h * sizes.grid_w
    for first in range(0, sizes.channels, TILE.CHANNELS):
        # [CHANNELS]
        c = first + tl.arange(0, TILE.CHANNELS)
        gate_c, slope_c = sigmoid(tl.load(rows.o_c + c, mask=c < sizes.channels, other=0.0))
        tl.store(rows.g_c + c, gate_c, mask=c < sizes.channels)
        # [CHANNELS, CELLS]
        total = tl.zeros([TILE.CHANNELS, TILE.CELLS], ACC)
        if SEQUENTIAL or not TILE.ONCE:
            for cell in range(0, cells, TILE.CELLS):
                # [CELLS]
                ij = cell + tl.arange(0, TILE.CELLS)
                if not TILE.ONCE:
                    tile = load_cells(factor, dy, y, first, cell, sizes, LAYOUT, TILE, ACC)
                    total += tile * (tl.load(rows.g_s + ij, mask=ij < cells, other=0.0) * SCALE)[None, :]
                if SEQUENTIAL:
                    tile = load_cells(sums, None, None, first, cell, sizes, LAYOUT, TILE, ACC)
                    total += tile * tl.load(gradients.shift_s + ij, mask=ij < cells, other=0.0)[None, :]
        # [CHANNELS]
        gradient = tl.sum(total, 1)
        if TILE.ONCE:
            gradient += tl.load(gradients.shift_c + c, mask=c < sizes.channels, other=0.0)
        tl.store(gradients.flow_c + c, gradient * slope_c, mask=c < sizes.channels)


@triton.jit
def ring_shifts(block, rows, gradients, weight, ring, sizes, TILE: tl.constexpr, ACC: tl.constexpr):
    """The shifts dz / (H W) of the channels, and the partials of the channel weight; ``block`` as above."""
    a, b = collapse(weight, TILE, ACC)
    # [NODES, HEADS]
    da = tl.zeros([TILE.NODES, TILE.HEADS], ACC)
    db = tl.zeros([TILE.NODES, TILE.HEADS], ACC)
    for first in range(0, ring.nodes, TILE.NODES):
        # [NODES]
        c = first + block
        node = tl.where(c < ring.nodes, c, 0)
        dz, da_i, db_i = transform_backward(rows.z, gradients.flow_c, node, a, b, weight.heads, ring)
        da += tl.where((c < ring.nodes)[:, None], da_i, 0.0)
        db += tl.where((c < ring.nodes)[:, None], db_i, 0.0)
        tl.store(gradients.shift_c + c, dz / sizes.area, mask=c < ring.nodes)
    head = tl.arange(0, TILE.HEADS)
    tl.store(gradients.partial, tl.sum(da, 0), mask=head < weight.heads)
    tl.store(gradients.partial + weight.heads, tl.sum(db, 0), mask=head < weight.heads)


@triton.jit
def graph_backward_of(
    n,
    sums,  # over the cells, or x if each cell is a pixel
    products,  # None: each cell is a pixel, and the products are computed from x and dy
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
    saved,
    gates,
    flows,
    shifts,
    partials,
    channel_weight,
    spatial_weight,
    sizes,
    ring_first,
    ring_count,
    SCALE: tl.constexpr,
    RING: tl.constexpr,
    OPTIONS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gates [g_c | g_s] of sample n, its shifts [dz / (H W) | du / (C n_cell)], and its partials of da and db.

    ``flows`` holds the gradients of the pre-activations, which other nodes read. Without RING, no gradient behind the
    channel gate is needed, and g_c, dz and the partials of the ring are not computed.
    """
    cells = sizes.grid_h * sizes.grid_w
    sample = n * sizes.channels * cells
    sums += sample
    if products is not None:
        factor = products + sample
        dy_n = None
        y_n = None
    else:
        factor = sums
        dy_n = dy + sample
        y_n = None
        if y is not None:
            y_n = y + sample
    rows = rows_of(n, saved, gates, sizes)
    gradients = gradients_of(n, flows, shifts, partials, channel_weight.heads, sizes, TILE)
    # [NODES]
    block = tl.arange(0, TILE.NODES)

    lattice_flows(factor, dy_n, y_n, rows, gradients, sizes, SCALE, RING, LAYOUT, TILE, ACC)
    tl.debug_barrier()
    lattice_shifts(block, rows, gradients, spatial_weight, lattice_of(sizes, OPTIONS), sizes, TILE, ACC)
    if RING:
        tl.debug_barrier()
        ring_flows(sums, factor, dy_n, y_n, rows, gradients, sizes, SCALE, OPTIONS.SEQUENTIAL, LAYOUT, TILE, ACC)
        tl.debug_barrier()
        ring = ring_of(sizes, ring_first, ring_count, OPTIONS)
        ring_shifts(block, rows, gradients, channel_weight, ring, sizes, TILE, ACC)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph_backward(
    sums,  # over the cells, or x if each cell is a pixel
    products,  # None: each cell is a pixel, and the products are computed from x and dy
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
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
    graph_backward_of(
        n, sums, products, dy, y, saved, gates, flows, shifts, partials, channel, spatial, sizes,
        ring_first, ring_count, SCALE, RING, OPTIONS, LAYOUT, TILE, ACC,
    )  # fmt: skip
