"""The benchmarks on a GPU: timing with a cold L2 cache, the measured copy bandwidth, facts of the device.

A call is captured as a CUDA graph once, and its replays are timed, so that the host's time to launch its kernels is not
in the figure. Events time the calls that cannot be captured one by one, and a table names them. Before each timed call
a kernel reads a buffer that is larger than the L2 cache, so that no map is in the cache. A kernel that writes the
buffer would leave lines which the timed call must write back. While the kernel reads, the host enqueues the call, so
that the events enclose the GPU's work alone, unless the events of a call that is not captured wait for its launches.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Sample

#: Bytes of the buffer whose copy is the measured bandwidth.
COPY_BYTES = 1 << 30
#: Calls before a capture: PyTorch asks for some, on the stream of the capture, so that nothing is compiled within it.
WARM_UP = 3


@functools.lru_cache(maxsize=1)
def _evictor() -> tuple[Tensor, Tensor]:
    """A buffer of twice the L2 cache, and the target of its sum."""
    size = max(torch.cuda.get_device_properties().L2_cache_size, 32 << 20)
    return torch.zeros(2 * size // 4, device="cuda"), torch.empty((), device="cuda")


def evict() -> None:
    """Enqueues a kernel that reads more than the L2 cache holds, and writes almost nothing."""
    buffer, target = _evictor()
    torch.sum(buffer, 0, out=target)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def capture(*steps: Callable[[], object]) -> list[Callable[[], None]]:
    """The replays of the steps, each captured as a CUDA graph of its own. A step may read the results of earlier ones.

    The graphs share memory, so they must be replayed in their order.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[torch.cuda.CUDAGraph] = []
    for step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            step()
        graphs.append(graph)
    return [graph.replay for graph in graphs]


class GpuBlock:
    """A block of calls, each timed by itself. The steps of a call run one after the other.

    ``whole`` is the direction of all steps, and ``last`` the direction of the last one if there are two.
    ``prepare`` runs before each block. The first block captures the steps.
    """

    def __init__(
        self, steps: list[Callable[[], object]], whole: str, last: str = "", prepare: Callable[[], object] | None = None
    ) -> None:
        self.steps, self.whole, self.last, self.prepare = steps, whole, last, prepare
        self.captured: list[Callable[[], None]] | None = None
        #: The reason why the steps cannot be captured; events time the calls themselves then.
        self.why_not_graph = ""

    @property
    def timed_by(self) -> str:
        return "events" if self.why_not_graph else "graph"

    def _run(self) -> list[Callable[[], Any]]:
        """The replays, or the steps if they cannot be captured."""
        if self.captured is None and not self.why_not_graph:
            try:
                self.captured = capture(*self.steps)
            except Exception as error:  # a contender may synchronise, or allocate more than there is
                torch.cuda.synchronize()
                lines = str(error).splitlines() or [""]
                self.why_not_graph = f"{type(error).__name__}: {lines[0]}"
        return list(self.steps if self.captured is None else self.captured)

    def __call__(self, calls: int) -> Sample:
        if self.prepare is not None:
            self.prepare()
        steps, marks = self._run(), []
        for step in steps:
            step()
        for _ in range(calls):
            evict()
            found = [_mark()]
            for step in steps:
                step()
                found.append(_mark())
            marks.append(found)
        torch.cuda.synchronize()
        spans = {self.whole: (0, -1)} | ({self.last: (-2, -1)} if self.last else {})
        return {
            name: statistics.fmean(found[first].elapsed_time(found[end]) for found in marks) * 1e-3
            for name, (first, end) in spans.items()
        }


def timed(direction: str, call: Callable[[], object], prepare: Callable[[], object] | None = None) -> GpuBlock:
    """A block of calls, as ``timing.timed`` makes it, but each call is timed by itself."""
    return GpuBlock([call], direction, prepare=prepare)


def timed_pair(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object], prepare: Callable[[], object] | None = None
) -> GpuBlock:
    """The GPU's part of ``passes.training_block``. Backward finds in the cache the data that forward left there."""
    results: list[Tensor] = []

    def first() -> None:
        results[:] = [forward()]

    return GpuBlock([first, lambda: backward(results.pop())], "both", "backward", prepare)


def not_captured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each contender that events timed, with the reasons of its rows."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["why_not_graph"]:
            reasons.setdefault(row["contender"], []).append(row["why_not_graph"])
    return [f"{name} was not captured: {'; '.join(dict.fromkeys(why))}" for name, why in reasons.items()]


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
