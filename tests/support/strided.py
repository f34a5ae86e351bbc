"""Tensors of the same shape in many memory forms, and calls of the operators with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support import cases
from tests.support.cases import Case

#: The names of the operators' inputs, in the order of ``forward`` and of ``backward``.
FORWARD = ("x", "channel_weight", "spatial_weight", "residual")
BACKWARD = ("dy", "x", "y", "channel_weight", "spatial_weight", "saved")
NEEDS = (True, True, True, True)


def _around(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.new_full(shape, float("nan"))


def _put(place: Tensor, values: Tensor) -> Tensor:
    return place.copy_(values)


def _sliced(values: Tensor, axis: int) -> Tensor:
    shape = list(values.shape)
    shape[axis] += 3
    return _put(_around(values, tuple(shape)).narrow(axis, 2, values.shape[axis]), values)


def _stepped(values: Tensor, axis: int) -> Tensor:
    shape = list(values.shape)
    shape[axis] *= 2
    return _put(_around(values, tuple(shape))[(slice(None),) * axis + (slice(1, None, 2),)], values)


def _transposed(values: Tensor) -> Tensor:
    return _put(_around(values, (*values.shape[:-2], values.shape[-1], values.shape[-2])).transpose(-1, -2), values)


def _offset(values: Tensor) -> Tensor:
    return _put(_around(values, (values.numel() + 1,))[1:].view(values.shape), values)


def _flat(values: Tensor) -> Tensor:
    """A view of a flat buffer with gaps, in which the last axis has the largest stride."""
    strides, reach = [], 2
    for size in values.shape:
        strides.append(reach)
        reach *= size + 1
    return _put(_around(values, (reach + 7,)).as_strided(values.shape, strides, 5), values)


def _expanded(values: Tensor, axis: int) -> Tensor:
    return values.narrow(axis, 0, 1).clone().expand(values.shape)


def _channels_last(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.channels_last) if values.dim() == 4 else values.clone()


#: The memory forms of a tensor. All keep the values, except "expanded ...", which repeats the first value of an axis.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.clone(memory_format=torch.contiguous_format),
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced in the first axis": lambda v: _sliced(v, 0),
    "sliced in the second axis": lambda v: _sliced(v, 1),
    "sliced in the last axis": lambda v: _sliced(v, -1),
    "offset by one": _offset,
    "flat buffer": _flat,
    "every second of the first axis": lambda v: _stepped(v, 0),
    "every second of the second axis": lambda v: _stepped(v, 1),
    "every second of the last axis": lambda v: _stepped(v, v.dim() - 1),
    "negative view": lambda v: torch._neg_view(-v),
    "expanded in the first axis": lambda v: _expanded(v, 0),
    "expanded in the last axis": lambda v: _expanded(v, -1),
}
#: The forms that keep every value.
KEEPING = tuple(name for name in FORMS if not name.startswith("expanded"))


def operator(prefix: str, name: str) -> Any:
    return getattr(torch.ops.steam_kernels, prefix + name)


def run_operators(
    prefix: str, case: Case, inputs: dict[str, Tensor], dy: Tensor, form: dict[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Tensor], list[tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]]]:
    """Runs ``forward`` and ``backward`` with a residual and a ReLU.

    Returns the results by name, and each call with its results. ``form`` changes the forms of "y" and "saved" between
    the operators.
    """
    forward, backward = operator(prefix, "forward"), operator(prefix, "backward")
    arguments = (*(inputs[name] for name in FORWARD), True, *case.operator_options)
    y, saved = forward(*arguments)
    calls = [(forward, arguments, (y, saved))]
    between = {"y": y, "saved": saved}
    between |= {name: form[name](value) for name, value in between.items() if name in form}
    given = inputs | between | {"dy": dy}
    arguments = (*(given[name] for name in BACKWARD), NEEDS, *case.operator_options)
    gradients = backward(*arguments)
    calls.append((backward, arguments, gradients))
    names = ("dx", "dchannel_weight", "dspatial_weight", "dresidual")
    return {"y": y, **dict(zip(names, gradients, strict=True))}, calls


def formed(case: Case, form: dict[str, Callable[[Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a case and dy, each in the form that ``form`` names."""
    inputs, dy = cases.make(case)
    inputs = {name: form.get(name, torch.clone)(value) for name, value in inputs.items()}
    return inputs, form.get("dy", torch.clone)(dy)
