"""``python -m steam_kernels.backends.triton.tune``: times other entries of the launch table on this machine's GPU.

For each stage of a ResNet, dtype, memory format and direction, this program prints the launches of the pool, graph,
lattice and gate kernels in the table, the fastest launches that it found, and the gain. A person copies the results
into ``launch.py``: nothing reads them at run time. The program needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import Inputs, Options
from ...schemas import Backward, Forward
from . import family, launch
from .operators import INTERPRETED, backward, forward

STAGES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (96, 14, 14))
DTYPES = (torch.float32, torch.bfloat16)
GRID = 7
#: The constants of each kernel that the search changes: blocks that the kernel accepts in other sizes, and the steps.
#: The kernels of the graph stage share their other blocks.
BLOCKS = {
    "pool_runs": ("STEPS",),
    "pool_tiles": ("CHANNELS", "ROWS", "CELLS", "COLUMNS"),
    "graph": ("HALO",),
    "graph_backward_ring": ("HALO",),
    "lattice": ("NODES", "BLOCKS"),
    "lattice_backward": ("NODES", "BLOCKS"),
    "gate": ("ROWS", "RUN", "STEPS"),
    "gate_backward": ("ROWS", "RUN", "STEPS"),
}
#: The constants that shape no tile of a map.
NO_TILE = ("STEPS", "HALO", "NODES", "BLOCKS")
#: The most elements of a candidate's tile.
LARGEST_TILE = 8192
#: Seconds of replays before the timed replays of a candidate, and the number of these.
WARM_UP = 0.03
REPEATS = 20


@dataclass(frozen=True)
class Result:
    """One kernel in one pass: the table's launch and the fastest launch found, with their times in microseconds."""

    of: launch.Pass
    table: launch.Launch
    table_us: float
    best: launch.Launch
    best_us: float

    @property
    def gain(self) -> float:
        return self.table_us / self.best_us - 1


def candidates(how: launch.Launch, p: launch.Pass) -> Iterator[launch.Launch]:
    """The table's launch, and launches with blocks and warps of half and twice the size."""
    names, own = BLOCKS[how.kernel], settings(how)
    choices = [sorted({max(1, own[name] // 2), own[name], 2 * own[name]}) for name in names]
    seen = set()
    for values in itertools.product(*choices):
        blocks = dict(zip(names, values, strict=True))
        tile = 1
        for name in names:
            tile *= 1 if name in NO_TILE else blocks[name]
        if tile > LARGEST_TILE or (how.kernel.startswith("gate") and tile < launch.GATE_THREADS):
            continue
        for warps in (how.num_warps // 2, how.num_warps, how.num_warps * 2):
            changed = own | blocks
            steps = changed.pop("STEPS")
            if steps > 1 and "LOOP" in changed:
                changed["LOOP"] = True
            key = (*values, warps)
            if warps < 1 or key in seen:
                continue
            seen.add(key)
            count = programs(how, changed, steps, p)
            yield replace(how, constants=changed, steps=steps, num_warps=warps, programs=count)


def settings(how: launch.Launch) -> dict[str, Any]:
    """The constants of a launch, and its steps."""
    return {**how.constants, "STEPS": how.steps}


def programs(how: launch.Launch, constants: dict[str, Any], steps: int, p: launch.Pass) -> int:
    """The number of programs of a kernel with these constants and steps."""
    if how.kernel == "pool_runs":
        return p.samples * launch.ceil_div(p.channels, constants["CHANNELS"] * steps)
    if how.kernel == "pool_tiles":
        cells = launch.ceil_div(p.grid_w, constants["CELLS"])
        return p.samples * p.grid_h * cells * launch.ceil_div(p.channels, constants["CHANNELS"])
    if how.kernel.startswith("gate"):
        rows = launch.ceil_div(launch.ceil_div(p.channels, constants["GROUP"]), constants["ROWS"] * steps)
        return p.samples * rows * launch.ceil_div(p.area * constants["GROUP"], constants["RUN"])
    return how.programs


def passes(samples: int, family: str) -> Iterator[tuple[launch.Pass, torch.dtype]]:
    """The passes that are tuned, with their dtypes."""
    for (c, h, w), dtype, last, back in itertools.product(STAGES, DTYPES, (False, True), (False, True)):
        grid = min(GRID, h), min(GRID, w)
        yield launch.Pass(samples, c, h, w, *grid, dtype.itemsize, last, back, family), dtype


def search(p: launch.Pass, time_of: Callable[[launch.Launch], float]) -> list[Result]:
    """The fastest launch of each stage, with the table's launches of the other stages.

    ``time_of`` gives the microseconds of a launch.
    """
    found = []
    for how in (launch.pool(p), launch.graph(p, 4, 2), launch.lattice(p, 4, 2), launch.gate(p)):
        if how is None:
            continue
        timed = [(time_of(candidate), candidate) for candidate in candidates(how, p)]
        own = next(us for us, candidate in timed if candidate == how)
        us, best = min(timed, key=lambda pair: pair[0])
        found.append(Result(p, how, own, best, us))
    return found


def table(results: Iterable[Result]) -> str:
    """The results as Markdown, the largest gain first."""
    lines = ["| pass | kernel | table | us | best | us | gain |", "|---|---|---|---|---|---|---|"]
    for r in sorted(results, key=lambda r: -r.gain):
        p = r.of
        layout = "channels_last" if p.channels_last else "NCHW"
        name = f"{p.samples}x{p.channels}x{p.height}x{p.width}, {p.itemsize} bytes, {layout}"
        own, best = (describe(how) for how in (r.table, r.best))
        lines.append(
            f"| {name} | {r.table.kernel} | {own} | {r.table_us:.1f} | {best} | {r.best_us:.1f} | {r.gain:.0%} |"
        )
    return "\n".join(lines)


def describe(how: launch.Launch) -> str:
    own = settings(how)
    blocks = " ".join(f"{name}={own[name]}" for name in BLOCKS[how.kernel])
    return f"{blocks}, {how.num_warps} warps"


def time_call(call: Callable[[], None]) -> float:
    """Microseconds of a call's work on the GPU: the median of replays of the call as a CUDA graph.

    An idle GPU lowers its clocks, and the events around a call in an empty queue enclose the host's time to launch it.
    So replays run for a while before the timed ones, and nothing waits for the GPU in between. A replay is one launch
    of the host, which takes less time than the GPU's work, so that the timed replays wait in the queue.
    """
    call()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        graph.replay()
    spans = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans) * 1e3


def time_on_gpu(p: launch.Pass, dtype: torch.dtype, how: launch.Launch) -> float:
    """Microseconds of a call that launches its kernel by ``how``; infinite if the kernel does not compile."""
    stage = how.kernel.removesuffix("_backward").split("_")[0]
    original, small = getattr(launch, stage), launch.SMALL
    format = torch.channels_last if p.channels_last else torch.contiguous_format
    x = torch.randn(p.samples, p.channels, p.height, p.width, device="cuda", dtype=dtype).to(memory_format=format)
    weight = torch.randn(4, 8, device="cuda")
    inputs, grid, arguments = Inputs(x, weight, weight), (p.grid_h, p.grid_w), Options().arguments
    given = Forward(inputs, True, grid, arguments)
    family = p.family
    _, saved = forward(given, family)
    upstream = Backward(x, inputs, None, saved, (True, True, True, False), grid, arguments)

    def call() -> None:
        if p.backward:
            backward(upstream, family)
        else:
            forward(given, family)

    setattr(launch, stage, lambda *_: how)
    launch.SMALL = 0
    try:
        return time_call(call)
    except Exception as error:  # too many registers or too much shared memory exclude this candidate alone
        print(f"  {describe(how)}: {type(error).__name__}")
        return float("inf")
    finally:
        setattr(launch, stage, original)
        launch.SMALL = small


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="the batch (%(default)s)")
    given = parser.parse_args(arguments)
    if INTERPRETED or not torch.cuda.is_available():
        print("tuning needs a GPU, and " + ("TRITON_INTERPRET is set" if INTERPRETED else "PyTorch sees none"))
        return 1
    results: list[Result] = []
    for p, dtype in passes(given.samples, family(torch.cuda.current_device())):
        results += search(p, lambda how, p=p, dtype=dtype: time_on_gpu(p, dtype, how))  # type: ignore[misc]
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
