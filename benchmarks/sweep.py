"""Time over the floor at random shapes.

    python -m benchmarks.sweep [--cases 200] [--seed 0] [--worst 15] [--json PATH]

The shapes have even and odd sizes, C below 8, C that is no multiple of a vector, maps from 1x1 up, grids that do not
divide the map, both memory formats, both dtypes, and x from 10 KB to 60 MB. Forward is ``steam()`` without gradients,
and backward is the operator. The program ends with 1 if a shape with x larger than 1 MB takes more than 4 times the
floor.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("sweep: loads PyTorch")

from benchmarks import judging, machine, passes, runs
from benchmarks.commandline import add_run_options, parser_of
from benchmarks.contenders import Fused
from benchmarks.shapes import DTYPES, LAYOUTS, Options, Shape
from benchmarks.tables import micro, table
from benchmarks.timing import Effort, interleaved

#: Bytes of x from which the limit holds.
LARGE = 1 << 20
#: The largest time over the floor of a large map.
LIMIT = 4.0
#: The number of samples that are judged. Samples are independent, and a float64 reference of all samples would take
#: longer than the timing.
JUDGED = 2


def random_shape(pick: random.Random) -> Shape:
    """A shape of 10 KB to 60 MB; the bytes are log-uniform."""
    while True:
        dtype, layout = pick.choice(("float32", "bfloat16")), pick.choice(tuple(LAYOUTS))
        elements = math.exp(pick.uniform(math.log(10e3), math.log(60e6))) / DTYPES[dtype].itemsize
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
        shape = Shape(n, c, h, w, dtype, layout, Options(grid_size=grid))
        if 10e3 <= shape.map_bytes <= 60e6:
            return shape


#: Larger maps have column sums: kSmallMap of csrc/cpu/plan.h, in pixels.
SMALL_MAP = 256
#: Float32 numbers in a vector, by CPU variant: kVectorBytes / 4 of csrc/cpu/vec.h.
LANES = {"avx512": 16, "avx2": 8, "generic": 4}


def walk(shape: Shape, variant: str) -> str:
    """The walk (``docs/performance.md``) of a shape in float32 or bfloat16. The choice repeats ``make_plan`` of
    ``csrc/cpu/plan.h``."""
    c, pixels = shape.c, shape.h * shape.w
    if pixels == 1 or (shape.layout == "channels_last" and c > 1):
        return "kNarrow" if c < LANES[variant] else "kChannels"
    return "kPixels" if pixels <= SMALL_MAP or shape.grid[0] == shape.h else "kColumns"


def facts_of(shape: Shape, variant: str) -> dict[str, Any]:
    """The facts that explain a figure: the walk of the shape, and its sizes."""
    return {
        "n": shape.n,
        "c": shape.c,
        "h": shape.h,
        "w": shape.w,
        "grid": list(shape.grid),
        "dtype": shape.dtype,
        "layout": shape.layout,
        "mbytes": shape.map_bytes / 1e6,
        "sample_kbytes": shape.map_bytes / shape.n / 1e3,
        "walk": walk(shape, variant) if variant in LANES else None,
    }


def measure(shape: Shape, check: bool, effort: Effort) -> dict[str, Any]:
    """Judges one shape, and times both passes and their floors."""
    tensors = shape.tensors()
    fused = Fused()
    if check:
        few = replace(shape, n=min(shape.n, JUDGED))
        given = few.tensors()
        judging.judge(few, given).check(judging.outputs(fused, few, given), label=few.label)
    blocks = passes.floor_blocks(shape, tensors)
    blocks |= {
        "forward": passes.forward_block(fused, shape, tensors),
        "backward": passes.backward_operator_block(shape, tensors),
    }
    m = interleaved(blocks, effort)
    row: dict[str, Any] = {"problem": shape.label, "bytes": shape.map_bytes, "checked": check, "backend": fused.ran}
    for d in ("forward", "backward"):
        row[d], row[f"{d}_floor"] = m.median(d, d), m.median(f"floor-{d}", d)
        row[f"{d}_over_floor"] = row[d] / row[f"{d}_floor"]
    row |= facts_of(shape, machine.cpu_variant())
    return row | {"worst": max(row["forward_over_floor"], row["backward_over_floor"])}


def line(row: dict[str, Any]) -> tuple[object, ...]:
    times = [micro(row[k]) for k in ("forward", "backward")]
    over = (row["forward_over_floor"], row["backward_over_floor"])
    return row["problem"], row["walk"], f"{row['bytes'] / 1e6:.2f} MB", *over, *times


HEAD = ("shape", "walk", "x", "fwd/floor", "bwd/floor", "t fwd", "t bwd")


def falls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with x larger than 1 MB that are above the limit."""
    return [r for r in rows if r["bytes"] > LARGE and r["worst"] > LIMIT]


def sweep(cases: int, seed: int, worst: int, check: bool, effort: Effort) -> tuple[list[dict[str, Any]], int]:
    """Measures ``cases`` shapes. Returns the rows, worst first, and the number of shapes that were out of bounds."""
    pick = random.Random(seed)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for i in range(cases):
        try:
            rows.append(measure(random_shape(pick), check, effort))
        except AssertionError as error:  # the shape has no time, and the sweep fails at its end
            wrong.append(str(error))
            say(f"  WRONG {error}")
        if rows and ((i + 1) % 20 == 0 or i + 1 == cases):
            so_far = max(rows, key=lambda r: r["worst"])
            say(f"  {i + 1} of {cases} shapes; worst so far {so_far['worst']:.2f} at {so_far['problem']}")
    rows.sort(key=lambda r: -r["worst"])
    large = [r for r in rows if r["bytes"] > LARGE]
    state = f"each judged against float64 on up to {JUDGED} samples" if check else "NOT judged"
    say("\n" + table(f"== worst of {cases} random shapes, {state} ==", HEAD, map(line, rows[:worst])))
    if large:
        say("\n" + table("== worst where x is larger than 1 MB ==", HEAD, map(line, large[:worst])))
        over = len(falls(rows))
        medians = [statistics.median(r[f"{d}_over_floor"] for r in large) for d in ("forward", "backward")]
        say(
            f"\nx > 1 MB: {len(large)} shapes, {over} above {LIMIT:g}; median over floor {medians[0]:.2f} forward, "
            f"{medians[1]:.2f} backward"
        )
    say(f"out of bounds and not timed: {len(wrong)}" + "".join(f"\n  {w}" for w in wrong))
    return rows, len(wrong)


def main() -> None:
    parser = parser_of("sweep", __doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worst", type=int, default=15, help="the number of the worst shapes to print")
    parser.add_argument("--no-check", action="store_true", help="do not judge the results (the table says so)")
    add_run_options(parser, "few rounds")
    args = parser.parse_args()
    facts = runs.begin()
    effort = Effort.quick() if args.quick else Effort(seconds=0.1, least=5, most=30)
    rows, wrong = sweep(args.cases, args.seed, args.worst, not args.no_check, effort)
    runs.write(args.json, "sweep", rows, facts, args.quick)
    if wrong:
        raise SystemExit(f"{wrong} of {args.cases} shapes are out of bounds")
    over = falls(rows)
    if over and not args.quick:  # few rounds are too noisy for a verdict
        worst = over[0]["problem"]
        raise SystemExit(f"{len(over)} shapes of more than 1 MB are above {LIMIT:g} times the floor, the worst {worst}")


if __name__ == "__main__":
    main()
