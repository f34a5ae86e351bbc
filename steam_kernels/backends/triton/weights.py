"""The gradients of both weights, from the partials of all blocks of channels and of all samples."""

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight, weight_numbers


@triton.jit
def add_up(weight, gradient, partials, rows, TILE: tl.constexpr, ACC: tl.constexpr):
    """The gradient of one weight: its partials, ``rows`` rows of (2, heads) terms of da and db, in a fixed order."""
    # [1, HEADS]
    head = tl.arange(0, TILE.HEADS)[None, :]
    # [ROWS, HEADS]
    da = tl.zeros([TILE.ROWS, TILE.HEADS], ACC)
    db = tl.zeros([TILE.ROWS, TILE.HEADS], ACC)
    for first in range(0, rows, TILE.ROWS):
        row = first + tl.arange(0, TILE.ROWS)[:, None]
        inside = (row < rows) & (head < weight.heads)
        at = partials + row.to(tl.int64) * 2 * weight.heads + head
        da += tl.load(at, mask=inside, other=0.0)
        db += tl.load(at + weight.heads, mask=inside, other=0.0)
    # [HEADS, 1]
    da = (tl.sum(da, 0) / tl.sqrt((weight.head_width + tl.zeros([TILE.HEADS], tl.int32)).to(ACC)))[:, None]
    db = tl.sum(db, 0)[:, None]
    head = tl.arange(0, TILE.HEADS)[:, None]
    # [1, WIDTH]
    k = tl.arange(0, TILE.WIDTH)[None, :]
    # [HEADS, WIDTH]
    inside = (head < weight.heads) & (k < weight.head_width)
    query, key, value, output = weight_numbers(weight, TILE, ACC)
    at = gradient.data + (head * weight.head_width + k) * gradient.column
    tl.store(at, (da * key).to(gradient.data.dtype.element_ty), mask=inside)
    tl.store(at + gradient.row, (da * query).to(gradient.data.dtype.element_ty), mask=inside)
    tl.store(at + 2 * gradient.row, (db * output).to(gradient.data.dtype.element_ty), mask=inside)
    tl.store(at + 3 * gradient.row, (db * value).to(gradient.data.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradients(
    channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column,
    dchannel_weight, dchannel_row, dchannel_column, dspatial_weight, dspatial_row, dspatial_column,
    heads, head_width, partials_c, partials_s, rows, samples, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of both weights; a gradient that is not needed is None."""
    if dchannel_weight is not None:
        weight = Weight(channel_weight, channel_row, channel_column, heads, head_width)
        gradient = Weight(dchannel_weight, dchannel_row, dchannel_column, heads, head_width)
        add_up(weight, gradient, partials_c, rows, TILE, ACC)
    if dspatial_weight is not None:
        weight = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
        gradient = Weight(dspatial_weight, dspatial_row, dspatial_column, heads, head_width)
        add_up(weight, gradient, partials_s, samples, TILE, ACC)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def weights_backward(
    partials_c, partials_s,
    channel_weight, spatial_weight,
    dchannel_weight, dspatial_weight,  # None: not needed
    channel_row, channel_column, spatial_row, spatial_column,
    dchannel_row, dchannel_column, dspatial_row, dspatial_column,
    rows, samples,
    heads, head_width,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of both weights, by one program, where no other kernel has a program for them."""
    weight_gradients(
        channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column,
        dchannel_weight, dchannel_row, dchannel_column, dspatial_weight, dspatial_row, dspatial_column,
        heads, head_width, partials_c, partials_s, rows, samples, TILE, ACC,
    )  # fmt: skip
