"""The sweep over random shapes, and the scaling along each axis."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling, sweep
from benchmarks.machine import ROOT
from benchmarks.shapes import Shape
from benchmarks.timing import Effort


def test_a_wrong_point_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: Shape, check: bool, effort: Effort) -> dict[str, Any]:
        if shape.n == 2:
            raise AssertionError("the second is wrong")
        return {"forward": shape.n}

    monkeypatch.setattr(scaling, "measure", measure)
    before = torch.get_num_threads()
    rows, wrong = scaling.run(["N"], [1], Effort.quick(), quick=False)
    torch.set_num_threads(before)
    assert [r["value"] for r in rows] == [n for n in scaling.AXES["N"] if n != 2]
    assert wrong == ["the second is wrong"]


def swept(name: str, mbytes: float, worst: float) -> dict[str, Any]:
    row = {"problem": name, "bytes": int(mbytes * 1e6), "worst": worst, "walk": "kPixels"}
    return row | {f"{d}{k}": worst for d in ("forward", "backward") for k in ("", "_floor", "_over_floor")}


@pytest.mark.parametrize(
    ("worst", "mbytes", "flags", "status"),
    [(4.1, 1.1, (), "1 shapes of more than 1 MB are above 4 times the floor, the worst last"), (3.9, 1.1, (), None),
     (4.1, 1.0, (), None), (4.1, 1.1, ("--quick",), None)],
)  # fmt: skip
def test_the_sweep_fails_where_a_large_map_falls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, worst: float, mbytes: float, flags: tuple[str, ...], status: Any
) -> None:
    """The file has every row, worst first."""
    rows = iter([swept("first", 5, 1.5), swept("last", mbytes, worst)])
    monkeypatch.setattr(sweep, "measure", lambda *_: next(rows))
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["sweep", "--cases", "2", "--json", str(path), *flags])
    if status:
        with pytest.raises(SystemExit, match=status):
            sweep.main()
    else:
        sweep.main()
    content = json.loads(path.read_text())
    assert [r["problem"] for r in content["rows"]] == ["last", "first"] and content["quick"] == bool(flags)


def test_the_sweep_says_which_walk_served_a_shape() -> None:
    """The walk is the choice of ``make_plan`` of the CPU kernels, with the same constants."""
    shape = Shape(2, 17, 20, 20)
    for changed, expected in (
        ({}, "kColumns"),
        ({"h": 16, "w": 16}, "kPixels"),
        ({"h": 7, "w": 90}, "kPixels"),  # cells one row high
        ({"layout": "channels_last"}, "kChannels"),
        ({"layout": "channels_last", "c": 15}, "kNarrow"),
        ({"layout": "channels_last", "c": 1}, "kColumns"),
        ({"h": 1, "w": 1}, "kChannels"),
        ({"h": 1, "w": 1, "c": 1}, "kNarrow"),
    ):
        assert sweep.walk(replace(shape, **changed), "avx512") == expected
    assert sweep.walk(replace(shape, layout="channels_last", c=15), "avx2") == "kChannels"
    plan, vectors = ((ROOT / "csrc" / "cpu" / name).read_text() for name in ("plan.h", "vec.h"))
    assert f"constexpr int64_t kSmallMap = {sweep.SMALL_MAP};" in plan
    for line in (
        "problem.channels < lanes ? Walk::kNarrow : Walk::kChannels;",
        "plan.pixels <= kSmallMap || problem.grid_h == problem.height ? Walk::kPixels : Walk::kColumns;",
        "if (problem.channels == 1) channels_last = false;",
        "if (plan.pixels == 1) channels_last = true;",
    ):
        assert line in plan
    assert [int(n) // 4 for n in re.findall(r"constexpr int kVectorBytes = (\d+);", vectors)] == [*sweep.LANES.values()]
    facts = sweep.facts_of(replace(shape, layout="channels_last"), "avx512")
    assert facts["walk"] == "kChannels" and facts["grid"] == [7, 7] and facts["mbytes"] == 2 * 17 * 400 * 4 / 1e6
    assert facts["sample_kbytes"] == 17 * 400 * 4 / 1e3 and (facts["n"], facts["c"], facts["h"]) == (2, 17, 20)
