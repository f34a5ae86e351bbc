"""The backends that tests run on this machine."""

from __future__ import annotations

import os

import steam_kernels


def usable_backends() -> list[str]:
    """Every backend with kernels of its own that can run here; the interpreter, which is slow, has tests of its own."""
    slow = ("triton", "reference") if os.environ.get("TRITON_INTERPRET") == "1" else ("reference",)
    return [name for name, why in steam_kernels.available_backends().items() if not why and name not in slow]


def unusable_backends() -> dict[str, str]:
    return {name: why for name, why in steam_kernels.available_backends().items() if why}
