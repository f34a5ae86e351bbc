"""The closing table of ``pytest benchmarks/``: one for each direction, and a legend."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import cuda
from benchmarks.contenders import BASELINES, OURS
from benchmarks.tables import NOISY, WIDTH, micro, number, spread, table

TITLES = {
    "forward": "forward (no grad)",
    "backward": "backward (autograd)",
    "both": "forward + backward (autograd)",
}
#: By key of a row: the form of the unit over which the speed-up is.
SPEEDUPS = {f"speedup_{name.replace('-', '_')}": name for name in BASELINES}
ON_GPU = ("of_copy", "timed_by")
Rows = Sequence[Mapping[str, Any]]

LEGEND = f"""\
Latency: the median of interleaved rounds. Spread: the distance of the quartiles over the median.
!: the spread is above {100 * NOISY:.0f} %; other work disturbed the run, and the figures of the row are uncertain.
GFLOP/s and GB/s: least operations (STEAM's) and bytes over the time.
Floor: the time over torch.mul(x, 0.5, out=y) forward, torch.add(x, dy, out=dx) backward; with a
tail the floor has more reads and writes."""
NARROW = """\
Speed-up over: the fastest other form of the unit that was measured at the shape, with its name.
--wide shows all contenders, and the speed-up over each of {others}."""
WIDE = """\
x eager, x compiled: the speed-up over the reference, eager and by torch.compile.
x plain, x plain-compiled: over benchmarks/plain.py, eager and by torch.compile.
Extra MB: the peak of allocated memory besides x, y and the gradients."""
GPU = """\
of copy: GB/s over this GPU's own copy of a large buffer, measured in this run.
timed by: the replay of a CUDA graph, or events around a call that cannot be captured."""


def narrow_rows(rows: Rows) -> Rows:
    """The rows of this package's contenders, or all rows if none of them was measured."""
    return [r for r in rows if r["contender"] in OURS] or rows


def speedup(row: Mapping[str, Any]) -> str:
    """The speed-up over the fastest other form of the unit at the row's shape, and the name of that form."""
    own = f"speedup_{row['contender'].replace('-', '_')}"
    found = [(row[key], name) for key, name in SPEEDUPS.items() if row.get(key) and key != own]
    if not found:
        return number(None)
    least, name = min(found)
    return f"{number(least)} {name}"


def name_of(rows: Rows) -> str:
    """The contender of rows that have only one, with the backend that ran if the contender has backends."""
    backends = dict.fromkeys(r["backend"] for r in rows if r["backend"])
    return rows[0]["contender"] + (f" on {', '.join(backends)}" if backends else "")


def tables(rows: Rows, wide: bool, on_gpu: bool) -> list[str]:
    """A table for each direction that has rows. A table that is not ``wide`` fits :data:`WIDTH` columns.

    The wide table has every contender and every figure.
    """
    head = ["latency", "spread  ", "GFLOP/s", "GB/s", "floor"]
    keys = ["gflops", "gbytes", "over_floor"]
    added = list(ON_GPU if on_gpu else ())
    if wide:
        keys += SPEEDUPS
        head += [*(f"x {name}" for name in SPEEDUPS.values()), "extra MB", "parameters"]
    else:
        rows = narrow_rows(rows)
        head.append("speed-up over")
    several = len({r["contender"] for r in rows}) > 1

    def cells(row: Mapping[str, Any]) -> Iterable[object]:
        yield f"{row['problem']}  {row['contender']}" if several else row["problem"]
        yield from (micro(row["seconds"]), spread(row["spread"]), *(row[k] for k in keys))
        if wide:
            yield from (None if row["extra_bytes"] is None else row["extra_bytes"] / 1e6, row["parameters"])
        else:
            yield speedup(row)
        yield from (row[k] for k in added)

    out = []
    head = [*head, *(key.replace("_", " ") for key in added)]
    for direction, title in TITLES.items():
        body = [tuple(cells(r)) for r in rows if r["direction"] == direction]
        if body:
            name = "shape, contender" if several else f"shape ({name_of(rows)})"
            out.append(table(f"== {title} ==", (name, *head), body, None if wide else WIDTH))
    return out


def legend(rows: Rows, wide: bool, on_gpu: bool) -> list[str]:
    """Lines below the tables: what the columns and the mark mean."""
    out = [*LEGEND.splitlines()]
    out += WIDE.splitlines() if wide else NARROW.format(others=", ".join(BASELINES)).splitlines()
    if on_gpu:
        out += GPU.splitlines()
        out += [part for line in cuda.not_captured(rows) for part in textwrap.wrap(line, WIDTH)]
    return out
