"""The backends that tests run on this machine."""

from __future__ import annotations

import os

import steam_kernels


def usable_backends() -> list[str]:
    """The backends with kernels that can run here. Triton's slow interpreter is left out and has separate tests."""
    slow = ("triton", "reference") if os.environ.get("TRITON_INTERPRET") == "1" else ("reference",)
    return [name for name, why in steam_kernels.available_backends().items() if not why and name not in slow]


def unusable_backends() -> dict[str, str]:
    return {name: why for name, why in steam_kernels.available_backends().items() if why}
