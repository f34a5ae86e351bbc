"""The Triton backend: pool, graph and gate on a GPU, or on anything that runs Triton's kernels.

``forward``, ``backward`` and ``forward_`` are the operators of ``steam_kernels.ops`` with their conventions. They know
no device: they allocate beside x and launch. Importing this module imports Triton.

What all three take: x (N, C, H, W) of float32, float64, float16 or bfloat16, dense in NCHW or channels_last; every
other map of x's shape, dtype and strides; both weights (4, embed_dim) of float32 or x's dtype, in any strides, of an
embed_dim that ``num_heads`` divides; ``grid`` the cells of each axis, at most H and W; all on one device. N may be 0,
and the stride of an axis of length 1 means nothing. Maps that break this raise a ValueError or TypeError before
anything is launched; shapes of weights and the options are ``steam_kernels.steam``'s to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import Arguments, accumulation_dtype
from . import launch
from .gate import gate, gate_backward
from .graph import graph, graph_backward, weights_backward
from .pool import pool_runs, pool_tiles
from .whole import whole, whole_backward

__all__ = ["INTERPRETED", "backward", "forward", "forward_"]

#: Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this was imported), on any tensor.
INTERPRETED = not isinstance(gate, triton.JITFunction)


class _Call(NamedTuple):
    """What all kernels of a call share."""

    problem: launch.Problem
    heads: int
    head_width: int
    ring: tuple[int, int]
    #: Constants of the graph kernels.
    options: dict[str, bool]
    acc: tl.dtype

    @property
    def table(self) -> tuple[launch.Problem, int, int, int]:
        """What the launch table wants to know for the graph stage."""
        return self.problem, self.heads, self.head_width, self.ring[1]

    def graphs(self, how: launch.Launch, channel_weight: Tensor, spatial_weight: Tensor) -> tuple[Any, ...]:
        """The arguments that the graph kernels, and those of a whole sample, end with."""
        return (
            channel_weight,
            spatial_weight,
            *channel_weight.stride(),
            *spatial_weight.stride(),
            *self.units(how),
            self.heads,
            self.head_width,
            *self.ring,
        )

    def units(self, how: launch.Launch) -> tuple[int, int, int, int, int]:
        """Channels, area and width, in the units that a launch's constants tell, and the grid."""
        p, told = self.problem, how.constants
        return (
            p.channels // told["CHANNEL_UNIT"],
            p.area // told.get("AREA_UNIT", 1),
            p.width // told.get("WIDTH_UNIT", 1),
            p.grid_h,
            p.grid_w,
        )


def _is_channels_last(x: Tensor) -> bool:
    """The layout of x; raises where it has neither of the two that the kernels know."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    raise ValueError(
        "x must be dense in NCHW or channels_last, which steam_kernels.steam() makes of any other, got shape "
        f"{tuple(x.shape)} and strides {x.stride()}"
    )


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    """Raises unless t can be read by x's offsets."""
    if t.dtype is not x.dtype:
        raise TypeError(f"{name} must be of x's dtype {x.dtype}, got {t.dtype}")
    if t.shape == x.shape:
        own, wanted = t.stride(), x.stride()
        if own == wanted or 0 in x.shape or all(a == b or n == 1 for a, b, n in zip(own, wanted, x.shape, strict=True)):
            return
    raise ValueError(
        f"{name} must have x's shape {tuple(x.shape)} and strides {x.stride()}, got {tuple(t.shape)} and {t.stride()}"
    )


def _check_saved(saved: Tensor, p: launch.Problem, x: Tensor) -> None:
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
    problem = launch.Problem(
        samples,
        channels,
        height,
        width,
        grid[0],
        grid[1],
        x.element_size(),
        channels_last,
        backward,
        family,
    )
    # A ring that reaches around has each node once.
    lowest = max(-channel_radius, -((channels - 1) // 2))
    highest = min(channel_radius, channels // 2)
    ring_loops = self_loops or highest == lowest
    options = {
        "RING_LOOPS": ring_loops,
        "LATTICE_LOOPS": self_loops or problem.cells == 1,
        "DIAGONAL": spatial_neighbors == 8,
        "SEQUENTIAL": sequential,
    }
    ring = lowest, highest - lowest + ring_loops
    acc = tl.float64 if x.dtype is torch.float64 else tl.float32
    return _Call(problem, num_heads, weight.shape[1] // num_heads, ring, options, acc)


def _rows(x: Tensor, numbers: int) -> Tensor:
    """Scratch, ``numbers`` a sample."""
    return torch.empty((x.shape[0], numbers), dtype=accumulation_dtype(x.dtype), device=x.device)


def _pool(
    call: _Call, x: Tensor, dy: Tensor | None, y: Tensor | None, sums: Tensor | None, products: Tensor | None
) -> None:
    how = launch.pool(call.problem)
    assert how is not None
    kernel = pool_runs if how.kernel == "pool_runs" else pool_tiles
    kernel[(how.programs,)](x, dy, y, sums, products, *call.units(how), ACC=call.acc, **how.options)


def _forward(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    y: Tensor,
    call: _Call,
    scale: float,
    relu: bool,
) -> Tensor:
    """Writes y and returns what backward wants."""
    p = call.problem
    saved = _rows(x, 2 * (p.channels + p.cells))
    if p.samples == 0:
        return saved
    gates = _rows(x, p.channels + p.cells)
    if launch.is_small(p):
        how = launch.whole(*call.table)
        whole[(how.programs,)](
            x,
            residual,
            y,
            None if p.pixel_cells else _rows(x, p.channels * p.cells),
            saved,
            gates,
            *call.graphs(how, channel_weight, spatial_weight),
            SCALE=scale,
            RELU=relu,
            ACC=call.acc,
            **call.options,
            **how.options,
        )
        return saved
    sums = x
    if not p.pixel_cells:
        sums = _rows(x, p.channels * p.cells)
        _pool(call, x, None, None, sums, None)
    how = launch.graph(*call.table)
    graph[(how.programs,)](
        sums,
        saved,
        gates,
        *call.graphs(how, channel_weight, spatial_weight),
        ACC=call.acc,
        **call.options,
        **how.options,
    )
    how = launch.gate(p)
    gate[(how.programs,)](
        x,
        residual,
        y,
        gates,
        *call.units(how),
        SCALE=scale,
        RELU=relu,
        ACC=call.acc,
        **how.options,
    )
    return saved


def forward(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    save: bool,
    grid: tuple[int, int],
    *options: Any,
    family: str = "generic",
) -> tuple[Tensor, Tensor]:
    """``steam_kernels::forward``: y, in x's layout, and what backward wants of it.

    That is (N, 2 (C + gh gw)) in the accumulation dtype where ``save`` is set, else nothing, (0,). ``residual`` is None
    or a map, ``sequential`` the order, ``relu`` the activation; ``family`` is a key of ``launch.FAMILIES``.
    """
    arguments = Arguments(*options)
    call = _call(x, channel_weight, grid, arguments, False, family)
    if residual is not None:
        _check_like("residual", residual, x)
    y = torch.empty_like(x)
    saved = _forward(x, channel_weight, spatial_weight, residual, y, call, arguments.scale, arguments.relu)
    return y, saved if save else saved.new_empty(0)


def forward_(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    grid: tuple[int, int],
    *options: Any,
    family: str = "generic",
) -> None:
    """``steam_kernels::forward_``: ``forward`` into x itself, whose memory ``residual`` must not share.

    The gate's programs read the very elements that they write.
    """
    arguments = Arguments(*options)
    call = _call(x, channel_weight, grid, arguments, False, family)
    if residual is not None:
        _check_like("residual", residual, x)
    _forward(x, channel_weight, spatial_weight, residual, x, call, arguments.scale, arguments.relu)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    saved: Tensor,
    needs: Sequence[bool],
    grid: tuple[int, int],
    *options: Any,
    family: str = "generic",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``steam_kernels::backward``: the gradients of x, both weights and the residual, (0,) where not asked for.

    ``dy`` is the gradient of y, ``y`` what forward returned where there was a ReLU, else None, ``saved`` its second
    result. Without a ReLU the residual's gradient is dy itself, and must not be asked for. The options are forward's.
    Gradients have the dtypes of what they are gradients of; those of maps have x's layout, weights' are contiguous.
    """
    need_x, need_channel_weight, need_spatial_weight, need_residual = needs
    arguments = Arguments(*options)
    call = _call(x, channel_weight, grid, arguments, True, family)
    p = call.problem
    _check_like("dy", dy, x)
    arguments.check_backward(y, needs)
    if y is not None:
        _check_like("y", y, x)
    _check_saved(saved, p, x)
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_x, need_residual))
    dchannel, dspatial = (
        weight.new_empty(weight.shape if need else 0)
        for weight, need in ((channel_weight, need_channel_weight), (spatial_weight, need_spatial_weight))
    )
    gates, shifts = _rows(x, p.channels + p.cells), _rows(x, p.channels + p.cells)
    partials = _rows(x, 4 * call.heads)
    ring = need_x or need_channel_weight  # whether anybody asks for what lies behind the channel gate
    graphs = ring or need_spatial_weight
    asked = (dx if need_x else None), (dresidual if need_residual else None)
    if p.samples and graphs and launch.is_small(p):
        flows, sums, products = _behind(call, x, ring)
        how = launch.whole(*call.table)
        whole_backward[(how.programs,)](
            dy,
            x,
            y,
            *asked,
            sums,
            products,
            saved,
            gates,
            flows,
            shifts,
            partials,
            *call.graphs(how, channel_weight, spatial_weight),
            SCALE=arguments.scale,
            RING=ring,
            ACC=call.acc,
            **call.options,
            **how.options,
        )
    elif p.samples:
        if graphs:
            _graph_backward(
                call, dy, x, y, channel_weight, spatial_weight, saved, gates, shifts, partials, arguments.scale, ring
            )
        if need_x or need_residual:
            how = launch.gate(p)
            gate_backward[(how.programs,)](
                dy,
                y,
                *asked,
                gates,
                shifts,
                *call.units(how),
                SCALE=arguments.scale,
                SEQUENTIAL=arguments.sequential,
                ACC=call.acc,
                **how.options,
            )
    if need_channel_weight or need_spatial_weight:
        weights_backward[(1,)](
            partials,
            channel_weight,
            spatial_weight,
            dchannel if need_channel_weight else None,
            dspatial if need_spatial_weight else None,
            *channel_weight.stride(),
            *spatial_weight.stride(),
            *(dchannel if need_channel_weight else channel_weight).stride(),
            *(dspatial if need_spatial_weight else spatial_weight).stride(),
            p.samples,
            call.heads,
            call.head_width,
            ACC=call.acc,
            **launch.weights(call.heads, call.head_width).options,
        )
    return dx, dchannel, dspatial, dresidual


def _behind(call: _Call, x: Tensor, ring: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scratch of the graph stage backwards: flows, and sums and products where they are not x and x dy themselves."""
    p = call.problem
    cells = None if p.pixel_cells else p.channels * p.cells
    sums = _rows(x, cells) if cells and ring and call.options["SEQUENTIAL"] else None
    return _rows(x, p.channels + p.cells), sums, _rows(x, cells) if cells else None


def _graph_backward(
    call: _Call,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    saved: Tensor,
    gates: Tensor,
    shifts: Tensor,
    partials: Tensor,
    scale: float,
    ring: bool,
) -> None:
    flows, sums, products = _behind(call, x, ring)
    if products is not None:
        _pool(call, x, dy, y, sums, products)
    how = launch.graph(*call.table)
    graph_backward[(how.programs,)](
        x if products is None else products if sums is None else sums,
        products,
        dy if products is None else None,
        y if products is None else None,
        saved,
        gates,
        flows,
        shifts,
        partials,
        *call.graphs(how, channel_weight, spatial_weight),
        SCALE=scale,
        RING=ring,
        ACC=call.acc,
        **call.options,
        **how.options,
    )
