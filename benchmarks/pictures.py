"""The pictures of a run: bars of the contenders at each shape, bars of whole networks, and lines of scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.runs import DIRECTIONS, Row, Run, UnitRows, name_of, networks_of, shape_name

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
#: The contenders of the pictures in their order, without the fused unit.
PEERS = (
    *("eager", "compiled", "plain", "plain-compiled"),
    *("gct", "gct-compiled", "eca", "eca-compiled", "se", "se-compiled", "cbam", "cbam-compiled"),
)


def _look(name: str) -> dict[str, Any]:
    """A compiled contender has the colour of the eager one, hatched."""
    colour = COLOURS["eager" if name == "compiled" else name.removesuffix("-compiled")]
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0} | (
        {"hatch": "//////"} if name.endswith("compiled") else {}
    )


def _bars(
    axis: Any, groups: list[str], series: dict[str, list[float | None]], label: Callable[[str], str], bottom: float
) -> None:
    """Grouped bars from ``bottom``. The bars of a group stand side by side, without gaps for missing contenders."""
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


def _legend(figure: Any, axis: Any, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, max(len(labels), 1)), frameon=False, fontsize=8
    )


def _two_panels(
    unit: UnitRows,
    names: Iterable[str],
    panels: dict[str, str],
    value: Callable[[Row, str, str], float | None],
    what: str,
    factors: bool,
) -> Any:
    """Two panels, one above the other, with a group of bars for each shape. ``panels`` has their keys and titles."""
    from benchmarks.plots import new_figure

    shown = unit.shown()
    names = [n for n in names if n in unit.contenders]
    figure, axes = new_figure(2, 1, (10.5, 6.4), sharex=True, sharey=True)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        series = {n: [value(r, n, key) for r in shown] for n in names}
        _bars(axis, [shape_name(r) for r in shown], series, unit.name, 1 if factors else 0)
        if factors:
            _factor_axis(axis)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(what)
    _legend(figure, axes[0], 5)
    return figure


def draw_over_floor(unit: UnitRows, path: Path) -> None:
    from benchmarks.plots import save_figure

    def value(row: Row, name: str, direction: str) -> float | None:
        return unit.value(row["problem"], name, direction, "over_floor")

    what = "time over the memory floor"
    save_figure(_two_panels(unit, ("fused", *PEERS), DIRECTIONS, value, what, factors=True), path)


def draw_speedup(unit: UnitRows, path: Path) -> None:
    from benchmarks.plots import save_figure

    def value(row: Row, name: str, direction: str) -> float | None:
        return unit.speedup(row["problem"], name, direction)

    what = f"time over the time of {unit.name('fused')}"
    save_figure(_two_panels(unit, PEERS, DIRECTIONS, value, what, factors=True), path)


def draw_memory(unit: UnitRows, path: Path) -> None:
    from benchmarks.plots import save_figure

    def value(row: Row, name: str, key: str) -> float | None:
        found = unit.value(row["problem"], name, "both", key)
        return None if found is None else found / row["map_bytes"]

    panels = {"kept_bytes": "kept for backward, besides x", "extra_bytes": "peak in training, besides x, y, dx"}
    what = "bytes over the bytes of x"
    save_figure(_two_panels(unit, ("fused", *PEERS), panels, value, what, factors=False), path)


def draw_price(rows: list[Row], path: Path) -> None:
    from benchmarks.plots import new_figure, save_figure

    tables = networks_of(rows)
    names = [n for n in dict.fromkeys(r["contender"] for r in rows) if n != "plain"]
    groups = [f"{network}\n{task}\n{mode}\n{layout}" for network, task, mode, layout in tables]
    figure, axes = new_figure(2, 1, (max(10.5, 1.1 * len(groups)), 7.0))
    panels = {"time_over_plain": "extra time", "memory_over_plain": "extra peak memory"}
    width = 0.84 / max(len(names), 1)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            places = [(g + (i + 0.5) * width - 0.42, t[name]) for g, t in enumerate(tables.values()) if name in t]
            xs, heights = [x for x, _ in places], [100 * (r[key] - 1) for _, r in places]
            spans = [[100 * (q - 1) for q in r["time_over_plain_quartiles"]] for _, r in places]
            axis.bar(xs, heights, width, label=name_of(name, places[0][1].get("backend")), **_look(name))
            for x, height in zip(xs, heights, strict=True):
                if abs(height) < 0.05:  # the page prints +0.0 %, and the bar would be invisible
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


def draw(run: Run, images: Path) -> list[Path]:
    """Draws the pictures of those files that the run has; returns their paths."""
    drawn: list[tuple[str, Callable[[Path], None]]] = []
    if "unit" in run:
        unit = UnitRows(run["unit"]["rows"])
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
