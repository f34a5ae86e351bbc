"""The gradients of both weights, from the partials of all samples."""

import triton
import triton.language as tl

from .arguments import DO_NOT_SPECIALIZE, Weight


@triton.jit
def weight_gradient(weight, gradient, partials, samples, TILE: tl.constexpr, ACC: tl.constexpr):
    """The gradient of one weight: the partials of da and db of all samples, added up in a fixed order."""
    # [1, HEADS]
    head = tl.arange(0, TILE.HEADS)[None, :]
    # [SAMPLES, HEADS]
    da = tl.zeros([TILE.SAMPLES, TILE.HEADS], ACC)
    db = tl.zeros([TILE.SAMPLES, TILE.HEADS], ACC)
    for first in range(0, samples, TILE.SAMPLES):
        n = first + tl.arange(0, TILE.SAMPLES)[:, None]
        inside = (n < samples) & (head < weight.heads)
        at = partials + n.to(tl.int64) * 4 * weight.heads + head
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
    at = weight.data + (head * weight.head_width + k) * weight.column
    query = tl.load(at, mask=inside, other=0.0).to(ACC)
    key = tl.load(at + weight.row, mask=inside, other=0.0).to(ACC)
    value = tl.load(at + 2 * weight.row, mask=inside, other=0.0).to(ACC)
    output = tl.load(at + 3 * weight.row, mask=inside, other=0.0).to(ACC)
    at = gradient.data + (head * weight.head_width + k) * gradient.column
    tl.store(at, (da * key).to(gradient.data.dtype.element_ty), mask=inside)
    tl.store(at + gradient.row, (da * query).to(gradient.data.dtype.element_ty), mask=inside)
    tl.store(at + 2 * gradient.row, (db * output).to(gradient.data.dtype.element_ty), mask=inside)
    tl.store(at + 3 * gradient.row, (db * value).to(gradient.data.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def weights_backward(
    partials,
    channel_weight,
    spatial_weight,
    dchannel_weight,  # None: not needed
    dspatial_weight,  # None: not needed
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    dchannel_row,
    dchannel_column,
    dspatial_row,
    dspatial_column,
    samples,
    heads,
    head_width,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of both weights, by one program."""
    if dchannel_weight is not None:
        weight = Weight(channel_weight, channel_row, channel_column, heads, head_width)
        gradient = Weight(dchannel_weight, dchannel_row, dchannel_column, heads, head_width)
        weight_gradient(weight, gradient, partials, samples, TILE, ACC)
    if dspatial_weight is not None:
        weight = Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)
        gradient = Weight(dspatial_weight, dspatial_row, dspatial_column, heads, head_width)
        weight_gradient(weight, gradient, partials + 2 * heads, samples, TILE, ACC)
