"""The short benchmark of several machines side by side, by the names of their processors.

    python -m benchmarks.machines [--results benchmarks/results] [--page docs/machines.md]
    python -m benchmarks.machines --folder      # prints the folder of this machine's results, and writes nothing

``make bench-short`` measures 16 rows of units at batch 32, the price of attention, and the host's overhead, and writes
them to ``benchmarks/results/<processor>/``. The page has a column for each folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.commandline import parser_of
from benchmarks.runs import DIRECTIONS, Run, alone, geometric_mean, is_quick, networks_of, price, read, times
from benchmarks.tables import markdown_table, say

RESULTS = machine.ROOT / "benchmarks" / "results"
#: The parts of a short benchmark.
PARTS = ("unit", "end_to_end", "host")
#: The folders with other results.
OTHERS = ("latest", "before")
FACTS = ("processor", "cpu_variant", "cores", "threads", "torch", "commit", "date")
HOST = ("x * 0.5 (built in)", "steam()", "FusedSTEAM")


def slug(processor: str) -> str:
    """The name of a processor as a folder: ``AMD EPYC (family 25, model 1)`` is ``amd-epyc-25-1``."""
    name = re.sub(r"\((?:R|TM|C)\)|\b(?:CPU|Processor)\b|@\s*[\d.]+\s*[GM]Hz", " ", processor, flags=re.IGNORECASE)
    name = re.sub(r"\b(?:family|model)\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def runs_of(results: Path) -> dict[str, Run]:
    """The short benchmarks in a folder, by the names of their folders."""
    found = {}
    for folder in sorted(p for p in results.iterdir() if p.is_dir() and p.name not in OTHERS):
        if all((folder / f"{part}.json").exists() for part in PARTS):
            found[folder.name] = {part: content for part, content in read(folder).items() if part in PARTS}
    return found


def _table(head: str, machines: dict[str, Run], rows: dict[str, Callable[[Run], str]]) -> list[str]:
    body = [(name, *(cell(run) for run in machines.values())) for name, cell in rows.items()]
    return markdown_table((head, *machines), body)


def _over_floor(direction: str, has_range: bool = True, **wanted: str) -> Callable[[Run], str]:
    """The mean over those rows that have the wanted values, and their range."""

    def cell(run: Run) -> str:
        of_rows: dict[str, str] = {"contender": "fused", "direction": direction, **wanted}
        values = [r["over_floor"] for r in run["unit"]["rows"] if all(r[k] == v for k, v in of_rows.items())]
        if not values:
            return ""
        mean = times(geometric_mean(values))
        return f"**{mean}** ({times(min(values))} to {times(max(values))})" if has_range else mean

    return cell


def _price(key: tuple[str, ...]) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        row = networks_of(run["end_to_end"]["rows"]).get(key, {}).get("steam")
        if row is None:
            return ""
        return ", units alone ".join(filter(None, (price(row), alone(row))))

    return cell


def _host(layer: str, column: str) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        found = [r[column] for r in run["host"]["rows"] if r["section"] == "layers" and r["layer"] == layer]
        return f"{found[0]:.0f}" if found else ""

    return cell


def _fact(name: str) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        values = sorted({str(part["machine"].get(name, "")) for part in run.values()})
        return f"{values[0]} to {values[-1]}" if name == "date" and len(values) > 1 else "; ".join(values)

    return cell


def page(machines: dict[str, Run]) -> str:
    """The Markdown page of the short benchmarks."""
    out = [
        "# The same code on several machines",
        "",
        "`make bench-short` measures a machine in about five minutes. This page has a column for each processor",
        "that was measured, of its last run. [benchmarking.md](benchmarking.md) describes the method. The raw",
        "results are in `benchmarks/results/`, in a folder for each processor.",
        "",
    ]
    if any(map(is_quick, machines.values())):
        out += ["**A quick run is among them: its times mean nothing.**", ""]
    out += _table("machine", machines, {name.replace("_", " "): _fact(name) for name in FACTS})
    out += [
        "## Time over the floor at batch 32",
        "",
        "The fused unit over a plain pass over the same memory: the geometric mean and in brackets the range, over the",
        "four stages of a ResNet-50 in NCHW and in channels_last.",
        "",
    ]
    means: dict[str, Callable[[Run], str]] = {}
    for direction, title in DIRECTIONS.items():
        for dtype in ("float32", "bfloat16"):
            means[f"{title}, {dtype}"] = _over_floor(direction, dtype=dtype)
        means[f"{title}, all 16 rows"] = _over_floor(direction)
    out += _table("mean", machines, means)
    problems = dict.fromkeys(r["problem"] for run in machines.values() for r in run["unit"]["rows"])
    for direction, title in DIRECTIONS.items():
        rows = {problem: _over_floor(direction, False, problem=problem) for problem in problems}
        out += [f"### {title[0].upper()}{title[1:]}", "", *_table("map", machines, rows)]
    keys = dict.fromkeys(key for run in machines.values() for key in networks_of(run["end_to_end"]["rows"]))
    out += [
        "## The price of attention",
        "",
        "The extra time of a network with STEAM units over the same network without attention, with batch 8 at 224×224",
        "in float32: the median of the ratios within a round, and in brackets their quartiles. Where the quartiles",
        "include zero, the noise of the machine is larger than the figure, and *units alone* is the better one: the",
        "sum of the times of the network's units, each called alone, over the time of the network without them.",
        "",
        *_table("network", machines, {", ".join(key): _price(key) for key in keys}),
        "## Host overhead",
        "",
        "Microseconds per call at (1, 64, 7, 7), float32.",
        "",
    ]
    columns = ("no grad", "forward + backward")
    out += _table("layer", machines, {f"{layer}, {c}": _host(layer, c) for layer in HOST for c in columns})
    return "\n".join(out).rstrip() + "\n"


def main() -> None:
    parser = parser_of("machines", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the machines' folders")
    parser.add_argument("--page", type=Path, default=machine.ROOT / "docs" / "machines.md", help="the page to write")
    parser.add_argument("--folder", action="store_true", help="only print the folder of this machine's results")
    args = parser.parse_args()
    if args.folder:
        print(args.results / slug(machine.facts()["processor"]))
        return
    machines = runs_of(args.results) if args.results.is_dir() else {}
    if not machines:
        sys.exit(f"--results {args.results}: no folder in it holds {', '.join(f'{part}.json' for part in PARTS)}")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(machines))
    say(f"wrote {args.page}")


if __name__ == "__main__":
    main()
