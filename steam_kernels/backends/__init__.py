"""Which backend runs a call, and the sentence why another cannot.

A backend is one entry: its name, ``why_not`` and, in ``ops.OPERATORS``, its operators. ``why_not(call)`` is "" where it
can run the call, else the reason; ``why_not(None)`` judges the machine alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Unit, check_backend
from . import native
from .gpu import why_not_cuda_sizes, why_not_triton

ENVIRONMENT = "STEAM_KERNELS_BACKEND"
_VARIABLE = ENVIRONMENT.encode()
_VARIABLES: dict[bytes, bytes] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None


class Call(NamedTuple):
    """One checked call of :func:`steam_kernels.steam`, for predicates to judge; ``grid`` is resolved."""

    x: Tensor
    channel_weight: Tensor
    spatial_weight: Tensor
    residual: Tensor | None
    unit: Unit
    grid: tuple[int, int]


def _cuda(call: Call | None) -> str:
    if native.CUDA.reason:
        return native.CUDA.reason
    if call is not None and call.x.device.type != "cuda":
        return f"the cuda backend runs tensors on a GPU, and x is on {call.x.device}"
    if not torch.cuda.is_available():
        return "there is no GPU that CUDA can use (torch.cuda.is_available() is False)"
    reason = native.why_not_gpu(torch.cuda.current_device() if call is None else call.x.device.index)
    return reason or ("" if call is None else why_not_cuda_sizes(call))


def _cpu(call: Call | None) -> str:
    if native.CPU.reason:
        return native.CPU.reason
    if call is not None and not call.x.is_cpu:
        return f"the cpu backend runs tensors on the CPU, and x is on {call.x.device}"
    return ""


def _reference(call: Call | None) -> str:
    return ""


#: Name -> why_not.
REGISTRY: dict[str, Callable[[Call | None], str]] = {
    "triton": why_not_triton,
    "cuda": _cuda,
    "cpu": _cpu,
    "reference": _reference,
}


#: What a call that names no backend tries, in this order, by the type of x's device. Triton's interpreter serves the
#: CPU too, but only where it is named.
_AUTOMATIC = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}


def first(call: Call) -> str:
    """The first backend made for x's device that can run ``call``, else the reference."""
    kind = "cpu" if call.x.is_cpu else call.x.device.type
    for name in _AUTOMATIC.get(kind, ()):
        if not REGISTRY[name](call):
            return name
    _warn_of_reference(kind)
    return "reference"


def _warn_of_reference(kind: str) -> None:
    """Warns once that calls on a device run the reference, where the machine lacks every backend made for it."""
    _warn_once_of_reference(kind)


@cache
def _warn_once_of_reference(kind: str) -> None:
    reasons = {name: REGISTRY[name](None) for name in _AUTOMATIC.get(kind, ())}
    if reasons and all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        mend = "python -m pip install --upgrade triton" if kind == "cuda" else native.how_to_mend()
        warnings.warn(
            f"steam_kernels runs its reference in plain PyTorch on {kind} tensors, which is many times slower than its "
            f"kernels. Why: {why}. What mends it: {mend}",
            stacklevel=2,
        )


# What torch.compiler.assume_constant_result does, which would import the compiler with this package: the compiler calls
# the function while it traces. It would trace what a cached function wraps, so this is not the cached one.
_warn_of_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _asked_for() -> str | None:
    # A name that is not there costs os.environ's own methods an exception, and a call 5 us: ask the dict under it.
    if _VARIABLES is not None and _VARIABLE not in _VARIABLES:
        return None
    return os.environ.get(ENVIRONMENT)


def choose(call: Call) -> tuple[str, bool]:
    """The backend that runs ``call``: the one asked for, by argument or environment, else the first that can.

    The flag says whether it was asked for.

    Raises:
        RuntimeError: the backend asked for by name cannot run the call; the message is its ``why_not``.
        ValueError: the environment variable names no backend.
    """
    asked = call.unit.backend
    source = "backend"
    if asked is None:
        asked = _asked_for()
        if not asked:
            return first(call), False
        source = ENVIRONMENT
        check_backend(asked, source)
    assert asked is not None
    reason = REGISTRY[asked](call)
    if reason:
        raise RuntimeError(f"{source}={asked!r} cannot run this call: {reason}")
    return asked, True


def available_backends() -> dict[str, str]:
    """Each backend's name, with "" where this machine can run it, else the sentence why not."""
    return {name: why_not(None) for name, why_not in REGISTRY.items()}
