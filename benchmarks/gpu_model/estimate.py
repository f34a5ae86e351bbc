"""The formula of the model, from the counts of a launch to an estimate of its time.

A launch takes the longer one of two times:

* **memory**: bytes over the bandwidth of memory, or over the bandwidth of the cache. Bytes that the cache still holds
  from an earlier launch of the call do not come from memory.
* **work**: a multiprocessor has as many programs at a time as its registers, shared memory and warps allow, a wave.
  Each wave takes its rounds of loads times the latency, and its instructions over the rate at which they begin.

To these comes a fixed time for each launch. The GPU's part of it is counted once a launch, and the host's part is not
counted: the host runs ahead of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu_model.gpus import DEPENDENT_CYCLES, Gpu
from benchmarks.gpu_model.launches import Launch, Program, Tensor


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one launch, without the fixed time of a launch."""

    #: Of the bytes that come from memory or go there, and of the bytes through the cache.
    memory: float
    cache: float
    work: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.cache, self.work)


# ---- work ------------------------------------------------------------------------------------------------------------


def warps(launch: Launch, gpu: Gpu) -> int:
    return -(-launch.threads // gpu.warp)


def waves(launch: Launch, gpu: Gpu) -> list[int]:
    """The programs that the multiprocessor with the most programs has at a time, wave after wave."""
    resident = gpu.limits.resident(launch.registers, launch.shared, warps(launch, gpu))
    most = -(-launch.programs // gpu.multiprocessors)
    full, rest = divmod(most, max(resident, 1))
    return [resident] * full + [rest] * (rest > 0)


def wave_seconds(program: Program, programs: int, launch: Launch, gpu: Gpu, from_memory: bool) -> float:
    """The time of so many equal programs on one multiprocessor.

    If the launch reads from memory, one round of each tile has the latency of memory. The other rounds have the
    cache's. A warp begins an instruction when its last one is done, so few warps do not reach the full rate.
    """
    rate = min(gpu.issue, programs * warps(launch, gpu) / DEPENDENT_CYCLES)
    # An instruction of a wider warp does the work of several.
    instructions = programs * program.instructions * 32 / gpu.warp
    far = min(program.rounds, launch.tiles) if from_memory else 0
    latency = far * gpu.memory_latency + (program.rounds - far) * gpu.cache_latency
    return latency + instructions / (rate * gpu.clock)


def work_seconds(launch: Launch, gpu: Gpu, from_memory: bool) -> float:
    """All waves, or the first program alone if it takes longer. Without counts, one round of loads."""
    if not launch.programs:
        return gpu.memory_latency if from_memory else gpu.cache_latency
    first = wave_seconds(launch.first, 1, launch, gpu, from_memory)
    return max(first, sum(wave_seconds(launch.program, n, launch, gpu, from_memory) for n in waves(launch, gpu)))


# ---- the cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes of a tensor that the cache holds, and whether a launch of the reversed order has left them."""

    bytes: float
    is_reversed: bool


class Cache:
    """The last-level cache from launch to launch: it gives up what was used longest ago. It is empty before a call."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.held: dict[str, Held] = {}  # the newest last

    def run(self, launch: Launch) -> float:
        """The bytes that a launch reads from memory; the cache then holds what the launch leaves."""
        missed = sum(max(0.0, self.unique(launch, name) - self.found(launch, name)) for name in launch.tensors)
        self._leave(launch)
        return missed

    @staticmethod
    def unique(launch: Launch, name: str) -> int:
        """The bytes of a tensor that a launch reads, each counted once."""
        return min(launch.tensors[name].bytes, launch.tensors[name].read)

    def found(self, launch: Launch, name: str) -> float:
        """The bytes of a tensor that a launch finds in the cache.

        It finds a whole tensor, and the end of a tensor if it begins there. Its other bytes replace what the cache
        holds, so it finds less, unless the cache gives up loaded lines first.
        """
        held, tensor = self.held.get(name), launch.tensors[name]
        if held is None or (held.bytes < tensor.bytes and held.is_reversed == launch.is_reversed):
            return 0.0
        if launch.evict_first:
            return held.bytes
        others = sum(touched(t) for other, t in launch.tensors.items() if other != name)
        room = self.size - sum(h.bytes for h in self.held.values())
        return min(held.bytes, (held.bytes + room) / (1 + others / tensor.bytes))

    def _leave(self, launch: Launch) -> None:
        """The launch leaves the last bytes that it has used, of all its tensors alike."""
        total = sum(map(touched, launch.tensors.values()))
        share = min(1.0, self.size / total) if total else 0.0
        left = {name: Held(share * touched(t), launch.is_reversed) for name, t in launch.tensors.items()}
        room = self.size - share * total
        kept: list[tuple[str, Held]] = []
        for name, held in reversed(self.held.items()):
            if name not in left and room > 0:
                kept.append((name, Held(min(held.bytes, room), held.is_reversed)))
                room -= kept[-1][1].bytes
        self.held = dict(reversed(kept)) | left


def touched(tensor: Tensor) -> int:
    """The bytes of a tensor that a launch uses, each counted once."""
    return min(tensor.bytes, max(tensor.read, tensor.written))


# ---- launches and calls ----------------------------------------------------------------------------------------------


def estimates(launches: Sequence[Launch], gpu: Gpu) -> list[Estimate]:
    """An estimate for each launch of a call."""
    cache, out = Cache(gpu.cache), []
    for launch in launches:
        read = cache.run(launch)
        written = sum(min(t.bytes, t.written) for t in launch.tensors.values())
        through = sum(t.read + t.written for t in launch.tensors.values())
        work = work_seconds(launch, gpu, read > 0)
        out.append(Estimate((read + written) / gpu.bandwidth, through / gpu.cache_bandwidth, work))
    return out


def kernels_seconds(launches: Sequence[Launch], gpu: Gpu) -> float:
    """The estimate of a call without the fixed times of its launches."""
    return sum(e.seconds for e in estimates(launches, gpu))


def launches_seconds(launches: Sequence[Launch], gpu: Gpu) -> float:
    """The fixed times of the launches of a call."""
    return len(launches) * gpu.launch


def call_seconds(launches: Sequence[Launch], gpu: Gpu) -> float:
    return kernels_seconds(launches, gpu) + launches_seconds(launches, gpu)


def floor_seconds(map_bytes: int, direction: str, gpu: Gpu) -> float:
    """The floor of ``benchmarks.passes``: a read and a write of the map forward, two reads and a write backward."""
    return map_bytes * (2 if direction == "forward" else 3) / gpu.bandwidth
