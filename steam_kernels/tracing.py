"""Whether a tool looks into a call: exporters, tracers and function transforms need plain operators in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Whether traces of torch.jit hold the operators.
_AS_OPERATORS: ContextVar[bool] = ContextVar("as_operators", default=False)


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Makes traces of ``torch.jit`` hold the operators, so that a counter sees them."""
    token = _AS_OPERATORS.set(True)
    try:
        yield
    finally:
        _AS_OPERATORS.reset(token)


def traced_as_operators() -> bool:
    """Whether ``torch.jit.trace`` runs under :func:`as_operators`."""
    return torch.jit.is_tracing() and _AS_OPERATORS.get()


def exporting() -> bool:
    """Whether an exporter or ``torch.jit.trace`` records the call, perhaps for sizes that it will not see."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def looked_into() -> bool:
    """Whether an exporter, a tracer, a function transform or forward-mode differentiation needs plain operators."""
    return (
        torch.compiler.is_exporting()
        or (torch.jit.is_tracing() and not _AS_OPERATORS.get())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def factor(value: float | Tensor, like: Tensor) -> float | Tensor:
    """``value``, a factor or divisor of ``like``; a tensor in an export, since ONNX rounds a number to float32."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.tensor(value, dtype=like.dtype, device=like.device) if exporting() else value
