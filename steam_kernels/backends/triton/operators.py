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

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...config import Arguments, accumulation_dtype
from ...schemas import Backward, Forward
from . import launch
from .arguments import INTERPRETED, Options, constants
from .gate import gate, gate_backward
from .graph import graph
from .graph_backward import graph_backward
from .pool import pool_runs, pool_tiles
from .weights import weights_backward
from .whole import whole, whole_backward

__all__ = ["INTERPRETED", "backward", "forward", "forward_"]


class _Call(NamedTuple):
    """The properties of a call that all its kernels need."""

    of: launch.Pass
    heads: int
    head_width: int
    #: The first neighbour of a channel on the ring, as a distance, and the number of neighbours.
    ring: tuple[int, int]
    options: Options
    acc: tl.dtype

    @property
    def graph_key(self) -> tuple[launch.Pass, int, int, int]:
        """The arguments of the launch table for the graph stage."""
        return self.of, self.heads, self.head_width, self.ring[1]

    def sizes(self, how: launch.Launch) -> tuple[int, int, int, int, int]:
        """Channels, area and width, divided by the divisors in the constants of a launch, and the grid."""
        p, constants = self.of, how.constants
        return (
            p.channels // constants["CHANNELS_MULTIPLE"],
            p.area // constants.get("AREA_MULTIPLE", 1),
            p.width // constants.get("WIDTH_MULTIPLE", 1),
            p.grid_h,
            p.grid_w,
        )

    def graph_arguments(self, how: launch.Launch, weights: _Weights) -> tuple[Any, ...]:
        """The last runtime arguments of the kernels of the graph stage, and of a whole sample."""
        sizes, strides = self.sizes(how), (*weights.channel.stride(), *weights.spatial.stride())
        return (*weights, *strides, *sizes, self.heads, self.head_width, *self.ring)

    @property
    def graph_constants(self) -> dict[str, Any]:
        """The constants of the same kernels that do not depend on the launch."""
        return {"OPTIONS": constants(Options, self.options._asdict()), "ACC": self.acc}


class _Weights(NamedTuple):
    channel: Tensor
    spatial: Tensor


class _Maps(NamedTuple):
    """The maps that the backward pass reads; y is None without a ReLU."""

    dy: Tensor
    x: Tensor
    y: Tensor | None


class _Rows(NamedTuple):
    """The vectors of each sample that the backward pass reads and writes.

    ``saved`` is from the forward pass: (N, 2 (C + gh gw)). ``gates``, ``flows`` and ``shifts`` are (N, C + gh gw), and
    ``partials`` is (N, 4 heads).
    """

    saved: Tensor
    gates: Tensor
    flows: Tensor
    shifts: Tensor
    partials: Tensor


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
) -> _Call:
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
    return _Call(p, num_heads, weight.shape[1] // num_heads, ring, options, acc)


def _rows(x: Tensor, numbers: int) -> Tensor:
    """Working memory of ``numbers`` numbers per sample."""
    return torch.empty((x.shape[0], numbers), dtype=accumulation_dtype(x.dtype), device=x.device)


def _pool(
    call: _Call, x: Tensor, dy: Tensor | None, y: Tensor | None, sums: Tensor | None, products: Tensor | None
) -> None:
    how = launch.pool(call.of)
    assert how is not None
    kernel = pool_runs if how.kernel == "pool_runs" else pool_tiles
    kernel[(how.programs,)](x, dy, y, sums, products, *call.sizes(how), ACC=call.acc, **how.keywords)


def _forward(given: Forward, y: Tensor, family: str) -> Tensor:
    """Writes y, and returns the tokens and pre-activations."""
    x, channel_weight, spatial_weight, residual = given.inputs
    weights, scale, relu = _Weights(channel_weight, spatial_weight), given.arguments.scale, given.arguments.relu
    call = _call(x, channel_weight, given.grid, given.arguments, False, family)
    if residual is not None:
        _check_like("residual", residual, x)
    p = call.of
    saved = _rows(x, 2 * (p.channels + p.cells))
    if p.samples == 0:
        return saved
    gates = _rows(x, p.channels + p.cells)
    if launch.is_small(p):
        how = launch.whole(*call.graph_key)
        whole[(how.programs,)](
            x,
            residual,
            y,
            None if p.pixel_cells else _rows(x, p.channels * p.cells),
            saved,
            gates,
            *call.graph_arguments(how, weights),
            SCALE=scale,
            RELU=relu,
            **call.graph_constants,
            **how.keywords,
        )
        return saved
    sums = x
    if not p.pixel_cells:
        sums = _rows(x, p.channels * p.cells)
        _pool(call, x, None, None, sums, None)
    how = launch.graph(*call.graph_key)
    arguments = call.graph_arguments(how, weights)
    graph[(how.programs,)](sums, saved, gates, *arguments, **call.graph_constants, **how.keywords)
    how = launch.gate(p)
    gate[(how.programs,)](
        x, residual, y, gates, *call.sizes(how), SCALE=scale, RELU=relu, ACC=call.acc, **how.keywords
    )  # fmt: skip
    return saved


def forward(given: Forward, family: str = "generic") -> tuple[Tensor, Tensor]:
    """``steam_kernels::forward``: y with x's strides, and the tokens and pre-activations for ``backward``.

    The second result is (N, 2 (C + gh gw)) in the accumulation dtype if ``save``, else (0,). ``residual`` is None or a
    map, ``options`` are :class:`~steam_kernels.config.Arguments`, and ``family`` is a key of ``launch.FAMILIES``.
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
    call = _call(x, channel_weight, grid, arguments, True, family)
    p = call.of
    _check_like("dy", dy, x)
    if y is not None:
        _check_like("y", y, x)
    _check_saved(saved, p, x)
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_x, need_residual))
    weights = _Weights(channel_weight, spatial_weight)
    of_weights = need_channel_weight, need_spatial_weight
    dweights = _Weights(*(w.new_empty(w.shape if need else 0) for w, need in zip(weights, of_weights, strict=True)))
    gates, flows, shifts = (_rows(x, p.channels + p.cells) for _ in range(3))
    rows = _Rows(saved, gates, flows, shifts, _rows(x, 4 * call.heads))
    ring = need_x or need_channel_weight  # whether a gradient behind the channel gate is needed
    graphs = ring or need_spatial_weight
    needed = (dx if need_x else None), (dresidual if need_residual else None)
    maps = _Maps(dy, x, y)
    if p.samples and graphs and launch.is_small(p):
        _whole_backward(call, maps, needed, weights, rows, arguments.scale, ring)
    elif p.samples:
        if graphs:
            _graph_backward(call, maps, weights, rows, arguments.scale, ring)
        if need_x or need_residual:
            how = launch.gate(p)
            gate_backward[(how.programs,)](
                dy,
                y,
                *needed,
                rows.gates,
                rows.shifts,
                *call.sizes(how),
                SCALE=arguments.scale,
                SEQUENTIAL=arguments.sequential,
                ACC=call.acc,
                **how.keywords,
            )
    if need_channel_weight or need_spatial_weight:
        _weights_backward(call, weights, dweights, of_weights, rows.partials)
    return dx, *dweights, dresidual


def _sums_and_products(call: _Call, x: Tensor, ring: bool) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the sums of x and of x dy; None for the sums if they are not needed, for both if a cell is a pixel."""
    p = call.of
    if p.pixel_cells:
        return None, None
    sums = _rows(x, p.channels * p.cells) if ring and call.options.SEQUENTIAL else None
    return sums, _rows(x, p.channels * p.cells)


def _whole_backward(
    call: _Call,
    maps: _Maps,
    needed: tuple[Tensor | None, Tensor | None],
    weights: _Weights,
    rows: _Rows,
    scale: float,
    ring: bool,
) -> None:
    how = launch.whole(*call.graph_key)
    whole_backward[(how.programs,)](
        *maps,
        *needed,
        *_sums_and_products(call, maps.x, ring),
        *rows,
        *call.graph_arguments(how, weights),
        SCALE=scale,
        RING=ring,
        **call.graph_constants,
        **how.keywords,
    )


def _graph_backward(call: _Call, maps: _Maps, weights: _Weights, rows: _Rows, scale: float, ring: bool) -> None:
    dy, x, y = maps
    sums, products = _sums_and_products(call, x, ring)
    if products is not None:
        _pool(call, x, dy, y, sums, products)
    how = launch.graph(*call.graph_key)
    graph_backward[(how.programs,)](
        x if products is None else products if sums is None else sums,
        products,
        dy if products is None else None,
        y if products is None else None,
        *rows,
        *call.graph_arguments(how, weights),
        SCALE=scale,
        RING=ring,
        **call.graph_constants,
        **how.keywords,
    )


def _weights_backward(
    call: _Call, weights: _Weights, gradients: _Weights, needs: tuple[bool, bool], partials: Tensor
) -> None:
    given = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    # A kernel takes strides also of a gradient that is not needed; those of the weight cause no other compilation.
    strided = [w if gradient is None else gradient for gradient, w in zip(given, weights, strict=True)]
    weights_backward[(1,)](
        partials,
        *weights,
        *given,
        *(stride for t in (*weights, *strided) for stride in t.stride()),
        call.of.samples,
        call.heads,
        call.head_width,
        ACC=call.acc,
        **launch.weights(call.heads, call.head_width).keywords,
    )
