"""Time against batch, channels, map, grid and threads, with the floor of the same run.

    python -m benchmarks.scaling [--axis N,C,HW,grid] [--threads 1,2] [--quick] [--json PATH]

One size varies at a time, from (8, 256, 28, 28) in float32, NCHW, with the 7x7 grid. Forward is ``steam()`` without
gradients, and backward is the operator.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("scaling: loads PyTorch")

import torch

from benchmarks import runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.progress import measured
from benchmarks.shapes import Options, Shape
from benchmarks.sweep import measure
from benchmarks.tables import micro, table
from benchmarks.timing import Effort

N, C, SIDE = 8, 256, 28
#: By axis: value on the axis -> the shape. The values of HW are pixels, and the values of grid are cells.
AXES: dict[str, dict[int, Shape]] = {
    "N": {n: Shape(n, C, SIDE, SIDE) for n in (1, 2, 4, 8, 16, 32, 64)},
    "C": {c: Shape(N, c, SIDE, SIDE) for c in (8, 16, 32, 64, 128, 256, 512, 1024)},
    "HW": {s * s: Shape(N, C, s, s) for s in (7, 14, 28, 56, 112)},
    "grid": {g * g: Shape(N, C, SIDE, SIDE, options=Options(grid_size=(g, g))) for g in (1, 2, 4, 7, 14, 28)},
}


def run(axes: list[str], threads: list[int], effort: Effort, quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each axis, value and number of threads, and the errors of those points that were wrong."""

    def at(axis: str, value: int, shape: Shape) -> list[dict[str, Any]]:
        rows = []
        for count in threads:
            torch.set_num_threads(count)
            # The bits do not depend on the number of threads, so one check is enough.
            row = measure(shape, count == threads[0], effort)
            rows.append({"axis": axis, "value": value, "threads": count} | row)
        return rows

    points = [(axis, *point) for axis in axes for point in list(AXES[axis].items())[: 2 if quick else None]]
    return measured([(f"{p[0]} = {p[1]}", p[0], functools.partial(at, *p)) for p in points])


def line(row: dict[str, Any]) -> tuple[object, ...]:
    times = [micro(row[k]) for k in ("forward", "forward_floor", "backward", "backward_floor")]
    over = (row["forward_over_floor"], row["backward_over_floor"])
    return f"{row['axis']} {row['value']}", row["threads"], *times, *over


HEAD = ("varied", "threads", "t fwd", "floor", "t bwd", "floor", "fwd/floor", "bwd/floor")


def main() -> None:
    parser = parser_of("scaling", __doc__)
    parser.add_argument("--axis", default=",".join(AXES), help=f"comma list: {', '.join(AXES)}")
    parser.add_argument("--threads", default="1,2", help="comma list, up to the number of cores (1,2)")
    add_run_options(parser, "two values of each axis")
    args = parser.parse_args()
    axes = choices(parser, "--axis", args.axis, AXES)
    cores = os.cpu_count() or 1
    threads = [t for t in map(int, args.threads.split(",")) if t <= cores] or [1]
    facts = runs.begin()
    effort = Effort.quick() if args.quick else Effort(seconds=0.15, least=5, most=40)
    rows, wrong = run(axes, threads, effort, args.quick)
    say("\n" + table("== scaling ==", HEAD, map(line, rows)))
    runs.write(args.json, "scaling", rows, facts, args.quick)
    if wrong:
        sys.exit(f"{len(wrong)} points are wrong")


if __name__ == "__main__":
    main()
