"""The gate stage: y = scale x g_c g_s (+ residual, ReLU), and its input gradient.

The stage sees a map as rows of numbers. In NCHW a row is the pixels of GROUP channels: with several channels, the
length of a row is a whole number of wide accesses also if H W is not. In channels_last GROUP is 1, the rows of a tile
are channels, and its columns are pixels.
"""

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, sizes_of
from .graph import lattice_gates, partials_of, rows_of
from .pool import upstream
from .weights import weight_gradients


@triton.jit
def gate_tiles(sizes, steps, TILE: tl.constexpr):
    """The numbers of blocks of rows and of blocks of columns of a sample; a block of rows has ``steps`` tiles."""
    row_blocks = tl.cdiv(tl.cdiv(sizes.channels, TILE.GROUP), TILE.ROWS * steps)
    return row_blocks, tl.cdiv(sizes.area * TILE.GROUP, TILE.RUN)


@triton.jit
def place(t, sizes, steps, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """The first row of tile t, its columns e, and for each column its channel within the group and its cell."""
    row_blocks, run_blocks = gate_tiles(sizes, steps, TILE)
    # Programs that run at the same time read neighbouring memory.
    if LAYOUT.CHANNELS_LAST:
        row_block = t % row_blocks
        run_block = t // row_blocks
    else:
        run_block = t % run_blocks
        row_block = t // run_blocks
    # [RUN]
    e = run_block * TILE.RUN + tl.arange(0, TILE.RUN)
    pixel = e
    member = tl.zeros([TILE.RUN], tl.int32)
    if TILE.GROUP > 1:
        member = e // sizes.area
        pixel = e - member * sizes.area
    row = pixel // sizes.width
    column = pixel - row * sizes.width
    cell = row * sizes.grid_h // (sizes.area // sizes.width) * sizes.grid_w + column * sizes.grid_w // sizes.width
    return row_block * steps * TILE.ROWS, e, member, cell


@triton.jit
def tile_of_program(sizes, steps, TILE: tl.constexpr):
    """The sample and the tile of this program. The programs begin with the last tile of the last sample.

    The pool stage read this sample last, so that the cache may still hold it.
    """
    row_blocks, run_blocks = gate_tiles(sizes, steps, TILE)
    tiles = row_blocks * run_blocks
    t = tl.num_programs(0) - 1 - tl.program_id(0)
    return (t // tiles).to(tl.int64), t % tiles


@triton.jit
def elements(first, e, member, sizes, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """For the elements of a tile: the offset in the sample, whether the element exists, and its channel."""
    # [ROWS, 1] and [1, RUN]
    row = first + tl.arange(0, TILE.ROWS)[:, None]
    column = e[None, :]
    # [ROWS, RUN]
    if LAYOUT.CHANNELS_LAST:
        offset = column.to(tl.int64) * sizes.channels + row
        inside = (row < sizes.channels) & (column < sizes.area)
        channel = row
    else:
        offset = row.to(tl.int64) * (sizes.area * TILE.GROUP) + column
        if TILE.GROUP > 1:
            # A comparison of channels would differ within a wide access, which would split the access.
            inside = (column < sizes.area * TILE.GROUP) & (offset < sizes.channels.to(tl.int64) * sizes.area)
            channel = row * TILE.GROUP + member[None, :]
        else:
            inside = (row < sizes.channels) & (column < sizes.area)
            channel = row
    return offset, inside, channel


@triton.jit
def gate_of(
    n, t, x,
    residual,  # None: no residual
    y,
    g_c, g_s,  # of the sample
    sizes, steps,
    SCALE: tl.constexpr, RELU: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y for tile t of sample n: ``steps`` tiles of (ROWS, RUN), one below the other, which have the same cells."""
    first, e, member, cell = place(t, sizes, steps, LAYOUT, TILE)
    base = n * (sizes.channels.to(tl.int64) * sizes.area)
    # [1, RUN]
    g_s = tl.load(g_s + cell, mask=e < sizes.area * TILE.GROUP, other=0.0)[None, :]
    for step in range(steps):
        # [ROWS, RUN]
        offset, inside, channel = elements(first + step * TILE.ROWS, e, member, sizes, LAYOUT, TILE)
        g = tl.load(g_c + channel, mask=channel < sizes.channels, other=0.0) * SCALE * g_s
        # No later kernel of this call reads x, and the next layer reads y: the cache should keep y.
        out = tl.load(x + base + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC) * g
        if residual is not None:
            out += tl.load(residual + base + offset, mask=inside, other=0.0).to(ACC)
        if RELU:
            out = tl.where(out <= 0.0, 0.0, out)  # not a maximum, because a NaN must stay a NaN
        tl.store(y + base + offset, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def lattice_of_program(
    n, keep, saved, partials, vectors, weight, sizes, OPTIONS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """g_s of sample n in memory of this program alone: its row of ``vectors``, which are rows of [u | g_s].

    The programs of a sample all compute the same numbers, so that the lattice has no launch of its own. The one with
    ``keep`` stores the tokens and pre-activations.
    """
    cells = sizes.grid_h * sizes.grid_w
    u = vectors + tl.program_id(0).to(tl.int64) * 2 * cells
    rows = rows_of(n, saved, vectors, sizes)  # The rows of the gates are not used.
    partials = partials_of(n, partials, sizes, TILE)
    lattice_gates(partials, u, rows.o_s, u + cells, rows.u, keep, weight, sizes, OPTIONS, TILE, ACC)
    tl.debug_barrier()
    return u + cells


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def gate(
    x,
    residual,  # None: no residual
    y, gates, steps,
    saved,
    partials,  # None: the lattice had a launch of its own
    vectors,
    spatial_weight, spatial_row, spatial_column,
    channels, area, width, grid_h, grid_w, heads, head_width,
    SCALE: tl.constexpr, RELU: tl.constexpr, OPTIONS: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr,
    GRAPH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is ``steps`` tiles of a sample. With partials, it first computes the lattice of its sample."""
    if not TILE.LOOP:
        steps = 1
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, t = tile_of_program(sizes, steps, TILE)
    g_c = gates + n * (sizes.channels + sizes.grid_h * sizes.grid_w)
    g_s = g_c + sizes.channels
    if partials is not None:
        weight = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
        g_s = lattice_of_program(n, t == 0, saved, partials, vectors, weight, sizes, OPTIONS, GRAPH, ACC)
    gate_of(n, t, x, residual, y, g_c, g_s, sizes, steps, SCALE, RELU, LAYOUT, TILE, ACC)


@triton.jit
def gate_backward_of(
    n, t, dy,
    y,  # None: no ReLU
    dx,  # None: not needed
    dresidual,  # None: not needed
    gates, shifts, sizes, steps,
    SCALE: tl.constexpr, SEQUENTIAL: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """For tile t of sample n: dx = scale dy g_c g_s + dz / (H W) + du / (C n_cell) (g_c or 1), and dresidual.

    dy counts as 0 where the ReLU was off, and dresidual is this masked dy.
    """
    first, e, member, cell = place(t, sizes, steps, LAYOUT, TILE)
    base = n * (sizes.channels.to(tl.int64) * sizes.area)
    at = n * (sizes.channels + sizes.grid_h * sizes.grid_w)
    if dx is not None:
        # [1, RUN]
        g_s = tl.load(gates + at + sizes.channels + cell, mask=e < sizes.area * TILE.GROUP, other=0.0)[None, :]
        share = tl.load(shifts + at + sizes.channels + cell, mask=e < sizes.area * TILE.GROUP, other=0.0)[None, :]
    for step in range(steps):
        # [ROWS, RUN]
        offset, inside, channel = elements(first + step * TILE.ROWS, e, member, sizes, LAYOUT, TILE)
        # No later kernel of this call reads dy or y, and the layer before reads dx.
        g = upstream(dy, y, base + offset, inside, ACC, "evict_first")
        if dresidual is not None:
            tl.store(dresidual + base + offset, g.to(dresidual.dtype.element_ty), mask=inside)
        if dx is not None:
            g_c = tl.load(gates + at + channel, mask=channel < sizes.channels, other=0.0)
            shift = tl.load(shifts + at + channel, mask=channel < sizes.channels, other=0.0)
            if SEQUENTIAL:
                shift += share * g_c
            else:
                shift += share
            out = g * (g_c * SCALE * g_s) + shift
            tl.store(dx + base + offset, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def gate_backward(
    dy,
    y,  # None: no ReLU
    dx,  # None: not needed
    dresidual,  # None: not needed
    gates, shifts,
    partials_c,  # None: all programs are tiles
    partials_s,
    channel_weight, spatial_weight,
    dchannel_weight, dspatial_weight,  # None: not needed
    channel_row, channel_column, spatial_row, spatial_column,
    dchannel_row, dchannel_column, dspatial_row, dspatial_column,
    rows, samples,
    heads, head_width, steps,
    channels, area, width, grid_h, grid_w,
    SCALE: tl.constexpr, SEQUENTIAL: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr,
    WEIGHTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is ``steps`` tiles of a sample. With partials, the first one computes the gradients of the weights."""
    if not TILE.LOOP:
        steps = 1
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    if partials_c is None or tl.program_id(0) > 0:
        n, t = tile_of_program(sizes, steps, TILE)
        gate_backward_of(
            n, t, dy, y, dx, dresidual, gates, shifts, sizes, steps, SCALE, SEQUENTIAL, LAYOUT, TILE, ACC
        )  # fmt: skip
    else:
        weight_gradients(
            channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column,
            dchannel_weight, dchannel_row, dchannel_column, dspatial_weight, dspatial_row, dspatial_column,
            heads, head_width, partials_c, partials_s, rows, samples, WEIGHTS, ACC,
        )  # fmt: skip
