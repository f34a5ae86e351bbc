"""Fresh memory that holds NaN, so that a result that was never written is seen."""

from __future__ import annotations

import ctypes

import torch

M_PERTURB = -6


def poison_memory() -> bool:
    """Has every allocation of this process come back as NaN until it is written, those of the C++ kernels included.

    glibc fills what malloc returns with the complement of this byte: 0xFF, a NaN in every floating dtype. The
    value is kept as an int, so that 0x100 is "on" although its low byte is 0.
    A block of less than 1 KB may come from the thread's cache of freed ones instead, and then hold what it held.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_PERTURB, 0x100) == 1 and bool(torch.empty(100_000).isnan().all())


POISONED = poison_memory()
