"""The operators: schemas, fakes, autograd and FLOP formulas. Only this module uses PyTorch's dispatcher from Python.

``steam_kernels::forward`` and ``steam_kernels::backward`` are functional and opaque to the compiler. ``forward_``
writes into x. On a GPU these operators run the first backend that can. ``triton_forward``, ``cuda_forward`` and the
like belong to one backend and serve the calls that name it.

Each schema ends with the resolved grid and the options of :class:`~steam_kernels.config.Arguments`, in their order.
``needs`` says which gradients are wanted: those of x, the two weights and the residual. ``saved`` is
``(N, 2 (C + gh gw))`` in the accumulation dtype. Each row is [z | o_c | u | o_s], the tokens and pre-activations of the
channel graph and of the spatial graph.

The operators take tensors of any strides. They copy a tensor if their kernels cannot read its strides. y, dx and
dresidual have x's strides if x is dense in NCHW or channels_last, else they are in NCHW. The gradient of a weight has
the strides that ``torch.empty_like`` gives for the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends, memory, reference
from .backends import triton
from .config import Inputs, Options, accumulation_dtype
from .flops import backward_flops, forward_flops
from .schemas import SCHEMAS, Backward, Forward

# The library object is at module level, because PyTorch removes the operators when the object is deleted.
_LIBRARY = torch.library.Library("steam_kernels", "DEF")
#: The prefixes of the operators' names, one for each backend. The empty prefix of the automatic operators is first.
PREFIXES = tuple(sorted({b.prefix for b in backends.BACKENDS.values() if b.prefix is not None}))
for _prefix in PREFIXES:
    for _name, _schema in SCHEMAS.items():
        # flexible_layout lets a compiler choose the memory format of the maps. The operators take any strides.
        _LIBRARY.define(_prefix + _name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


class Operators(NamedTuple):
    """The three operators of one backend, with the schemas above."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    forward_: Callable[..., None]


def _operators(prefix: str) -> Operators:
    return Operators(*(getattr(torch.ops.steam_kernels, prefix + name).default for name in Operators._fields))


#: The key of the operators for calls that name no backend.
AUTOMATIC = "automatic"
#: The operators by the name of the backend. A backend without an entry is plain differentiable PyTorch.
OPERATORS: dict[str, Operators] = {
    AUTOMATIC: _operators(""),
    **{b.name: _operators(b.prefix) for b in backends.BACKENDS.values() if b.prefix is not None},
}


# ---- fakes: shapes, dtypes and strides -------------------------------------------------------------------------------


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Forward.of(*args)
    x, grid = call.inputs.x, call.grid
    shape = (x.shape[0], 2 * (x.shape[1] + grid[0] * grid[1])) if call.save else (0,)
    return _map_like(x, True), x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Backward.of(*args)
    return _gradients_like(call.inputs, call.needs)


def _gradients_like(inputs: Inputs, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _map_like(inputs.x, needs[0]),
        _weight_like(inputs.channel_weight, needs[1]),
        _weight_like(inputs.spatial_weight, needs[2]),
        _map_like(inputs.x, needs[3]),
    )


def _map_like(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(memory.dense(x)) if wanted else x.new_empty(0)


def _weight_like(weight: Tensor, wanted: bool) -> Tensor:
    # empty_like is not used for a contiguous weight, because its fake loses the stride of an axis of length 1.
    if wanted and not weight.is_contiguous():
        return torch.empty_like(weight)
    return weight.new_empty(weight.shape if wanted else 0)


def _fake_forward_(*args: Any) -> None:
    return None


for _prefix in PREFIXES:
    for _name, _fake in (("forward", _fake_forward), ("backward", _fake_backward), ("forward_", _fake_forward_)):
        torch.library.register_fake(f"steam_kernels::{_prefix}{_name}", _fake, lib=_LIBRARY)


# ---- the operators in plain PyTorch, for devices without kernels -----------------------------------------------------


def _plain_forward(call: Forward) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y, saved = reference.forward(call.inputs, call.arguments.options(), call.grid)
        return _map_like(call.inputs.x, True).copy_(y), saved if call.save else saved.new_empty(0)


def _plain_backward(call: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call.arguments.check_backward(call.y, call.needs)
    dy = call.dy
    with torch.no_grad():
        if call.y is not None:
            dy = dy.masked_fill(call.y <= 0, 0)
        gradients = reference.backward(dy, call.inputs, call.saved, call.arguments.options(), call.grid)
        results = zip(_gradients_like(call.inputs, call.needs), (*gradients, dy), call.needs, strict=True)
        dx, dchannel, dspatial, dresidual = (out.copy_(value) if need else out for out, value, need in results)
        return dx, dchannel, dspatial, dresidual


def _plain_forward_(call: Forward) -> None:
    with torch.no_grad():
        call.inputs.x.copy_(reference.evaluate(call.inputs, call.arguments.options(), call.grid))


def from_arguments(operators: Operators) -> Operators:
    """The operators as the dispatcher calls them, of operators that take a :class:`Forward` or a :class:`Backward`."""
    return Operators(
        lambda *args: operators.forward(Forward.of(*args)),
        lambda *args: operators.backward(Backward.of(*args)),
        lambda *args: operators.forward_(Forward.of_in_place(*args)),
    )


def with_any_strides(kernels: Operators) -> Operators:
    """The operators of kernels written in Python. Both take a :class:`Forward` or a :class:`Backward`.

    The kernels see every map in the strides of a dense x, and contiguous weights.
    """

    def dense(inputs: Inputs) -> Inputs:
        x = memory.dense(inputs.x)
        residual = None if inputs.residual is None else memory.match_strides(inputs.residual, x)
        return Inputs(x, inputs.channel_weight.contiguous(), inputs.spatial_weight.contiguous(), residual)

    def forward(call: Forward) -> tuple[Tensor, Tensor]:
        return kernels.forward(call._replace(inputs=dense(call.inputs)))

    def backward(call: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = dense(call.inputs)
        dy = memory.match_strides(call.dy, inputs.x)
        y = None if call.y is None else memory.match_strides(call.y, inputs.x)
        given = call._replace(inputs=inputs, dy=dy, y=y, saved=call.saved.contiguous())
        dx, *dweights, dresidual = kernels.backward(given)
        dchannel, dspatial = (
            dweight if weight is own or not dweight.numel() else _weight_like(own, True).copy_(dweight)
            for dweight, weight, own in zip(dweights, inputs[1:3], call.inputs[1:3], strict=True)
        )
        return dx, dchannel, dspatial, dresidual

    def forward_(call: Forward) -> None:
        x = call.inputs.x
        memory.check_overlaps(x, call.inputs.residual)
        inputs = dense(call.inputs)
        kernels.forward_(call._replace(inputs=inputs))
        if inputs.x is not x:
            x.copy_(inputs.x)

    return Operators(forward, backward, forward_)


_PLAIN = with_any_strides(Operators(_plain_forward, _plain_backward, _plain_forward_))
for _name, _plain in from_arguments(_PLAIN)._asdict().items():
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")


# ---- the operators on a GPU ------------------------------------------------------------------------------------------


def _triton(name: str) -> Callable[..., Any]:
    """The operator ``name`` of the Triton kernels, which are imported at the first call."""

    def run(call: Forward | Backward) -> Any:
        kernels, device = triton.triton_kernels(), call.inputs.x.device
        if kernels.reason:
            raise RuntimeError(kernels.reason)
        function = getattr(kernels.module, name)
        if device.type != "cuda":
            return function(call)
        with torch.cuda.device(device):
            return function(call, family=triton.family(device.index))

    return run


def _on_gpu(name: str, of: Callable[..., Forward | Backward]) -> Callable[..., Any]:
    """The operator ``name`` of the first GPU backend that can run the call, else of plain PyTorch."""

    def run(*args: Any) -> Any:
        call = of(*args)
        judged = backends.Call(*call.inputs, call.arguments.options(), call.grid)
        chosen = backends.first(judged)
        # Functions of this module are called directly, because their operators would be another dispatch.
        direct = {"triton": _TRITON, "reference": _PLAIN}.get(chosen)
        return getattr(OPERATORS[chosen], name)(*args) if direct is None else getattr(direct, name)(call)

    return run


_TRITON = with_any_strides(Operators(*map(_triton, Operators._fields)))
for _name, _kernel in from_arguments(_TRITON)._asdict().items():
    _LIBRARY.impl(f"triton_{_name}", _kernel, "CompositeExplicitAutograd")
for _name, _of in (("forward", Forward.of), ("backward", Backward.of), ("forward_", Forward.of_in_place)):
    _LIBRARY.impl(_name, _on_gpu(_name, _of), "CUDA")


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Steam(torch.autograd.Function):
    # This class has the classic form, because setup_context and register_autograd cost 20 to 30 us more per call.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        residual: Tensor | None,
        options: Options,
        grid: tuple[int, int],
        backend: str,
    ) -> Tensor:
        save = any(ctx.needs_input_grad[:3])
        arguments = options.arguments
        y, saved = OPERATORS[backend].forward(x, channel_weight, spatial_weight, residual, save, grid, *arguments)
        masks = y if arguments.relu else None
        if save:
            ctx.save_for_backward(x, channel_weight, spatial_weight, saved, masks)
        else:
            ctx.save_for_backward(None, None, None, None, masks)
        ctx.call = options, grid, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, channel_weight, spatial_weight, saved, y = ctx.saved_tensors
        need_x, need_channel, need_spatial, need_residual = ctx.needs_input_grad[:4]
        if x is None:  # only the residual needs a gradient
            return None, None, None, dy if y is None else dy.masked_fill(y <= 0, 0), None, None, None
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy)
        options, grid, backend = ctx.call
        masked = need_residual and y is not None
        needs = need_x, need_channel, need_spatial, masked
        dx, dchannel, dspatial, dresidual = OPERATORS[backend].backward(
            dy, x, y, channel_weight, spatial_weight, saved, needs, grid, *options.arguments
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
    """The gradients, computed by the reference so that autograd can differentiate them again."""
    x, channel_weight, spatial_weight, _, y = ctx.saved_tensors
    options, grid, _ = ctx.call
    if y is not None:
        dy = dy.masked_fill(y <= 0, 0)
    # The gradients are taken with respect to aliases. One saved tensor may depend on another one. Without aliases,
    # autograd would follow that path here, and the caller's backward pass would count the path a second time.
    inputs = x.view_as(x), channel_weight.view_as(channel_weight), spatial_weight.view_as(spatial_weight)
    out = reference.evaluate(Inputs(*inputs), options.but(activation=None), grid)
    asked = [t for t, need in zip(inputs, ctx.needs_input_grad[:3], strict=True) if need]
    found = iter(torch.autograd.grad(out, asked, dy, create_graph=True))
    gradients = [next(found) if need else None for need in ctx.needs_input_grad[:3]]
    return *gradients, dy if ctx.needs_input_grad[3] else None, None, None, None


def call(inputs: Inputs, options: Options, grid: tuple[int, int], backend: str) -> Tensor:
    """One checked call on a backend's operators. It goes through autograd only if autograd records the call."""
    x, channel_weight, spatial_weight, residual = inputs
    if options.inplace:
        memory.check_inplace(*inputs)
        OPERATORS[backend].forward_(*inputs, grid, *options.arguments)
        if not (torch.compiler.is_compiling() or x.is_inference()):
            # Autograd notices the write by the version counter. The dispatcher increments the counter only for
            # operators that it differentiates.
            torch.autograd.graph.increment_version(x)
        return x
    if torch.is_grad_enabled() and (
        x.requires_grad
        or channel_weight.requires_grad
        or spatial_weight.requires_grad
        or (residual is not None and residual.requires_grad)
    ):
        # An x that is not dense is copied once here, so that forward and backward share the copy.
        return _Steam.apply(memory.dense(x), channel_weight, spatial_weight, residual, options, grid, backend)
    return OPERATORS[backend].forward(*inputs, False, grid, *options.arguments)[0]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _packets(*names: str) -> list[Any]:
    return [getattr(torch.ops.steam_kernels, prefix + name) for prefix in PREFIXES for name in names]


@register_flop_formula(_packets("forward"))
def forward_flop(*args: Any, out_shape: Any = None) -> int:
    """FLOPs of a call of ``forward``. The arguments are tensors or their shapes."""
    return _forward_flop(Forward.of(*args))


@register_flop_formula(_packets("forward_"))
def forward_in_place_flop(*args: Any, out_shape: Any = None) -> int:
    """FLOPs of a call of ``forward_``. The arguments are tensors or their shapes."""
    return _forward_flop(Forward.of_in_place(*args))


def _forward_flop(call: Forward) -> int:
    samples, channels, height, width = call.inputs.x
    residual = call.inputs.residual is not None
    return samples * forward_flops(channels, height, width, call.grid, call.arguments, residual)


@register_flop_formula(_packets("backward"))
def _backward_flop(*args: Any, out_shape: Any = None) -> int:
    call = Backward.of(*args)
    samples, channels, height, width = call.inputs.x
    return samples * backward_flops(channels, height, width, call.grid, call.arguments)
