"""The cpu backend: compiled C++ kernels, which PyTorch's dispatcher calls for tensors on the CPU."""

from __future__ import annotations

from . import native
from .base import Backend, Call


def why_not(call: Call | None) -> str:
    """ "" if the CPU kernels can run the call, else the reason."""
    if native.CPU.reason:
        return native.CPU.reason
    if call is not None and not call.x.is_cpu:
        return f"the cpu backend runs tensors on the CPU, and x is on {call.x.device}"
    return ""


BACKEND = Backend("cpu", why_not, devices=("cpu",), prefix="")
