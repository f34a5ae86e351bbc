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

from ...config import accumulation_dtype
from . import launch
from .arguments import INTERPRETED, Options, constants
from .gate import gate, gate_backward
from .graph import graph, lattice
from .graph_backward import graph_backward_cells, graph_backward_ring, lattice_backward
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
    def graph_key(self) -> tuple[launch.Pass, int, int]:
        """The arguments of the launch table for the graph stage."""
        return self.of, self.heads, self.head_width

    @property
    def reach(self) -> int:
        """The distance of a channel's farthest neighbour on the ring."""
        first, count = self.ring
        return max(-first, first + count - self.options.RING_LOOPS)

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

    def branch(self, how: launch.Launch, weight: Tensor, ring: bool) -> tuple[Any, ...]:
        """The last runtime arguments of a kernel of one branch of the graph stage."""
        last = self.ring if ring else ()
        return (weight, *weight.stride(), *self.sizes(how), self.heads, self.head_width, *last)

    def branches(self, how: launch.Launch, weights: _Weights) -> tuple[Any, ...]:
        """The last runtime arguments of a kernel of a whole sample."""
        strides = *weights.channel.stride(), *weights.spatial.stride()
        return (*weights, *strides, *self.sizes(how), self.heads, self.head_width, *self.ring)

    @property
    def graph_constants(self) -> dict[str, Any]:
        """The constants of these kernels that do not depend on the launch."""
        return {"OPTIONS": constants(Options, self.options._asdict()), "ACC": self.acc}


class _Weights(NamedTuple):
    """Both weights, or their gradients, where None is not needed."""

    channel: Any
    spatial: Any


class _Maps(NamedTuple):
    """The maps of the backward pass; y is None without a ReLU, and a gradient is None if it is not needed."""

    dy: Tensor
    x: Tensor
    y: Tensor | None
    dx: Tensor | None
    dresidual: Tensor | None


class _Forward(NamedTuple):
    """Working memory of the forward pass.

    ``sums`` are (N, C gh gw), and None where each cell is a pixel. ``gates`` are (N, C + gh gw). ``windows`` and
    ``partials`` have a row for each block of channels of each sample, of CHANNELS + 2 x reach and of gh gw numbers.
    """

    sums: Tensor | None
    gates: Tensor
    windows: Tensor
    partials: Tensor


class _Backward(NamedTuple):
    """Working memory of the backward pass.

    ``sums`` and ``products`` are (N, C gh gw), and None if they are not needed. ``gates``, ``flows`` and ``shifts`` are
    (N, C + gh gw). ``windows``, ``partials`` and ``partials_c`` have a row for each block of channels of each sample:
    of 2 (CHANNELS + 4 x reach), of gh gw and of 2 heads numbers. ``partials_s`` is (N, 2 heads).
    """

    sums: Tensor | None
    products: Tensor | None
    gates: Tensor
    flows: Tensor
    shifts: Tensor
    windows: Tensor
    partials: Tensor
    partials_c: Tensor
    partials_s: Tensor


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
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    sequential: bool,
    backward: bool,
    family: str,
) -> _Call:
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


def _cut(x: Tensor, *sizes: int) -> list[Tensor | None]:
    """Working memory in one allocation: views of so many numbers, aligned to 128 bytes; None for a size of 0."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // 32) * 32
    memory = torch.empty(end, dtype=accumulation_dtype(x.dtype), device=x.device)
    return [memory[start : start + size] if size else None for start, size in zip(starts, sizes, strict=True)]


def _pool(
    call: _Call, x: Tensor, dy: Tensor | None, y: Tensor | None, sums: Tensor | None, products: Tensor | None
) -> None:
    how = launch.pool(call.of)
    assert how is not None
    arguments = x, dy, y, sums, products, *call.sizes(how)
    if how.kernel == "pool_runs":
        pool_runs[(how.programs,)](*arguments, how.steps, ACC=call.acc, **how.keywords)
    else:
        pool_tiles[(how.programs,)](*arguments, ACC=call.acc, **how.keywords)


def _forward(
    x: Tensor, weights: _Weights, residual: Tensor | None, y: Tensor, call: _Call, scale: float, relu: bool
) -> Tensor:
    """Writes y, and returns the tokens and pre-activations."""
    p = call.of
    saved = x.new_empty((p.samples, 2 * (p.channels + p.cells)), dtype=accumulation_dtype(x.dtype))
    if p.samples == 0:
        return saved
    small = launch.is_small(p)
    how = (launch.whole if small else launch.graph)(*call.graph_key)
    channels = how.constants["GRAPH_CHANNELS" if small else "CHANNELS"]
    blocks = p.samples * launch.ceil_div(p.channels, channels)
    memory = _Forward(
        *_cut(
            x,
            0 if p.pixel_cells else p.samples * p.channels * p.cells,
            p.samples * (p.channels + p.cells),
            blocks * (channels + 2 * call.reach),
            blocks * p.cells,
        )
    )
    if small:
        whole[(how.programs,)](
            x,
            residual,
            y,
            memory.sums,
            saved,
            *memory[1:],
            *call.branches(how, weights),
            SCALE=scale,
            RELU=relu,
            **call.graph_constants,
            **how.keywords,
        )
        return saved
    if memory.sums is not None:
        _pool(call, x, None, None, memory.sums, None)
    sums = x if memory.sums is None else memory.sums
    arguments = call.branch(how, weights.channel, True)
    graph[(how.programs,)](sums, saved, *memory[1:], *arguments, **call.graph_constants, **how.keywords)
    how = launch.lattice(*call.graph_key)
    arguments = call.branch(how, weights.spatial, False)
    lattice[(how.programs,)](
        saved, memory.gates, memory.partials, *arguments, **call.graph_constants, **how.keywords
    )  # fmt: skip
    how = launch.gate(p)
    gate[(how.programs,)](
        x, residual, y, memory.gates, how.steps, *call.sizes(how), SCALE=scale, RELU=relu, ACC=call.acc, **how.keywords
    )  # fmt: skip
    return saved


def forward(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    grid: tuple[int, int],
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    sequential: bool,
    scale: float,
    relu: bool,
    save: bool,
    *,
    family: str = "generic",
) -> tuple[Tensor, Tensor]:
    """``steam_kernels::forward``: y with x's strides, and the tokens and pre-activations for ``backward``.

    The second result is (N, 2 (C + gh gw)) in the accumulation dtype if ``save``, else (0,). ``residual`` is None or a
    map, ``sequential`` is the order, ``relu`` is the activation, and ``family`` is a key of ``launch.FAMILIES``.
    """
    options = num_heads, channel_radius, spatial_neighbors, self_loops, sequential
    call = _call(x, channel_weight, grid, *options, False, family)
    if residual is not None:
        _check_like("residual", residual, x)
    y = torch.empty_like(x)
    saved = _forward(x, _Weights(channel_weight, spatial_weight), residual, y, call, scale, relu)
    return y, saved if save else saved.new_empty(0)


def forward_(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    grid: tuple[int, int],
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    sequential: bool,
    scale: float,
    relu: bool,
    *,
    family: str = "generic",
) -> None:
    """``steam_kernels::forward_``: ``forward`` into x itself. ``residual`` must not share memory with x.

    In the gate stage each program reads only the elements of x that it writes.
    """
    options = num_heads, channel_radius, spatial_neighbors, self_loops, sequential
    call = _call(x, channel_weight, grid, *options, False, family)
    if residual is not None:
        _check_like("residual", residual, x)
    _forward(x, _Weights(channel_weight, spatial_weight), residual, x, call, scale, relu)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    saved: Tensor,
    grid: tuple[int, int],
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    sequential: bool,
    scale: float,
    need_x: bool,
    need_channel_weight: bool,
    need_spatial_weight: bool,
    need_residual: bool,
    *,
    family: str = "generic",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``steam_kernels::backward``: the gradients of x, both weights and the residual; (0,) for each that is not needed.

    ``dy`` is the gradient of y. ``y`` is the first result of forward if there was a ReLU, else None. ``saved`` is the
    second result of forward, and the options are forward's. Without a ReLU the residual's gradient is dy itself, and
    ``need_residual`` must be False. A gradient has the dtype of its tensor. Gradients of maps have x's strides, and
    gradients of weights are contiguous.
    """
    options = num_heads, channel_radius, spatial_neighbors, self_loops, sequential
    call = _call(x, channel_weight, grid, *options, True, family)
    p = call.of
    _check_like("dy", dy, x)
    if y is not None:
        _check_like("y", y, x)
    elif need_residual:
        raise ValueError("need_residual must be False where y is None: without a ReLU the residual's gradient is dy")
    _check_saved(saved, p, x)
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_x, need_residual))
    weights = _Weights(channel_weight, spatial_weight)
    needs = need_channel_weight, need_spatial_weight
    dweights = _Weights(*(w.new_empty(w.shape if need else 0) for w, need in zip(weights, needs, strict=True)))
    ring = need_x or need_channel_weight  # whether a gradient behind the channel gate is needed
    graphs = ring or need_spatial_weight
    maps = _Maps(dy, x, y, dx if need_x else None, dresidual if need_residual else None)
    gradients = _Weights(*(w if need else None for w, need in zip(dweights, needs, strict=True)))
    if p.samples == 0:
        for gradient in dweights:
            gradient.zero_()
    elif not graphs:
        if need_residual:
            _gate_backward(call, maps, weights, gradients, None, 0, scale)
    else:
        _graphs_backward(call, maps, weights, gradients, saved, scale, ring)
    return dx, *dweights, dresidual


def _graphs_backward(
    call: _Call, maps: _Maps, weights: _Weights, gradients: _Weights, saved: Tensor, scale: float, ring: bool
) -> None:
    """The backward pass of the graphs, and of the gate stage behind them."""
    p, small = call.of, launch.is_small(call.of)
    how = (launch.whole if small else launch.graph)(*call.graph_key)
    channels = how.constants["GRAPH_CHANNELS" if small else "CHANNELS"]
    blocks = p.samples * launch.ceil_div(p.channels, channels)
    sums = 0 if p.pixel_cells else p.samples * p.channels * p.cells
    row = p.samples * (p.channels + p.cells)
    memory = _Backward(
        *_cut(
            maps.x,
            sums if ring and call.options.SEQUENTIAL else 0,
            sums,
            *(row, row, row),
            blocks * 2 * (channels + 4 * call.reach),
            blocks * p.cells,
            blocks * 2 * call.heads,
            p.samples * 2 * call.heads,
        )
    )
    if small:
        whole_backward[(how.programs,)](
            *maps,
            *memory[:2],
            saved,
            *memory[2:],
            *call.branches(how, weights),
            SCALE=scale,
            RING=ring,
            **call.graph_constants,
            **how.keywords,
        )
        if any(gradient is not None for gradient in gradients):
            _weights_backward(call, weights, gradients, memory, blocks)
        return
    _stages_backward(call, maps, weights, saved, memory, how, scale, ring)
    if maps.dx is not None or maps.dresidual is not None:
        _gate_backward(call, maps, weights, gradients, memory, blocks, scale)
    else:
        _weights_backward(call, weights, gradients, memory, blocks)


def _stages_backward(
    call: _Call,
    maps: _Maps,
    weights: _Weights,
    saved: Tensor,
    memory: _Backward,
    how: launch.Launch,
    scale: float,
    ring: bool,
) -> None:
    """The pool and graph stages; ``how`` is the launch of the kernels of blocks of channels."""
    dy, x, y, *_ = maps
    if memory.products is None:
        factor, sums = (x, dy, y), x
    else:
        _pool(call, x, dy, y, memory.sums, memory.products)
        factor, sums = (memory.products, None, None), memory.sums
    options, keywords = call.graph_constants, how.keywords
    graph_backward_cells[(how.programs,)](
        *factor, saved, memory.gates, memory.flows, memory.partials, *call.sizes(how),
        SCALE=scale, RING=ring, ACC=call.acc, **keywords,
    )  # fmt: skip
    single = launch.lattice(*call.graph_key)
    lattice_backward[(single.programs,)](
        saved, memory.gates, memory.flows, memory.shifts, memory.partials, memory.partials_s,
        *call.branch(single, weights.spatial, False), SCALE=scale, **options, **single.keywords,
    )  # fmt: skip
    if ring:
        graph_backward_ring[(how.programs,)](
            sums if call.options.SEQUENTIAL else None,
            saved, memory.flows, memory.shifts, memory.windows, memory.partials_c,
            *call.branch(how, weights.channel, True), **options, **keywords,
        )  # fmt: skip


def _gate_backward(
    call: _Call,
    maps: _Maps,
    weights: _Weights,
    gradients: _Weights,
    memory: _Backward | None,
    blocks: int,
    scale: float,
) -> None:
    """The gate stage, with one more program if a gradient of a weight is needed."""
    how = launch.gate(call.of)
    of_weights = any(gradient is not None for gradient in gradients)
    vectors = (None, None) if memory is None else (memory.gates, memory.shifts)
    table = launch.weights(call.heads, call.head_width).keywords["TILE"] if of_weights else None
    gate_backward[(how.programs + of_weights,)](
        maps.dy,
        maps.y,
        maps.dx,
        maps.dresidual,
        *vectors,
        *_weight_arguments(call, weights, gradients, memory if of_weights else None, blocks),
        how.steps,
        *call.sizes(how),
        SCALE=scale,
        SEQUENTIAL=call.options.SEQUENTIAL,
        WEIGHTS=table,
        ACC=call.acc,
        **how.keywords,
    )


def _weights_backward(
    call: _Call, weights: _Weights, gradients: _Weights, memory: _Backward, blocks: int
) -> None:
    how = launch.weights(call.heads, call.head_width)
    arguments = _weight_arguments(call, weights, gradients, memory, blocks)
    weights_backward[(how.programs,)](*arguments, ACC=call.acc, **how.keywords)


def _weight_arguments(
    call: _Call, weights: _Weights, gradients: _Weights, memory: _Backward | None, blocks: int
) -> tuple[Any, ...]:
    """The arguments for the gradients of the weights; ``blocks`` are the blocks of channels of all samples."""
    partials = (None, None) if memory is None else (memory.partials_c, memory.partials_s)
    # A kernel takes strides also of a gradient that is not needed; those of the weight cause no other compilation.
    strided = [w if gradient is None else gradient for gradient, w in zip(gradients, weights, strict=True)]
    strides = (stride for t in (*weights, *strided) for stride in t.stride())
    return (*partials, *weights, *gradients, *strides, blocks, call.of.samples, call.heads, call.head_width)
