"""The fused unit under other conditions: ways to store, one thread, denormal numbers; and a copy with streaming stores.

    python -m benchmarks.conditions [--size 56,28,14,7] [--batch 32] [--dtype float32] [--layout nchw,channels_last]
                                    [--quick] [--json PATH]

All conditions of a shape are measured in the same rounds. Forward is ``steam()`` without gradients, and backward is the
operator. Each time is over the floor of a plain pass (``passes.floor_blocks``) on the same number of threads.

* *default*: the way to store that the kernels choose here, on all threads.
* *past the caches*, *ordinary stores*, *claimed lines*: the three ways to store, whichever the kernels would choose.
  The results have the same bits.
* *one thread*: over the floor on one thread.
* *denormal numbers*: x and dy are 1e-39 times as large, so that they and the results are denormal; *flushed* under
  ``torch.set_flush_denormal(True)``. *The floor on denormal numbers* is the plain pass over them.
* *copy with streaming stores*: the C library's ``memmove`` of x, divided among as many threads, which writes past the
  caches. It is what the memory can do, because the plain pass reads each line of its output before it writes it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    # glibc's memmove of at least so many bytes uses streaming stores. This is the least number that glibc takes.
    malloc.restart({"glibc.cpu.x86_non_temporal_threshold": "16448"})
    say("conditions: loads PyTorch")

import torch
from torch import Tensor

from benchmarks import judging, passes, runs
from benchmarks.cache import Share
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.contenders import Fused
from benchmarks.progress import measured
from benchmarks.shapes import DTYPES, LAYOUTS, STAGES, Shape
from benchmarks.sweep import JUDGED
from benchmarks.tables import micro, table
from benchmarks.timing import Block, Effort, interleaved, timed, within

PASSES = ("forward", "backward")
#: By name: the bytes of the cache that a call counts on, and whether it claims the lines of its output.
WAYS = {
    "past the caches": (0, False),
    "ordinary stores": ((1 << 63) - 1, False),
    "claimed lines": ((1 << 63) - 1, True),
}
DENORMAL = 1e-39
COPY = "copy with streaming stores"
DENORMAL_FLOOR = "the floor on denormal numbers"
Context = Callable[[], AbstractContextManager[None]]


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        raise RuntimeError("this processor cannot flush denormal numbers to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def copy_block(x: Tensor) -> Block:
    """A copy of x by ``memmove``, in as many equal parts as torch has threads."""
    y, parts = torch.empty_like(x), torch.get_num_threads()
    size = x.numel() * x.element_size()
    edges = [i * size // parts for i in range(parts + 1)]
    pool = ThreadPoolExecutor(parts)

    def copy() -> None:
        pairs = itertools.pairwise(edges)
        list(pool.map(lambda e: ctypes.memmove(y.data_ptr() + e[0], x.data_ptr() + e[0], e[1] - e[0]), pairs))

    copy()
    if not torch.equal(x, y):
        raise AssertionError("the copy differs from x")
    return timed("forward", copy)


def small(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with denormal x and dy."""
    return tensors | {name: tensors[name] * DENORMAL for name in ("x", "dy")}


def judge(share: Share, shape: Shape) -> None:
    """Judges the unit on normal and on denormal numbers, against float64 on a few samples, and compares the bits of the
    ways to store.

    Raises:
        AssertionError: a result is out of bounds, or the bits differ.
    """
    few = replace(shape, n=min(shape.n, JUDGED))
    normal = few.tensors()
    for name, given in (("", normal), (", denormal numbers", small(normal))):
        found = judging.outputs(Fused(), few, given)
        judging.judge(few, given).check(found, few.label + name)
        for way, (cache, claims) in WAYS.items():
            with share.storing(cache, claims):
                others = judging.outputs(Fused(), few, given)
            differ = [k for k, v in found.items() if not torch.equal(v, others[k])]
            if differ:
                raise AssertionError(f"{few.label}{name}: {', '.join(differ)} has other bits with {way}")


def measure(share: Share, shape: Shape, effort: Effort) -> list[dict[str, Any]]:
    """Rows of one shape, one for each condition."""
    judge(share, shape)
    tensors = shape.tensors()
    fused = Fused()
    pair = {
        "forward": passes.forward_block(fused, shape, tensors),
        "backward": passes.backward_operator_block(shape, tensors),
    }
    floor = passes.floor_blocks(shape, tensors)
    blocks = dict(floor)
    over: dict[str, str] = {}  # condition -> the prefix of its floor

    def add(condition: str, chosen: dict[str, Block], context: Context | None = None, prefix: str = "") -> None:
        for direction, block in chosen.items():
            blocks[f"{condition} {direction}"] = within(context, block) if context else block
        over[condition] = prefix

    add("default", pair)
    for way, (cache, claims) in WAYS.items():
        add(way, pair, lambda cache=cache, claims=claims: share.storing(cache, claims))  # type: ignore[misc]
    if torch.get_num_threads() > 1:
        blocks |= {f"one {name}": within(one_thread, block) for name, block in floor.items()}
        add("one thread", pair, one_thread, "one ")
    tiny = small(tensors)
    denormal = {
        "forward": passes.forward_block(fused, shape, tiny),
        "backward": passes.backward_operator_block(shape, tiny),
    }
    add("denormal numbers", denormal)
    add("denormal numbers, flushed", denormal, flushed)
    add(DENORMAL_FLOOR, {k.removeprefix("floor-"): b for k, b in passes.floor_blocks(shape, tiny).items()})
    if sys.platform == "linux":
        add(COPY, {"forward": copy_block(tensors["x"])})
    m = interleaved(blocks, effort)
    rows = []
    for condition, prefix in over.items():
        row: dict[str, Any] = {"problem": shape.label, "condition": condition, "backend": fused.ran}
        for d in PASSES:
            block = f"{condition} {d}"
            if block in m.samples:
                row[d], row[f"{d}_spread"] = m.median(block, d), m.spread(block, d)
                row[f"{d}_over_floor"] = row[d] / m.median(f"{prefix}floor-{d}", d)
        rows.append(row)
    return rows


HEAD = ("shape, condition", "t fwd", "spread  ", "t bwd", "fwd/floor", "bwd/floor")


def line(row: dict[str, Any]) -> tuple[object, ...]:
    times = [micro(row[d]) if d in row else None for d in PASSES]
    over = [row.get(f"{d}_over_floor") for d in PASSES]
    return f"{row['problem']}  {row['condition']}", times[0], f"{100 * row['forward_spread']:.0f}%", times[1], *over


def main() -> None:
    parser = parser_of("conditions", __doc__)
    parser.add_argument("--size", default="", help=f"comma list: {', '.join(STAGES)} (all)")
    parser.add_argument("--batch", type=int, default=0, help="batch size (32)")
    parser.add_argument("--dtype", default="float32", help="comma list (float32)")
    parser.add_argument("--layout", default="", help=f"comma list: {', '.join(LAYOUTS)} (both)")
    add_run_options(parser, "one stage, batch 2, few rounds")
    args = parser.parse_args()
    sizes = choices(parser, "--size", args.size, STAGES) or (["7"] if args.quick else list(STAGES))
    dtypes = choices(parser, "--dtype", args.dtype, DTYPES)
    layouts = choices(parser, "--layout", args.layout, LAYOUTS) or (["nchw"] if args.quick else list(LAYOUTS))
    batch = args.batch or (2 if args.quick else 32)
    shapes = [Shape(batch, *STAGES[s], d, layout) for s in sizes for d in dtypes for layout in layouts]
    share = Share()
    facts = runs.begin()
    effort = Effort.quick() if args.quick else Effort(seconds=0.25)
    rows, wrong = measured([(s.label, "shape", functools.partial(measure, share, s, effort)) for s in shapes])
    say("\n" + table("== the fused unit under other conditions ==", HEAD, map(line, rows)))
    runs.write(args.json, "conditions", rows, facts, args.quick)
    if wrong:
        sys.exit(f"{len(wrong)} shapes are wrong")


if __name__ == "__main__":
    main()
