"""The operators: schema, fakes, autograd and FLOP formulas; the one place that knows PyTorch's dispatcher.

``steam_kernels::forward`` and ``steam_kernels::backward`` are functional and opaque to the compiler; ``forward_``
writes into x. On a GPU they run the first backend that can; ``triton_forward``, ``cuda_forward`` and so on are one
backend's, for a call that names it. All take tensors of any strides, and copy those that their kernels cannot read as
they are. y, dx and dresidual have x's strides where x is dense in NCHW or channels_last, else NCHW's; gradients of
weights have the strides that ``torch.empty_like`` gives for the weights. ``grid`` is resolved. ``saved`` is
``(N, 2 (C + gh gw))`` in the accumulation dtype, a row being [z | o_c | u | o_s]: tokens and pre-activations of the
channel and the spatial graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends, memory, reference
from .backends import gpu
from .config import Unit, accumulation_dtype, make_unit
from .cost import backward_flops, forward_flops

# At module level: the operators vanish with the library object.
_LIBRARY = torch.library.Library("steam_kernels", "DEF")
_OPTIONS = (
    "SymInt[2] grid, int num_heads, int channel_radius, int spatial_neighbors, bool self_loops, bool sequential, "
    "float scale"
)
_SCHEMAS = {
    "forward": "(Tensor x, Tensor channel_weight, Tensor spatial_weight, Tensor? residual, "
    f"{_OPTIONS}, bool relu, bool save) -> (Tensor y, Tensor saved)",
    "backward": "(Tensor dy, Tensor x, Tensor? y, Tensor channel_weight, Tensor spatial_weight, Tensor saved, "
    f"{_OPTIONS}, bool need_x, bool need_channel_weight, bool need_spatial_weight, bool need_residual) "
    "-> (Tensor dx, Tensor dchannel_weight, Tensor dspatial_weight, Tensor dresidual)",
    "forward_": "(Tensor(a!) x, Tensor channel_weight, Tensor spatial_weight, Tensor? residual, "
    f"{_OPTIONS}, bool relu) -> ()",
}
#: Backends with operators of their own, by name.
_NAMED = ("triton", "cuda")
#: What the names of one backend's operators start with, the automatic ones' first.
PREFIXES = ("", *(f"{_backend}_" for _backend in _NAMED))
for _prefix in PREFIXES:
    for _name, _schema in _SCHEMAS.items():
        # flexible_layout: a compiler may choose the memory format of the maps, which the operators take in any strides.
        _LIBRARY.define(_prefix + _name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


class Operators(NamedTuple):
    """The three operators of one backend, all of the schemas above."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    forward_: Callable[..., None]


def _operators(prefix: str) -> Operators:
    return Operators(*(getattr(torch.ops.steam_kernels, prefix + name).default for name in Operators._fields))


#: The key of the operators that serve a call which names no backend.
AUTOMATIC = "automatic"
#: Backend name -> operators; a backend that is not here is plain differentiable PyTorch.
OPERATORS: dict[str, Operators] = {
    AUTOMATIC: _operators(""),
    "cpu": _operators(""),
    **{name: _operators(f"{name}_") for name in _NAMED},
}


# ---- fakes: shapes, dtypes and strides -------------------------------------------------------------------------------


def _fake_forward(
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
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], 2 * (x.shape[1] + grid[0] * grid[1])) if save else (0,)
    return _map_like(x, True), x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def _fake_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _map_like(x, need_x),
        _weight_like(channel_weight, need_channel_weight),
        _weight_like(spatial_weight, need_spatial_weight),
        _map_like(x, need_residual),
    )


def _map_like(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(memory.dense(x)) if wanted else x.new_empty(0)


def _weight_like(weight: Tensor, wanted: bool) -> Tensor:
    # Not empty_like of what is contiguous, whose fake forgets the stride of an axis of length 1.
    if wanted and not weight.is_contiguous():
        return torch.empty_like(weight)
    return weight.new_empty(weight.shape if wanted else 0)


def _fake_forward_(*args: Any) -> None:
    return None


for _prefix in PREFIXES:
    for _name, _fake in (("forward", _fake_forward), ("backward", _fake_backward), ("forward_", _fake_forward_)):
        torch.library.register_fake(f"steam_kernels::{_prefix}{_name}", _fake, lib=_LIBRARY)


# ---- the operators in plain PyTorch, for every device that has no kernels --------------------------------------------


def _unit(
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    sequential: bool,
    scale: float,
    relu: bool = False,
) -> Unit:
    order, activation = "sequential" if sequential else "parallel", "relu" if relu else None
    return make_unit(
        num_heads,
        None,
        None,
        channel_radius,
        spatial_neighbors,
        self_loops,
        order,
        scale,
        activation,
        False,
        None,
    )


def _plain_forward(
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
) -> tuple[Tensor, Tensor]:
    unit = _unit(num_heads, channel_radius, spatial_neighbors, self_loops, sequential, scale, relu)
    with torch.no_grad():
        y, saved = reference.forward(x, channel_weight, spatial_weight, residual, unit, (grid[0], grid[1]))
        return _map_like(x, True).copy_(y), saved if save else saved.new_empty(0)


def _plain_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unit = _unit(num_heads, channel_radius, spatial_neighbors, self_loops, sequential, scale)
    if need_residual and y is None:
        raise ValueError("need_residual must be False where y is None: without a ReLU the residual's gradient is dy")
    with torch.no_grad():
        if y is not None:
            dy = dy.masked_fill(y <= 0, 0)
        gradients = reference.backward(dy, x, channel_weight, spatial_weight, saved, unit, (grid[0], grid[1]))
        needs = need_x, need_channel_weight, need_spatial_weight, need_residual
        like = _map_like(x, needs[0]), _weight_like(channel_weight, needs[1]), _weight_like(spatial_weight, needs[2])
        out = *like, _map_like(x, needs[3])
        dx, dchannel, dspatial, dresidual = (
            t.copy_(value) if need else t for t, value, need in zip(out, (*gradients, dy), needs, strict=True)
        )
        return dx, dchannel, dspatial, dresidual


def _plain_forward_(
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
) -> None:
    unit = _unit(num_heads, channel_radius, spatial_neighbors, self_loops, sequential, scale, relu)
    with torch.no_grad():
        x.copy_(reference.evaluate(x, channel_weight, spatial_weight, residual, unit, (grid[0], grid[1])))


def with_any_strides(kernels: Operators) -> Operators:
    """Operators of any strides from kernels that take every map in the strides of a dense x, and contiguous weights."""

    def forward(
        x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        x = memory.dense(x)
        if residual is not None:
            residual = memory.match_strides(residual, x)
        return kernels.forward(x, channel_weight.contiguous(), spatial_weight.contiguous(), residual, *options)

    def backward(
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        saved: Tensor,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = memory.dense(x)
        dy = memory.match_strides(dy, x)
        if y is not None:
            y = memory.match_strides(y, x)
        given = channel_weight, spatial_weight
        weights = channel_weight.contiguous(), spatial_weight.contiguous()
        dx, *dweights, dresidual = kernels.backward(dy, x, y, *weights, saved.contiguous(), *options)
        dchannel, dspatial = (
            dweight if weight is own or not dweight.numel() else _weight_like(own, True).copy_(dweight)
            for dweight, weight, own in zip(dweights, weights, given, strict=True)
        )
        return dx, dchannel, dspatial, dresidual

    def forward_(
        x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None, *options: Any
    ) -> None:
        memory.check_overlaps(x, residual)
        target = memory.dense(x)
        if residual is not None:
            residual = memory.match_strides(residual, target)
        kernels.forward_(target, channel_weight.contiguous(), spatial_weight.contiguous(), residual, *options)
        if target is not x:
            x.copy_(target)

    return Operators(forward, backward, forward_)


_PLAIN = with_any_strides(Operators(_plain_forward, _plain_backward, _plain_forward_))
for _name, _plain in _PLAIN._asdict().items():
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")


# ---- the operators on a GPU ------------------------------------------------------------------------------------------


def _triton(name: str) -> Callable[..., Any]:
    """An operator of the Triton kernels, imported when it is first called."""

    def run(*args: Any) -> Any:
        kernels, x = gpu.triton_kernels(), args[0]
        if kernels.reason:
            raise RuntimeError(kernels.reason)
        function = getattr(kernels.module, name)
        if x.device.type != "cuda":
            return function(*args)
        with torch.cuda.device(x.device):
            return function(*args, family=gpu.family(x.device.index))

    return run


def _first_on_gpu(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of the first GPU backend that can run the call, else plain PyTorch."""
    start = 1 if name == "backward" else 0  # dy
    options = {"forward": 4, "backward": 6, "forward_": 4}[name]

    def run(*args: Any) -> Any:
        x = args[start]
        channel_weight, spatial_weight = args[3:5] if name == "backward" else args[1:3]
        unit, grid = _unit(*args[options + 1 : options + 7]), (args[options][0], args[options][1])
        call = backends.Call(x, channel_weight, spatial_weight, None, unit, grid)
        backend = backends.first(call)
        if backend == "triton":  # a function of this module: its operator would be another dispatch
            return getattr(_TRITON, name)(*args)
        return getattr(OPERATORS[backend], name)(*args) if backend in _NAMED else plain(*args)

    return run


_TRITON = with_any_strides(Operators(*map(_triton, Operators._fields)))
for _name, _kernel in _TRITON._asdict().items():
    _LIBRARY.impl(f"triton_{_name}", _kernel, "CompositeExplicitAutograd")
for _name, _plain in _PLAIN._asdict().items():
    _LIBRARY.impl(_name, _first_on_gpu(_name, _plain), "CUDA")


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Steam(torch.autograd.Function):
    # The classic form: setup_context and register_autograd cost 20 to 30 us more a call.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        residual: Tensor | None,
        unit: Unit,
        grid: tuple[int, int],
        backend: str,
    ) -> Tensor:
        need_x, need_channel, need_spatial = ctx.needs_input_grad[:3]
        save = need_x or need_channel or need_spatial
        relu = unit.relu
        y, saved = OPERATORS[backend].forward(
            x, channel_weight, spatial_weight, residual, grid, *unit.options, relu, save
        )
        if save:
            ctx.save_for_backward(x, channel_weight, spatial_weight, saved, y if relu else None)
        else:
            ctx.save_for_backward(None, None, None, None, y if relu else None)
        ctx.call = unit, grid, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, channel_weight, spatial_weight, saved, y = ctx.saved_tensors
        need_x, need_channel, need_spatial, need_residual = ctx.needs_input_grad[:4]
        if x is None:  # only the residual asks
            return None, None, None, dy if y is None else dy.masked_fill(y <= 0, 0), None, None, None
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy)
        unit, grid, backend = ctx.call
        masked = need_residual and y is not None
        dx, dchannel, dspatial, dresidual = OPERATORS[backend].backward(
            dy,
            x,
            y,
            channel_weight,
            spatial_weight,
            saved,
            grid,
            *unit.options,
            need_x,
            need_channel,
            need_spatial,
            masked,
        )
        return (
            dx if need_x else None,
            dchannel if need_channel else None,
            dspatial if need_spatial else None,
            dresidual if masked else dy if need_residual else None,
            None,
            None,
            None,
        )


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again, by way of the reference."""
    x, channel_weight, spatial_weight, _, y = ctx.saved_tensors
    unit, grid, _ = ctx.call
    if y is not None:
        dy = dy.masked_fill(y <= 0, 0)
    # Gradients are taken by aliases that are made here. From the saved tensors themselves autograd would walk on to
    # what they depend on, which may be another of them, and the caller's own backward pass would count that path again.
    inputs = x.view_as(x), channel_weight.view_as(channel_weight), spatial_weight.view_as(spatial_weight)
    out = reference.evaluate(*inputs, None, unit.without_tail(), grid)
    asked = [t for t, need in zip(inputs, ctx.needs_input_grad[:3], strict=True) if need]
    found = iter(torch.autograd.grad(out, asked, dy, create_graph=True))
    gradients = [next(found) if need else None for need in ctx.needs_input_grad[:3]]
    return *gradients, dy if ctx.needs_input_grad[3] else None, None, None, None


def call(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    unit: Unit,
    grid: tuple[int, int],
    backend: str,
) -> Tensor:
    """One checked call on a backend's operators: with autograd where it is recording, without where it is not."""
    if unit.inplace:
        return _call_inplace(x, channel_weight, spatial_weight, residual, unit, grid, backend)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or channel_weight.requires_grad
        or spatial_weight.requires_grad
        or (residual is not None and residual.requires_grad)
    ):
        # The copy of an x that is not dense is made here once, for the operators of both directions.
        return _Steam.apply(memory.dense(x), channel_weight, spatial_weight, residual, unit, grid, backend)
    return OPERATORS[backend].forward(
        x, channel_weight, spatial_weight, residual, grid, *unit.options, unit.relu, False
    )[0]


def _call_inplace(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None,
    unit: Unit,
    grid: tuple[int, int],
    backend: str,
) -> Tensor:
    memory.check_inplace(x, channel_weight, spatial_weight, residual)
    OPERATORS[backend].forward_(x, channel_weight, spatial_weight, residual, grid, *unit.options, unit.relu)
    if not (torch.compiler.is_compiling() or x.is_inference()):
        # The dispatcher does not do it for an operator without autograd: whoever saved x must hear of the change.
        torch.autograd.graph.increment_version(x)
    return x


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _packets(*names: str) -> list[Any]:
    return [getattr(torch.ops.steam_kernels, prefix + name) for prefix in PREFIXES for name in names]


@register_flop_formula(_packets("forward", "forward_"))
def forward_flop(
    x: Any,
    channel_weight: Any,
    spatial_weight: Any,
    residual: Any,
    grid: Any,
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of a call of ``forward`` or ``forward_`` from its arguments, tensors or their shapes."""
    unit = _unit(num_heads, channel_radius, spatial_neighbors, self_loops, True, 1.0)
    return x[0] * forward_flops(x[1], x[2], x[3], tuple(grid), unit, residual is not None)


@register_flop_formula(_packets("backward"))
def _backward_flop(
    dy: Any,
    x: Any,
    y: Any,
    channel_weight: Any,
    spatial_weight: Any,
    saved: Any,
    grid: Any,
    num_heads: int,
    channel_radius: int,
    spatial_neighbors: int,
    self_loops: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    unit = _unit(num_heads, channel_radius, spatial_neighbors, self_loops, True, 1.0)
    return x[0] * backward_flops(x[1], x[2], x[3], tuple(grid), unit)
