"""Tells whether a tool looks into a call. Exporters, tracers and function transforms need plain operators there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])

#: Whether a trace of torch.jit contains the operators of this package.
_AS_OPERATORS: ContextVar[bool] = ContextVar("as_operators", default=False)


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Makes traces of ``torch.jit`` contain the operators of this package, so that a counter sees them."""
    token = _AS_OPERATORS.set(True)
    try:
        yield
    finally:
        _AS_OPERATORS.reset(token)


def traced_as_operators() -> bool:
    """Whether ``torch.jit.trace`` runs under :func:`as_operators`."""
    return torch.jit.is_tracing() and _AS_OPERATORS.get()


def exporting() -> bool:
    """Whether an exporter or ``torch.jit.trace`` records the call. The record may later run on other sizes."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def looked_into() -> bool:
    """Whether an exporter, a tracer, a function transform or forward-mode differentiation needs plain operators."""
    return (
        torch.compiler.is_exporting()
        or (torch.jit.is_tracing() and not _AS_OPERATORS.get())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def called_while_compiling(function: _F) -> _F:
    """Makes ``torch.compile`` call ``function`` while it traces, and take the result for a constant.

    ``torch.compiler.assume_constant_result`` sets the same attribute, but it would import the compiler, which takes
    about as long as the import of torch. The compiler would trace into a function that ``functools.cache`` wraps, so
    ``function`` must not be one; it may call one.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def factor(value: float | Tensor, like: Tensor) -> float | Tensor:
    """``value``, a factor or divisor of ``like``. In exports it is a tensor, because ONNX rounds numbers to float32."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.tensor(value, dtype=like.dtype, device=like.device) if exporting() else value
