"""A run of the benchmarks as a page with pictures: docs/benchmarks.md from the JSON files of a run.

    python -m benchmarks.report [--run benchmarks/results/latest] [--page docs/benchmarks.md] [--images docs/images]

A run is a folder with unit.json, end_to_end.json, host.json and scaling.json, as ``make bench`` writes them; unit.csv
is added, with the rows of unit.json. Sections whose file is missing are left out. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import core
from benchmarks.core import ROOT

FILES = ("unit", "end_to_end", "host", "scaling")
Row = dict[str, Any]
Run = dict[str, dict[str, Any]]

#: What the page says of the machine, in this order.
FACTS = (
    "processor", "cpu_capability", "cores", "threads", "cpu_variant", "torch", "python", "steam_kernels", "commit",
    "malloc", "date",
)  # fmt: skip
COLOURS = {
    "fused": "#d62728",
    "steam": "#d62728",
    "eager": "#555555",
    "steam-reference": "#555555",
    "plain": "#17becf",
    "se": "#1f77b4",
    "eca": "#2ca02c",
    "cbam": "#9467bd",
    "gct": "#ff7f0e",
}
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
#: The contenders of the pictures in their order, but for ours.
PEERS = (
    *("eager", "compiled", "plain", "plain-compiled"),
    *("gct", "gct-compiled", "eca", "eca-compiled", "se", "se-compiled", "cbam", "cbam-compiled"),
)


def name_of(contender: str, backend: str | None = None) -> str:
    """What the page calls a contender; the reference, where it was asked for, is not called fused."""
    if contender in ("fused", "steam") and backend == "reference":
        return "STEAM, backend reference"
    return NAMES.get(contender, contender)


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


def read(folder: Path) -> Run:
    """The files of a run, by name.

    Raises:
        FileNotFoundError: the folder holds none of them.
    """
    run = {name: json.loads(path.read_text()) for name in FILES if (path := folder / f"{name}.json").exists()}
    if not run:
        raise FileNotFoundError(f"{folder}: holds none of {', '.join(f'{n}.json' for n in FILES)}")
    return run


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def _times(value: float | None) -> str:
    return (
        ""
        if value is None
        else f"{value:.2f}"
        if value < 9.995
        else f"{value:.1f}"
        if value < 99.95
        else f"{value:.0f}"
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


class Unit:
    """The rows of unit.json, by problem, contender and direction."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.at = {(r["problem"], r["contender"], r["direction"]): r for r in rows}
        self.problems = {r["problem"]: r for r in rows}
        self.contenders = list(dict.fromkeys(r["contender"] for r in rows))
        self.backends = {r["contender"]: r.get("backend") for r in rows}

    def name(self, contender: str) -> str:
        return name_of(contender, self.backends.get(contender))

    def column(self, contender: str) -> str:
        """Its name in the head of a table."""
        by_name = contender == "fused" and self.backends.get(contender) == "reference"
        return f"{contender} (reference)" if by_name else contender

    def shown(self) -> list[Row]:
        """A row for each shape of the pictures: those of batch 8 if there are, else whatever was measured."""
        found = [r for r in self.problems.values() if all(r[k] == v for k, v in SHOWN.items()) and r["shape"] in SHAPES]
        return sorted(found, key=lambda r: SHAPES.index(r["shape"])) if found else list(self.problems.values())

    def value(self, problem: str, contender: str, direction: str, key: str) -> float | None:
        row = self.at.get((problem, contender, direction))
        return None if row is None else row[key]

    def speedup(self, problem: str, over: str, direction: str) -> float | None:
        """The time of ``over`` in units of ours."""
        ours, theirs = (self.value(problem, c, direction, "seconds") for c in ("fused", over))
        return theirs / ours if ours and theirs else None

    def speedups(self, over: str, direction: str) -> list[float]:
        found = (self.speedup(p, over, direction) for p in self.problems)
        return [v for v in found if v is not None]


# ---- pictures --------------------------------------------------------------------------------------------------------


def _look(name: str) -> dict[str, Any]:
    """A compiled contender has the colour of the eager one, hatched."""
    colour = COLOURS["eager" if name == "compiled" else name.removesuffix("-compiled")]
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0} | (
        {"hatch": "//////"} if name.endswith("compiled") else {}
    )


def _bars(
    axis: Any, groups: list[str], series: dict[str, list[float | None]], label: Callable[[str], str], bottom: float
) -> None:
    """Grouped bars from ``bottom``, side by side whatever is missing in a group."""
    there = [[n for n, values in series.items() if values[g] is not None] for g in range(len(groups))]
    width = 0.88 / max(map(len, there), default=1)
    for name, values in series.items():
        places, heights = [], []
        for g, value in enumerate(values):
            if value is not None:
                places.append(g + (there[g].index(name) - (len(there[g]) - 1) / 2) * width)
                heights.append(value - bottom)
        axis.bar(places, heights, width, bottom=bottom, label=label(name), **_look(name))
    axis.set_xticks(range(len(groups)), groups)


def _factor_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.grid(axis="y", linewidth=0.4, color="#dddddd")
    axis.set_axisbelow(True)


def _label(row: Row) -> str:
    return SHAPE_NAMES.get(row["shape"], row["shape"])


def _legend(figure: Any, axis: Any, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, max(len(labels), 1)), frameon=False, fontsize=8
    )


def _two_panels(
    unit: Unit,
    names: Iterable[str],
    panels: dict[str, str],
    value: Callable[[Row, str, str], float | None],
    what: str,
    factors: bool,
) -> Any:
    """One panel over the other, by ``panels``' keys and titles: a group of bars for each shape."""
    from benchmarks.plots import new_figure

    shown = unit.shown()
    names = [n for n in names if n in unit.contenders]
    figure, axes = new_figure(2, 1, (10.5, 6.4), sharex=True, sharey=True)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        series = {n: [value(r, n, key) for r in shown] for n in names}
        _bars(axis, [_label(r) for r in shown], series, unit.name, 1 if factors else 0)
        if factors:
            _factor_axis(axis)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(what)
    _legend(figure, axes[0], 5)
    return figure


def draw_over_floor(unit: Unit, path: Path) -> None:
    from benchmarks.plots import save_figure

    def value(row: Row, name: str, direction: str) -> float | None:
        return unit.value(row["problem"], name, direction, "over_floor")

    what = "time over the memory floor"
    save_figure(_two_panels(unit, ("fused", *PEERS), DIRECTIONS, value, what, factors=True), path)


def draw_speedup(unit: Unit, path: Path) -> None:
    from benchmarks.plots import save_figure

    def value(row: Row, name: str, direction: str) -> float | None:
        return unit.speedup(row["problem"], name, direction)

    what = f"time over that of {unit.name('fused')}"
    save_figure(_two_panels(unit, PEERS, DIRECTIONS, value, what, factors=True), path)


def draw_memory(unit: Unit, path: Path) -> None:
    from benchmarks.plots import save_figure

    def value(row: Row, name: str, key: str) -> float | None:
        found = unit.value(row["problem"], name, "both", key)
        return None if found is None else found / row["map_bytes"]

    panels = {"kept_bytes": "kept for backward, besides x", "extra_bytes": "most at once in training, besides x, y, dx"}
    what = "bytes over those of x"
    save_figure(_two_panels(unit, ("fused", *PEERS), panels, value, what, factors=False), path)


def _tables(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """The end-to-end rows of each network, task and mode, by contender."""
    out: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        out.setdefault((row["network"], row["task"], row["mode"]), {})[row["contender"]] = row
    return out


def draw_price(rows: list[Row], path: Path) -> None:
    from benchmarks.plots import new_figure, save_figure

    tables = _tables(rows)
    names = [n for n in dict.fromkeys(r["contender"] for r in rows) if n != "plain"]
    groups = [f"{network}\n{task}, {mode}" for network, task, mode in tables]
    figure, axes = new_figure(2, 1, (10.5, 6.4))
    panels = {"time_over_plain": "extra time", "memory_over_plain": "extra peak memory"}
    width = 0.84 / max(len(names), 1)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            places = [(g + (i + 0.5) * width - 0.42, t[name]) for g, t in enumerate(tables.values()) if name in t]
            xs, heights = [x for x, _ in places], [100 * (r[key] - 1) for _, r in places]
            spans = [[100 * (q - 1) for q in r["time_over_plain_quartiles"]] for _, r in places]
            axis.bar(xs, heights, width, label=name_of(name, places[0][1].get("backend")), **_look(name))
            for x, height in zip(xs, heights, strict=True):
                if abs(height) < 0.05:  # the page's +0.0 %: no bar to be seen
                    axis.annotate("0", (x, 0), (0, 2), textcoords="offset points", ha="center", fontsize=8)
            if key == "time_over_plain":
                axis.vlines(xs, [s[0] for s in spans], [s[1] for s in spans], color="black", linewidth=0.9)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set_ylabel("per cent of the plain network")
        axis.set_title(title, fontsize=9)
    _legend(figure, axes[0], 8)
    save_figure(figure, path)


def draw_scaling(rows: list[Row], path: Path) -> None:
    from benchmarks.plots import new_figure, save_figure

    axes_of = list(dict.fromkeys(r["axis"] for r in rows))
    titles = {"N": "batch", "C": "channels", "HW": "pixels of the map", "grid": "cells of the grid"}
    figure, axes = new_figure(2, len(axes_of), (2.6 * len(axes_of) + 0.6, 5.0), sharey="row", squeeze=False)
    threads = sorted({r["threads"] for r in rows})
    for column, name in enumerate(axes_of):
        for line, direction in enumerate(("forward", "backward")):
            axis = axes[line][column]
            for count, colour in zip(threads, ("#ff9896", "#d62728", "#8c1b1b", "#4d0f0f"), strict=False):
                own = sorted((r for r in rows if r["axis"] == name and r["threads"] == count), key=lambda r: r["value"])
                xs, many = [r["value"] for r in own], f"{count} thread{'s' if count > 1 else ''}"
                axis.plot(xs, [1e6 * r[direction] for r in own], "o-", color=colour, markersize=3, label=many)
                floor = [1e6 * r[f"{direction}_floor"] for r in own]
                axis.plot(xs, floor, "--", color=colour, linewidth=1, label=f"floor, {many}")
            axis.set(xscale="log", yscale="log")
            axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
            if line:
                axis.set_xlabel(titles[name])
        axes[0][column].set_title(titles[name], fontsize=9)
    axes[0][0].set_ylabel("forward, µs")
    axes[1][0].set_ylabel("backward, µs")
    _legend(figure, axes[0][0], 8)
    save_figure(figure, path)


# ---- page ------------------------------------------------------------------------------------------------------------


def _facts(run: Run) -> tuple[list[tuple[str, str]], list[str]]:
    """What the page says of the machine: one value where the parts of the run agree, else each part's; and the names
    of those in which they differ. Parts run one after the other, so that dates are a span."""
    table, differ = [], []
    for key in FACTS:
        values = {part: str(content["machine"].get(key, "not recorded")) for part, content in run.items()}
        distinct = sorted(set(values.values()))
        name = key.replace("_", " ")
        if distinct == ["not recorded"]:
            continue
        if len(distinct) == 1:
            table.append((name, distinct[0]))
        elif key == "date":
            table.append((name, f"{distinct[0]} to {distinct[-1]}"))
        else:
            differ.append(name)
            table.append((name, "; ".join(f"{part}: {value}" for part, value in values.items())))
    return table, differ


def _header(run: Run) -> list[str]:
    facts, differ = _facts(run)
    out = [
        "# What a unit costs",
        "",
        "Made by `make bench` (`benchmarks/report.py`) from one run on the machine below. How it is measured, and what",
        "the contenders and the floor are: [benchmarking.md](benchmarking.md).",
        "",
    ]
    if any(content.get("quick") for content in run.values()):
        out += ["**A quick run: it shows that the benchmarks run, not what things take.**", ""]
    ours = {"fused", "steam"}
    if any(r.get("contender") in ours and r.get("backend") == "reference" for c in run.values() for r in c["rows"]):
        out += ["**Ours ran on the backend reference, which is plain PyTorch: no kernel is measured here.**", ""]
    if differ:
        out += [f"**Not one run: its parts differ in {', '.join(differ)}.**", ""]
    if any(str(content["machine"].get("commit", "")).endswith("-dirty") for content in run.values()):
        out += ["**Measured with changes that are in no commit.**", ""]
    out += core.markdown_table(("what", "value"), facts)
    return out


def _price_section(rows: list[Row], images: str) -> list[str]:
    out = ["## The price of attention", "", f"![price of attention]({images}/price_of_attention.svg)", ""]
    first = rows[0]
    out += [
        f"Whole networks, batch {first['batch']} at {first['size']}×{first['size']}, float32: extra time and extra",
        "peak memory over the same network without attention. STEAM at the sites of `insert_steam()`; SE and ECA",
        "(timm's) in every block at the end of its branch. In brackets the quartiles over the rounds; each",
        "contender is compared with the plain network of its own round.",
        "",
    ]
    body = []
    for (network, task, mode), table in _tables(rows).items():
        for name, r in table.items():
            if name == "plain":
                continue
            low, high = r["time_over_plain_quartiles"]
            body.append(
                (
                    f"{network}, {task}, {mode}",
                    f"{name_of(name, r.get('backend'))} ({r['layers']})",
                    f"**{_percent(r['time_over_plain'])}** ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})",
                    f"{_percent(r['memory_over_plain'])}",
                    r["parameters"] - table["plain"]["parameters"],
                    r["rounds"],
                )
            )
    head = ("network", "attention (layers)", "extra time", "extra peak memory", "extra parameters", "rounds")
    return out + core.markdown_table(head, body)


def _unit_section(unit: Unit, images: str) -> list[str]:
    out = ["## Speed-ups of the fused unit", "", f"![speed-ups]({images}/speedup.svg)", ""]
    body = []
    for name in unit.contenders:
        if name == "fused":
            continue
        cells: list[object] = [unit.name(name)]
        for direction in DIRECTIONS:
            found = unit.speedups(name, direction)
            cells.append(
                f"**{_times(geometric_mean(found))}** ({_times(min(found))} to {_times(max(found))})" if found else ""
            )
        body.append((*cells, len(unit.speedups(name, "both"))))
    out += [
        "Time of each contender over that of the fused unit: geometric mean, and range, over all shapes at which both",
        "ran. Below 1 the other one is quicker; SE, ECA, CBAM and GCT compute other functions.",
        "",
    ]
    head = ("contender", "forward", "forward + backward", "shapes")
    out += core.markdown_table(head, body)
    out += ["## Time over the floor", "", f"![time over the floor]({images}/over_floor.svg)", ""]
    out += ["A map of N×C×H×W; *floor* is a plain pass over the same memory in the same run.", ""]
    for direction, title in DIRECTIONS.items():
        body = []
        for problem in unit.problems:
            values = [unit.value(problem, c, direction, "over_floor") for c in unit.contenders]
            seconds = unit.value(problem, "fused", direction, "seconds")
            spread = unit.value(problem, "fused", direction, "spread")
            micro = "" if seconds is None else f"{seconds * 1e6:.0f} µs ± {100 * (spread or 0) / 2:.0f} %"
            body.append((problem, *map(_times, values), micro))
        out += [f"### {title[0].upper()}{title[1:]}", ""]
        out += core.markdown_table(("map", *map(unit.column, unit.contenders), "fused takes"), body)
    out += ["## Memory", "", f"![memory]({images}/memory.svg)", ""]
    out += [
        "Bytes over those of x: *kept* from forward for backward besides x and y; *peak* the most that is allocated",
        "at once in forward + backward, besides x, y and the gradients. By `torch.profiler`; what oneDNN and the CPU",
        "kernels keep in scratch of their own is not in it. Where *peak* is below *kept*, Inductor has kept a copy of",
        "x, in channels_last for the gate's convolution, and frees it before it allocates dx, which *peak* leaves out.",
        "",
    ]
    body = []
    for row in unit.shown():
        cells = [_label(row)]
        for name in unit.contenders:
            kept, extra = (unit.value(row["problem"], name, "both", k) for k in ("kept_bytes", "extra_bytes"))
            have = kept is not None and extra is not None
            cells.append(f"{kept / row['map_bytes']:.3f} / {extra / row['map_bytes']:.3f}" if have else "")  # type: ignore[operator]
        body.append(cells)
    out += core.markdown_table(("map: kept / peak", *map(unit.column, unit.contenders)), body)
    counts = {c: next((r["parameters"] for r in unit.rows if r["contender"] == c), None) for c in unit.contenders}
    first = next(iter(unit.problems.values()))
    named = ", ".join(f"{c} {v}" for c, v in counts.items() if v is not None and not c.endswith("compiled"))
    out += [f"Parameters at {_label(first)}: {named}.", ""]
    return out


def _host_section(rows: list[Row]) -> list[str]:
    layers = [r for r in rows if r["section"] == "layers"]
    columns = ("no grad", "forward with grad", "forward + backward")
    out = ["## Host overhead", "", "Microseconds a call at (1, 64, 7, 7), float32.", ""]
    out += core.markdown_table(("layer", *columns), [(r["layer"], *(f"{r[c]:.0f}" for c in columns)) for r in layers])
    small = [r for r in rows if r["section"] == "small"]
    out += ["Small maps, float32: time of `reference.STEAM` over that of `FusedSTEAM`.", ""]
    keys = ("speedup no grad", "speedup forward + backward")
    out += core.markdown_table(
        ("map", "forward", "forward + backward"), [(r["problem"], *(_times(r[k]) for k in keys)) for r in small]
    )
    slower = [r["problem"] for r in small if min(r[k] for k in keys) < 1]
    out += [f"Plain PyTorch is quicker at: {', '.join(slower) or 'none of these'}.", ""]
    return out


def _scaling_section(rows: list[Row], images: str) -> list[str]:
    out = ["## Scaling", "", f"![scaling]({images}/scaling.svg)", ""]
    out += ["One thing varied at a time, from (8, 256, 28, 28), float32, NCHW, 7×7 cells; dashed: the floor.", ""]
    threads = sorted({r["threads"] for r in rows})
    body = []
    for key in dict.fromkeys((r["axis"], r["value"]) for r in rows):
        cells: list[object] = [f"{key[0]} = {key[1]}"]
        own = {r["threads"]: r for r in rows if (r["axis"], r["value"]) == key}
        for direction in ("forward", "backward"):
            cells += [_times(own[t][f"{direction}_over_floor"]) for t in threads]
            cells.append(_times(own[threads[0]][direction] / own[threads[-1]][direction]))
        body.append(cells)
    head = ["varied"]
    for direction in ("forward", "backward"):
        head += [f"{direction} over floor, {t} thr." for t in threads] + [
            f"{threads[-1]} over {threads[0]}: times as fast"
        ]
    return out + core.markdown_table(head, body)


def page(run: Run, images: str) -> str:
    """The Markdown page; ``images`` is the pictures' folder as seen from it."""
    out = _header(run)
    if "end_to_end" in run:
        out += _price_section(run["end_to_end"]["rows"], images)
    if "unit" in run:
        out += _unit_section(Unit(run["unit"]["rows"]), images)
    if "host" in run:
        out += _host_section(run["host"]["rows"])
    if "scaling" in run:
        out += _scaling_section(run["scaling"]["rows"], images)
    return "\n".join(out).rstrip() + "\n"


def draw(run: Run, images: Path) -> list[Path]:
    """The pictures of what is in the run."""
    drawn: list[tuple[str, Callable[[Path], None]]] = []
    if "unit" in run:
        unit = Unit(run["unit"]["rows"])
        drawn += [
            ("speedup.svg", lambda path: draw_speedup(unit, path)),
            ("over_floor.svg", lambda path: draw_over_floor(unit, path)),
            ("memory.svg", lambda path: draw_memory(unit, path)),
        ]
    if "end_to_end" in run:
        drawn.append(("price_of_attention.svg", lambda path: draw_price(run["end_to_end"]["rows"], path)))
    if "scaling" in run:
        drawn.append(("scaling.svg", lambda path: draw_scaling(run["scaling"]["rows"], path)))
    for name, make in drawn:
        make(images / name)
    return [images / name for name, _ in drawn]


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=Path, default=ROOT / "benchmarks" / "results" / "latest", help="folder of the run"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page to write")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    args = parser.parse_args()
    try:
        run = read(args.run)
    except FileNotFoundError as error:
        sys.exit(f"--run {error}")
    pictures = draw(run, args.images)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(run, os.path.relpath(args.images, args.page.parent).replace(os.sep, "/")))
    if "unit" in run:
        write_csv(run["unit"]["rows"], args.run / "unit.csv")
    print(f"wrote {args.page} and {len(pictures)} pictures in {args.images}")


if __name__ == "__main__":
    main()
