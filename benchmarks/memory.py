"""How much memory a call takes, by torch.profiler's record of what PyTorch's allocator hands out and takes back.

What a library keeps in memory of its own is not in the record: oneDNN's and the CPU kernels' scratch, which stays with
the thread between calls. On a GPU the record is the caching allocator's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


class Memory(NamedTuple):
    """Bytes: ``kept`` is what is still allocated when the call has returned, ``peak`` the most that was at once."""

    kept: int
    peak: int


def traced(call: Callable[[], T]) -> tuple[T, Memory]:
    """The result of ``call()`` and the memory that it took; what was allocated before it is not counted."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        if peak:  # else the call was the CPU's
            return result, Memory(kept, peak)
        del result
    enabled = gc.isenabled()
    gc.disable()  # or it could free what was allocated before, and the sum would be too low
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
