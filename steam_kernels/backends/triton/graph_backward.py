"""The graph stage, backward: from the gradients of the gates to the shifts of dx and the partials of the weights.

The steps are ``graph_backward_cells``, by blocks of channels, the lattice, and ``graph_backward_ring``, by blocks of
channels. The lattice comes before the ring: in the sequential order the gradients of the channel gates depend on the
shares of the cells. It is a part of each program of the ring, or ``lattice_backward``, by samples.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, program_of, sizes_of, weights_of
from .graph import (
    block_of,
    by_channel,
    halo_node,
    halo_sums,
    lattice_of,
    load_cells,
    partials_of,
    pixels_of,
    ring_of,
    rows_of,
    store_around,
    sum_of_cells,
    sum_of_channels,
    sums_of_blocks,
)
from .transform import Graph, collapse, sigmoid, store_jacobian, transform_backward


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
    """Stores a row of (2, heads) terms of da and db, from (HEADS, NODES) terms."""
    # [HEADS]
    head = tl.arange(0, TILE.HEADS)
    tl.store(partial + head, tl.sum(da, 1), mask=head < heads)
    tl.store(partial + heads + head, tl.sum(db, 1), mask=head < heads)


@triton.jit
def store_terms(terms, da, db, node, inside, heads, nodes, TILE: tl.constexpr):
    """Stores the derivatives by a and by b of each head, (HEADS, NODES) each, as rows of ``nodes`` numbers."""
    # [HEADS, 1] and [HEADS, NODES]
    head = tl.arange(0, TILE.HEADS)[:, None]
    at = terms + head * nodes + node[None, :]
    known = inside[None, :] & (head < heads)
    tl.store(at, da, mask=known)
    tl.store(at + heads * nodes, db, mask=known)


@triton.jit
def load_terms(terms, flow, node, inside, heads, nodes, TILE: tl.constexpr):
    """The terms of da and db, (HEADS, NODES) each: the derivatives that ``store_terms`` has stored times the flows."""
    # [HEADS, 1] and [HEADS, NODES]
    head = tl.arange(0, TILE.HEADS)[:, None]
    at = terms + head * nodes + node[None, :]
    known = inside[None, :] & (head < heads)
    da = tl.load(at, mask=known, other=0.0)
    return da * flow[None, :], tl.load(at + heads * nodes, mask=known, other=0.0) * flow[None, :]


@triton.jit
def whole_ring(sizes, ring_first, ring_count, OPTIONS: tl.constexpr):
    """The graph of the channel branch."""
    return Graph(sizes.channels, sizes.channels, ring_first, ring_count, True, True, OPTIONS.RING_LOOPS, False)


@triton.jit
def jacobian_of(n, jacobians, heads, graph):
    """The rows of sample n in ``jacobians``, and behind them the rows of derivatives by a and by b of each head."""
    jacobian = jacobians + n * graph.nodes * (graph.neighbors + 1 + 2 * heads)
    return jacobian, jacobian + (graph.neighbors + 1) * graph.nodes


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
    saved, gates, flows, jacobians, partials, weight, sizes, ring_first, ring_count,
    SCALE: tl.constexpr, RING: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The sums over block b of the channels of sample n, of g_c R. If RING, also its g_c, dg_c and derivatives.

    The derivatives of the ring's transform depend on tokens alone. So they are computed here, where the tokens of all
    channels are known, and not behind a barrier of ``ring_backward_of``.
    """
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
        inside = c < sizes.channels
        tl.store(rows.g_c + c, gate_c, mask=inside)
        tl.store(dg_c + c, sum_of_cells(total, TILE) * SCALE, mask=inside)
        score, value = collapse(weight, TILE, ACC)
        ring = whole_ring(sizes, ring_first, ring_count, OPTIONS)
        jacobian, terms = jacobian_of(n, jacobians, weight.heads, ring)
        node = tl.where(inside, c, 0)
        da, db = store_jacobian(rows.z, jacobian, node, inside, score, value, weight.heads, ring)
        store_terms(terms, da, db, c, inside, weight.heads, ring.nodes, TILE)


@triton.jit
def lattice_jacobian(
    n, saved, gates, jacobians, weight, sizes, OPTIONS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """g_s of sample n, and the derivatives of the lattice's transform, which depend on tokens alone."""
    cells = sizes.grid_h * sizes.grid_w
    rows = rows_of(n, saved, gates, sizes)
    score, value = collapse(weight, TILE, ACC)
    lattice = lattice_of(sizes, OPTIONS)
    jacobian, terms = jacobian_of(n, jacobians, weight.heads, lattice)
    for first in range(0, cells, TILE.NODES):
        # [NODES]
        i = first + tl.arange(0, TILE.NODES)
        inside = i < cells
        tl.store(rows.g_s + i, sigmoid(tl.load(rows.o_s + i, mask=inside, other=0.0))[0], mask=inside)
        node = tl.where(inside, i, 0)
        da, db = store_jacobian(rows.u, jacobian, node, inside, score, value, weight.heads, lattice)
        store_terms(terms, da, db, i, inside, weight.heads, lattice.nodes, TILE)


@triton.jit
def lattice_shares(
    n, keep,
    flow, share,  # of the sample
    kept,  # None: the shares are kept
    saved, jacobians, partials, partials_s, sizes, heads,
    SCALE: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The shares du / (C n_cell) of sample n, from the sums of its blocks of channels.

    If ``keep``, also its terms of the gradient of the spatial weight, and the shares in ``kept``.
    """
    cells = sizes.grid_h * sizes.grid_w
    rows = rows_of(n, saved, saved, sizes)  # The gates are not read.
    lattice = lattice_of(sizes, OPTIONS)
    jacobian, terms = jacobian_of(n, jacobians, heads, lattice)
    partials = partials_of(n, partials, sizes, TILE)
    for first in range(0, cells, TILE.NODES):
        # [NODES]
        i = first + tl.arange(0, TILE.NODES)
        total = sums_of_blocks(partials, i, sizes, TILE, ACC)
        _, slope_s = sigmoid(tl.load(rows.o_s + i, mask=i < cells, other=0.0))
        tl.store(flow + i, total * SCALE * slope_s, mask=i < cells)
    tl.debug_barrier()

    for first in range(0, cells, TILE.NODES):
        # [NODES]
        i = first + tl.arange(0, TILE.NODES)
        node = tl.where(i < cells, i, 0)
        du = transform_backward(jacobian, node, lattice, flow, node, lattice)
        du /= pixels_of(node, sizes).to(ACC) * sizes.channels
        tl.store(share + i, du, mask=i < cells)
        if kept is not None:  # noqa: SIM102 - the compiler decides this condition
            if keep:
                tl.store(kept + i, du, mask=i < cells)
    if keep:
        # [HEADS, NODES]
        da = tl.zeros([TILE.HEADS, TILE.NODES], ACC)
        db = tl.zeros([TILE.HEADS, TILE.NODES], ACC)
        for first in range(0, cells, TILE.NODES):
            # [NODES]
            i = first + tl.arange(0, TILE.NODES)
            of_node = tl.load(flow + i, mask=i < cells, other=0.0)
            da_i, db_i = load_terms(terms, of_node, i, i < cells, heads, cells, TILE)
            da += da_i
            db += db_i
        store_partial(partials_s + n * 2 * heads, da, db, heads, TILE)


@triton.jit
def ring_backward_of(
    n, b,
    sums,  # over the cells, or x if each cell is a pixel; None in the parallel order
    share,  # of the cells of the sample
    saved, flows, shifts, jacobians, windows, partials_c, sizes, heads, ring_first, ring_count,
    OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The shifts dz / (H W) of block b of the channels of sample n, and its terms of the channel weight's gradient.

    A node needs the flows of its neighbours. ``windows`` are rows of CHANNELS + 2 x reach flows, one for each block.
    """
    cells = sizes.grid_h * sizes.grid_w
    rows = rows_of(n, saved, saved, sizes)  # The gates are not read.
    gradients = gradients_of(n, flows, shifts, sizes)
    block = block_of(b, sizes, ring_first, ring_count, OPTIONS, TILE)
    place = n * tl.cdiv(sizes.channels, TILE.CHANNELS) + b
    window = windows + place * (TILE.CHANNELS + 2 * block.halo)
    # [CHANNELS]
    i = tl.arange(0, TILE.CHANNELS)
    inside = i < block.own
    c = block.first + i

    gradient = tl.load(gradients.dg_c + c, mask=inside, other=0.0)
    if OPTIONS.SEQUENTIAL:
        sums += n * sizes.channels * cells
        # [GROUPS, CELLS, LANES]
        total = share_of_cells(0, sums, share, block.first, sizes, LAYOUT, TILE, ACC)
        if not TILE.ONCE:
            for cell in range(TILE.CELLS, cells, TILE.CELLS):
                total += share_of_cells(cell, sums, share, block.first, sizes, LAYOUT, TILE, ACC)
        # [CHANNELS]
        gradient += sum_of_cells(total, TILE)
    _, slope_c = sigmoid(tl.load(rows.o_c + c, mask=inside, other=0.0))
    flow = gradient * slope_c
    tl.store(window + block.halo + i, flow, mask=inside)
    store_around(window, flow, i, block)
    for first in range(0, block.beside, TILE.HALO):
        # [HALO]
        h = first + tl.arange(0, TILE.HALO)
        node, c_h = halo_node(h, block, sizes.channels)
        exists = h < block.beside
        gradient_h = tl.load(gradients.dg_c + c_h, mask=exists, other=0.0)
        if OPTIONS.SEQUENTIAL:
            gradient_h += halo_sums(sums, share, c_h, exists, sizes, LAYOUT, TILE, ACC)
        gate_h = sigmoid(tl.load(rows.o_c + c_h, mask=exists, other=0.0))
        tl.store(window + node, gradient_h * gate_h[1], mask=exists)
    whole = whole_ring(sizes, ring_first, ring_count, OPTIONS)
    jacobian, terms = jacobian_of(n, jacobians, heads, whole)
    da, db = load_terms(terms, flow, c, inside, heads, whole.nodes, TILE)
    store_partial(partials_c + place * 2 * heads, da, db, heads, TILE)
    tl.debug_barrier()

    ring = ring_of(block, ring_first, ring_count, OPTIONS)
    # [CHANNELS]
    node = tl.where(inside, block.halo + i, block.halo)
    channel = tl.where(inside, c, block.first)
    dz = transform_backward(jacobian, channel, whole, window, node, ring)
    tl.store(gradients.shift_c + c, dz / sizes.area, mask=inside)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph_backward_cells(
    products,  # or x if each cell is a pixel
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
    saved, gates, flows,
    jacobian_c,  # None: not RING
    jacobian_s,  # None: another launch computes it
    partials,
    channel_weight, spatial_weight, channel_row, channel_column, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width, ring_first, ring_count,
    SCALE: tl.constexpr, RING: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program is a block of channels of a sample. With ``jacobian_s``, one more for each sample is its cells."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    channel, spatial = weights_of(
        channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column, heads, head_width
    )  # fmt: skip
    blocks = tl.cdiv(sizes.channels, TILE.CHANNELS)
    n, b = program_of(blocks if jacobian_s is None else blocks + 1)
    if jacobian_s is None or b < blocks:
        cells_of(
            n, b, products, dy, y, saved, gates, flows, jacobian_c, partials, channel, sizes, ring_first, ring_count,
            SCALE, RING, OPTIONS, LAYOUT, TILE, ACC,
        )  # fmt: skip
    else:
        lattice_jacobian(n, saved, gates, jacobian_s, spatial, sizes, OPTIONS, TILE, ACC)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def lattice_backward(
    saved, gates, flows, shifts, jacobians, partials, partials_s,
    spatial_weight, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width,
    SCALE: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is the cells of a sample."""
    n = tl.program_id(0).to(tl.int64)
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    weight = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
    lattice_jacobian(n, saved, gates, jacobians, weight, sizes, OPTIONS, TILE, ACC)
    tl.debug_barrier()
    of = gradients_of(n, flows, shifts, sizes)
    lattice_shares(
        n, True, of.flow_s, of.shift_s, None, saved, jacobians, partials, partials_s, sizes, heads,
        SCALE, OPTIONS, TILE, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph_backward_ring(
    sums,  # over the cells, or x if each cell is a pixel; None in the parallel order
    saved, flows, shifts, jacobian_c,
    jacobian_s,  # None: the lattice had a launch of its own
    vectors, windows, partials, partials_c, partials_s,
    channels, area, width, grid_h, grid_w, heads, ring_first, ring_count,
    SCALE: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is a block of channels of a sample. With ``jacobian_s``, it first computes the shares of its sample.

    The programs of a sample all compute the same shares, in rows of ``vectors``, [flows | shares]. The first one keeps
    them.
    """
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, b = program_of(tl.cdiv(sizes.channels, TILE.CHANNELS))
    of = gradients_of(n, flows, shifts, sizes)
    share = of.shift_s
    if jacobian_s is not None:
        cells = sizes.grid_h * sizes.grid_w
        flow = vectors + tl.program_id(0).to(tl.int64) * 2 * cells
        share = flow + cells
        lattice_shares(
            n, b == 0, flow, share, of.shift_s, saved, jacobian_s, partials, partials_s, sizes, heads,
            SCALE, OPTIONS, TILE, ACC,
        )  # fmt: skip
        tl.debug_barrier()
    ring_backward_of(
        n, b, sums, share, saved, flows, shifts, jacobian_c, windows, partials_c, sizes, heads, ring_first, ring_count,
        OPTIONS, LAYOUT, TILE, ACC,
    )  # fmt: skip
