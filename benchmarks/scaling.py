"""How the time grows with batch, channels, map, grid and threads, beside the floor of the same run.

    python -m benchmarks.scaling [--axis N,C,HW,grid] [--threads 1,2] [--quick] [--json PATH]

One thing is varied at a time, from (8, 256, 28, 28), float32, NCHW, on the 7x7 grid. Forward is ``steam()`` without
gradients, backward the operator.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import core

if __name__ == "__main__":
    core.restart_with_malloc()

from benchmarks.core import Problem, say
from benchmarks.sweep import measure

N, C, SIDE = 8, 256, 28
#: By axis: value on the axis -> the problem. The map's axis is in pixels, the grid's in cells.
AXES: dict[str, dict[int, Problem]] = {
    "N": {n: Problem(n, C, SIDE, SIDE) for n in (1, 2, 4, 8, 16, 32, 64)},
    "C": {c: Problem(N, c, SIDE, SIDE) for c in (8, 16, 32, 64, 128, 256, 512, 1024)},
    "HW": {s * s: Problem(N, C, s, s) for s in (7, 14, 28, 56, 112)},
    "grid": {g * g: Problem(N, C, SIDE, SIDE, grid_size=(g, g)) for g in (1, 2, 4, 7, 14, 28)},
}


def run(
    axes: list[str], threads: list[int], effort: core.Effort, quick: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each axis, value and number of threads; and what was wrong, which has no rows."""
    rows, wrong = [], []
    for axis in axes:
        for value, problem in list(AXES[axis].items())[: 2 if quick else None]:
            for count in threads:
                core.torch.set_num_threads(count)
                # The bits do not depend on the threads, so that one check is enough.
                try:
                    row = measure(problem, count == threads[0], effort)
                except AssertionError as error:
                    wrong.append(str(error))
                    say(f"  WRONG {error}")
                    break
                rows.append({"axis": axis, "value": value, "threads": count} | row)
        say(f"  scaling over {axis}")
    return rows, wrong


def line(row: dict[str, Any]) -> tuple[object, ...]:
    times = [core.micro(row[k]) for k in ("forward", "forward_floor", "backward", "backward_floor")]
    over = (row["forward_over_floor"], row["backward_over_floor"])
    return f"{row['axis']} {row['value']}", row["threads"], *times, *over


HEAD = ("varied", "threads", "t fwd", "floor", "t bwd", "floor", "fwd/floor", "bwd/floor")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axis", default=",".join(AXES), help=f"comma list: {', '.join(AXES)}")
    parser.add_argument("--threads", default="1,2", help="comma list, as far as there are cores (1,2)")
    parser.add_argument("--quick", action="store_true", help="two values an axis: that it runs, not what it takes")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    axes = [a for a in args.axis.split(",") if a]
    if wrong := [a for a in axes if a not in AXES]:
        parser.error(f"--axis {wrong[0]!r}: allowed are {', '.join(AXES)}")
    cores = os.cpu_count() or 1
    threads = [t for t in map(int, args.threads.split(",")) if t <= cores] or [1]
    facts = core.machine()
    say(core.describe(facts))
    effort = core.Effort.quick() if args.quick else core.Effort(seconds=0.15, least=5, most=40)
    rows, wrong = run(axes, threads, effort, args.quick)
    say("\n" + core.table("== scaling ==", HEAD, map(line, rows)))
    if args.json:
        core.write_json(args.json, "scaling", rows, facts, args.quick)
    if wrong:
        sys.exit(f"{len(wrong)} points are wrong")


if __name__ == "__main__":
    main()
