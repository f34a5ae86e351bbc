"""The benchmarks on a GPU: timing by events with a cold L2 cache, the measured copy bandwidth, facts of the device.

Each timed call is enqueued behind a kernel that overwrites the L2 cache, so that no map is in the cache. While that
kernel runs, the host enqueues the call. The events then enclose the GPU's work alone, unless a call keeps the host busy
for longer than that kernel runs.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Block, Sample

#: Bytes of the buffer whose copy is the measured bandwidth.
COPY_BYTES = 1 << 30


@functools.lru_cache(maxsize=1)
def _evictor() -> Tensor:
    """A buffer of twice the L2 cache."""
    size = max(torch.cuda.get_device_properties().L2_cache_size, 32 << 20)
    return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _mean(spans: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    torch.cuda.synchronize()
    return statistics.fmean(start.elapsed_time(end) for start, end in spans) * 1e-3


def timed(direction: str, call: Callable[[], object]) -> Block:
    """A block of calls, as ``timing.timed`` makes it, but each call is timed by itself."""

    def block(calls: int) -> Sample:
        spans = []
        call()
        for _ in range(calls):
            _evictor().zero_()
            start = _mark()
            call()
            spans.append((start, _mark()))
        return {direction: _mean(spans)}

    return block


def timed_pair(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> Block:
    """The GPU's part of ``passes.training_block``. Backward finds in the cache the data that forward left there."""

    def block(calls: int) -> Sample:
        both, second = [], []
        backward(forward())
        for _ in range(calls):
            _evictor().zero_()
            start = _mark()
            y = forward()
            middle = _mark()
            grads = backward(y)
            end = _mark()
            both.append((start, end))
            second.append((middle, end))
            del y, grads
        return {"both": _mean(both), "backward": _mean(second)}

    return block


@functools.lru_cache(maxsize=1)
def copy_gbytes() -> float:
    """GB/s of this device's own copy of a large buffer, read and write counted. Shares of bandwidth refer to it."""
    free, _ = torch.cuda.mem_get_info()
    source = torch.zeros(min(COPY_BYTES, free // 4), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    block = timed("copy", lambda: target.copy_(source))
    seconds = statistics.median(block(1)["copy"] for _ in range(20))
    return 2 * source.numel() / seconds * 1e-9


def facts() -> dict[str, Any]:
    """The device and its driver, as an addition to ``machine.facts()``."""
    from steam_kernels.backends import native

    device = torch.cuda.get_device_properties()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "gpu": device.name,
        "gpu_architecture": getattr(device, "gcnArchName", "") or f"sm_{device.major}{device.minor}",
        "gpu_memory_gbytes": round(device.total_memory * 1e-9, 1),
        "gpu_multiprocessors": device.multi_processor_count,
        "gpu_l2_mbytes": round(device.L2_cache_size * 1e-6, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "triton": triton_version,
        "cuda_library": native.build_of(native.CUDA_LIBRARY.stem),
        "copy_gbytes": round(copy_gbytes(), 1),
    }


def _driver() -> str:
    version = int(torch._C._cuda_getDriverVersion()) if torch.version.cuda else 0
    return f"supports CUDA {version // 1000}.{version % 1000 // 10}" if version else "unknown"
