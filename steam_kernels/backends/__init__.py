"""Which backend runs a call, and the sentence why another cannot.

A backend is one entry: its name, ``why_not`` and, in ``ops.OPERATORS``, its operators. ``why_not(call)`` is "" where it
can run the call, else the reason; ``why_not(None)`` judges the machine alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Unit, check_backend
from . import native

ENVIRONMENT = "STEAM_KERNELS_BACKEND"


class Call(NamedTuple):
    """One checked call of :func:`steam_kernels.steam`, for predicates to judge; ``grid`` is resolved."""

    x: Tensor
    channel_weight: Tensor
    spatial_weight: Tensor
    residual: Tensor | None
    unit: Unit
    grid: tuple[int, int]


def _triton(call: Call | None) -> str:
    return "this version of steam_kernels has no Triton kernels"


def _cuda(call: Call | None) -> str:
    if native.CUDA.reason:
        return native.CUDA.reason
    if call is not None and call.x.device.type != "cuda":
        return f"the cuda backend runs tensors on a GPU, and x is on {call.x.device}"
    if not torch.cuda.is_available():
        return "there is no GPU that CUDA can use (torch.cuda.is_available() is False)"
    return native.why_not_gpu(torch.cuda.current_device() if call is None else call.x.device.index)


def _cpu(call: Call | None) -> str:
    if native.CPU.reason:
        return native.CPU.reason
    if call is not None and call.x.device.type != "cpu":
        return f"the cpu backend runs tensors on the CPU, and x is on {call.x.device}"
    return ""


def _reference(call: Call | None) -> str:
    return ""


#: Name -> why_not, in the order in which they are tried.
REGISTRY: dict[str, Callable[[Call | None], str]] = {
    "triton": _triton,
    "cuda": _cuda,
    "cpu": _cpu,
    "reference": _reference,
}


def choose(call: Call) -> str:
    """The backend that runs ``call``: the one asked for, by argument or environment, else the first that can.

    Raises:
        RuntimeError: the backend asked for by name cannot run the call; the message is its ``why_not``.
        ValueError: the environment variable names no backend.
    """
    asked = call.unit.backend
    source = "backend"
    if asked is None:
        asked = os.environ.get(ENVIRONMENT)
        if not asked:
            for name, why_not in REGISTRY.items():
                if not why_not(call):
                    return name
        source = ENVIRONMENT
        check_backend(asked, source)
    assert asked is not None
    reason = REGISTRY[asked](call)
    if reason:
        raise RuntimeError(f"{source}={asked!r} cannot run this call: {reason}")
    return asked


def available_backends() -> dict[str, str]:
    """Each backend's name, with "" where this machine can run it, else the sentence why not."""
    return {name: why_not(None) for name, why_not in REGISTRY.items()}
