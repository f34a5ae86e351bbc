"""Comparison of two runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, runs
from benchmarks.machine import ROOT
from benchmarks.shapes import DIRECTIONS


def made_up(
    over_floor: float = 2.0,
    plain: float = 1.05,
    host: float = 9.0,
    memory: float = 0.01,
    bfloat16: float = 1.5,
    threads: float = 1.5,
    latency: float = 1.1,
) -> runs.Run:
    """A run of two shapes in two dtypes, one network, one layer and one point of scaling."""
    unit = []
    for problem, dtype in (("a", "float32"), ("b", "float32"), ("c", "bfloat16")):
        for direction in DIRECTIONS:
            row = {"problem": problem, "dtype": dtype, "contender": "fused", "direction": direction, "backend": "cpu"}
            row |= {"over_floor": over_floor if dtype == "float32" else bfloat16}
            unit.append(row | {"map_bytes": 1000, "extra_bytes": 1000 * memory if direction == "both" else None})
    unit[5]["over_floor"] = 2.0  # one row never changes
    net = {"network": "n", "mode": "eager", "task": "training", "batch": 1, "size": 8, "contender": "steam"}
    small = net | {"task": "inference", "layout": "nchw", "time_over_plain": latency}
    layers = [
        {"section": "layers", "layer": name, "no grad": us, "forward + backward": us}
        for name, us in (("FusedSTEAM", host), ("x * 0.5 (built in)", 1.0))
    ]
    scaled = [
        {
            "axis": "N",
            "value": n,
            "threads": t,
            "forward_over_floor": threads if t == 2 else 1.5,
            "backward_over_floor": 2,
        }
        for n in (1, 2)
        for t in (1, 2)
    ]
    rows = {
        "unit": unit,
        "end_to_end": [net | {"time_over_plain": plain}],
        "latency": [small],
        "host": layers,
        "scaling": scaled,
    }
    return {name: {"rows": r, "machine": {}} for name, r in rows.items()}


def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: runs.Run, new: runs.Run) -> int:
    for name, made in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        for part, content in made.items():
            (tmp_path / name / f"{part}.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    with pytest.raises(SystemExit) as end:
        compare.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"over_floor": 2.4}, "over the floor, forward, float32: the geometric mean is 1.200"),
        ({"over_floor": 3.0}, "over the floor, both, float32, a: 2.000 -> 3.000, 1.50 times the old"),
        ({"bfloat16": 1.95}, "over the floor, backward, bfloat16: the geometric mean is 1.300"),
        ({"threads": 1.95}, "scaling, forward over the floor, threads: 2: the geometric mean is 1.300"),
        ({"plain": 1.2}, "over the plain network, training: the geometric mean is 1.143"),
        ({"latency": 1.4}, "latency over the plain network: the geometric mean is 1.273"),
        ({"host": 12.0}, "host, module over x * 0.5: the geometric mean is 1.333"),
        ({"memory": 0.1}, "extra memory over x, a: 0.0100 -> 0.1000"),
    ],
)
def test_a_worse_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Any, named: str
) -> None:
    assert compared(tmp_path, monkeypatch, made_up(), made_up(**change)) == 1
    assert f"WORSE {named}" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{}, {"over_floor": 1.0}, {"over_floor": 2.1, "plain": 1.06, "memory": 0.019}])
def test_a_run_that_is_no_worse_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    assert compared(tmp_path, monkeypatch, made_up(), made_up(**change)) == 0


def without(part: str, **values: Any) -> runs.Run:
    """The made-up run without the rows of a part that have these values."""
    out = made_up()
    rows = out[part]["rows"]
    out[part]["rows"] = [r for r in rows if not all(r.get(k) == v for k, v in values.items())]
    assert len(out[part]["rows"]) < len(rows)
    return out


@pytest.mark.parametrize(
    ("new", "named"),
    [
        (without("unit", problem="a"), "over the floor, forward, float32, a: NEW has no such figure"),
        (without("unit", problem="a"), "extra memory over x, a: NEW has no such figure"),
        (without("unit", dtype="bfloat16"), "over the floor, both, bfloat16: NEW has none of its 1 figures"),
        (without("end_to_end", contender="steam"), "over the plain network, training: NEW has none of its 1 figures"),
        (without("host", layer="FusedSTEAM"), "host, module over x * 0.5: NEW has none of its 2 figures"),
        (without("host", layer="x * 0.5 (built in)"), "host, module over x * 0.5: NEW has none of its 2 figures"),
        (without("scaling", value=2, threads=2), "backward over the floor, threads: 2, N = 2: NEW has no such figure"),
        *(({k: v for k, v in made_up().items() if k != part}, "NEW has none") for part in made_up()),
    ],
)
def test_what_has_vanished_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], new: runs.Run, named: str
) -> None:
    assert compared(tmp_path, monkeypatch, made_up(), new) == 1
    assert any(line.startswith("WORSE ") and named in line for line in capsys.readouterr().out.splitlines())


def test_what_is_new_is_not_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(tmp_path, monkeypatch, without("unit", problem="a"), made_up()) == 0


def test_another_backend_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = made_up()
    new["unit"]["rows"][0]["backend"] = "reference"
    assert compared(tmp_path, monkeypatch, made_up(), new) == 1
    assert "WORSE unit, a, forward: ran on cpu, and in NEW on reference" in capsys.readouterr().out


def test_networks_of_older_runs_were_in_nchw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row without a layout is compared with the row that names NCHW, its backend too."""
    old, new = made_up(), made_up(plain=1.2)
    old["end_to_end"]["rows"][0]["backend"] = "cpu"
    new["end_to_end"]["rows"][0] |= {"backend": "reference", "layout": "nchw"}
    assert compared(tmp_path, monkeypatch, old, new) == 1
    printed = capsys.readouterr().out
    assert "WORSE over the plain network, training: the geometric mean is 1.143" in printed
    assert "WORSE end_to_end, n, training, eager, nchw: ran on cpu, and in NEW on reference" in printed


def test_quick_and_full_runs_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = made_up()
    new["host"]["quick"] = True
    assert compared(tmp_path, monkeypatch, made_up(), new) == 2
    assert "a quick run is not compared with a full one: host" in capsys.readouterr().err


def test_the_committed_run_is_no_worse_than_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run without a single one of its rows is worse."""
    run = runs.read(ROOT / "benchmarks" / "results" / "latest")
    assert compare.compare(run, run, 1.35, 1.1, 1.1)[1] == []
    fewer = json.loads(json.dumps(run))
    ours = next(r for r in fewer["unit"]["rows"] if r["contender"] == "fused" and r["direction"] == "backward")
    fewer["unit"]["rows"].remove(ours)
    worse = compare.compare(run, fewer, 1.35, 1.1, 1.1)[1]
    assert worse == [f"over the floor, backward, {ours['dtype']}, {ours['problem']}: NEW has no such figure"]


def test_runs_that_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = made_up(), made_up()
    assert compared(tmp_path, monkeypatch, {"unit": old["unit"]}, {"host": new["host"]}) == 2
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "missing"), str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
