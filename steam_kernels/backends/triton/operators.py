"""The Triton backend: pool, graph and gate on a GPU, or in Triton's interpreter.

``forward``, ``backward`` and ``forward_`` are the operators of ``steam_kernels.ops`` with their conventions. They
allocate memory on the device of x and launch kernels, and do not look at the kind of device. Importing this module
imports Triton.

All three take the following arguments. All tensors are on one device.

- x (N, C, H, W) of float32, float64, float16 or bfloat16, dense in NCHW or channels_last. N may be 0. The stride of an
  axis of length 1 has no meaning.
- Every other map has x's shape, dtype and strides.
- Both weights (4, embed_dim) of float32 or x's dtype, in any strides. ``num_heads`` divides embed_dim.
- ``grid`` is the number of cells of each axis, at most H and W.

Other maps raise a ValueError or TypeError before any launch. ``steam_kernels.steam`` checks the shapes of the weights
and the options, and these operators do not.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...config import Arguments, accumulation_dtype
from ...schemas import Backward, Forward
from . import launch
from .arguments import INTERPRETED, Options
from .calls import Call, Maps, Weights, run_backward, run_forward, run_gate_backward

__all__ = ["INTERPRETED", "backward", "forward", "forward_"]


def _is_channels_last(x: Tensor) -> bool:
    """Whether x is in channels_last and not in NCHW; raises if it is in neither."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    raise ValueError(
        "x must be dense in NCHW or channels_last (steam_kernels.steam() copies any other x), got shape "
        f"{tuple(x.shape)} and strides {x.stride()}"
    )


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    """Raises unless x's offsets are t's offsets."""
    if t.dtype is not x.dtype:
        raise TypeError(f"{name} must be of x's dtype {x.dtype}, got {t.dtype}")
    if t.shape == x.shape:
        own, wanted = t.stride(), x.stride()
        if own == wanted or 0 in x.shape or all(a == b or n == 1 for a, b, n in zip(own, wanted, x.shape, strict=True)):
            return
    raise ValueError(
        f"{name} must have x's shape {tuple(x.shape)} and strides {x.stride()}, got {tuple(t.shape)} and {t.stride()}"
    )


def _check_saved(saved: Tensor, p: launch.Pass, x: Tensor) -> None:
    shape = p.samples, 2 * (p.channels + p.cells)
    if saved.shape != shape or not saved.is_contiguous() or saved.dtype is not accumulation_dtype(x.dtype):
        raise ValueError(
            f"saved must be what forward returned with save=True, contiguous {shape} of {accumulation_dtype(x.dtype)}, "
            f"got {tuple(saved.shape)} of {saved.dtype} and strides {saved.stride()}"
        )


def _call(
    x: Tensor,
    weight: Tensor,
    grid: tuple[int, int],
    arguments: Arguments,
    backward: bool,
    family: str,
) -> Call:
    num_heads, channel_radius, spatial_neighbors, self_loops, sequential, _, _ = arguments
    samples, channels, height, width = x.shape
    channels_last = _is_channels_last(x)
    p = launch.Pass(samples, channels, height, width, *grid, x.element_size(), channels_last, backward, family)
    # In a small ring two distances may lead to the same node, and each node counts once.
    lowest = max(-channel_radius, -((channels - 1) // 2))
    highest = min(channel_radius, channels // 2)
    ring_loops = self_loops or highest == lowest
    options = Options(
        RING_LOOPS=ring_loops,
        LATTICE_LOOPS=self_loops or p.cells == 1,
        DIAGONAL=spatial_neighbors == 8,
        SEQUENTIAL=sequential,
    )
    ring = lowest, highest - lowest + ring_loops
    acc = tl.float64 if x.dtype is torch.float64 else tl.float32
    return Call(p, num_heads, weight.shape[1] // num_heads, ring, options, acc)


def _forward(given: Forward, y: Tensor, family: str) -> Tensor:
    """Writes y, and returns the tokens and pre-activations."""
    x, channel_weight, spatial_weight, residual = given.inputs
    arguments = given.arguments
    call = _call(x, channel_weight, given.grid, arguments, False, family)
    if residual is not None:
        _check_like("residual", residual, x)
    weights = Weights(channel_weight, spatial_weight)
    return run_forward(x, weights, residual, y, call, arguments.scale, arguments.relu)


def forward(given: Forward, family: str = "generic") -> tuple[Tensor, Tensor]:
    """``steam_kernels::forward``: y with x's strides, and the tokens and pre-activations for ``backward``.

    The second result is (N, 2 (C + gh gw)) in the accumulation dtype if ``save``, else (0,). ``family`` is a key of
    ``launch.FAMILIES``.
    """
    y = torch.empty_like(given.inputs.x)
    saved = _forward(given, y, family)
    return y, saved if given.save else saved.new_empty(0)


def forward_(given: Forward, family: str = "generic") -> None:
    """``steam_kernels::forward_``: ``forward`` into x itself. ``residual`` must not share memory with x.

    In the gate stage each program reads only the elements of x that it writes.
    """
    _forward(given, given.inputs.x, family)


def backward(given: Backward, family: str = "generic") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``steam_kernels::backward``: the gradients of x, both weights and the residual; (0,) for each that is not needed.

    ``dy`` is the gradient of y. ``y`` is the first result of forward if there was a ReLU, else None. ``saved`` is the
    second result of forward, and the options are forward's. Without a ReLU the residual's gradient is dy itself, and
    ``needs[3]`` must be False. A gradient has the dtype of its tensor. Gradients of maps have x's strides, and
    gradients of weights are contiguous.
    """
    dy, (x, channel_weight, spatial_weight, _), y, saved, needs, grid, arguments = given
    arguments.check_backward(y, needs)
    need_x, need_channel_weight, need_spatial_weight, need_residual = needs
    scale, call = arguments.scale, _call(x, channel_weight, grid, arguments, True, family)
    p = call.of
    _check_like("dy", dy, x)
    if y is not None:
        _check_like("y", y, x)
    _check_saved(saved, p, x)
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_x, need_residual))
    weights = Weights(channel_weight, spatial_weight)
    of_weights = need_channel_weight, need_spatial_weight
    dweights = Weights(*(w.new_empty(w.shape if need else 0) for w, need in zip(weights, of_weights, strict=True)))
    ring = need_x or need_channel_weight  # whether a gradient behind the channel gate is needed
    graphs = ring or need_spatial_weight
    maps = Maps(dy, x, y, dx if need_x else None, dresidual if need_residual else None)
    gradients = Weights(*(w if need else None for w, need in zip(dweights, of_weights, strict=True)))
    if p.samples == 0:
        for gradient in dweights:
            gradient.zero_()
    elif not graphs:
        if need_residual:
            run_gate_backward(call, maps, weights, gradients, None, 0, scale)
    else:
        run_backward(call, maps, weights, gradients, saved, scale, ring)
    return dx, *dweights, dresidual
