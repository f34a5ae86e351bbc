"""The entry of a backend: a name, a check of a call, the devices that it serves, and a prefix of its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..config import Options


class Call(NamedTuple):
    """One checked call of :func:`steam_kernels.steam`, the argument of ``why_not``. ``grid`` is resolved."""

    x: Tensor
    channel_weight: Tensor
    spatial_weight: Tensor
    residual: Tensor | None
    options: Options
    grid: tuple[int, int]


class Backend(NamedTuple):
    """One way to run a call."""

    #: The name for ``backend=`` and ``STEAM_KERNELS_BACKEND``.
    name: str
    #: Returns "" if the backend can run the call, else the reason. For None: whether this machine can run the backend.
    why_not: Callable[[Call | None], str]
    #: The device types whose calls try this backend without naming it.
    devices: tuple[str, ...] = ()
    #: The prefix of its operators' names. "" is for the operators of calls that name no backend, None for no operators.
    prefix: str | None = None


def too_large(backend: str, name: str, size: int, bits: int) -> str:
    """The reason that ``size`` is too large for a backend's arithmetic, which needs it below 2^bits; "" if it fits."""
    return f"the {backend} backend needs {name} below 2^{bits}, and it is {size}" if size >= 2**bits else ""
