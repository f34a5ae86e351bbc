"""steam() checks a call and runs one operator, or the reference if a tool must see plain operators."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import backends, ops, reference, tracing
from .config import Inputs, Options, make_options

__all__ = ["steam"]

_log = logging.getLogger("steam_kernels")


def steam(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None = None,
    *,
    num_heads: int = 4,
    grid_size: int | tuple[int, int] | None = None,
    window: int | None = None,
    channel_radius: int = 1,
    spatial_neighbors: int = 4,
    self_loops: bool = True,
    order: str = "sequential",
    scale: float | Tensor = 1.0,
    activation: str | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""One STEAM unit: ``y = activation(scale * x * channel_gate * spatial_gate + residual)``.

    Source: *STEAM: Squeeze and Transform Enhanced Attention Module*, arXiv 2412.09023. This is a reconstruction.
    docs/math.md marks which parts come from the paper, which are second-hand and which are ours.

    Args:
        x: ``(N, C, H, W)``, float16, bfloat16, float32 or float64. N may be 0. A map that is not dense in NCHW
            or channels_last is copied once.
        channel_weight, spatial_weight: ``(4, d)``, the query, key, value and output rows, in float32 or x's dtype, on
            x's device.
        residual: None or a tensor of x's shape, dtype and device.
        num_heads: h, which divides d.
        grid_size: cells per axis, an int or ``(gh, gw)``, at most one per pixel. None is 7 unless ``window`` is given.
        window: pixels per cell, instead of ``grid_size``: ``(ceil(H / window), ceil(W / window))`` cells.
        channel_radius: how far the ring joins channels on either side, 0 or more.
        spatial_neighbors: 4 or 8.
        self_loops: whether a node also attends to itself.
        order: "sequential" or "parallel".
        scale: a finite factor of the gates. Under an exporter, a tracer or a function transform it may also be a tensor
            of 0 dimensions.
        activation: None or "relu", applied after the residual is added.
        inplace: whether to write y into x and return x. Autograd must not record the call, and ``residual`` must not
            share memory with x.
        backend: the name of the backend that must run the call. None takes the backend that the environment variable
            ``STEAM_KERNELS_BACKEND`` names, or else the first backend that can run the call.

    Returns:
        y, with x's shape and dtype. y has x's strides if x is dense in NCHW or channels_last, else it is in NCHW.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or is out of range; the message
            names the argument.
        RuntimeError: the backend that was asked for by name cannot run the call, or ``inplace`` would overwrite values
            that a gradient needs.
    """
    tensor = None
    if not isinstance(scale, (int, float)) and (tracing.looked_into() or has_torch_function((x, scale))):
        tensor, scale = scale, 1.0
    graphs = num_heads, grid_size, window, channel_radius, spatial_neighbors, self_loops
    options = make_options(*graphs, order, scale, activation, inplace, backend)
    return run(Inputs(x, channel_weight, spatial_weight, residual), options, tensor)


def run(inputs: Inputs, options: Options, scale: Tensor | None = None) -> Tensor:
    """:func:`steam` with checked options. ``scale``, if given, replaces the scale of the options."""
    if has_torch_function(inputs):
        given = options.given() if scale is None else options.given() | {"scale": scale}
        return handle_torch_function(_STEAM, inputs, *inputs, **given)
    grid = options.check(inputs)
    chosen, named = backends.choose(backends.Call(*inputs, options, grid))
    plain = tracing.looked_into() or chosen not in ops.OPERATORS
    if not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
        x, runs = inputs.x, "reference" if plain else chosen
        _log.debug("%s %s on %s: %s", tuple(x.shape), x.dtype, x.device, runs)
    if plain:
        return reference.compute(inputs, options, grid, scale)
    if type(grid[0]) is not int and tracing.traced_as_operators():
        grid = int(grid[0]), int(grid[1])  # sizes are tensors in a trace, and the counter reads ints
    return ops.call(inputs, options, grid, chosen if named else ops.AUTOMATIC)


# torch.fx.wrap has FX keep the call as one node. FX replaces the name ``steam`` while it traces, so ``_STEAM`` keeps
# the function itself, which is the node's target.
_STEAM = steam
torch.fx.wrap("steam")
