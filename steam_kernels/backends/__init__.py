"""Selects the backend of a call, and gives the reason why a backend cannot run it.

Each backend is one entry of :data:`BACKENDS` and has its own file.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

from ..tracing import called_while_compiling
from . import cpu, cuda, native, triton
from .base import Backend, Call

ENVIRONMENT = "STEAM_KERNELS_BACKEND"
#: The dict in which ``os.environ`` keeps the variables; None where it has another form.
_VARIABLES: dict[bytes, bytes] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None
_VARIABLE = ENVIRONMENT.encode()
#: The backends by name, in the order in which a call without a named backend tries them. The reference runs any call.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (triton.BACKEND, cuda.BACKEND, cpu.BACKEND, Backend("reference", lambda call: ""))
}
_BY_DEVICE = {
    kind: [backend for backend in BACKENDS.values() if kind in backend.devices]
    for kind in {kind for backend in BACKENDS.values() for kind in backend.devices}
}


def check_name(name: Any, argument: str = "backend") -> None:
    """Raises ValueError unless ``name`` is None or the name of a backend."""
    if name is not None and (not isinstance(name, str) or name not in BACKENDS):
        raise ValueError(f"{argument} must be None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def first(call: Call) -> str:
    """The first backend for x's device that can run ``call``, else the reference."""
    kind = "cpu" if call.x.is_cpu else call.x.device.type
    for backend in _BY_DEVICE.get(kind, ()):
        if not backend.why_not(call):
            return backend.name
    _warn_of_reference(kind)
    return "reference"


@called_while_compiling
def _warn_of_reference(kind: str) -> None:
    """Warns once that calls on a device run the reference, if this machine cannot run any other backend for it."""
    _warn_once_of_reference(kind)


@cache
def _warn_once_of_reference(kind: str) -> None:
    reasons = {backend.name: backend.why_not(None) for backend in _BY_DEVICE.get(kind, ())}
    if reasons and all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        mend = "python -m pip install --upgrade triton" if kind == "cuda" else native.how_to_mend()
        warnings.warn(
            f"steam_kernels runs its reference in plain PyTorch on {kind} tensors, which is many times slower than its "
            f"kernels. Why: {why}. What mends it: {mend}",
            stacklevel=2,
        )


def _environment() -> str | None:
    # For a variable that is not set, os.environ.get raises and catches two exceptions. That takes 5 of the 30 us that a
    # call of a small map takes on the CPU, so the dict is asked first.
    if _VARIABLES is not None and _VARIABLE not in _VARIABLES:
        return None
    return os.environ.get(ENVIRONMENT)


def choose(call: Call) -> tuple[str, bool]:
    """The backend that runs ``call``, and whether the backend was asked for by name.

    An argument or the environment variable may name the backend. Otherwise it is the first that can run the call.

    Raises:
        RuntimeError: the named backend cannot run the call; the message contains its ``why_not``.
        ValueError: the environment variable names no backend.
    """
    asked, source = call.options.backend, "backend"
    if asked is None:
        asked, source = _environment(), ENVIRONMENT
        if not asked:
            return first(call), False
        check_name(asked, source)
    reason = BACKENDS[asked].why_not(call)
    if reason:
        raise RuntimeError(f"{source}={asked!r} cannot run this call: {reason}")
    return asked, True


def available_backends() -> dict[str, str]:
    """The name of each backend, with "" if this machine can run the backend, else the reason why not."""
    return {name: backend.why_not(None) for name, backend in BACKENDS.items()}
