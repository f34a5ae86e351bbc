"""Files of a run: what is written and read, and the names and numbers that the page, the pictures and the comparison
take from them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.tables import say

FILES = ("unit", "end_to_end", "latency", "host", "scaling", "conditions")
Row = dict[str, Any]
Run = dict[str, dict[str, Any]]
#: By what the rows of latency differ, besides the contender.
LATENCY = ("network", "layout", "batch")

NAMES = {
    "fused": "STEAM, fused",
    "steam": "STEAM, fused",
    "eager": "STEAM, plain PyTorch",
    "steam-reference": "STEAM, plain PyTorch",
    "compiled": "STEAM, torch.compile",
    "plain": "STEAM, honest baseline",
    "plain-compiled": "STEAM, honest baseline compiled",
    "se": "SE",
    "eca": "ECA",
    "cbam": "CBAM",
    "gct": "Gaussian GCT",
    "se-compiled": "SE compiled",
    "eca-compiled": "ECA compiled",
    "cbam-compiled": "CBAM compiled",
    "gct-compiled": "Gaussian GCT compiled",
    "triton": "STEAM, Triton kernels",
    "cuda": "STEAM, CUDA kernels",
}
#: The directions that the page and the pictures show, with their titles.
DIRECTIONS = {"forward": "forward", "both": "forward + backward"}
#: The rows that the pictures show.
SHOWN = {"batch": 8, "dtype": "float32", "layout": "nchw"}
SHAPES = ("56", "28", "14", "7", "m56", "m28", "m14", "m7")
SHAPE_NAMES = {
    "56": "256×56×56",
    "28": "512×28×28",
    "14": "1024×14×14",
    "7": "2048×7×7",
    "det": "256×200×334",
    "m56": "24×56×56",
    "m28": "32×28×28",
    "m14": "96×14×14",
    "m7": "320×7×7",
}


def write(
    path: Path | None, name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], quick: bool
) -> None:
    """Writes one file, if there is a path: the benchmark, the machine, whether the run was quick, and the rows."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": quick, "machine": facts, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    say(f"wrote {path}")


def begin() -> dict[str, Any]:
    """The facts of the machine, which are also printed; the first act of a measurement."""
    facts = machine.facts()
    say(machine.describe(facts))
    return facts


def read(folder: Path) -> Run:
    """The files of a run, by name.

    Raises:
        FileNotFoundError: the folder has none of them.
    """
    run = {name: json.loads(path.read_text()) for name in FILES if (path := folder / f"{name}.json").exists()}
    if not run:
        raise FileNotFoundError(f"{folder}: holds none of {', '.join(f'{n}.json' for n in FILES)}")
    return run


def is_quick(run: Run) -> bool:
    """Whether a part of the run is quick, so that its times mean nothing."""
    return any(part.get("quick") for part in run.values())


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def times(value: float | None) -> str:
    """A factor with three digits; empty without one."""
    if value is None:
        return ""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def percent(ratio: float) -> str:
    """A ratio as the increase in per cent."""
    return f"{100 * (ratio - 1):+.1f} %"


def price(row: Row) -> str:
    """The extra time of a network over the network without attention, and its quartiles."""
    low, high = row["time_over_plain_quartiles"]
    return f"**{percent(row['time_over_plain'])}** ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})"


def alone(row: Row) -> str:
    """The time of a network's units, each called alone, over the time of the network without attention. Older runs have
    no such figure."""
    share = row.get("units_over_plain")
    return "" if share is None else f"{100 * share:.1f} %"


def name_of(contender: str, backend: str | None = None) -> str:
    """The name of a contender in the page. If the backend is the reference, the name does not say "fused"."""
    if contender in ("fused", "steam") and backend == "reference":
        return "STEAM, backend reference"
    return NAMES.get(contender, contender)


def shape_name(row: Row) -> str:
    return SHAPE_NAMES.get(row["shape"], row["shape"])


def networks_of(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The rows of whole networks by the given keys, or by network, task, mode and layout, and then by contender. Older
    runs have NCHW alone, and do not name it."""
    out: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(
            row.get(k, "nchw") if k == "layout" else row[k] for k in keys or ("network", "task", "mode", "layout")
        )
        out.setdefault(key, {})[row["contender"]] = row
    return out


class UnitRows:
    """The rows of unit.json, by label of the shape, contender and direction."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.at = {(r["problem"], r["contender"], r["direction"]): r for r in rows}
        self.labels = {r["problem"]: r for r in rows}
        self.contenders = list(dict.fromkeys(r["contender"] for r in rows))
        self.backends = {r["contender"]: r.get("backend") for r in rows}

    def name(self, contender: str) -> str:
        return name_of(contender, self.backends.get(contender))

    def column(self, contender: str) -> str:
        """The name of a contender in the head of a table."""
        reference = contender == "fused" and self.backends.get(contender) == "reference"
        return f"{contender} (reference)" if reference else contender

    def of_default_unit(self) -> dict[str, Row]:
        """A row for each shape with the unit's default options; the files of older runs have no others."""
        return {label: row for label, row in self.labels.items() if row.get("default_options", True)}

    def shown(self) -> list[Row]:
        """A row for each shape of the pictures. They have batch 8; if no shape has, all shapes are shown."""
        rows = list(self.of_default_unit().values()) or list(self.labels.values())
        found = [r for r in rows if all(r[k] == v for k, v in SHOWN.items()) and r["shape"] in SHAPES]
        return sorted(found, key=lambda r: SHAPES.index(r["shape"])) if found else rows

    def value(self, label: str, contender: str, direction: str, key: str) -> float | None:
        row = self.at.get((label, contender, direction))
        return None if row is None else row[key]

    def speedup(self, label: str, over: str, direction: str) -> float | None:
        """The time of the contender ``over``, divided by the time of the fused unit."""
        ours, theirs = (self.value(label, c, direction, "seconds") for c in ("fused", over))
        return theirs / ours if ours and theirs else None

    def speedups(self, over: str, direction: str) -> list[float]:
        """The speed-ups at all shapes with the default options."""
        found = (self.speedup(label, over, direction) for label in self.of_default_unit())
        return [v for v in found if v is not None]
