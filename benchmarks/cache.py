"""Whose cache it is: the unit over the floor, and a network with units over the same without, by the cache counted on.

    python -m benchmarks.cache [--cache 8,16,32,64,300] [--shape 56,28,...] [--batch 32] [--network-batch 8]
                               [--seconds 0.5] [--network-seconds 60] [--quick] [--json PATH]

Outputs that our share of the last-level cache cannot hold are written past the caches. For each number of MiB, as
``STEAM_KERNELS_CACHE`` sets it in bytes, in one run and interleaved:

* *units*: forward (``steam()`` without gradients) and backward (the operator), each over its floor;
* *network*: a ResNet-50 with units over the same network without, in training and in inference, because what follows a
  unit reads its output: what the unit gains by writing past the caches the next layer may lose.

The default of this machine is always among them, and marked.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import core

if __name__ == "__main__":
    core.restart_with_malloc()

import torch

from benchmarks import end_to_end
from benchmarks.core import Problem, say
from steam_kernels.backends import native

MIB = 1 << 20
PASSES = ("forward", "backward")


class Share:
    """What the CPU kernels count on, in this process."""

    def __init__(self) -> None:
        if native.CPU.reason or native.CPU.cache is None:
            raise SystemExit(f"the CPU kernels do not run: {native.CPU.reason}")
        self.default = native.CPU.cache.used
        self._set = ctypes.CDLL(str(native.CPU.path)).steam_cpu_set_cache_bytes
        self._set.argtypes = [ctypes.c_int64]

    @contextmanager
    def of(self, bytes_: int) -> Iterator[None]:
        self._set(bytes_)
        try:
            yield
        finally:
            self._set(self.default)

    def block(self, bytes_: int, block: core.Block) -> core.Block:
        """``block`` with that share."""

        def run(calls: int) -> core.Sample:
            with self.of(bytes_):
                return block(calls)

        return run


def units(share: Share, caches: list[int], problems: list[Problem], effort: core.Effort) -> list[dict[str, Any]]:
    rows = []
    for problem in problems:
        tensors = problem.tensors()
        blocks = core.floor_blocks(problem, tensors)
        made = {
            "forward": core.forward_block(core.fused(), problem, tensors),
            "backward": core.op_backward_block(problem, tensors),
        }
        for cache in caches:
            with share.of(cache):
                judged = core.judge(problem, tensors)
                judged.check(core.outputs(core.fused(), problem, tensors), problem.label)
            blocks |= {f"{d} {cache}": share.block(cache, block) for d, block in made.items()}
        m = core.interleaved(blocks, effort)
        for cache in caches:
            row: dict[str, Any] = {"section": "units", "problem": problem.label, "cache": cache}
            for d in PASSES:
                row[d] = m.median(f"{d} {cache}", d)
                row[f"{d}_over_floor"] = row[d] / m.median(f"floor-{d}", d)
                row[f"{d}_spread"] = m.spread(f"{d} {cache}", d)
            rows.append(row | {"default": cache == share.default})
        say(f"  units: {problem.label}")
    return rows


def network(share: Share, caches: list[int], name: str, images: torch.Tensor, seconds: float) -> list[dict[str, Any]]:
    """Rows of both tasks; medians and quartiles of the ratios of times in one round."""
    judge = end_to_end.Judge(name, images[:4, :, :112, :112])
    for cache in caches:
        with share.of(cache):
            judge.check("steam")
    rows = []
    for task in end_to_end.TASKS:
        calls: dict[int | None, Callable[[], object]] = {
            None: end_to_end.CALLS[task](end_to_end.make(name, "plain"), images)
        }
        with_units = end_to_end.CALLS[task](end_to_end.make(name, "steam"), images)
        calls |= dict.fromkeys(caches, with_units)
        once = 0.0
        blocks: dict[int | None, core.Block] = {}
        for cache, call in calls.items():
            block = core.timed(task, call, warm=False)
            blocks[cache] = block if cache is None else share.block(cache, block)
            blocks[cache](2)
            once += blocks[cache](1)[task]
        times: dict[int | None, list[float]] = {cache: [] for cache in blocks}
        for _ in range(max(end_to_end.ROUNDS if seconds else 2, int(seconds / once))):
            for cache, block in blocks.items():
                times[cache].append(block(1)[task])
        for cache in caches:
            ratios = [a / b for a, b in zip(times[cache], times[None], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row = {"section": "network", "network": name, "task": task, "cache": cache, "rounds": len(ratios)}
            row |= {"seconds": statistics.median(times[cache]), "time_over_plain": middle, "quartiles": [low, high]}
            rows.append(row | {"default": cache == share.default})
        say(f"  network: {name}, {task}")
    return rows


def label(row: dict[str, Any]) -> str:
    return f"{row['cache'] / MIB:g} MiB" + (" (default)" if row["default"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", default="8,16,32,64,300", help="comma list of MiB (8,16,32,64,300)")
    parser.add_argument("--shape", default="", help=f"comma list of stages: {', '.join(core.STAGES)} (all)")
    parser.add_argument("--dtype", default="float32", help="comma list (float32)")
    parser.add_argument("--layout", default="nchw", help=f"comma list: {', '.join(core.LAYOUTS)} (nchw)")
    parser.add_argument("--batch", type=int, default=0, help="of the units (32)")
    parser.add_argument("--network-batch", type=int, default=0, help="images (8)")
    parser.add_argument("--size", type=int, default=0, help="their side in pixels (224)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each pass of each row of units (0.5)")
    parser.add_argument("--network-seconds", type=float, default=60, help="for each task of the network (60)")
    parser.add_argument("--quick", action="store_true", help="small, few rounds: that it runs, not what it takes")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    share = Share()
    caches = sorted({share.default, *(round(float(v) * MIB) for v in args.cache.split(",") if v)})
    stages = [s for s in args.shape.split(",") if s] or (["7"] if args.quick else list(core.STAGES))
    batch = args.batch or (2 if args.quick else 32)
    problems = [
        Problem(batch, *core.STAGES[s], d, layout)
        for s in stages
        for d in args.dtype.split(",")
        for layout in args.layout.split(",")
    ]
    facts = core.machine()
    say(core.describe(facts))
    say(f"the cache: {native.CPU.cache}")
    rows = units(share, caches, problems, core.Effort.quick() if args.quick else core.Effort(seconds=args.seconds))
    head = ("unit, time over the floor", "cache", "forward", "backward")
    body = [(r["problem"], label(r), r["forward_over_floor"], r["backward_over_floor"]) for r in rows]
    say("\n" + core.table("== units ==", head, body) + "\n")
    size = args.size or (64 if args.quick else 224)
    images = torch.randn(
        args.network_batch or (2 if args.quick else 8), 3, size, size, generator=torch.Generator().manual_seed(0)
    )
    name = "resnet18" if args.quick else "resnet50"
    networks = network(share, caches, name, images, 0.0 if args.quick else args.network_seconds)
    head = ("network, time over it without units", "cache", "median", "quartiles", "time")
    lines = []
    for r in networks:
        low, high = r["quartiles"]
        times = (r["time_over_plain"], f"{low:.3f} to {high:.3f}", core.micro(r["seconds"]))
        lines.append((f"{r['network']} {r['task']}", label(r), *times))
    say("\n" + core.table("== network ==", head, lines))
    if args.json:
        core.write_json(args.json, "cache", rows + networks, facts, args.quick)


if __name__ == "__main__":
    main()
