"""Quick runs of the benchmarks: every part runs, judges before it times, and becomes a page. No time is judged here."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import conditions, end_to_end, gates, grid, report, runs
from benchmarks.shapes import DIRECTIONS

Python = Callable[..., str]
pytestmark = pytest.mark.xdist_group("benchmarks")


def test_every_contender_has_every_figure(run: Path) -> None:
    content = json.loads((run / "unit.json").read_text())
    assert content["quick"] is True
    assert {r["problem"] for r in content["rows"]} == {p.label for p in grid.quick_grid()}
    found = {(r["contender"], r["direction"]) for r in content["rows"]}
    assert found == {(c, d) for c in ("fused", "eager", *gates.GATES) for d in DIRECTIONS}
    for r in content["rows"]:
        assert all(r[k] > 0 for k in ("seconds", "floor_seconds", "gbytes", "over_floor", "speedup_eager"))
        assert (r["gflops"] is None) == (r["contender"] in gates.GATES)
        assert r["spread"] >= 0 and r["kept_bytes"] >= 0
        assert (r["extra_bytes"] is None) == (r["direction"] == "backward")
    parameters = {r["contender"]: r["parameters"] for r in content["rows"]}
    assert parameters["fused"] == parameters["eager"] == 64 and parameters["gct"] == 0
    kept = {r["contender"]: r["kept_bytes"] for r in content["rows"] if r["shape"] == "14"}
    assert kept["fused"] == 2 * (1024 + 49) * 4, "two float32 numbers per channel and cell"
    assert kept["eager"] > 1024 * 14 * 14 * 4


def test_prices_are_over_the_plain_network(run: Path) -> None:
    rows = json.loads((run / "end_to_end.json").read_text())["rows"]
    assert {(r["task"], r["contender"]) for r in rows} == {
        (t, c) for t in end_to_end.TASKS for c in ("plain", "steam", "se")
    }
    for r in rows:
        assert r["time_over_plain"] > 0 and r["peak_bytes"] > 0
        assert r["rounds"] >= 9, "quartiles of fewer rounds mean nothing"
        assert r["layers"] == {"plain": 0, "steam": 4, "se": 8}[r["contender"]]
        assert (r["units_over_plain"] is not None) == (r["contender"] == "steam")
        if r["contender"] == "steam":
            assert 0 < r["units_over_plain"] < 1, "the units are a part of the network"
        if r["contender"] == "plain":
            assert r["time_over_plain"] == r["memory_over_plain"] == 1


def test_latencies_have_a_95th_percentile(run: Path) -> None:
    rows = json.loads((run / "latency.json").read_text())["rows"]
    assert [(r["contender"], r["batch"], r["layout"]) for r in rows] == [(c, 1, "nchw") for c in ("plain", "steam")]
    for r in rows:
        assert r["rounds"] >= 60, "of fewer rounds, too few are above the 95th percentile"
        assert 0 < r["seconds"] < r["seconds_95"]


def test_host_and_scaling(run: Path) -> None:
    layers = [r for r in json.loads((run / "host.json").read_text())["rows"] if r["section"] == "layers"]
    names = [r["layer"] for r in layers]
    floors = ["x * 0.5 (built in)", "an autograd function of nothing"]
    assert names[:3] == [*floors, "operator, batch 0"] and "FusedSTEAM" in names
    rows = json.loads((run / "scaling.json").read_text())["rows"]
    assert {(r["axis"], r["value"]) for r in rows} == {("N", 1), ("N", 2), ("grid", 1), ("grid", 4)}
    assert all(r[f"{d}_floor"] > 0 for r in rows for d in ("forward", "backward"))


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "--cases", "3", "--seed", "2"],
        ["options", "--only", "inplace,tail"],
        ["cache", "--cache", "8"],
    ],
    ids=lambda command: command[0],
)
def test_the_other_scripts(command: list[str], tmp_path: Path, python: Python) -> None:
    """They run, and write their rows. Each row was judged before it was timed."""
    python("-m", f"benchmarks.{command[0]}", *command[1:], "--quick", "--json", str(tmp_path / "rows.json"))
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = content["rows"]
    assert rows and all(row.get("checked", True) for row in rows) and content["quick"]
    if command[0] == "options":
        assert {row["section"] for row in rows} == {"inplace", "tail"}
    if command[0] == "sweep":
        assert all(row["walk"] in ("kColumns", "kPixels", "kChannels", "kNarrow") and row["mbytes"] > 0 for row in rows)


def test_page_and_pictures(run: Path, tmp_path: Path, python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has every section and picture, and the page of another process has the same bytes."""
    written = []
    for name in ("here", "another process"):
        docs = tmp_path / name
        arguments = ["--run", str(run), "--page", str(docs / "benchmarks.md"), "--images", str(docs / "images")]
        if name == "here":
            monkeypatch.setattr(sys, "argv", ["report", *arguments])
            report.main()
        else:
            python("-m", "benchmarks.report", *arguments)
        written.append({p.name: p.read_bytes() for p in docs.rglob("*") if p.is_file()})
    assert written[0] == written[1]
    page = written[0]["benchmarks.md"].decode()
    assert "A quick run: it shows that the benchmarks run" in page
    named = set(re.findall(r"!\[[^]]*\]\(images/([^)]+)\)", page))
    assert named == {"price_of_attention.svg", "speedup.svg", "over_floor.svg", "memory.svg", "scaling.svg"}
    assert set(written[0]) == named | {"benchmarks.md"}
    for name in named:
        assert written[0][name].lstrip().startswith(b"<?xml") and len(written[0][name]) < 100_000
        assert b"<dc:date>" not in written[0][name]
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        *("The price of attention", "Latency", "Speed-ups of the fused unit", "Time over the floor", "Memory"),
        *("Host overhead", "Scaling", "Other conditions"),
    ]
    networks = json.loads((run / "end_to_end.json").read_text())["rows"]
    prices = [line for line in page.splitlines() if line.startswith(("| resnet18, training", "| resnet18, inference"))]
    assert [line.split(" | ")[-1] for line in prices] == [
        f"{r['rounds']} |" for r in networks if r["contender"] != "plain"
    ]
    rows = json.loads((run / "unit.json").read_text())["rows"]
    with (run / "unit.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    unit = runs.UnitRows(rows)
    assert f"| STEAM, plain PyTorch | **{runs.times(runs.geometric_mean(unit.speedups('eager', 'forward')))}**" in page
    assert len(unit.speedups("eager", "both")) == 2


def test_a_run_is_no_worse_than_itself(run: Path, python: Python) -> None:
    assert "nothing is worse" in python("-m", "benchmarks.compare", str(run), str(run))


def test_each_row_names_its_backend(run: Path) -> None:
    rows = json.loads((run / "unit.json").read_text())["rows"]
    assert {(r["contender"], r["backend"]) for r in rows} == {
        ("fused", "cpu"),
        *((c, None) for c in ("eager", *gates.GATES)),
    }
    networks = json.loads((run / "end_to_end.json").read_text())["rows"]
    assert {(r["contender"], r["backend"]) for r in networks} == {("plain", None), ("steam", "cpu"), ("se", None)}
    assert {r["backend"] for r in json.loads((run / "scaling.json").read_text())["rows"]} == {"cpu"}


def test_the_conditions(run: Path) -> None:
    """Every condition has its row, and its figures are over the floor of its own number of threads."""
    rows = json.loads((run / "conditions.json").read_text())["rows"]
    names = ["default", *conditions.WAYS, "denormal numbers", "denormal numbers, flushed"]
    names += [conditions.DENORMAL_FLOOR, conditions.COPY]
    assert [r["condition"] for r in rows] == names, "one thread is no condition of its own where torch has one thread"
    for r in rows:
        assert r["backend"] == "cpu" and r["forward"] > 0 and r["forward_over_floor"] > 0
        assert ("backward" in r) == (r["condition"] != conditions.COPY)


def test_the_page_compares_a_run_with_the_run_before(run: Path) -> None:
    now = runs.read(run)
    before = json.loads(json.dumps(now))
    for row in before["unit"]["rows"]:
        row["over_floor"] *= 2
    before["unit"]["machine"]["commit"] = "0ld"
    text = report.page(now, "images", before)
    assert "## What changed since 0ld" in text and "on another processor" not in text
    (mean,) = [line for line in text.splitlines() if line.startswith("| over the floor, forward, float32 |")]
    assert mean.endswith("| **0.50** |")
    row = next(r for r in now["unit"]["rows"] if (r["contender"], r["direction"]) == ("fused", "forward"))
    figures = " | ".join((runs.times(2 * row["over_floor"]), runs.times(row["over_floor"]), "0.50"))
    assert f"| {row['problem']} | {figures} |" in text
    before["unit"]["machine"]["processor"] = "another one"
    assert "**The run before was on another processor: another one.**" in report.page(now, "images", before)
    before["unit"]["quick"] = False
    for part in before.values():
        part["quick"] = False
    assert "What changed" not in report.page(now, "images", before), "a quick run is compared with a quick run alone"


def test_the_page_does_not_call_the_reference_fused(run: Path) -> None:
    parts = runs.read(run)
    page = report.page(parts, "images")
    assert "STEAM, fused" in page and "no kernel is measured" not in page
    for part in ("unit", "end_to_end", "latency"):
        for row in parts[part]["rows"]:
            row["backend"] = "reference" if row["contender"] in ("fused", "steam") else row["backend"]
    page = report.page(parts, "images")
    assert "STEAM, fused" not in page and "| map | fused (reference) |" in page
    assert "STEAM, backend reference (4)" in page and "no kernel is measured here" in page


@pytest.mark.slow
def test_a_compiled_contender(tmp_path: Path, python: Python) -> None:
    """The contender is compiled, judged and measured, and its row has the memory and the speed-up."""
    rows = tmp_path / "rows.json"
    python(
        *("-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q", "--size", "m7", "--dtype", "float32"),
        *("--layout", "nchw", "--contender", "fused,eca-compiled", "--json", str(rows)),
    )
    found = {(r["contender"], r["direction"]): r for r in json.loads(rows.read_text())["rows"]}
    assert set(found) == {(c, d) for c in ("fused", "eca-compiled") for d in DIRECTIONS}
    assert all(r["seconds"] > 0 and r["parameters"] > 0 for r in found.values())
