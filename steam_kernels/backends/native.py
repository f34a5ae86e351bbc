"""Loads the compiled libraries; nothing else touches ctypes or ``torch.ops`` loading.

``STEAM_KERNELS_CPU`` = avx512, avx2 or generic forces a variant of the CPU kernels. What is missing or cannot be is a
reason, not an error: importing always works.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

#: What the build said of each library, a line each; absent where nothing was built.
BUILD_REPORT = Path(__file__).resolve().parent.parent / "_build.txt"
CPU_LIBRARY = Path(__file__).resolve().parent.parent / "libsteam_cpu.so"
ENVIRONMENT = "STEAM_KERNELS_CPU"
CPU_VARIANTS = ("avx512", "avx2", "generic")


@dataclass(frozen=True)
class Library:
    """What became of one compiled library: ``reason`` is "" where it is loaded and usable."""

    path: Path
    reason: str = ""
    #: The variants that this processor can run, best first.
    supported: tuple[str, ...] = ()
    #: The variant in use.
    variant: str = ""


def _why_not_built(library: str) -> str:
    lines = BUILD_REPORT.read_text().splitlines() if BUILD_REPORT.is_file() else []
    reasons = [line.partition(": ")[2] for line in lines if line.startswith(f"{library}: ")]
    return (
        reasons[0]
        if reasons
        else "it was never built (`python setup.py build_ext --inplace`, which needs a C++20 compiler)"
    )


def load_cpu(path: Path = CPU_LIBRARY, forced: str = "") -> Library:
    """Loads the CPU kernels, which register under the operators' CPU key, and selects the ``forced`` variant."""
    if not path.is_file():
        return Library(path, f"{path.name} is not in {path.parent}: {_why_not_built(path.stem)}")
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        library.steam_cpu_supported.restype = ctypes.c_char_p
        library.steam_cpu_variant.restype = ctypes.c_char_p
        library.steam_cpu_select.argtypes = [ctypes.c_char_p]
        supported = tuple(library.steam_cpu_supported().decode().split(","))
        reason = ""
        if forced and not (forced in CPU_VARIANTS and library.steam_cpu_select(forced.encode()) == 0):
            known = forced in CPU_VARIANTS
            cause = "a variant that this processor or build lacks" if known else "not a variant of the CPU kernels"
            reason = f"{ENVIRONMENT}={forced!r} is {cause}; there is {', '.join(supported)}"
        return Library(path, reason, supported, library.steam_cpu_variant().decode())
    except (OSError, AttributeError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return Library(path, f"{path} cannot be loaded: {lines[0]}")


CPU = load_cpu(forced=os.environ.get(ENVIRONMENT, ""))
