"""The pool stage: sums of x, and of x dy, over the cells of each channel.

The results are sums, and the graph stage divides them. They have the memory format of the map: (N, C, gh gw), or
(N, gh gw, C) in channels_last. So the map itself is its sums if each cell is one pixel, and this stage does not run.
"""

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, program_of, sizes_of


@triton.jit
def cell_begin(cell, cells, size):
    """The first pixel of a cell along one axis."""
    return (cell * size + cells - 1) // cells


@triton.jit
def upstream(dy, y, offset, inside, ACC: tl.constexpr, EVICTION: tl.constexpr = ""):
    """dy in the accumulation type, and 0 where the ReLU that made y was off. A NaN in y keeps dy, as in PyTorch.

    EVICTION: which loaded numbers the cache gives up first, as ``tl.load`` takes it.
    """
    g = tl.load(dy + offset, mask=inside, other=0.0, eviction_policy=EVICTION).to(ACC)
    if y is not None:
        masks = tl.load(y + offset, mask=inside, other=0.0, eviction_policy=EVICTION)
        g = tl.where(masks <= 0.0, 0.0, g)
    return g


@triton.jit
def rearrange(flat, index, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The numbers of a run as a (ROWS, COLUMNS) tile, 0 outside."""
    # [ROWS * COLUMNS]
    tile = tl.gather(flat, tl.reshape(index, [ROWS * COLUMNS]), 0)
    # [ROWS, COLUMNS]
    return tl.where(inside, tl.reshape(tile, [ROWS, COLUMNS]).to(ACC), 0.0)


@triton.jit
def pool_runs_of(
    n, first, steps, x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: only products
    products, sizes,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of small NCHW maps of sample n, in ``steps`` runs of CHANNELS whole maps from channel ``first`` on.

    A run is contiguous memory. It is read by wide accesses and sorted into cells on the chip. All runs have the same
    places of pixels in cells, which are computed once.
    """
    height = sizes.area // sizes.width
    cells = sizes.grid_h * sizes.grid_w
    sample = sizes.channels.to(tl.int64) * sizes.area

    # [CHANNELS * CELLS]
    slot = tl.arange(0, TILE.CHANNELS * TILE.CELLS)
    channel = slot // TILE.CELLS
    cell = slot % TILE.CELLS
    top = cell_begin(cell // sizes.grid_w, sizes.grid_h, height)
    left = cell_begin(cell % sizes.grid_w, sizes.grid_w, sizes.width)
    cell_height = cell_begin(cell // sizes.grid_w + 1, sizes.grid_h, height) - top
    cell_width = cell_begin(cell % sizes.grid_w + 1, sizes.grid_w, sizes.width) - left
    # [PIXELS, CHANNELS * CELLS]: pixels are the first axis, so that a thread adds up the numbers in its own registers
    pixel = tl.arange(0, TILE.PIXELS)[:, None]
    inside = (cell < cells)[None, :] & (pixel < (cell_height * cell_width)[None, :])
    row = pixel // cell_width[None, :]
    column = pixel - row * cell_width[None, :]
    index = (channel * sizes.area + top * sizes.width + left)[None, :] + row * sizes.width + column
    index = tl.where(inside, index, 0)

    # [RUN]
    flat = tl.arange(0, TILE.RUN)
    for step in range(steps):
        c = first + step * TILE.CHANNELS
        start = c.to(tl.int64) * sizes.area
        offset = n * sample + start + flat
        read = (flat < TILE.CHANNELS * sizes.area) & (flat < sample - start)
        # [CHANNELS * CELLS]
        out = (n * sizes.channels + c) * cells + channel * cells + cell
        write = (cell < cells) & (c + channel < sizes.channels)
        # [RUN]
        values = tl.load(x + offset, mask=read, other=0.0)
        if sums is not None:
            # [PIXELS, CHANNELS * CELLS]
            tile = rearrange(values, index, inside, TILE.PIXELS, TILE.CHANNELS * TILE.CELLS, ACC)
            tl.store(sums + out, tl.sum(tile, 0), mask=write)
        if dy is not None:
            # [RUN]
            product = values.to(ACC) * upstream(dy, y, offset, read, ACC)
            # [PIXELS, CHANNELS * CELLS]
            tile = rearrange(product, index, inside, TILE.PIXELS, TILE.CHANNELS * TILE.CELLS, ACC)
            tl.store(products + out, tl.sum(tile, 0), mask=write)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def pool_runs(
    x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: only products
    products,
    channels, area, width, grid_h, grid_w, steps,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is ``steps`` runs of a sample."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, b = program_of(tl.cdiv(sizes.channels, TILE.CHANNELS * steps))
    pool_runs_of(n, b * steps * TILE.CHANNELS, steps, x, dy, y, sums, products, sizes, TILE, ACC)


@triton.jit
def pool_tiles_of(
    n, t, x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: only products
    products,
    sizes,  # the width divided by WIDTH_MULTIPLE
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of tile t of sample n, of any map: CHANNELS channels of CELLS neighbours in a row of cells.

    A tile has ROWS x COLUMNS pixels of each cell at once, and walks over the cells.
    """
    # The width of every cell if all are equal. The compiler sees its alignment in the product.
    wide = sizes.width // sizes.grid_w * LAYOUT.WIDTH_MULTIPLE
    width = sizes.width * LAYOUT.WIDTH_MULTIPLE
    height = sizes.area // width
    cells = sizes.grid_h * sizes.grid_w
    channel_blocks = tl.cdiv(sizes.channels, TILE.CHANNELS)
    cell_blocks = tl.cdiv(sizes.grid_w, TILE.CELLS)
    # Programs that run at the same time read neighbouring memory.
    if LAYOUT.CHANNELS_LAST:
        channel_block = t % channel_blocks
        cell_block = t // channel_blocks % cell_blocks
        i = t // channel_blocks // cell_blocks
    else:
        cell_block = t % cell_blocks
        i = t // cell_blocks % sizes.grid_h
        channel_block = t // cell_blocks // sizes.grid_h

    # [CHANNELS]
    c = channel_block * TILE.CHANNELS + tl.arange(0, TILE.CHANNELS)
    # [CELLS]
    j = cell_block * TILE.CELLS + tl.arange(0, TILE.CELLS)
    if TILE.UNIFORM:
        left = j * wide
    else:
        left = cell_begin(j, sizes.grid_w, width)
        cell_width = cell_begin(j + 1, sizes.grid_w, width) - left
    widest = tl.cdiv(width, sizes.grid_w)
    top = cell_begin(i, sizes.grid_h, height)
    bottom = cell_begin(i + 1, sizes.grid_h, height)

    # [CHANNELS, ROWS, CELLS, COLUMNS]
    if sums is not None:
        total = tl.zeros([TILE.CHANNELS, TILE.ROWS, TILE.CELLS, TILE.COLUMNS], ACC)
    if dy is not None:
        product = tl.zeros([TILE.CHANNELS, TILE.ROWS, TILE.CELLS, TILE.COLUMNS], ACC)
    c_4 = c[:, None, None, None]
    left_4 = left[None, None, :, None]
    for r in range(top, bottom, TILE.ROWS):
        row = (r + tl.arange(0, TILE.ROWS))[None, :, None, None]
        for k in range(0, widest, TILE.COLUMNS):
            column = (k + tl.arange(0, TILE.COLUMNS))[None, None, None, :]
            if TILE.UNIFORM:
                inside = column < wide
            else:
                inside = column < cell_width[None, None, :, None]
            # [CHANNELS, ROWS, CELLS, COLUMNS]
            inside = (c_4 < sizes.channels) & (row < bottom) & (j < sizes.grid_w)[None, None, :, None] & inside
            if LAYOUT.CHANNELS_LAST:
                pixel = row.to(tl.int64) * width + (left_4 + column)
                offset = n * sizes.area * sizes.channels + (pixel * sizes.channels + c_4)
            else:
                line = c_4.to(tl.int64) * sizes.area + row * width
                offset = n * sizes.area * sizes.channels + (line + (left_4 + column))
            values = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
            if sums is not None:
                total += values
            if dy is not None:
                product += values * upstream(dy, y, offset, inside, ACC)

    # [CHANNELS, CELLS]
    cell = i * sizes.grid_w + j[None, :]
    if LAYOUT.CHANNELS_LAST:
        out = (n * cells + cell) * sizes.channels + c[:, None]
    else:
        out = (n * sizes.channels + c[:, None]) * cells + cell
    write = (c < sizes.channels)[:, None] & (j < sizes.grid_w)[None, :]
    if sums is not None:
        tl.store(sums + out, tl.sum(tl.sum(total, 3), 1), mask=write)
    if dy is not None:
        tl.store(products + out, tl.sum(tl.sum(product, 3), 1), mask=write)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def pool_tiles(
    x,
    dy,  # None: no products
    y,  # None: no ReLU
    sums,  # None: only products
    products,
    channels, area, width, grid_h, grid_w,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program is one tile of a sample."""
    sizes = sizes_of(channels, area, width, grid_h, grid_w, LAYOUT)
    n, t = program_of(tl.cdiv(sizes.channels, TILE.CHANNELS) * tl.cdiv(grid_w, TILE.CELLS) * grid_h)
    pool_tiles_of(n, t, x, dy, y, sums, products, sizes, LAYOUT, TILE, ACC)
