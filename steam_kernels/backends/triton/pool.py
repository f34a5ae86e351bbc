"""The pool stage: sums of x, and of x dy, over the cells of each channel.

Sums, not means: the graph stage divides. They lie as the map does, (N, C, gh gw) or, channels last, (N, gh gw, C), so
that where a cell is a pixel the map itself takes their place and none of this runs.
"""

import triton
import triton.language as tl

from .sizes import DO_NOT_SPECIALIZE


@triton.jit
def cell_begin(cell, cells, size):
    """First pixel of a cell along one axis."""
    return (cell * size + cells - 1) // cells


@triton.jit
def upstream(dy, y, offset, inside, ACC: tl.constexpr):
    """dy in the accumulation type, 0 where the ReLU that made y was off; a NaN in y lets it pass, as in PyTorch."""
    g = tl.load(dy + offset, mask=inside, other=0.0).to(ACC)
    if y is not None:
        g = tl.where(tl.load(y + offset, mask=inside, other=0.0) <= 0.0, 0.0, g)
    return g


@triton.jit
def rearrange(flat, index, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """A run of numbers as a (ROWS, COLUMNS) tile, 0 outside."""
    tile = tl.gather(flat, tl.reshape(index, [ROWS * COLUMNS]), 0)
    return tl.where(inside, tl.reshape(tile, [ROWS, COLUMNS]).to(ACC), 0.0)


@triton.jit
def pool_runs_of(
    n,
    first,
    steps,
    x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: products alone
    products,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    PIXELS: tl.constexpr,
    RUN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Small NCHW maps of sample n: CHANNELS whole maps are one run of memory, read wide and sorted on the chip.

    ``steps`` runs from channel ``first`` on share the places of their pixels.
    """
    height = area // width
    cells = grid_h * grid_w
    sample = channels.to(tl.int64) * area

    # (PIXELS, CHANNELS * CELLS): pixels outermost, so that a thread adds up what it holds
    slot = tl.arange(0, CHANNELS * CELLS)
    channel = slot // CELLS
    cell = slot % CELLS
    top = cell_begin(cell // grid_w, grid_h, height)
    left = cell_begin(cell % grid_w, grid_w, width)
    cell_height = cell_begin(cell // grid_w + 1, grid_h, height) - top
    cell_width = cell_begin(cell % grid_w + 1, grid_w, width) - left
    pixel = tl.arange(0, PIXELS)[:, None]
    inside = (cell < cells)[None, :] & (pixel < (cell_height * cell_width)[None, :])
    row = pixel // cell_width[None, :]
    column = pixel - row * cell_width[None, :]
    index = (channel * area + top * width + left)[None, :] + row * width + column
    index = tl.where(inside, index, 0)

    flat = tl.arange(0, RUN)
    for step in range(steps):
        c = first + step * CHANNELS
        start = c.to(tl.int64) * area
        offset = n * sample + start + flat
        read = (flat < CHANNELS * area) & (flat < sample - start)
        out = (n * channels + c) * cells + channel * cells + cell
        write = (cell < cells) & (c + channel < channels)
        values = tl.load(x + offset, mask=read, other=0.0)
        if sums is not None:
            tile = rearrange(values, index, inside, PIXELS, CHANNELS * CELLS, ACC)
            tl.store(sums + out, tl.sum(tile, 0), mask=write)
        if dy is not None:
            product = values.to(ACC) * upstream(dy, y, offset, read, ACC)
            tile = rearrange(product, index, inside, PIXELS, CHANNELS * CELLS, ACC)
            tl.store(products + out, tl.sum(tile, 0), mask=write)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def pool_runs(
    x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: products alone
    products,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    CHANNEL_UNIT: tl.constexpr,
    AREA_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    PIXELS: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is STEPS runs of a sample."""
    channels = channels * CHANNEL_UNIT
    area = area * AREA_UNIT
    blocks = tl.cdiv(channels, CHANNELS * STEPS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * STEPS * CHANNELS
    pool_runs_of(
        n, first, STEPS, x, dy, y, sums, products, channels, area, width, grid_h, grid_w,
        CHANNELS, CELLS, PIXELS, RUN, ACC,
    )  # fmt: skip


@triton.jit
def pool_tiles_of(
    n,
    t,
    x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: products alone
    products,
    channels,
    area,
    width,  # in units of WIDTH_UNIT
    grid_h,
    grid_w,
    WIDTH_UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Any map, tile t of sample n: CELLS neighbours in a row of cells, CHANNELS channels, ROWS x COLUMNS pixels."""
    wide = width // grid_w * WIDTH_UNIT  # of every cell where they are uniform; a product tells its alignment
    width = width * WIDTH_UNIT
    height = area // width
    cells = grid_h * grid_w
    channel_blocks = tl.cdiv(channels, CHANNELS)
    cell_blocks = tl.cdiv(grid_w, CELLS)
    # the neighbour in memory is the neighbour in time
    if CHANNELS_LAST:
        channel_block = t % channel_blocks
        cell_block = t // channel_blocks % cell_blocks
        i = t // channel_blocks // cell_blocks
    else:
        cell_block = t % cell_blocks
        i = t // cell_blocks % grid_h
        channel_block = t // cell_blocks // grid_h

    c = channel_block * CHANNELS + tl.arange(0, CHANNELS)
    j = cell_block * CELLS + tl.arange(0, CELLS)
    if UNIFORM:
        left = j * wide
    else:
        left = cell_begin(j, grid_w, width)
        cell_width = cell_begin(j + 1, grid_w, width) - left
    widest = tl.cdiv(width, grid_w)
    top = cell_begin(i, grid_h, height)
    bottom = cell_begin(i + 1, grid_h, height)

    if sums is not None:
        total = tl.zeros([CHANNELS, ROWS, CELLS, COLUMNS], ACC)
    if dy is not None:
        product = tl.zeros([CHANNELS, ROWS, CELLS, COLUMNS], ACC)
    c_4 = c[:, None, None, None]
    left_4 = left[None, None, :, None]
    for r in range(top, bottom, ROWS):
        row = (r + tl.arange(0, ROWS))[None, :, None, None]
        for k in range(0, widest, COLUMNS):
            column = (k + tl.arange(0, COLUMNS))[None, None, None, :]
            if UNIFORM:
                inside = column < wide
            else:
                inside = column < cell_width[None, None, :, None]
            inside = (c_4 < channels) & (row < bottom) & (j < grid_w)[None, None, :, None] & inside
            if CHANNELS_LAST:
                pixel = row.to(tl.int64) * width + (left_4 + column)
                offset = n * area * channels + (pixel * channels + c_4)
            else:
                line = c_4.to(tl.int64) * area + row * width
                offset = n * area * channels + (line + (left_4 + column))
            values = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
            if sums is not None:
                total += values
            if dy is not None:
                product += values * upstream(dy, y, offset, inside, ACC)

    cell = i * grid_w + j[None, :]
    if CHANNELS_LAST:
        out = (n * cells + cell) * channels + c[:, None]
    else:
        out = (n * channels + c[:, None]) * cells + cell
    write = (c < channels)[:, None] & (j < grid_w)[None, :]
    if sums is not None:
        tl.store(sums + out, tl.sum(tl.sum(total, 3), 1), mask=write)
    if dy is not None:
        tl.store(products + out, tl.sum(tl.sum(product, 3), 1), mask=write)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def pool_tiles(
    x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: products alone
    products,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    CHANNEL_UNIT: tl.constexpr,
    AREA_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is one tile of a sample."""
    channels = channels * CHANNEL_UNIT
    area = area * AREA_UNIT
    tiles = tl.cdiv(channels, CHANNELS) * tl.cdiv(grid_w, CELLS) * grid_h
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pool_tiles_of(
        n, tl.program_id(0) % tiles, x, dy, y, sums, products, channels, area, width, grid_h, grid_w,
        WIDTH_UNIT, UNIFORM, CHANNELS_LAST, CHANNELS, ROWS, CELLS, COLUMNS, ACC,
    )  # fmt: skip
