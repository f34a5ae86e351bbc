"""The graph stage, forward: from sums over cells to tokens, pre-activations and gates.

``graph`` processes a block of channels of a sample, and ``lattice`` the cells of a sample, if the gate stage does not
compute them. A token that other nodes of the program read is written to global memory and read again after a barrier,
so the number of nodes has no limit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, program_of, sizes_of
from .pool import cell_begin, upstream
from .transform import Graph, collapse, sigmoid, transform


class Rows(NamedTuple):
    """The vectors of one sample: tokens, pre-activations and gates of the channels and of the cells."""

    z: Any
    o_c: Any
    u: Any
    o_s: Any
    g_c: Any
    g_s: Any


class Block(NamedTuple):
    """A block of channels of a sample, and the halo of channels on either side that its program also needs.

    ``first`` is the first channel, ``own`` is the number of channels, and ``halo`` is the number of channels on each
    side, the distance of the farthest neighbour on the ring. ``beside`` is the number of these channels that are in
    other blocks: a block of all channels is its own halo.
    """

    first: Any
    own: Any
    halo: Any
    beside: Any


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


# ---- blocks of channels, and windows of the ring ---------------------------------------------------------------------


@triton.jit
def block_of(b, sizes, ring_first, ring_count, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Block b of the channels, with a halo of the reach of the ring."""
    first = b * TILE.CHANNELS
    last = ring_first + ring_count
    if OPTIONS.RING_LOOPS:
        last -= 1
    reach = tl.maximum(-ring_first, last)
    beside = tl.where(sizes.channels > TILE.CHANNELS, 2 * reach, 0)
    return Block(first, tl.minimum(TILE.CHANNELS, sizes.channels - first), reach, beside)


@triton.jit
def ring_of(block, ring_first, ring_count, OPTIONS: tl.constexpr):
    """The graph of the channel branch in a window: the left halo, the block and the right halo are one row of nodes.

    The neighbours of the block's own nodes never wrap.
    """
    nodes = block.own + 2 * block.halo
    return Graph(nodes, nodes, ring_first, ring_count, True, False, OPTIONS.RING_LOOPS, False)


@triton.jit
def store_around(window, numbers, i, block):
    """Stores the halo of a block of all channels: its first and last channels, once more at the other end."""
    if block.beside == 0:
        last = (i >= block.own - block.halo) & (i < block.own)
        tl.store(window + block.halo + i - block.own, numbers, mask=last)
        tl.store(window + block.halo + i + block.own, numbers, mask=i < block.halo)


@triton.jit
def halo_node(h, block, channels):
    """For number h of the 2 x halo channels beside a block: its node in the window, and its channel."""
    left = h < block.halo
    node = tl.where(left, h, h + block.own)
    # The distance is compared before it is added to a channel, so that the sum stays below 2^31.
    after = h - block.halo
    right = tl.where(
        after >= channels - block.first - block.own,
        after - (channels - block.first - block.own),
        block.first + block.own + after,
    )
    before = block.first + after
    return node, tl.where(left, tl.where(before < 0, before + channels, before), right)


@triton.jit
def length_of(sizes, TILE: tl.constexpr):
    """The numbers of a channel in memory: its pixels if the program pools them, else its sums."""
    if TILE.ROWS > 0:
        return sizes.area
    else:
        return sizes.grid_h * sizes.grid_w


@triton.jit
def place_of(ij, pixel: tl.constexpr, sizes, TILE: tl.constexpr):
    """The place of cells ij in their channel, or of one pixel of each cell if the program pools them."""
    if TILE.ROWS > 0:
        i = ij // sizes.grid_w
        row = i * TILE.ROWS + pixel // TILE.COLUMNS
        column = (ij - i * sizes.grid_w) * TILE.COLUMNS + pixel % TILE.COLUMNS
        return row * sizes.width + column
    else:
        return ij


@triton.jit
def load_run(
    x,
    dy,  # None: only x
    y, first_channel, sizes,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A run of memory that holds CHANNELS channels; 0 beyond the last. With dy, the products x dy.

    If the program pools, the pixels of a cell in one row of the map are added up: neighbours in the registers of a
    thread. The run then has ROWS numbers for each cell.
    """
    length = length_of(sizes, TILE)
    # [RUN]
    flat = tl.arange(0, TILE.RUN)
    start = length.to(tl.int64) * first_channel
    read = (flat < TILE.CHANNELS * length) & (flat < sizes.channels.to(tl.int64) * length - start)
    run = tl.load(x + start + flat, mask=read, other=0.0)
    if dy is not None:
        run = run.to(ACC) * upstream(dy, y, start + flat, read, ACC)
    if TILE.COLUMNS > 1:
        # [RUN // COLUMNS]
        run = tl.sum(tl.reshape(run.to(ACC), [TILE.RUN // TILE.COLUMNS, TILE.COLUMNS]), 1)
    return run


@triton.jit
def sort_run(run, row: tl.constexpr, member, ij, sizes, TILE: tl.constexpr, ACC: tl.constexpr):
    """The (GROUPS, CELLS, LANES) tile of a run: its number for each cell, or for one row of pixels of each cell."""
    cells = sizes.grid_h * sizes.grid_w
    if TILE.ROWS > 1:
        i = ij // sizes.grid_w
        place = tl.where(ij < cells, ij + (i * (TILE.ROWS - 1) + row) * sizes.grid_w, 0)
        index = member * (cells * TILE.ROWS) + place
    else:
        # A place beyond the last cell of a channel is in the run too, in the next channel.
        index = member * cells + ij
    # [GROUPS * CELLS * LANES]
    tile = tl.gather(run, tl.reshape(index, [TILE.CHANNELS * TILE.CELLS]), 0)
    # [GROUPS, CELLS, LANES]: the run is 0 beyond the last channel
    tile = tl.reshape(tile, [TILE.CHANNELS // TILE.LANES, TILE.CELLS, TILE.LANES])
    return tl.where(ij < cells, tile.to(ACC), 0.0)


@triton.jit
def load_pixel(
    x,
    dy,  # None: only x
    y, pixel: tl.constexpr, c, ij, inside, sizes,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of cells ij of channels c, or one pixel of each, 0 outside. With dy, the products x dy."""
    place = place_of(ij, pixel, sizes, TILE).to(tl.int64)
    if LAYOUT.CHANNELS_LAST:
        offset = place * sizes.channels + c
    else:
        offset = c.to(tl.int64) * length_of(sizes, TILE) + place
    tile = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
    if dy is not None:
        tile *= upstream(dy, y, offset, inside, ACC)
    return tile


@triton.jit
def load_pixels(
    x,
    dy,  # None: only x
    y, c, ij, inside, sizes,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of cells ij of channels c, 0 outside; added up from their pixels if the program pools."""
    tile = load_pixel(x, dy, y, 0, c, ij, inside, sizes, LAYOUT, TILE, ACC)
    if TILE.ROWS > 0:
        for pixel in tl.static_range(1, TILE.ROWS * TILE.COLUMNS):
            tile += load_pixel(x, dy, y, pixel, c, ij, inside, sizes, LAYOUT, TILE, ACC)
    return tile


@triton.jit
def load_cells(
    x,
    dy,  # None: only the sums of x
    y, first_channel, first_cell, sizes,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the sums of a sample, 0 outside. With dy, where each cell is a pixel, of x dy.

    The tile is (GROUPS, CELLS, LANES), and its channels are in groups of LANES. RUN is the length of a run of memory
    that holds CHANNELS rows of all cells, or of all their pixels, and is sorted on the chip.
    """
    GROUPS: tl.constexpr = TILE.CHANNELS // TILE.LANES
    # [GROUPS, 1, LANES] and [1, CELLS, 1]
    member = tl.arange(0, GROUPS)[:, None, None] * TILE.LANES + tl.arange(0, TILE.LANES)[None, None, :]
    ij = first_cell + tl.arange(0, TILE.CELLS)[None, :, None]
    # [GROUPS, CELLS, LANES]
    if TILE.RUN > 0:
        run = load_run(x, dy, y, first_channel, sizes, TILE, ACC)
        tile = sort_run(run, 0, member, ij, sizes, TILE, ACC)
        if TILE.ROWS > 1:
            for row in tl.static_range(1, TILE.ROWS):
                tile += sort_run(run, row, member, ij, sizes, TILE, ACC)
    else:
        c = first_channel + member
        inside = (ij < sizes.grid_h * sizes.grid_w) & (c < sizes.channels)
        tile = load_pixels(x, dy, y, c, ij, inside, sizes, LAYOUT, TILE, ACC)
    return tile


@triton.jit
def sum_of_cells(tile, TILE: tl.constexpr):
    """The sums of a tile over its cells, (CHANNELS,)."""
    return tl.reshape(tl.sum(tile, 1), [TILE.CHANNELS])


@triton.jit
def sum_of_channels(tile):
    """The sums of a tile over its channels, (CELLS,)."""
    return tl.sum(tl.sum(tile, 0), 1)


@triton.jit
def by_channel(numbers, TILE: tl.constexpr):
    """(CHANNELS,) numbers in the shape of a tile, (GROUPS, 1, LANES)."""
    return tl.reshape(numbers, [TILE.CHANNELS // TILE.LANES, 1, TILE.LANES])


@triton.jit
def load_halo(
    cell, sums,
    factor,  # None: 1 for each cell
    c, inside, sizes,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The (CELLS, HALO) tile of the sums of channels c, each cell times its ``factor``, from ``cell`` on."""
    # [CELLS, 1]
    ij = cell + tl.arange(0, TILE.CELLS)[:, None]
    exists = ij < sizes.grid_h * sizes.grid_w
    # [CELLS, HALO]
    tile = load_pixels(sums, None, None, c[None, :], ij, exists & inside[None, :], sizes, LAYOUT, TILE, ACC)
    if factor is not None:
        tile *= tl.load(factor + ij, mask=exists, other=0.0)
    return tile


@triton.jit
def halo_sums(
    sums,
    factor,  # None: 1 for each cell
    c, inside, sizes,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of channels c, each cell times its ``factor``, added up over the cells; (HALO,)."""
    # [CELLS, HALO]
    total = load_halo(0, sums, factor, c, inside, sizes, LAYOUT, TILE, ACC)
    if not TILE.ONCE:
        for cell in range(TILE.CELLS, sizes.grid_h * sizes.grid_w, TILE.CELLS):
            total += load_halo(cell, sums, factor, c, inside, sizes, LAYOUT, TILE, ACC)
    return tl.sum(total, 0)


@triton.jit
def sums_of_blocks(partials, cell, sizes, TILE: tl.constexpr, ACC: tl.constexpr):
    """The partials of all blocks of channels of a sample, added up in a fixed order, for each ``cell``; (NODES,)."""
    cells = sizes.grid_h * sizes.grid_w
    blocks = tl.cdiv(sizes.channels, TILE.CHANNELS)
    # [BLOCKS, NODES]
    total = tl.zeros([TILE.BLOCKS, TILE.NODES], ACC)
    for first in range(0, blocks, TILE.BLOCKS):
        b = first + tl.arange(0, TILE.BLOCKS)[:, None]
        inside = (b < blocks) & (cell < cells)[None, :]
        total += tl.load(partials + b.to(tl.int64) * cells + cell[None, :], mask=inside, other=0.0)
    # [NODES]
    return tl.sum(total, 0)


@triton.jit
def partials_of(n, partials, sizes, TILE: tl.constexpr):
    """The partials of sample n, one row of gh gw numbers for each block of channels."""
    return partials + n * tl.cdiv(sizes.channels, TILE.CHANNELS) * (sizes.grid_h * sizes.grid_w)


@triton.jit
def pixels_of(cell, sizes):
    """The number of pixels of each cell."""
    height = sizes.area // sizes.width
    i = cell // sizes.grid_w
    j = cell % sizes.grid_w
    rows = cell_begin(i + 1, sizes.grid_h, height) - cell_begin(i, sizes.grid_h, height)
    return rows * (cell_begin(j + 1, sizes.grid_w, sizes.width) - cell_begin(j, sizes.grid_w, sizes.width))


@triton.jit
def lattice_of(sizes, OPTIONS: tl.constexpr):
    """The graph of the spatial branch."""
    cells = sizes.grid_h * sizes.grid_w
    neighbors: tl.constexpr = 9 if OPTIONS.DIAGONAL else 5
    return Graph(cells, sizes.grid_w, 0, neighbors, False, False, OPTIONS.LATTICE_LOOPS, OPTIONS.DIAGONAL)


# ---- the two steps ---------------------------------------------------------------------------------------------------


@triton.jit
def graph_of(
    n, b,
    sums,  # over the cells, or x if each cell is a pixel or this program pools them
    saved, gates, windows, partials, weight, sizes, ring_first, ring_count,
    OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z, o_c and g_c of block b of the channels of sample n, and the block's terms of the spatial tokens.

    ``windows`` are rows of CHANNELS + 2 x reach tokens, one for each block. ``partials`` are rows of sums over the
    channels of a block, of g_c P or of P.
    """
    cells = sizes.grid_h * sizes.grid_w
    sums += n * sizes.channels * length_of(sizes, TILE)
    rows = rows_of(n, saved, gates, sizes)
    block = block_of(b, sizes, ring_first, ring_count, OPTIONS, TILE)
    place = n * tl.cdiv(sizes.channels, TILE.CHANNELS) + b
    window = windows + place * (TILE.CHANNELS + 2 * block.halo)
    partial = partials + place * cells
    # [CHANNELS]
    i = tl.arange(0, TILE.CHANNELS)
    inside = i < block.own

    # [GROUPS, CELLS, LANES]
    tile = load_cells(sums, None, None, block.first, 0, sizes, LAYOUT, TILE, ACC)
    total = tile
    if not TILE.ONCE:
        for cell in range(TILE.CELLS, cells, TILE.CELLS):
            total += load_cells(sums, None, None, block.first, cell, sizes, LAYOUT, TILE, ACC)
    # [CHANNELS]
    z = sum_of_cells(total, TILE) / sizes.area
    tl.store(rows.z + block.first + i, z, mask=inside)
    tl.store(window + block.halo + i, z, mask=inside)
    store_around(window, z, i, block)
    for first in range(0, block.beside, TILE.HALO):
        # [HALO]
        h = first + tl.arange(0, TILE.HALO)
        node, c = halo_node(h, block, sizes.channels)
        exists = h < block.beside
        z_h = halo_sums(sums, None, c, exists, sizes, LAYOUT, TILE, ACC) / sizes.area
        tl.store(window + node, z_h, mask=exists)
    tl.debug_barrier()

    score, value = collapse(weight, TILE, ACC)
    ring = ring_of(block, ring_first, ring_count, OPTIONS)
    # [CHANNELS]
    o = transform(window, tl.where(inside, i, 0) + block.halo, score, value, weight.heads, ring)
    g, _ = sigmoid(o)
    tl.store(rows.o_c + block.first + i, o, mask=inside)
    tl.store(rows.g_c + block.first + i, g, mask=inside)
    # [GROUPS, 1, LANES]
    g = by_channel(tl.where(inside, g, 0.0), TILE)
    # [CELLS]
    ij = tl.arange(0, TILE.CELLS)
    if OPTIONS.SEQUENTIAL:
        tile *= g
    tl.store(partial + ij, sum_of_channels(tile), mask=ij < cells)
    if not TILE.ONCE:
        for cell in range(TILE.CELLS, cells, TILE.CELLS):
            tile = load_cells(sums, None, None, block.first, cell, sizes, LAYOUT, TILE, ACC)
            if OPTIONS.SEQUENTIAL:
                tile *= g
            tl.store(partial + cell + ij, sum_of_channels(tile), mask=cell + ij < cells)


@triton.jit
def lattice_gates(
    partials,  # of the blocks of channels of the sample
    u, o_s, g_s,
    kept,  # None: u is kept
    keep, weight, sizes,
    OPTIONS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u and g_s of a sample, from the sums of its blocks of channels. If ``keep``, also o_s, and u in ``kept``."""
    cells = sizes.grid_h * sizes.grid_w
    for first in range(0, cells, TILE.NODES):
        # [NODES]
        i = first + tl.arange(0, TILE.NODES)
        total = sums_of_blocks(partials, i, sizes, TILE, ACC)
        token = total / (pixels_of(i, sizes).to(ACC) * sizes.channels)
        tl.store(u + i, token, mask=i < cells)
        if kept is not None:  # noqa: SIM102 - the compiler decides this condition
            if keep:
                tl.store(kept + i, token, mask=i < cells)
    tl.debug_barrier()

    score, value = collapse(weight, TILE, ACC)
    lattice = lattice_of(sizes, OPTIONS)
    for first in range(0, cells, TILE.NODES):
        # [NODES]
        i = first + tl.arange(0, TILE.NODES)
        o = transform(u, tl.where(i < cells, i, 0), score, value, weight.heads, lattice)
        if keep:
            tl.store(o_s + i, o, mask=i < cells)
        tl.store(g_s + i, sigmoid(o)[0], mask=i < cells)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph(
    sums,  # over the cells, or x if each cell is a pixel or the programs pool them
    saved, gates, windows, partials,
    channel_weight, channel_row, channel_column,
    channels, area, width, grid_h, grid_w, heads, head_width, ring_first, ring_count,
    OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is a block of channels of a sample."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, b = program_of(tl.cdiv(sizes.channels, TILE.CHANNELS))
    weight = Weight(channel_weight, channel_row, channel_column, heads, head_width)
    graph_of(
        n, b, sums, saved, gates, windows, partials, weight, sizes, ring_first, ring_count, OPTIONS, LAYOUT, TILE, ACC
    )  # fmt: skip


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def lattice(
    saved, gates, partials,
    spatial_weight, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width,
    OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is the cells of a sample."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    weight = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
    n = tl.program_id(0).to(tl.int64)
    rows = rows_of(n, saved, gates, sizes)
    partials = partials_of(n, partials, sizes, TILE)
    lattice_gates(partials, rows.u, rows.o_s, rows.g_s, None, True, weight, sizes, OPTIONS, TILE, ACC)
