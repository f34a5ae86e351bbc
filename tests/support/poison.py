"""Fills fresh memory with NaN, so that tests notice a result that was never written."""

from __future__ import annotations

import ctypes

import torch

M_PERTURB = -6


def poison_memory() -> bool:
    """Fills every allocation of this process with NaN, also the allocations of the C++ kernels.

    glibc fills the memory that malloc returns with the complement of this byte: 0xFF, a NaN in every floating dtype.
    glibc keeps the value as an int, so 0x100 turns the filling on although its low byte is 0. A block of less than 1 KB
    may come from the thread's cache of freed blocks; then it keeps its old content.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_PERTURB, 0x100) == 1 and bool(torch.empty(100_000).isnan().all())


POISONED = poison_memory()
