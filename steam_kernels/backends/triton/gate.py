"""The gate stage: y = scale x g_c g_s (+ residual, ReLU), and its input gradient.

A map is rows of numbers: NCHW, a row is the pixels of a channel, or of GROUP channels, so that its length is a whole
number of wide accesses also where H W is not; channels last, GROUP is 1, a tile's rows are channels and its
columns pixels.
"""

import triton
import triton.language as tl

from .pool import upstream
from .sizes import DO_NOT_SPECIALIZE


@triton.jit
def gate_tiles(
    channels, area, GROUP: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Blocks of rows and of columns of a sample; a block of rows has STEPS tiles."""
    return tl.cdiv(tl.cdiv(channels, GROUP), ROWS * STEPS), tl.cdiv(area * GROUP, RUN)


@triton.jit
def place(
    t,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Tile t's first row, its columns e, and each column's channel within the group and cell."""
    row_blocks, run_blocks = gate_tiles(channels, area, GROUP, ROWS, RUN, STEPS)
    # the neighbour in memory is the neighbour in time
    if CHANNELS_LAST:
        row_block = t % row_blocks
        run_block = t // row_blocks
    else:
        run_block = t % run_blocks
        row_block = t // run_blocks
    e = run_block * RUN + tl.arange(0, RUN)
    pixel = e
    member = tl.zeros([RUN], tl.int32)
    if GROUP > 1:
        member = e // area
        pixel = e - member * area
    row = pixel // width
    column = pixel - row * width
    cell = row * grid_h // (area // width) * grid_w + column * grid_w // width
    return row_block * STEPS * ROWS, e, member, cell


@triton.jit
def elements(
    first,
    e,
    member,
    channels,
    area,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A (ROWS, RUN) tile's offsets in the sample, which of them exist, and their channels."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = e[None, :]
    if CHANNELS_LAST:
        offset = column.to(tl.int64) * channels + row
        inside = (row < channels) & (column < area)
        channel = row
    else:
        offset = row.to(tl.int64) * (area * GROUP) + column
        # by offset: a comparison of channels would differ within a wide access
        if GROUP > 1:
            inside = (column < area * GROUP) & (offset < channels.to(tl.int64) * area)
            channel = row * GROUP + member[None, :]
        else:
            inside = (row < channels) & (column < area)
            channel = row
    return offset, inside, channel


@triton.jit
def gate_of(
    n,
    t,
    x,
    residual,  # None: none
    y,
    gates,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    SCALE: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """y for STEPS tiles of (ROWS, RUN), one below the other: they share their columns' cells."""
    first, e, member, cell = place(t, channels, area, width, grid_h, grid_w, CHANNELS_LAST, GROUP, ROWS, RUN, STEPS)
    base = n * (channels.to(tl.int64) * area)
    g_c = gates + n * (channels + grid_h * grid_w)
    g_s = tl.load(g_c + channels + cell, mask=e < area * GROUP, other=0.0)[None, :]
    for step in range(STEPS):
        offset, inside, channel = elements(first + step * ROWS, e, member, channels, area, CHANNELS_LAST, GROUP, ROWS)
        g = tl.load(g_c + channel, mask=channel < channels, other=0.0) * SCALE * g_s
        out = tl.load(x + base + offset, mask=inside, other=0.0).to(ACC) * g
        if residual is not None:
            out += tl.load(residual + base + offset, mask=inside, other=0.0).to(ACC)
        if RELU:
            out = tl.where(out <= 0.0, 0.0, out)  # a NaN stays
        tl.store(y + base + offset, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def gate(
    x,
    residual,  # None: none
    y,
    gates,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    SCALE: tl.constexpr,
    RELU: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    AREA_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is STEPS tiles of a sample."""
    channels = channels * CHANNEL_UNIT
    area = area * AREA_UNIT
    row_blocks, run_blocks = gate_tiles(channels, area, GROUP, ROWS, RUN, STEPS)
    tiles = row_blocks * run_blocks
    n = (tl.program_id(0) // tiles).to(tl.int64)
    gate_of(
        n,
        tl.program_id(0) % tiles,
        x,
        residual,
        y,
        gates,
        channels,
        area,
        width,
        grid_h,
        grid_w,
        SCALE,
        RELU,
        CHANNELS_LAST,
        GROUP,
        ROWS,
        RUN,
        STEPS,
        ACC,
    )


@triton.jit
def gate_backward_of(
    n,
    t,
    dy,
    y,  # None: no ReLU
    dx,  # None: not asked for
    dresidual,  # None: not asked for
    gates,
    shifts,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    SCALE: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx = scale dy g_c g_s + dz / (H W) + du / (C n_cell) (g_c or 1), and dy as the ReLU let it pass."""
    first, e, member, cell = place(t, channels, area, width, grid_h, grid_w, CHANNELS_LAST, GROUP, ROWS, RUN, STEPS)
    base = n * (channels.to(tl.int64) * area)
    at = n * (channels + grid_h * grid_w)
    if dx is not None:
        g_s = tl.load(gates + at + channels + cell, mask=e < area * GROUP, other=0.0)[None, :]
        share = tl.load(shifts + at + channels + cell, mask=e < area * GROUP, other=0.0)[None, :]
    for step in range(STEPS):
        offset, inside, channel = elements(first + step * ROWS, e, member, channels, area, CHANNELS_LAST, GROUP, ROWS)
        g = upstream(dy, y, base + offset, inside, ACC)
        if dresidual is not None:
            tl.store(dresidual + base + offset, g.to(dresidual.dtype.element_ty), mask=inside)
        if dx is not None:
            g_c = tl.load(gates + at + channel, mask=channel < channels, other=0.0)
            shift = tl.load(shifts + at + channel, mask=channel < channels, other=0.0)
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
    dx,  # None: not asked for
    dresidual,  # None: not asked for
    gates,
    shifts,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    SCALE: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    AREA_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is STEPS tiles of a sample."""
    channels = channels * CHANNEL_UNIT
    area = area * AREA_UNIT
    row_blocks, run_blocks = gate_tiles(channels, area, GROUP, ROWS, RUN, STEPS)
    tiles = row_blocks * run_blocks
    n = (tl.program_id(0) // tiles).to(tl.int64)
    gate_backward_of(
        n,
        tl.program_id(0) % tiles,
        dy,
        y,
        dx,
        dresidual,
        gates,
        shifts,
        channels,
        area,
        width,
        grid_h,
        grid_w,
        SCALE,
        SEQUENTIAL,
        CHANNELS_LAST,
        GROUP,
        ROWS,
        RUN,
        STEPS,
        ACC,
    )
