"""steam(): checks one call, then runs it by one operator, or by the reference where a tool must see the steps."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import backends, ops, reference, tracing
from .config import Options, make_options

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

    Source: *STEAM: Squeeze and Transform Enhanced Attention Module*, arXiv 2412.09023; a reconstruction, see the
    documentation's page on the mathematics for what is the paper's, what second-hand and what ours.

    Args:
        x: ``(N, C, H, W)``, float16, bfloat16, float32 or float64. N may be 0. NCHW and channels_last maps are read as
            they are, other strides are made contiguous once.
        channel_weight, spatial_weight: ``(4, d)`` query, key, value and output rows, float32 or x's dtype, on x's
            device.
        residual: None or a tensor of x's shape, dtype and device.
        num_heads: h, a divisor of d.
        grid_size: cells per axis, an int or ``(gh, gw)``, at most one per pixel; None is 7 unless ``window`` is given.
        window: pixels per cell instead: ``(ceil(H / window), ceil(W / window))`` cells.
        channel_radius: how far the ring joins channels on either side, 0 or more.
        spatial_neighbors: 4 or 8.
        self_loops: whether a node attends to itself too.
        order: "sequential" or "parallel".
        scale: a finite factor of the gates; where an exporter, a tracer or a function transform looks into the call, it
            may be a tensor of 0 dimensions.
        activation: None or "relu", applied after the residual is added.
        inplace: write y into x and return x; only where no gradient is recorded. ``residual`` may not share memory with
            x then.
        backend: name of the backend that must run the call; None is the one that the environment variable
            ``STEAM_KERNELS_BACKEND`` names, else the first that can.

    Returns:
        y of x's shape and dtype, in x's strides where x is dense in NCHW or channels_last, else in NCHW.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or out of range; the message
            names it.
        RuntimeError: the backend asked for by name cannot run the call, or ``inplace`` would overwrite what a gradient
            needs.
    """
    tensor = None
    if not isinstance(scale, (int, float)) and (tracing.looked_into() or has_torch_function((x, scale))):
        tensor, scale = scale, 1.0
    graphs = num_heads, grid_size, window, channel_radius, spatial_neighbors, self_loops
    options = make_options(*graphs, order, scale, activation, inplace, backend)
    return run(x, channel_weight, spatial_weight, residual, options, tensor)


def run(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    options: Options,
    scale: Tensor | None = None,
) -> Tensor:
    """:func:`steam` of options that have been made; ``scale`` replaces theirs where it is given."""
    tensors = x, channel_weight, spatial_weight, residual
    if has_torch_function(tensors):
        given = options.given() if scale is None else options.given() | {"scale": scale}
        return handle_torch_function(_STEAM, tensors, *tensors, **given)
    grid = options.check(*tensors)
    chosen, named = backends.choose(backends.Call(*tensors, options, grid))
    plain = tracing.looked_into() or chosen not in ops.OPERATORS
    if not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s %s on %s: %s", tuple(x.shape), x.dtype, x.device, "reference" if plain else chosen)
    if plain:
        return reference.compute(*tensors, options, grid, scale)
    if tracing.traced_as_operators():
        grid = int(grid[0]), int(grid[1])  # a counter reads them from the trace, where sizes are tensors
    return ops.call(*tensors, options, grid, chosen if named else ops.AUTOMATIC)


# FX keeps the call as one node. It patches the name meanwhile, and the node's target is to be the function itself.
_STEAM = steam
torch.fx.wrap("steam")
