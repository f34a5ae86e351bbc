"""No falls: time over the floor at random shapes.

    python -m benchmarks.sweep [--cases 200] [--seed 0] [--worst 15] [--json PATH]

The shapes are odd as often as even, with C below 8, C that is no multiple of a vector, maps from 1x1 up and grids that
do not divide them, both memory formats and dtypes, x from 10 KB to 60 MB. Forward is ``steam()`` without gradients,
backward the operator. It ends with 1 where a shape with x larger than 1 MB takes more than 4 times the floor.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import core
from benchmarks.core import Problem, say

LARGE = 1 << 20
JUDGED = 2  # samples
BAR = 4.0


def random_problem(pick: random.Random) -> Problem:
    """A problem of 10 KB to 60 MB, its size log-uniform."""
    while True:
        dtype, layout = pick.choice(("float32", "bfloat16")), pick.choice(tuple(core.LAYOUTS))
        elements = math.exp(pick.uniform(math.log(10e3), math.log(60e6))) / core.DTYPES[dtype].itemsize
        kind = pick.random()
        if kind < 0.15:
            c = pick.randint(1, 7)
        elif kind < 0.6:
            c = pick.randint(8, 2100)
        else:
            c = 2 ** pick.randint(3, 11)
        n = pick.choice((1, 1, 2, 3, 4, 7, 8, 16, 32, 33, 64))
        pixels = elements / (n * c)
        if not 1 <= pixels <= 1500 * 1500:
            continue
        aspect = math.exp(pick.uniform(-0.7, 0.7))
        h, w = max(1, round(math.sqrt(pixels * aspect))), max(1, round(math.sqrt(pixels / aspect)))
        grid = (7, 7) if pick.random() < 0.75 else (pick.randint(1, 14), pick.randint(1, 21))
        problem = Problem(n, c, h, w, dtype, layout, grid)
        if 10e3 <= problem.map_bytes <= 60e6:
            return problem


#: Maps of more pixels than this have column sums: kSmallMap of csrc/cpu/plan.h.
SMALL_MAP = 256
#: Float32 numbers in a vector, by CPU variant: kVectorBytes / 4 of csrc/cpu/vec.h.
LANES = {"avx512": 16, "avx2": 8, "generic": 4}


def walk(problem: Problem, variant: str) -> str:
    """The walk of ``docs/performance.md`` that serves a problem in float32 or bfloat16, chosen as in ``make_plan`` of
    ``csrc/cpu/plan.h``."""
    c, pixels = problem.c, problem.h * problem.w
    if pixels == 1 or (problem.layout == "channels_last" and c > 1):
        return "kNarrow" if c < LANES[variant] else "kChannels"
    return "kPixels" if pixels <= SMALL_MAP or problem.grid[0] == problem.h else "kColumns"


def facts_of(problem: Problem, variant: str) -> dict[str, Any]:
    """What explains a figure: the walk that served the shape, and the sizes that it depends on."""
    return {
        "n": problem.n,
        "c": problem.c,
        "h": problem.h,
        "w": problem.w,
        "grid": list(problem.grid),
        "dtype": problem.dtype,
        "layout": problem.layout,
        "mbytes": problem.map_bytes / 1e6,
        "sample_kbytes": problem.map_bytes / problem.n / 1e3,
        "walk": walk(problem, variant) if variant in LANES else None,
    }


def measure(problem: Problem, check: bool, effort: core.Effort) -> dict[str, Any]:
    """Judge one problem, and time both passes beside their floors."""
    tensors = problem.tensors()
    fused = core.fused()
    if check:
        # Samples do not touch each other, and a float64 reference of 64 of them takes longer than all that is timed.
        few = replace(problem, n=min(problem.n, JUDGED))
        given = few.tensors()
        core.judge(few, given).check(core.outputs(fused, few, given), label=few.label)
    blocks = core.floor_blocks(problem, tensors)
    blocks |= {
        "forward": core.forward_block(fused, problem, tensors),
        "backward": core.op_backward_block(problem, tensors),
    }
    m = core.interleaved(blocks, effort)
    row: dict[str, Any] = {"problem": problem.label, "bytes": problem.map_bytes, "checked": check, "backend": fused.ran}
    for d in ("forward", "backward"):
        row[d], row[f"{d}_floor"] = m.median(d, d), m.median(f"floor-{d}", d)
        row[f"{d}_over_floor"] = row[d] / row[f"{d}_floor"]
    row |= facts_of(problem, core.cpu_variant())
    return row | {"worst": max(row["forward_over_floor"], row["backward_over_floor"])}


def line(row: dict[str, Any]) -> tuple[object, ...]:
    times = [core.micro(row[k]) for k in ("forward", "forward_floor", "backward", "backward_floor")]
    over = (row["forward_over_floor"], row["backward_over_floor"])
    return row["problem"], row["walk"], f"{row['bytes'] / 1e6:.2f} MB", *over, *times


HEAD = ("shape", "walk", "x", "fwd/floor", "bwd/floor", "t fwd", "floor", "t bwd", "floor")


def falls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are above the bar, of those where x is larger than 1 MB."""
    return [r for r in rows if r["bytes"] > LARGE and r["worst"] > BAR]


def sweep(cases: int, seed: int, worst: int, check: bool, effort: core.Effort) -> tuple[list[dict[str, Any]], int]:
    """Measure ``cases`` shapes; the rows, worst first, and how many were out of bounds."""
    pick = random.Random(seed)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for i in range(cases):
        try:
            rows.append(measure(random_problem(pick), check, effort))
        except AssertionError as error:  # out of bounds: no time, and the sweep fails at its end
            wrong.append(str(error))
            say(f"  WRONG {error}")
        if rows and ((i + 1) % 20 == 0 or i + 1 == cases):
            so_far = max(rows, key=lambda r: r["worst"])
            say(f"  {i + 1} of {cases} shapes; worst so far {so_far['worst']:.2f} at {so_far['problem']}")
    rows.sort(key=lambda r: -r["worst"])
    large = [r for r in rows if r["bytes"] > LARGE]
    state = f"each judged against float64, on up to {JUDGED} samples" if check else "NOT judged"
    say("\n" + core.table(f"== worst of {cases} random shapes, {state} ==", HEAD, map(line, rows[:worst])))
    if large:
        say("\n" + core.table("== worst where x is larger than 1 MB ==", HEAD, map(line, large[:worst])))
        over = len(falls(rows))
        medians = [statistics.median(r[f"{d}_over_floor"] for r in large) for d in ("forward", "backward")]
        say(
            f"\nx > 1 MB: {len(large)} shapes, {over} above {BAR:g}; median over floor {medians[0]:.2f} forward, "
            f"{medians[1]:.2f} backward"
        )
    say(f"out of bounds, and so not timed: {len(wrong)}" + "".join(f"\n  {w}" for w in wrong))
    return rows, len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worst", type=int, default=15, help="how many of the worst to print")
    parser.add_argument("--no-check", action="store_true", help="leave out the correctness gate (the table says so)")
    parser.add_argument("--quick", action="store_true", help="few rounds: that it runs, not what it takes")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    core.restart_with_malloc()
    facts = core.machine()
    say(core.describe(facts))
    effort = core.Effort.quick() if args.quick else core.Effort(seconds=0.1, least=5, most=30)
    rows, wrong = sweep(args.cases, args.seed, args.worst, not args.no_check, effort)
    if args.json:
        core.write_json(args.json, "sweep", rows, facts, args.quick)
    if wrong:
        raise SystemExit(f"{wrong} of {args.cases} shapes are out of bounds")
    over = falls(rows)
    if over and not args.quick:  # few rounds judge nothing
        worst = over[0]["problem"]
        raise SystemExit(f"{len(over)} shapes of more than 1 MB are above {BAR:g} times the floor, the worst {worst}")


if __name__ == "__main__":
    main()
