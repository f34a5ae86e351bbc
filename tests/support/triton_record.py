"""The record of the bytes and of the compiled code of the Triton kernels, and the page that shows it.

    python -m tests.support.triton_record --write

counts, compiles, and writes the record and docs/triton_verification.md anew.

The record is the budget: tests count and compile again, and must find the recorded figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import fill_marks
from tests.support import triton_aot, triton_interpreted

RECORD = Path(__file__).with_name("triton_record.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "triton_verification.md"
#: The keys that identify a compiled row, and the figures that are recorded.
KEYS = ("target", "case", "kernel")
FIGURES = ("warps", "registers", "spills", "shared", "wide", "wide_all", "occupancy")

#: P and R by the names of the parameters of the kernels.
SUMS = {"sums": "P", "products": "R"}

Row = dict[str, Any]


def load() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def compiled(rows: Iterable[Row]) -> dict[str, Row]:
    """The recorded figures of rows of ``triton_aot``, by their keys."""
    return {" | ".join(row[k] for k in KEYS): {k: row[k] for k in FIGURES} for row in rows}


def compiled_for(target: str) -> dict[str, Row]:
    """The recorded figures of one target."""
    return {key: row for key, row in load()["compiled"].items() if key.startswith(f"{target} | ")}


def moved(rows: dict[str, Row]) -> dict[str, Row]:
    """The recorded figures of rows of ``triton_interpreted``: the launches, and how often maps, P and R are moved."""
    out = {}
    for name, row in rows.items():
        for direction in ("forward", "backward"):
            seen = row[direction]
            maps = {k: v for k, v in seen.items() if isinstance(v, list) and k != "kernels"}
            sums = {k: [n / size for n in counts] for k, (size, *counts) in seen["others"].items() if k in SUMS}
            out[f"{name} {direction}"] = {"launches": len(seen["kernels"]), "maps": maps, "sums": sums}
    return out


# ---- the page's tables -----------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(str(c) for c in row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _times(n: float) -> str:
    return f"{n:.3g}"


def traffic_table(record: dict[str, Any]) -> str:
    def side(tensors: dict[str, list[float]], i: int) -> str:
        return ", ".join(f"{k} {_times(v[i])}" for k, v in sorted(tensors.items()) if v[i]) or "-"

    rows = []
    for name, row in record["moved"].items():
        sums = {SUMS[k]: v for k, v in row["sums"].items()}
        rows.append((name, row["launches"], *(side(t, i) for t in (row["maps"], sums) for i in (0, 1))))
    head = ("stage", "launches", "maps read", "maps written", "P, R read", "P, R written")
    return "\n".join(_table(head, rows))


def compiled_table(record: dict[str, Any]) -> str:
    kernels: dict[tuple[str, str], dict[str, Row]] = {}
    for name, row in record["compiled"].items():
        target, case, kernel = name.split(" | ")
        kernels.setdefault((case, kernel), {})[target] = row

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        wide = "-" if row["wide"] is None else f"{100 * row['wide']:.0f} %"
        return f"{row['registers']}, {row['spills']}, {row['shared']}, {wide}, {100 * row['occupancy']:.0f} %"

    rows = [(*key, *(cell(found.get(target)) for target in triton_aot.TARGETS)) for key, found in kernels.items()]
    return "\n".join(_table(("call", "kernel", *triton_aot.TARGETS), rows))


TABLES = {"traffic": traffic_table, "compiled": compiled_table}


def page(text: str, record: dict[str, Any]) -> str:
    """The page with new tables from the record. Two comments with its name enclose each table."""
    for name, table in TABLES.items():
        text = fill_marks(text, name, f"{table(record)}\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="count and compile, then rewrite the record and the page")
    args = parser.parse_args()
    if not args.write:
        parser.error("nothing to do without --write")
    traffic = triton_interpreted.start("traffic")
    wrong = [f"{name}:\n{row['error']}" for name, row in traffic.items() if "error" in row]
    if wrong:
        sys.exit("\n".join(wrong))
    record = {"moved": moved(traffic), "compiled": compiled(triton_aot.rows())}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
