"""What a backend is: a name, the devices whose calls try it unasked, the sentence why it cannot, and its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..config import Options


class Call(NamedTuple):
    """One checked call of :func:`steam_kernels.steam`, for ``why_not`` to judge; ``grid`` is resolved."""

    x: Tensor
    channel_weight: Tensor
    spatial_weight: Tensor
    residual: Tensor | None
    options: Options
    grid: tuple[int, int]


class Backend(NamedTuple):
    """One way to run a call."""

    #: What ``backend=`` and ``STEAM_KERNELS_BACKEND`` call it.
    name: str
    #: "" if it can run the call, else the reason; for None, the same of the machine.
    why_not: Callable[[Call | None], str]
    #: Types of devices whose calls try this backend though they name none.
    devices: tuple[str, ...] = ()
    #: What the names of its operators start with: "" for the operators that every call may use, None for no operators.
    prefix: str | None = None


def too_large(backend: str, name: str, size: int, bits: int) -> str:
    """The sentence that a size is not below 2^bits, which a backend's arithmetic needs; "" if it is."""
    return f"the {backend} backend needs {name} below 2^{bits}, and it is {size}" if size >= 2**bits else ""
