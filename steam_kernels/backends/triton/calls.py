"""The launches of a call: working memory, and one launch for each stage or for whole samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...config import accumulation_dtype
from . import launch
from .arguments import Options, constants
from .gate import gate, gate_backward
from .graph import graph, lattice
from .graph_backward import graph_backward_cells, graph_backward_ring, lattice_backward
from .pool import pool_runs, pool_tiles
from .weights import weights_backward
from .whole import whole, whole_backward


class Call(NamedTuple):
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

    def branches(self, how: launch.Launch, weights: Weights) -> tuple[Any, ...]:
        """The last runtime arguments of a kernel of both branches."""
        strides = *weights.channel.stride(), *weights.spatial.stride()
        return (*weights, *strides, *self.sizes(how), self.heads, self.head_width, *self.ring)

    @property
    def graph_constants(self) -> dict[str, Any]:
        """The constants of these kernels that do not depend on the launch."""
        return {"OPTIONS": constants(Options, self.options._asdict()), "ACC": self.acc}


class Weights(NamedTuple):
    """Both weights, or their gradients, where None is not needed."""

    channel: Any
    spatial: Any


class Maps(NamedTuple):
    """The maps of the backward pass; y is None without a ReLU, and a gradient is None if it is not needed."""

    dy: Tensor
    x: Tensor
    y: Tensor | None
    dx: Tensor | None
    dresidual: Tensor | None


class ForwardMemory(NamedTuple):
    """Working memory of the forward pass.

    ``sums`` are (N, C gh gw), and None where each cell is a pixel or the graph stage pools. ``gates`` are
    (N, C + gh gw). ``windows`` and ``partials`` have a row for each block of channels of each sample, of
    CHANNELS + 2 x reach and of gh gw numbers. ``vectors`` have 2 gh gw numbers for each program of the gate stage, if
    these programs compute the lattice.
    """

    sums: Tensor | None
    gates: Tensor
    windows: Tensor
    partials: Tensor
    vectors: Tensor | None


class BackwardMemory(NamedTuple):
    """Working memory of the backward pass.

    ``sums`` and ``products`` are (N, C gh gw), and None if they are not needed. ``gates``, ``flows`` and ``shifts`` are
    (N, C + gh gw). ``jacobian_c`` has (K + 1 + 2 heads) C numbers for each sample, of K neighbours on the ring, and
    ``jacobian_s`` (K + 1 + 2 heads) gh gw, of K places on the lattice. ``vectors``, ``windows``, ``partials`` and
    ``partials_c`` have a row for each block of channels of each sample: of 2 gh gw, of CHANNELS + 2 x reach, of gh gw
    and of 2 heads numbers. ``partials_s`` is (N, 2 heads). ``vectors`` are None if the lattice has a launch of its own.
    """

    sums: Tensor | None
    products: Tensor | None
    gates: Tensor
    flows: Tensor
    shifts: Tensor
    jacobian_c: Tensor | None
    jacobian_s: Tensor
    vectors: Tensor | None
    windows: Tensor
    partials: Tensor
    partials_c: Tensor
    partials_s: Tensor


def _cut(x: Tensor, *sizes: int) -> list[Any]:
    """Working memory in one allocation: views of so many numbers, aligned to 128 bytes; None for a size of 0."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // 32) * 32
    memory = torch.empty(end, dtype=accumulation_dtype(x.dtype), device=x.device)
    return [memory[start : start + size] if size else None for start, size in zip(starts, sizes, strict=True)]


def _pool(
    how: launch.Launch,
    call: Call,
    x: Tensor,
    dy: Tensor | None,
    y: Tensor | None,
    sums: Tensor | None,
    products: Tensor | None,
) -> None:
    arguments = x, dy, y, sums, products, *call.sizes(how)
    if how.kernel == "pool_runs":
        pool_runs[(how.programs,)](*arguments, how.steps, ACC=call.acc, **how.keywords)
    else:
        pool_tiles[(how.programs,)](*arguments, ACC=call.acc, **how.keywords)


def run_forward(
    x: Tensor, weights: Weights, residual: Tensor | None, y: Tensor, call: Call, scale: float, relu: bool
) -> Tensor:
    """Writes y, and returns the tokens and pre-activations."""
    p = call.of
    saved = x.new_empty((p.samples, 2 * (p.channels + p.cells)), dtype=accumulation_dtype(x.dtype))
    if p.samples == 0:
        return saved
    small, gating = launch.is_small(p), launch.gate(p)
    merged = not small and launch.merges_lattice(*call.graph_key)
    pooling = None if small else launch.pool(p)
    has_sums = not p.pixel_cells if small else pooling is not None
    how = (launch.whole if small else launch.graph)(*call.graph_key)
    channels = how.constants["GRAPH_CHANNELS" if small else "CHANNELS"]
    blocks = p.samples * launch.ceil_div(p.channels, channels)
    memory = ForwardMemory(
        *_cut(
            x,
            p.samples * p.channels * p.cells if has_sums else 0,
            p.samples * (p.channels + p.cells),
            blocks * (channels + 2 * call.reach),
            blocks * p.cells,
            gating.programs * 2 * p.cells if merged else 0,
        )
    )
    if small:
        whole[(how.programs,)](
            x,
            residual,
            y,
            memory.sums,
            saved,
            *(memory.gates, memory.windows, memory.partials),
            *call.branches(how, weights),
            SCALE=scale,
            RELU=relu,
            **call.graph_constants,
            **how.keywords,
        )
        return saved
    if pooling is not None:
        _pool(pooling, call, x, None, None, memory.sums, None)
    sums = x if memory.sums is None else memory.sums
    arguments = call.branch(how, weights.channel, True)
    graph[(how.programs,)](
        sums, saved, memory.gates, memory.windows, memory.partials, *arguments, **call.graph_constants, **how.keywords
    )  # fmt: skip
    single = launch.lattice(*call.graph_key)
    if not merged:
        arguments = call.branch(single, weights.spatial, False)
        lattice[(single.programs,)](
            saved, memory.gates, memory.partials, *arguments, **call.graph_constants, **single.keywords
        )  # fmt: skip
    gate[(gating.programs,)](
        x, residual, y, memory.gates, gating.steps, saved, memory.partials if merged else None, memory.vectors,
        *call.branch(gating, weights.spatial, False),
        SCALE=scale, RELU=relu, GRAPH=single.keywords["TILE"], **call.graph_constants, **gating.keywords,
    )  # fmt: skip
    return saved


def run_backward(
    call: Call, maps: Maps, weights: Weights, gradients: Weights, saved: Tensor, scale: float, ring: bool
) -> None:
    """The backward pass of the graphs, and of the gate stage behind them."""
    p, small = call.of, launch.is_small(call.of)
    how = (launch.whole if small else launch.graph)(*call.graph_key)
    channels = how.constants["GRAPH_CHANNELS" if small else "CHANNELS"]
    blocks = p.samples * launch.ceil_div(p.channels, channels)
    sums = 0 if p.pixel_cells else p.samples * p.channels * p.cells
    row = p.samples * (p.channels + p.cells)
    memory = BackwardMemory(
        *_cut(
            maps.x,
            sums if ring and call.options.SEQUENTIAL else 0,
            sums,
            *(row, row, row),
            p.samples * p.channels * (call.ring[1] + 1 + 2 * call.heads) if ring else 0,
            p.samples * p.cells * ((9 if call.options.DIAGONAL else 5) + 1 + 2 * call.heads),
            blocks * 2 * p.cells if ring and not small and launch.merges_lattice(*call.graph_key) else 0,
            blocks * (channels + 2 * call.reach),
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
            *memory[2:7],
            *memory[8:],
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
        run_gate_backward(call, maps, weights, gradients, memory, blocks, scale)
    else:
        _weights_backward(call, weights, gradients, memory, blocks)


def _stages_backward(
    call: Call,
    maps: Maps,
    weights: Weights,
    saved: Tensor,
    memory: BackwardMemory,
    how: launch.Launch,
    scale: float,
    ring: bool,
) -> None:
    """The pool and graph stages; ``how`` is the launch of the ring."""
    dy, x, y, *_ = maps
    given: tuple[Tensor | None, ...]
    sums: Tensor | None
    pooling = launch.pool(call.of)
    if pooling is None:
        given, sums = (x, dy, y), x
    else:
        _pool(pooling, call, x, dy, y, memory.sums, memory.products)
        given, sums = (memory.products, None, None), memory.sums
    options, merged = call.graph_constants, memory.vectors is not None
    jacobian_s = memory.jacobian_s if merged else None
    cells = launch.cells(*call.graph_key, merged)
    graph_backward_cells[(cells.programs,)](
        *given, saved, memory.gates, memory.flows, memory.jacobian_c, jacobian_s, memory.partials,
        *call.branches(cells, weights), SCALE=scale, RING=ring, **options, **cells.keywords,
    )  # fmt: skip
    if not merged:
        single = launch.lattice(*call.graph_key)
        lattice_backward[(single.programs,)](
            saved, memory.gates, memory.flows, memory.shifts, memory.jacobian_s, memory.partials, memory.partials_s,
            *call.branch(single, weights.spatial, False), SCALE=scale, **options, **single.keywords,
        )  # fmt: skip
    if ring:
        graph_backward_ring[(how.programs,)](
            sums if call.options.SEQUENTIAL else None,
            saved, memory.flows, memory.shifts, memory.jacobian_c, jacobian_s, memory.vectors, memory.windows,
            memory.partials, memory.partials_c, memory.partials_s,
            *call.sizes(how), call.heads, *call.ring, SCALE=scale, **options, **how.keywords,
        )  # fmt: skip


def run_gate_backward(
    call: Call,
    maps: Maps,
    weights: Weights,
    gradients: Weights,
    memory: BackwardMemory | None,
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


def _weights_backward(call: Call, weights: Weights, gradients: Weights, memory: BackwardMemory, blocks: int) -> None:
    how = launch.weights(call.heads, call.head_width)
    arguments = _weight_arguments(call, weights, gradients, memory, blocks)
    weights_backward[(how.programs,)](*arguments, ACC=call.acc, **how.keywords)


def _weight_arguments(
    call: Call, weights: Weights, gradients: Weights, memory: BackwardMemory | None, blocks: int
) -> tuple[Any, ...]:
    """The arguments for the gradients of the weights; ``blocks`` are the blocks of channels of all samples."""
    partials = (None, None) if memory is None else (memory.partials_c, memory.partials_s)
    # A kernel takes strides also of a gradient that is not needed; those of the weight cause no other compilation.
    strided = [w if gradient is None else gradient for gradient, w in zip(gradients, weights, strict=True)]
    strides = (stride for t in (*weights, *strided) for stride in t.stride())
    return (*partials, *weights, *gradients, *strides, blocks, call.of.samples, call.heads, call.head_width)
