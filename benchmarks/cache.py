"""The share of the last-level cache: the unit over the floor, and a network with units over the network without them.

    python -m benchmarks.cache [--cache 8,16,32,64,300] [--shape 56,28,...] [--batch 32] [--network-batch 8]
                               [--seconds 0.5] [--network-seconds 60] [--quick] [--json PATH]

The kernels write outputs past the caches if the outputs do not fit into the share of the last-level cache that
``STEAM_KERNELS_CACHE`` sets. For each share in MiB, one run measures, interleaved:

* *units*: forward (``steam()`` without gradients) and backward (the operator), each over its floor;
* *network*: a ResNet-50 with units over the same network without them, in training and in inference. The next layer
  reads the output of a unit, and may lose the time that the unit gains by writing past the caches.

The default share of this machine is always measured, and is marked.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("cache: loads PyTorch and torchvision")

import torch

from benchmarks import end_to_end, judging, passes, runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.contenders import Fused
from benchmarks.shapes import DTYPES, LAYOUTS, STAGES, Shape
from benchmarks.tables import micro, table
from benchmarks.timing import Block, Effort, interleaved, timed, within
from steam_kernels.backends import native

MIB = 1 << 20
PASSES = ("forward", "backward")


class Share:
    """The share of the last-level cache that the CPU kernels use in this process."""

    def __init__(self) -> None:
        if native.CPU.reason or native.CPU.cache is None:
            raise SystemExit(f"the CPU kernels do not run: {native.CPU.reason}")
        self.default, self._fixed = native.CPU.cache.used, native.CPU.cache.set
        library = ctypes.CDLL(str(native.CPU.path))
        self._set, self._unset = library.steam_cpu_set_cache_bytes, library.steam_cpu_unset_cache_bytes
        self._set.argtypes = [ctypes.c_int64]
        self._claim = library.steam_cpu_probe_set_claims

    @contextmanager
    def of(self, bytes_: int) -> Iterator[None]:
        """The default leaves the choice to the kernels, which may not be the same as setting its bytes."""
        if bytes_ != self.default:
            self._set(bytes_)
        try:
            yield
        finally:
            if self._fixed:
                self._set(self.default)
            else:
                self._unset()

    @contextmanager
    def storing(self, bytes_: int, claims: bool) -> Iterator[None]:
        """With that share, and with or without claims of the lines of the output."""
        self._claim(int(claims))
        try:
            with self.of(bytes_):
                yield
        finally:
            self._claim(-1)

    def block(self, bytes_: int, block: Block) -> Block:
        """``block`` with that share."""
        return within(lambda: self.of(bytes_), block)


def units(share: Share, caches: list[int], shapes: list[Shape], effort: Effort) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        tensors = shape.tensors()
        blocks = passes.floor_blocks(shape, tensors)
        made = {
            "forward": passes.forward_block(Fused(), shape, tensors),
            "backward": passes.backward_operator_block(shape, tensors),
        }
        for cache in caches:
            with share.of(cache):
                judged = judging.judge(shape, tensors)
                judged.check(judging.outputs(Fused(), shape, tensors), shape.label)
            blocks |= {f"{d} {cache}": share.block(cache, block) for d, block in made.items()}
        m = interleaved(blocks, effort)
        for cache in caches:
            row: dict[str, Any] = {"section": "units", "problem": shape.label, "cache": cache}
            for d in PASSES:
                row[d] = m.median(f"{d} {cache}", d)
                row[f"{d}_over_floor"] = row[d] / m.median(f"floor-{d}", d)
                row[f"{d}_spread"] = m.spread(f"{d} {cache}", d)
            rows.append(row | {"default": cache == share.default})
        say(f"  units: {shape.label}")
    return rows


def network(share: Share, caches: list[int], name: str, images: torch.Tensor, seconds: float) -> list[dict[str, Any]]:
    """Rows of both tasks, with medians and quartiles of the ratios of times in the same round."""
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
        blocks: dict[int | None, Block] = {}
        for cache, call in calls.items():
            block = timed(task, call, warm=False)
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
    parser = parser_of("cache", __doc__)
    parser.add_argument("--cache", default="8,16,32,64,300", help="comma list of MiB (8,16,32,64,300)")
    parser.add_argument("--shape", default="", help=f"comma list of stages: {', '.join(STAGES)} (all)")
    parser.add_argument("--dtype", default="float32", help="comma list (float32)")
    parser.add_argument("--layout", default="nchw", help=f"comma list: {', '.join(LAYOUTS)} (nchw)")
    parser.add_argument("--batch", type=int, default=0, help="batch of the units (32)")
    parser.add_argument("--network-batch", type=int, default=0, help="batch of the network (8)")
    parser.add_argument("--size", type=int, default=0, help="side of the images in pixels (224)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds for each pass of each row of units (0.5)")
    parser.add_argument("--network-seconds", type=float, default=60, help="seconds for each task of the network (60)")
    add_run_options(parser, "small maps and images, few rounds")
    args = parser.parse_args()
    share = Share()
    caches = sorted({share.default, *(round(float(v) * MIB) for v in args.cache.split(",") if v)})
    stages = choices(parser, "--shape", args.shape, STAGES) or (["7"] if args.quick else list(STAGES))
    batch = args.batch or (2 if args.quick else 32)
    shapes = [
        Shape(batch, *STAGES[s], d, layout)
        for s in stages
        for d in choices(parser, "--dtype", args.dtype, DTYPES)
        for layout in choices(parser, "--layout", args.layout, LAYOUTS)
    ]
    facts = runs.begin()
    say(f"the cache: {native.CPU.cache}")
    rows = units(share, caches, shapes, Effort.quick() if args.quick else Effort(seconds=args.seconds))
    head = ("unit, time over the floor", "cache", "forward", "backward")
    body = [(r["problem"], label(r), r["forward_over_floor"], r["backward_over_floor"]) for r in rows]
    say("\n" + table("== units ==", head, body) + "\n")
    size = args.size or (64 if args.quick else 224)
    images = torch.randn(
        args.network_batch or (2 if args.quick else 8), 3, size, size, generator=torch.Generator().manual_seed(0)
    )
    name = "resnet18" if args.quick else "resnet50"
    networks = network(share, caches, name, images, 0.0 if args.quick else args.network_seconds)
    head = ("network, time over the network without units", "cache", "median", "quartiles", "time")
    lines = []
    for r in networks:
        low, high = r["quartiles"]
        times = (r["time_over_plain"], f"{low:.3f} to {high:.3f}", micro(r["seconds"]))
        lines.append((f"{r['network']} {r['task']}", label(r), *times))
    say("\n" + table("== network ==", head, lines))
    runs.write(args.json, "cache", rows + networks, facts, args.quick)


if __name__ == "__main__":
    main()
