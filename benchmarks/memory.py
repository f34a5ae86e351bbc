"""The memory of a call, from torch.profiler's record of PyTorch's allocations and frees.

The record lacks the memory that a library manages itself: the working memory of oneDNN and of the CPU kernels, which a
thread keeps between calls. On a GPU the caching allocator counts the bytes that were requested from it, before it
rounds them up to its blocks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


class Memory(NamedTuple):
    """Bytes: ``kept`` is still allocated after the call has returned, ``peak`` is the largest sum at one time."""

    kept: int
    peak: int


def _requested(which: str) -> int:
    """Bytes that were requested from the GPU's caching allocator: ``current`` or ``peak``."""
    return int(torch.cuda.memory_stats().get(f"requested_bytes.all.{which}", 0))  # empty before the first use of CUDA


def traced(call: Callable[[], T]) -> tuple[T, Memory]:
    """The result of ``call()`` and its memory, without the memory that was allocated before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = _requested("current")
        result = call()
        kept, peak = _requested("current") - before, _requested("peak") - before
        if peak:  # without a peak the call ran on the CPU
            return result, Memory(kept, peak)
        del result
    enabled = gc.isenabled()
    gc.disable()  # a collection could free earlier memory, and the sum would be too low
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = call()
    finally:
        if enabled:
            gc.enable()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, Memory(now, peak)
