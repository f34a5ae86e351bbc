"""The device files of GPUs. This module does not import torch, because conftest.py needs it before that import."""

from __future__ import annotations

from pathlib import Path

#: Patterns of the files of NVIDIA GPUs, of AMD GPUs, and of the Windows driver's GPUs in WSL2, which has no others.
PATTERNS = ("nvidia[0-9]*", "kfd", "dxg")


def gpu_files(folder: Path = Path("/dev")) -> list[Path]:
    """The device files of GPUs in ``folder``; empty without a GPU."""
    return [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
