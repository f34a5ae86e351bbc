"""The closing table of the benchmarks: its width, its contenders, and the mark of a large spread."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import closing, conftest, contenders, cuda, grid, sweep, tables
from benchmarks.bench_unit import Row
from benchmarks.shapes import DIRECTIONS, LAYOUTS, NAMED_OPTIONS, SHAPES, Shape
from benchmarks.tables import WIDTH
from benchmarks.timing import Measured


def measured(shape: Shape, times: dict[str, list[float]]) -> Row:
    """A made-up measurement: the rounds of each contender, the same in each direction; the floor takes 1 us."""
    row = Row(shape, memory={name: {"kept_bytes": 8, "both": 16, "parameters": 64} for name in times})
    samples = {f"floor-{d}": [{d: 1e-6}] for d in ("forward", "backward")}
    for name, rounds in times.items():
        samples[f"{name} forward"] = [{"forward": v} for v in rounds]
        samples[f"{name} training"] = [{"backward": v, "both": v} for v in rounds]
        if shape.device == "cuda":
            row.timed_by |= {f"{name} {block}": ("events", "a reason " * 20) for block in ("forward", "training")}
    row.measured = Measured(samples)
    return row


def longest(device: str) -> list[Shape]:
    """Shapes of the family with the longest names: every dtype, layout and set of options."""
    family = itertools.product(grid.ALLOWED["--dtype"], LAYOUTS, NAMED_OPTIONS.values())
    return [Shape(128, *SHAPES["det"], dtype, layout, options, device) for dtype, layout, options in family]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seconds", [1e-6, 99.0])
def test_every_line_fits(monkeypatch: pytest.MonkeyPatch, device: str, seconds: float) -> None:
    """This holds for the longest names, the largest figures, and a run without a contender of this package."""
    monkeypatch.setattr(cuda, "copy_gbytes", lambda: 1.0)
    names = [n for n in contenders.CONTENDERS if n not in contenders.OURS]
    ours = ["fused"] if device == "cpu" else ["triton", "cuda"]
    for chosen in ([*ours, *names], names):
        times = {name: [seconds, 4 * seconds, 9 * seconds] for name in chosen}
        rows = [line for shape in longest(device) for line in measured(shape, times).lines()]
        found = closing.tables(rows, wide=False, on_gpu=device == "cuda")
        assert len(found) == len(DIRECTIONS)
        lines = [
            line for table in [*found, *closing.legend(rows, False, device == "cuda")] for line in table.splitlines()
        ]
        assert max(map(len, lines)) <= WIDTH
        shown = [name for name in chosen if name in ours] or chosen
        labels = [
            shape.label if len(shown) == 1 else f"{shape.label}  {name}" for shape in longest(device) for name in shown
        ]
        for table in found:
            firsts = (re.match(r"\S+(  [a-z]\S*)?", line) for line in table.splitlines()[3:])
            assert [match[0] for match in firsts if match] == labels


def test_the_default_grid_needs_one_line_for_each_shape() -> None:
    every = grid.default_grid()
    times = {name: [2e-3] for name in contenders.CONTENDERS if name not in ("triton", "cuda")}
    rows = [line for shape in every for line in measured(shape, times).lines()]
    for table in closing.tables(rows, wide=False, on_gpu=False):
        assert "(fused)" in table.splitlines()[1], "the contender is named once"
        names = [name for line in table.splitlines()[3:] if (name := line.split()[0])[-1].isalpha() or "grid" in name]
        assert names == [shape.label for shape in every]
        two_lines = {line for line in table.splitlines()[3:] if len(line.split()) == 1}
        assert all("grid13x21" in line for line in two_lines), "only names longer than 40 letters have a second line"


def test_figures_of_the_narrow_table() -> None:
    """Latency, GFLOP/s, the time over the floor, and the speed-up over the fastest other form with its name."""
    shape = Shape(8, *SHAPES["56"])
    row = measured(shape, {"fused": [2e-6], "eager": [9e-6], "plain": [5e-6], "plain-compiled": [3e-6], "se": [1e-6]})
    forward, *_ = closing.tables(row.lines(), wide=False, on_gpu=False)
    _title, head, _, line = forward.splitlines()
    assert head.split() == ["shape", "(fused)", "latency", "spread", "GFLOP/s", "GB/s", "floor", "speed-up", "over"]
    gflops = tables.number(shape.flops("forward") / 2e-6 * 1e-9)
    gbytes = tables.number(shape.ideal_bytes("forward") / 2e-6 * 1e-9)
    assert line.split() == [shape.label, "2.0", "us", "0%", gflops, gbytes, "2.00", "1.50", "plain-compiled"]
    row.backends["fused"] = "reference"
    assert "shape (fused on reference)  " in closing.tables(row.lines(), wide=False, on_gpu=False)[0]
    alone, *_ = closing.tables(measured(shape, {"fused": [2e-6]}).lines(), wide=False, on_gpu=False)
    assert alone.splitlines()[-1].split()[-1] == "-"
    (only, *_) = closing.tables(measured(shape, {"eager": [9e-6], "plain": [3e-6]}).lines(), wide=False, on_gpu=False)
    assert [line.split()[-2:] for line in only.splitlines()[3:]] == [["0.33", "plain"], ["3.00", "eager"]]


def test_the_wide_table_has_every_contender() -> None:
    shape = Shape(8, *SHAPES["56"])
    names = [n for n in contenders.CONTENDERS if n not in ("triton", "cuda")]
    rows = measured(shape, {name: [2e-3] for name in names}).lines()
    for table in closing.tables(rows, wide=True, on_gpu=False):
        _title, head, _, *lines = table.splitlines()
        assert [line.split()[:2] for line in lines] == [[shape.label, name] for name in names]
        assert all(f"x {name}" in head for name in contenders.BASELINES) and "extra MB  parameters" in head
    narrow = closing.tables(rows, wide=False, on_gpu=False)
    assert all(len(table.splitlines()) == 4 for table in narrow)


def test_a_spread_above_a_quarter_is_marked() -> None:
    """The mark is in both tables, and the legend explains it."""
    shapes = {Shape(8, *SHAPES["56"]): 0.125, Shape(1, *SHAPES["56"]): 0.13}
    rows = [
        line
        for shape, d in shapes.items()
        for line in measured(shape, {"fused": [1 - d, 1 - d, 1, 1 + d, 1 + d], "se": [1.0]}).lines()
    ]
    assert [r["spread"] for r in rows if r["contender"] == "fused"] == pytest.approx([0.25] * 3 + [0.26] * 3)
    for wide in (False, True):
        for table in closing.tables(rows, wide, on_gpu=False):
            marked = [line for line in table.splitlines() if "!" in line]
            assert len(marked) == 1 and marked[0].startswith("1x256x56x56") and "26% !" in marked[0]
            assert "25%   " in table
        assert sum(line.startswith("!: the spread is above 25 %") for line in closing.legend(rows, wide, False)) == 1


class Config:
    """The options and the rows of a run, as pytest would hold them."""

    def __init__(self, **given: Any) -> None:
        self.given, self.stash, self.option = given, pytest.Stash(), SimpleNamespace(benchmark_quiet=False)

    def getoption(self, option: str, default: Any = "") -> Any:
        return self.given.get(option.removeprefix("--"), default)


def test_the_option_wide() -> None:
    shape = Shape(8, *SHAPES["56"])
    row = measured(shape, {"fused": [2e-3], "eager": [3e-3], "cbam": [4e-3]})
    printed: dict[bool, str] = {}
    for wide in (False, True):
        lines: list[str] = []
        config: Any = Config(wide=wide, device="cpu")
        config.stash[conftest.ROWS] = {shape: row}
        conftest.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), config)  # type: ignore[arg-type]
        printed[wide] = "\n".join(lines)
    assert "cbam" in printed[True] and "cbam" not in printed[False] and "--wide shows all" in printed[False]


def test_when_pytest_benchmark_prints_its_table(pytestconfig: pytest.Config) -> None:
    """It does for those options whose results are part of its table. All names are options of the real plugin."""
    assert {"benchmark_quiet", "benchmark_json", *conftest.NEED_ITS_TABLE} <= set(vars(pytestconfig.option))
    for given in ({}, {"benchmark_json": "file"}, *({name: ["x"]} for name in conftest.NEED_ITS_TABLE)):
        config: Any = Config(**given)
        conftest.pytest_configure(config)
        assert config.option.benchmark_quiet == (not given.keys() & set(conftest.NEED_ITS_TABLE))


def test_a_long_name_has_a_line_of_its_own() -> None:
    text = tables.table("t", ("name", "a"), [("x" * 30, 1), ("short", 2)], width=20)
    assert text.splitlines()[3:] == ["x" * 30, "       1", "short  2"]
    assert tables.table("t", ("name", "a"), [("x" * 30, 1)], width=None).splitlines()[3] == "x" * 30 + "  1"


def test_the_sweep_fits() -> None:
    row = {"problem": "64x2048x100x100-grid14x21-bfloat16-channels_last", "walk": "kChannels", "bytes": 60e6}
    row |= {f"{d}{k}": 99.0 for d in ("forward", "backward") for k in ("", "_over_floor")}
    text = tables.table("", sweep.HEAD, [sweep.line(row)])
    assert max(map(len, text.splitlines())) <= WIDTH
