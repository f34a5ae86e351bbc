"""The pictures of the committed run can be read, and show every contender."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contenders, end_to_end, pictures, runs
from benchmarks.machine import ROOT
from benchmarks.shapes import NAMED_OPTIONS, SHAPES, Shape


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any, part: str) -> Any:
    """A picture of the committed run, as a figure."""
    from benchmarks import plots

    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    rows = runs.read(ROOT / "benchmarks" / "results" / "latest")[part]["rows"]
    draw(runs.UnitRows(rows) if part == "unit" else rows, Path("unused.svg"))
    (figure,) = figures
    figure.canvas.draw()
    return figure


PICTURES = [
    (pictures.draw_speedup, "unit"),
    (pictures.draw_over_floor, "unit"),
    (pictures.draw_memory, "unit"),
    (pictures.draw_price, "end_to_end"),
]


@pytest.mark.parametrize(("draw", "part"), PICTURES, ids=lambda value: getattr(value, "__name__", None))
def test_pictures_can_be_read(monkeypatch: pytest.MonkeyPatch, draw: Any, part: str) -> None:
    """No tick labels overlap, and the legend has proper names."""
    figure = drawn(monkeypatch, draw, part)
    for axis in figure.axes:
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [t.get_window_extent() for t in ticks if t.get_text() and t.get_visible()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) > 1 and set(names) <= set(runs.NAMES.values())
    extents = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert min(e.x0 for e in extents) >= 0 and max(e.x1 for e in extents) <= figure.get_window_extent().width


@pytest.mark.parametrize("draw", [pictures.draw_speedup, pictures.draw_over_floor])
def test_pictures_of_factors_show_every_contender(monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    figure = drawn(monkeypatch, draw, "unit")
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    peers = {runs.NAMES[c] for c in contenders.CONTENDERS if c not in contenders.OURS}
    assert names - {"STEAM, fused"} == peers
    for axis in figure.axes:
        low, high = axis.get_ylim()
        ticks = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]
        assert {"1", "2", "5", "10", "20", "50"} <= set(ticks)
        for bar in axis.patches:  # bars begin at 1, so that their direction shows which contender is faster
            assert 1 in (pytest.approx(bar.get_y()), pytest.approx(bar.get_y() + bar.get_height()))


def test_no_price_is_a_printed_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, pictures.draw_price, "end_to_end")
    rows = runs.read(ROOT / "benchmarks" / "results" / "latest")["end_to_end"]["rows"]
    for axis, key in zip(figure.axes, ("time_over_plain", "memory_over_plain"), strict=True):
        none = sum(runs.percent(r[key]) in ("+0.0 %", "-0.0 %") for r in rows if r["contender"] != "plain")
        assert sum(text.get_text() == "0" for text in axis.texts) == none


def test_every_contender_has_a_name() -> None:
    assert {*contenders.CONTENDERS, *end_to_end.CONTENDERS} - {"plain"} <= set(runs.NAMES)


def test_page_has_mobile_and_detection_names() -> None:
    """Each shape has its name on the page, and a picture has rows of one dtype and layout."""
    assert set(runs.SHAPE_NAMES) == set(SHAPES)
    for name, text in runs.SHAPE_NAMES.items():
        assert text == "×".join(map(str, SHAPES[name]))
    shape = Shape(8, *SHAPES["m14"])
    rows = [
        {"problem": p.label, "contender": "fused", "direction": "both", "shape": p.name}
        | {"batch": p.n, "dtype": p.dtype, "layout": p.layout}
        for p in (shape, replace(shape, layout="channels_last"), replace(shape, n=1))
    ]
    assert [r["problem"] for r in runs.UnitRows(rows).shown()] == [shape.label]


def test_means_and_pictures_have_the_default_options_alone() -> None:
    shapes = (Shape(8, *SHAPES["m14"]), Shape(8, *SHAPES["m14"], options=NAMED_OPTIONS["tail"]))
    rows = [
        {"problem": s.label, "contender": contender, "direction": "forward", "shape": s.name, "seconds": seconds}
        | {"batch": s.n, "dtype": s.dtype, "layout": s.layout, "default_options": not s.options.tail}
        for s in shapes
        for contender, seconds in (("fused", 1.0), ("se", 3.0 if s.options.tail else 2.0))
    ]
    unit = runs.UnitRows(rows)
    assert list(unit.labels) == [s.label for s in shapes]
    assert [r["problem"] for r in unit.shown()] == [shapes[0].label] and unit.speedups("se", "forward") == [2.0]
