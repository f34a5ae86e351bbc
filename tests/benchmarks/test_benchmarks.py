"""The benchmarks run, judge before they time, and become a page; no time is judged here."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import cases

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    bars,
    bench_unit,
    compare,
    conftest,
    core,
    end_to_end,
    gates,
    memory,
    plain,
    report,
    scaling,
    sweep,
)
from steam_kernels.backends import native  # noqa: E402

pytestmark = pytest.mark.xdist_group("benchmarks")

QUICK = {
    "unit": [
        *("-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q"),
        *("--contender", "fused,eager,se,eca,cbam,gct"),
    ],
    "end_to_end": ["-m", "benchmarks.end_to_end", "--quick", "--contender", "steam,se"],
    "host": ["-m", "benchmarks.host", "--quick"],
    "scaling": ["-m", "benchmarks.scaling", "--quick", "--axis", "N,grid", "--threads", "1"],
}


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not a worker of pytest-xdist
    env = alone | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env)


def python(*arguments: str) -> str:
    done = run_python(*arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of every part, as ``make bench`` makes one."""
    folder = tmp_path_factory.mktemp("run")
    for name, command in QUICK.items():
        python(*command, "--json", str(folder / f"{name}.json"))
    return folder


# ---- a quick run -----------------------------------------------------------------------------------------------------


def test_every_contender_has_every_figure(run: Path) -> None:
    content = json.loads((run / "unit.json").read_text())
    assert content["quick"] is True
    assert {r["problem"] for r in content["rows"]} == {p.label for p in conftest.quick_grid()}
    found = {(r["contender"], r["direction"]) for r in content["rows"]}
    assert found == {(c, d) for c in ("fused", "eager", *gates.GATES) for d in core.DIRECTIONS}
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
        assert r["rounds"] >= 9, "quartiles of fewer say nothing"
        assert r["layers"] == {"plain": 0, "steam": 4, "se": 8}[r["contender"]]
        if r["contender"] == "plain":
            assert r["time_over_plain"] == r["memory_over_plain"] == 1


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
        ["bars", "--runs", "1", "--no-compiled", "--rows", "kernel"],
        ["sweep", "--cases", "3", "--seed", "2"],
        ["options", "--only", "inplace"],
        ["cache", "--cache", "8"],
    ],
    ids=lambda command: command[0],
)
def test_the_other_scripts(command: list[str], tmp_path: Path) -> None:
    """They run, and write their rows, each of which was judged before it was timed."""
    python("-m", f"benchmarks.{command[0]}", *command[1:], "--quick", "--json", str(tmp_path / "rows.json"))
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = content["rows"]
    assert rows and all(row.get("checked", True) for row in rows) and content["quick"]
    if command[0] == "sweep":
        assert all(row["walk"] in ("kColumns", "kPixels", "kChannels", "kNarrow") and row["mbytes"] > 0 for row in rows)


def test_page_and_pictures(run: Path, tmp_path: Path) -> None:
    """Every section, every picture that the page names, and the same bytes the second time."""
    written = []
    for name in ("first", "second"):
        docs = tmp_path / name
        python(
            *("-m", "benchmarks.report", "--run", str(run), "--page", str(docs / "benchmarks.md")),
            *("--images", str(docs / "images")),
        )
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
        *("The price of attention", "Speed-ups of the fused unit", "Time over the floor", "Memory"),
        *("Host overhead", "Scaling"),
    ]
    networks = json.loads((run / "end_to_end.json").read_text())["rows"]
    prices = [line for line in page.splitlines() if line.startswith("| resnet18, ")]
    assert [line.split(" | ")[-1] for line in prices] == [
        f"{r['rounds']} |" for r in networks if r["contender"] != "plain"
    ]
    rows = json.loads((run / "unit.json").read_text())["rows"]
    with (run / "unit.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    unit = report.Unit(rows)
    assert (
        f"| STEAM, plain PyTorch | **{report._times(report.geometric_mean(unit.speedups('eager', 'forward')))}**"
        in page
    )
    assert len(unit.speedups("eager", "both")) == 2


def test_a_run_is_no_worse_than_itself(run: Path) -> None:
    assert "nothing is worse" in python("-m", "benchmarks.compare", str(run), str(run))


def facts(**changed: str) -> dict[str, Any]:
    return {"processor": "a", "threads": 2, "commit": "1234567", "date": "2027-01-02T03:04:05"} | changed


def header(**machines: dict[str, Any]) -> str:
    return "\n".join(report._header({part: {"machine": m, "rows": []} for part, m in machines.items()}))


def test_parts_of_one_run_have_one_header() -> None:
    text = header(unit=facts(), host=facts(date="2027-01-02T03:05:00"))
    assert "differ" not in text and "in no commit" not in text
    assert "| commit | 1234567 |" in text and "| threads | 2 |" in text
    assert "| date | 2027-01-02T03:04:05 to 2027-01-02T03:05:00 |" in text
    assert "| date | 2027-01-02T03:04:05 |" in header(unit=facts())


@pytest.mark.parametrize("fact", ["processor", "commit"])
def test_parts_of_two_runs_are_named(fact: str) -> None:
    """Also where the first part is not the one that differs."""
    text = header(unit=facts(), host=facts(), scaling=facts(**{fact: "other"}))
    assert f"**Not one run: its parts differ in {fact}.**" in text
    assert f"| {fact} | unit: {facts()[fact]}; host: {facts()[fact]}; scaling: other |" in text
    older = {k: v for k, v in facts().items() if k != fact}
    assert f"host: not recorded; scaling: {facts()[fact]} |" in header(host=older, scaling=facts())


def test_a_dirty_tree_is_named(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        names = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert core.commit_of(tmp_path) == ""
    git("init", "-q")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tmp_path / "setup.py", results / "unit.json", tmp_path / "README.md"):
        path.write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = core.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (results / "unit.json").write_text("2")  # a run writes it while it is measured
    (tmp_path / "README.md").write_text("2")
    assert core.commit_of(tmp_path) == clean
    (tmp_path / "setup.py").write_text("2")
    assert core.commit_of(tmp_path) == f"{clean}-dirty"
    git("commit", "-qam", "second")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new.h").write_text("1")  # not added, and compiled all the same
    assert core.commit_of(tmp_path).endswith("-dirty")
    assert "**Measured with changes that are in no commit.**" in header(unit=facts(), host=facts(commit="1-dirty"))


@pytest.mark.slow
def test_a_compiled_contender(tmp_path: Path) -> None:
    """It is compiled, judged, measured, and its memory and speed-up are beside the fused unit's."""
    rows = tmp_path / "rows.json"
    python(
        *("-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q", "--size", "m7", "--dtype", "float32"),
        *("--layout", "nchw", "--contender", "fused,eca-compiled", "--json", str(rows)),
    )
    found = {(r["contender"], r["direction"]): r for r in json.loads(rows.read_text())["rows"]}
    assert set(found) == {(c, d) for c in ("fused", "eca-compiled") for d in core.DIRECTIONS}
    assert all(r["seconds"] > 0 and r["parameters"] > 0 for r in found.values())


# ---- the committed page ----------------------------------------------------------------------------------------------

LATEST = ROOT / "benchmarks" / "results" / "latest"


def test_the_committed_page_is_of_the_committed_run(tmp_path: Path) -> None:
    """Page and table byte for byte; pictures to a hundredth of a point where this matplotlib drew them, else what is
    written in them."""
    run = report.read(LATEST)
    assert report.page(run, "images") == (ROOT / "docs" / "benchmarks.md").read_text()
    report.write_csv(run["unit"]["rows"], tmp_path / "unit.csv")
    assert (tmp_path / "unit.csv").read_bytes() == (LATEST / "unit.csv").read_bytes()
    for path in report.draw(run, tmp_path):
        made, kept = path.read_text(), (ROOT / "docs" / "images" / path.name).read_text()
        drawn_by = [re.findall(r"<dc:title>(Matplotlib [^,<]*)", text) for text in (made, kept)]
        assert drawn_by[1], f"{path.name} does not say which matplotlib drew it"
        if drawn_by[0] == drawn_by[1]:
            # names are hashes of coordinates, whose last digits are the processor's
            named = [re.sub(r'(id="|url\(#|href="#)[^")]*', "", text) for text in (made, kept)]
            places = [[float(n) for n in re.findall(r"-?\d+\.?\d*", text)] for text in named]
            assert len(places[0]) == len(places[1]) and np.allclose(*places, rtol=0, atol=0.01), path.name
        words = [sorted(re.findall(r"<text [^>]*>([^<]*)</text>", text)) for text in (made, kept)]
        assert words[0] == words[1] and words[0], path.name


def test_the_bars_of_the_performance_page_are_of_the_committed_runs() -> None:
    runs = [ROOT / "benchmarks" / "results" / variant / "bars.json" for variant in ("avx512", "avx2")]
    table = bars.markdown([json.loads(path.read_text()) for path in runs])
    text = (ROOT / "docs" / "performance.md").read_text()
    assert f"<!-- bars -->\n{table}<!-- /bars -->\n" in text
    (shown,) = [t for t in tables_of(text) if t[0][:2] == ["map", "bar"]]
    assert len(shown) == 1 + len(list(bars.bars())) and all(all(row[:3]) and row[4] for row in shown)


def tables_of(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text, head first, as rows of cells."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if set("".join(cells)) - set("-: "):
                tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def agree(cell: str, printed: list[str], what: str) -> None:
    """Each number of a cell is the page's, rounded to as many digits as are written."""
    written = re.findall(r"[-+]?\d+(?:\.\d+)?", cell.replace("−", "-"))
    assert len(written) == len(printed), f"{what}: {cell!r} for {printed}"
    for text, number in zip(written, printed, strict=True):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - float(number)) <= half + 1e-9, f"{what}: {text} is written, the page has {number}"


README_NAMES = {
    "STEAM in plain PyTorch (the reference)": "eager",
    "STEAM in the fastest plain PyTorch we could write": "plain",
    "SE (timm)": "se",
    "ECA (timm)": "eca",
    "CBAM (timm)": "cbam",
    "Gaussian GCT": "gct",
}
UNDER = " under `torch.compile`"


def test_the_contenders_of_the_readme_are_of_the_committed_run() -> None:
    unit = report.Unit(report.read(LATEST)["unit"]["rows"])
    (table,) = [t for t in tables_of((ROOT / "README.md").read_text()) if t[0][0] == "contender"]
    assert table[0] == ["contender", *report.DIRECTIONS.values()] and len(table) > 5
    last = ""
    for name, *cells in table[1:]:
        compiled = name.endswith(UNDER)
        name = name.removesuffix(UNDER)
        last = last if name == "the same" else README_NAMES[name]
        contender = last if not compiled else "compiled" if last == "eager" else f"{last}-compiled"
        for cell, direction in zip(cells, report.DIRECTIONS, strict=True):
            found = unit.speedups(contender, direction)
            values = (report.geometric_mean(found), min(found), max(found))
            agree(cell, [report._times(v) for v in values], f"{contender}, {direction}")


def test_the_prices_of_the_readme_are_of_the_committed_run() -> None:
    tables = report._tables(report.read(LATEST)["end_to_end"]["rows"])
    (table,) = [t for t in tables_of((ROOT / "README.md").read_text()) if t[0][0] == "network"]
    names = {report.NAMES[c]: c for c in end_to_end.CONTENDERS if c != "plain"}
    columns = [names[name] for name in table[0][1:]]
    assert {"steam", "steam-reference", "se", "eca"} == set(columns) and len(table) > 3
    networks = {"ResNet-50": "resnet50", "MobileNetV2": "mobilenet_v2"}
    own: dict[str, Any] = {}
    for name, *cells in table[1:]:
        memory_of = "memory" in name
        if not memory_of:
            network, _, task = name.partition(", ")
            mode = "compiled" if "compiled" in task else "eager"
            own = tables[networks[network], "training" if "training" in task else "inference", mode]
        for contender, cell in zip(columns, cells, strict=True):
            if cell in ("", "–", "-") and contender not in own:
                continue
            row = own[contender]
            ratios = (
                [row["memory_over_plain"]] if memory_of else [row["time_over_plain"], *row["time_over_plain_quartiles"]]
            )
            agree(cell, [report._percent(r).removesuffix(" %") for r in ratios], f"{name}, {contender}")


def test_a_wrong_figure_of_the_readme_is_seen() -> None:
    agree("26.7 (3.9 to 75)", ["26.7", "3.91", "75.0"], "right")
    agree("3 (−2 to 6)", ["+3.0", "-1.9", "+6.0"], "right")
    for cell in ("26.8 (3.9 to 75)", "26.7 (3.9 to 76)", "26.7 (3.9)"):
        with pytest.raises(AssertionError, match="wrong"):
            agree(cell, ["26.7", "3.91", "75.0"], "wrong")


# ---- make bench ------------------------------------------------------------------------------------------------------

RECORDER = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in *"$FAILS"*) exit 3 ;; esac
"""
PLACES = ("benchmarks/results/latest", "docs/benchmarks.md", "docs/images")
QUICK_PLACES = ("build/bench/results", "build/bench/benchmarks.md", "build/bench/images")


def make_bench(tmp_path: Path, *variables: str, fails: str = "nothing") -> tuple[int, list[str], str]:
    """``make bench`` in a folder of its own, by an interpreter that only notes what it is to run: make's exit status,
    the commands, what was printed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    recorder, calls = tmp_path / "recorder", tmp_path / "calls"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    calls.write_text("")
    done = subprocess.run(
        ["make", "-o", "venv", "bench", f"PY={recorder}", *variables],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"CALLS": str(calls), "FAILS": fails},
    )
    return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "places"),
    [
        ((), PLACES),
        (("BENCH_FLAGS=--quick --contender fused",), QUICK_PLACES),
        (("BENCH_FLAGS=--quick", "RUN=r", "PAGE=p.md", "IMAGES=i"), ("r", "p.md", "i")),
    ],
)
def test_make_bench_runs_every_part(tmp_path: Path, flags: tuple[str, ...], places: tuple[str, str, str]) -> None:
    """And a quick run leaves the committed run, page and pictures alone."""
    status, calls, printed = make_bench(tmp_path, *flags)
    assert status == 0, printed
    run, page, images = places
    given = flags[0].partition("=")[2].split() if flags else []
    quick = [flag for flag in given if flag == "--quick"]
    expected = [["-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--json", f"{run}/unit.json", *given]]
    parts = ("end_to_end", "host", "scaling")
    expected += [["-m", f"benchmarks.{part}", "--json", f"{run}/{part}.json", *quick] for part in parts]
    expected += [["-m", "benchmarks.report", "--run", run, "--page", page, "--images", images]]
    assert [call.split() for call in calls] == expected
    assert (tmp_path / run).is_dir()


@pytest.mark.parametrize(("fails", "named"), [("-m pytest", "unit"), ("benchmarks.host", "host"), ("report", "report")])
def test_make_bench_goes_on_and_fails_at_its_end(tmp_path: Path, fails: str, named: str) -> None:
    status, calls, printed = make_bench(tmp_path, fails=fails)
    assert status != 0 and f"failed: {named}\n" in printed and len(calls) == 5


# ---- comparing -------------------------------------------------------------------------------------------------------


def made_up(
    over_floor: float = 2.0,
    plain: float = 1.05,
    host: float = 9.0,
    memory: float = 0.01,
    bfloat16: float = 1.5,
    threads: float = 1.5,
) -> report.Run:
    """A run of two shapes in two dtypes, one network, one layer and one point of scaling."""
    unit = []
    for problem, dtype in (("a", "float32"), ("b", "float32"), ("c", "bfloat16")):
        for direction in core.DIRECTIONS:
            row = {"problem": problem, "dtype": dtype, "contender": "fused", "direction": direction, "backend": "cpu"}
            row |= {"over_floor": over_floor if dtype == "float32" else bfloat16}
            unit.append(row | {"map_bytes": 1000, "extra_bytes": 1000 * memory if direction == "both" else None})
    unit[5]["over_floor"] = 2.0  # one of them never changes
    net = {"network": "n", "mode": "eager", "task": "training", "batch": 1, "size": 8, "contender": "steam"}
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
    rows = {"unit": unit, "end_to_end": [net | {"time_over_plain": plain}], "host": layers, "scaling": scaled}
    return {name: {"rows": r, "machine": {}} for name, r in rows.items()}


def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: report.Run, new: report.Run) -> int:
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


def without(part: str, **values: Any) -> report.Run:
    """The made-up run less the rows of a part that have these values."""
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], new: report.Run, named: str
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


def test_quick_and_full_runs_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = made_up()
    new["host"]["quick"] = True
    assert compared(tmp_path, monkeypatch, made_up(), new) == 2
    assert "a quick run is not compared with a full one: host" in capsys.readouterr().err


def test_the_committed_run_is_no_worse_than_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is worse without a single row of it."""
    run = report.read(ROOT / "benchmarks" / "results" / "latest")
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


# ---- what is measured ------------------------------------------------------------------------------------------------


class Config:
    """Command-line options, as pytest would hold them."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def getoption(self, option: str) -> Any:
        default: dict[str, Any] = {"--device": "cpu", "--quick": False, "--full": False}
        return self.given.get(option[2:], default.get(option, ""))


def test_default_grid() -> None:
    """Everything that is promised is in it, and the compiled contenders are at few shapes only."""
    grid = conftest.problems(Config())  # type: ignore[arg-type]
    assert len(set(grid)) == len(grid)
    assert {p.name for p in grid} == set(core.SHAPES) and {p.n for p in grid} == {1, 2, 8, 32}
    assert {(p.dtype, p.layout) for p in grid} == {(d, o) for d in ("float32", "bfloat16") for o in core.LAYOUTS}
    assert set(conftest.COMPILED_AT) < set(grid)
    for p in grid:
        names = set(conftest.contenders_at(Config(), p))  # type: ignore[arg-type]
        assert {"fused", "eager", *gates.GATES} <= names
        assert (set(conftest.COMPILED) <= names) == (p in conftest.COMPILED_AT)
        assert p in conftest.COMPILED_AT or not names & set(conftest.COMPILED)
    full = conftest.problems(Config(full=True))  # type: ignore[arg-type]
    assert len(full) == 4 * (3 * 8 + 1)
    assert set(conftest.COMPILED) <= set(conftest.contenders_at(Config(full=True), full[0]))  # type: ignore[arg-type]
    chosen = conftest.problems(Config(size="m14", batch="4", dtype="float32", layout="nchw"))  # type: ignore[arg-type]
    assert chosen == [core.Problem(4, 96, 14, 14)]
    assert len(conftest.problems(Config(quick=True))) == 2  # type: ignore[arg-type]
    with pytest.raises(pytest.UsageError, match=r"--size 'm5': allowed are 56, 28"):
        conftest.problems(Config(size="m5"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("bfloat16", 1.5)])
def test_no_time_without_a_check(monkeypatch: pytest.MonkeyPatch, dtype: str, factor: float) -> None:
    """Gates that are off get a reason and no time, the right one beside them a time; bfloat16's bound is wider."""

    class Off(core.Gate):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * factor

    for name in ("se", "eca", "cbam"):
        monkeypatch.setitem(core.CONTENDERS, name, lambda p, name=name: Off(name, p))
    row = bench_unit.measure(core.Problem(2, 16, 9, 9, dtype), ["fused", *gates.GATES], core.Effort.quick())
    assert set(row.wrong) == {"se", "eca", "cbam"}
    assert all("error" in why and "bound" in why for why in row.wrong.values())
    timed = {block.split()[0] for block in row.measured.samples}
    assert timed == {"fused", "gct", "floor-forward", "floor-backward"}


PLANTED = """
from benchmarks import core

def check(self):
    raise RuntimeError("planted")

core.Steady.check = check
"""


def test_a_spoilt_measurement_is_made_once(tmp_path: Path) -> None:
    """What was compiled while it was measured has no time, and all tests of the shape fail without measuring again."""
    (tmp_path / "planted.py").write_text(PLANTED)
    rows = tmp_path / "rows.json"
    done = run_python(
        *("-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "planted", "--quick", "--size", "m7"),
        *("--dtype", "float32", "--layout", "nchw", "--contender", "fused,gct", "--json", str(rows)),
        PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))),
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("measuring 1x320x7x7-float32-nchw") == 1
    assert "6 failed" in done.stdout and done.stdout.count("AssertionError: RuntimeError: planted") >= 6
    assert not rows.exists(), "there is no time to be kept"


def test_backend_of_the_fused_contender() -> None:
    """``--backend`` reaches the unit: a backend that cannot run is an error, not another's time."""
    row = bench_unit.measure(core.Problem(1, 8, 7, 7), ["fused"], core.Effort.quick(), "reference")
    assert not row.wrong
    assert {line["backend"] for line in row.lines()} == {"reference"}
    assert row.memory["fused"]["kept_bytes"] > 8 * 7 * 7 * 4, "plain PyTorch keeps maps"
    if not torch.cuda.is_available():
        row = bench_unit.measure(core.Problem(1, 8, 7, 7), ["fused"], core.Effort.quick(), "cuda")
        assert "cuda" in row.wrong["fused"] and not row.measured.samples.get("fused forward")


def test_without_kernels_nothing_is_called_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a row nor a network, though both would have run, on the reference."""
    monkeypatch.setattr(native, "CPU", replace(native.CPU, reason="not built"))
    row = bench_unit.measure(core.Problem(1, 8, 7, 7), ["fused", "gct"], core.Effort.quick())
    assert set(row.wrong) == {"fused"} and "cpu: not built" in row.wrong["fused"]
    assert {line["contender"] for line in row.lines()} == {"gct"}
    judge = end_to_end.Judge("resnet18", torch.zeros(1))
    monkeypatch.setattr(end_to_end, "results", lambda model, images: called(model))
    with pytest.raises(RuntimeError, match="no kernel ran"):
        judge.check("steam")
    judge.check("steam-reference")
    assert judge.backends == {"steam-reference": "reference"}


def called(model: nn.Module) -> dict[str, torch.Tensor]:
    """Runs one unit of a network."""
    unit = next(m for m in model.modules() if isinstance(m, end_to_end.FusedSTEAM))
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    return {"y": unit(torch.zeros(1, unit.channels, 7, 7, dtype=dtype)).detach() + 1}


def test_each_row_names_its_backend(run: Path) -> None:
    rows = json.loads((run / "unit.json").read_text())["rows"]
    assert {(r["contender"], r["backend"]) for r in rows} == {
        ("fused", "cpu"),
        *((c, None) for c in ("eager", *gates.GATES)),
    }
    networks = json.loads((run / "end_to_end.json").read_text())["rows"]
    assert {(r["contender"], r["backend"]) for r in networks} == {("plain", None), ("steam", "cpu"), ("se", None)}
    assert {r["backend"] for r in json.loads((run / "scaling.json").read_text())["rows"]} == {"cpu"}


def test_the_page_does_not_call_the_reference_fused(run: Path) -> None:
    parts = report.read(run)
    page = report.page(parts, "images")
    assert "STEAM, fused" in page and "no kernel is measured" not in page
    for part in ("unit", "end_to_end"):
        for row in parts[part]["rows"]:
            row["backend"] = "reference" if row["contender"] in ("fused", "steam") else row["backend"]
    page = report.page(parts, "images")
    assert "STEAM, fused" not in page and "| map | fused (reference) |" in page
    assert "STEAM, backend reference (4)" in page and "no kernel is measured here" in page


SERVED = cases.FACTORS | {
    "where": tuple(s for s in cases.SPACES if s[0][0] * s[0][1] <= 900 and not isinstance(s[1], str)),
    "channels": (1, 2, 3, 8, 17, 64),
    "layout": ("nchw", "nhwc"),
    "dtype": (torch.float64, torch.float32),
    "scale": (1.0,),
    "tail": ("none", "relu", "residual", "residual_relu"),
    "dy_layout": ("same",),
}


def test_the_honest_baseline_is_the_unit() -> None:
    """Output and gradients, over every pair of values of the options that it serves, by the tests' rule."""
    chosen = cases.all_pairs(SERVED)
    assert len(chosen) > 40
    for case in chosen:
        inputs, dy = cases.make(case)
        options = case.options | {"grid_size": case.resolved_grid}
        assert options.pop("scale") == 1
        cases.bounds_of(case, inputs, dy).check(cases.forward_backward(plain.steam, inputs, dy, **options), case.id)


def test_a_wrong_baseline_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule above is narrow enough to see one neighbour too few."""
    case = cases.Case(dtype=torch.float64)
    inputs, dy = cases.make(case)
    options = case.options | {"grid_size": case.resolved_grid, "self_loops": False}
    del options["scale"]
    with pytest.raises(AssertionError, match=r"y .*error"):
        cases.bounds_of(case, inputs, dy).check(cases.forward_backward(plain.steam, inputs, dy, **options), case.id)


def test_gaussian_gct_is_its_formula() -> None:
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    pooled = x.numpy().mean((2, 3))
    normal = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-5)
    expected = x.numpy() * np.exp(-2 * normal**2)[:, :, None, None]
    np.testing.assert_allclose(gates.GaussianGCT(6)(x).numpy(), expected, rtol=1e-13)


def test_memory_is_counted() -> None:
    x = torch.zeros(1024)

    def call() -> torch.Tensor:
        held = x.neg()
        return held.neg()[:512]

    result, taken = memory.traced(call)
    assert taken == memory.Memory(kept=4096, peak=8192)
    assert result.shape == (512,)


def test_spread() -> None:
    measured = core.Measured({"b": [{"forward": float(v)} for v in (1, 2, 3, 4, 5)]})
    assert measured.spread("b", "forward") == pytest.approx(2 / 3)


# ---- whole networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "blocks"), [("resnet18", 8), ("resnet50", 16), ("mobilenet_v2", 17)])
def test_gates_go_into_every_block(network: str, blocks: int) -> None:
    import torchvision.models

    with torch.device("meta"):
        model = getattr(torchvision.models, network)(weights=None)
        assert gates.insert_gate(model, "eca") == blocks == end_to_end.attention_layers(model)


def test_gates_come_before_the_addition() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    gates.insert_gate(model, "gct")
    block = model.layer1[0]
    block.bn2.attention.forward = torch.zeros_like  # type: ignore[assignment]
    x = torch.randn(1, 64, 5, 5)
    assert torch.equal(block(x), x.relu())
    with pytest.raises(TypeError, match="Linear"):
        gates.insert_gate(nn.Linear(2, 2), "se")


def test_a_wrong_point_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(problem: core.Problem, check: bool, effort: core.Effort) -> dict[str, Any]:
        if problem.n == 2:
            raise AssertionError("the second is wrong")
        return {"forward": problem.n}

    monkeypatch.setattr(scaling, "measure", measure)
    before = torch.get_num_threads()
    rows, wrong = scaling.run(["N"], [1], core.Effort.quick(), quick=False)
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
    """And keeps every row, worst first."""
    rows = iter([swept("first", 5, 1.5), swept("last", mbytes, worst)])
    monkeypatch.setattr(sweep, "measure", lambda *_: next(rows))
    monkeypatch.setattr(core, "restart_with_malloc", lambda: None)
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
    """As ``make_plan`` of the CPU kernels chooses it, with its constants."""
    problem = core.Problem(2, 17, 20, 20)
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
        assert sweep.walk(replace(problem, **changed), "avx512") == expected
    assert sweep.walk(replace(problem, layout="channels_last", c=15), "avx2") == "kChannels"
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
    facts = sweep.facts_of(replace(problem, layout="channels_last"), "avx512")
    assert facts["walk"] == "kChannels" and facts["grid"] == [7, 7] and facts["mbytes"] == 2 * 17 * 400 * 4 / 1e6
    assert facts["sample_kbytes"] == 17 * 400 * 4 / 1e3 and (facts["n"], facts["c"], facts["h"]) == (2, 17, 20)


def test_bars_say_which_share_meets_each() -> None:
    row = {"forward_bar": 1.1, "backward_bar": 1.2, "kernel": False, "missed": []}
    rows = [
        row | {"forward_over_floor": 1.0, "backward_over_floor": 1.1, "speedup_forward": 1.9, "speedup_both": 2.0},
        row | {"forward_over_floor": 1.2, "backward_over_floor": 1.2, "speedup_forward": 1.8, "missed": ["forward"]},
        row | {"kernel": True, "forward_kernel_us": 1.0, "backward_kernel_us": 3.0, "missed": ["backward"]},
    ]
    assert bars.shares(rows) == [
        "forward, over the floor: 1 of 2 rows (50 %)",
        "forward, kernel alone: 1 of 1 rows (100 %)",
        "backward, over the floor: 2 of 2 rows (100 %)",
        "backward, kernel alone: 0 of 1 rows (0 %)",
        "forward, 1.8 times as fast as the compiled baseline: 2 of 2 rows (100 %)",
        "forward + backward, 3 times as fast as the compiled baseline: 0 of 1 rows (0 %)",
        "all of these: 1 of 3 rows (33 %)",
    ]


def test_networks_of_all_contenders_have_the_same_convolutions() -> None:
    plain, gated, steam = (end_to_end.make("resnet18", c).state_dict() for c in ("plain", "se", "steam"))
    convolutions = {k: v for k, v in plain.items() if v.ndim == 4}
    assert len(convolutions) == 20  # 16 in the blocks, the first, and three on the shortcuts
    assert all(torch.equal(v, gated[k]) and torch.equal(v, steam[k]) for k, v in convolutions.items())


def test_a_wrong_network_has_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    judge = end_to_end.Judge("resnet18", images)
    judge.check("steam")
    right = end_to_end.make

    def wrong(network: str, contender: str, seed: int = 0) -> nn.Module:
        model = right(network, contender, seed)
        for unit in (m for m in model.modules() if contender == "steam" and isinstance(m, end_to_end.FusedSTEAM)):
            unit.scale = 1.001
        return model

    monkeypatch.setattr(end_to_end, "make", wrong)
    with pytest.raises(AssertionError, match=r"resnet18 steam: .* is off by"):
        judge.check("steam")


def test_compiled_contenders_are_not_each_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchDynamo must not take the graph of one network for another's: what is measured is what it is called, and the
    check sees it where it is not."""
    from torchvision.models.resnet import BasicBlock, ResNet

    def make(network: str, contender: str, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
            return model if contender == "plain" else end_to_end.insert_steam(model)

    compile_ = torch.compile
    monkeypatch.setattr(end_to_end, "make", make)
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager", **options))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    judge = end_to_end.Judge("resnet", images)
    judge.bounds = {c: {"inference": 1e-5} for c in ("plain", "steam")}
    rows = end_to_end.measure(judge, "inference", "compiled", ["plain", "steam"], images, 0.0)
    assert [r["layers"] for r in rows] == [0, 4]
    assert [r["rounds"] for r in rows] == [9, 9], "no time to measure for is no reason for fewer"
    torch._dynamo.reset()
    with pytest.raises(AssertionError, match="steam, compiled: inference is off by"):
        judge.check_compiled("steam", "inference", make("", "plain"), images)


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any, part: str) -> Any:
    """A picture of the committed run, as a figure."""
    from benchmarks import plots

    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    rows = report.read(ROOT / "benchmarks" / "results" / "latest")[part]["rows"]
    draw(report.Unit(rows) if part == "unit" else rows, Path("unused.svg"))
    (figure,) = figures
    figure.canvas.draw()
    return figure


PICTURES = [
    (report.draw_speedup, "unit"),
    (report.draw_over_floor, "unit"),
    (report.draw_memory, "unit"),
    (report.draw_price, "end_to_end"),
]


@pytest.mark.parametrize(("draw", "part"), PICTURES, ids=lambda value: getattr(value, "__name__", None))
def test_pictures_can_be_read(monkeypatch: pytest.MonkeyPatch, draw: Any, part: str) -> None:
    """No tick's label is printed over another, and the legend has proper names."""
    figure = drawn(monkeypatch, draw, part)
    for axis in figure.axes:
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [t.get_window_extent() for t in ticks if t.get_text() and t.get_visible()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) > 1 and set(names) <= set(report.NAMES.values())
    extents = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert min(e.x0 for e in extents) >= 0 and max(e.x1 for e in extents) <= figure.get_window_extent().width


@pytest.mark.parametrize("draw", [report.draw_speedup, report.draw_over_floor])
def test_pictures_of_factors_show_every_contender(monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    figure = drawn(monkeypatch, draw, "unit")
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    peers = {report.NAMES[c] for c in core.CONTENDERS if c not in core.OURS}
    assert names - {"STEAM, fused"} == peers
    for axis in figure.axes:
        low, high = axis.get_ylim()
        ticks = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]
        assert {"1", "2", "5", "10", "20", "50"} <= set(ticks)
        for bar in axis.patches:  # up from 1, or down: which is quicker is seen at once
            assert 1 in (pytest.approx(bar.get_y()), pytest.approx(bar.get_y() + bar.get_height()))


def test_no_price_is_a_printed_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, report.draw_price, "end_to_end")
    rows = report.read(ROOT / "benchmarks" / "results" / "latest")["end_to_end"]["rows"]
    for axis, key in zip(figure.axes, ("time_over_plain", "memory_over_plain"), strict=True):
        none = sum(report._percent(r[key]) in ("+0.0 %", "-0.0 %") for r in rows if r["contender"] != "plain")
        assert sum(text.get_text() == "0" for text in axis.texts) == none


def test_every_contender_has_a_name() -> None:
    assert {*core.CONTENDERS, *end_to_end.CONTENDERS} - {"plain"} <= set(report.NAMES)


def test_page_has_mobile_and_detection_names() -> None:
    """Each shape of the table has its name on the page, and a picture takes rows of one dtype and layout only."""
    assert set(report.SHAPE_NAMES) == set(core.SHAPES)
    for name, text in report.SHAPE_NAMES.items():
        assert text == "×".join(map(str, core.SHAPES[name]))
    problem = core.Problem(8, *core.SHAPES["m14"])
    rows = [
        {"problem": p.label, "contender": "fused", "direction": "both", "shape": p.name}
        | {"batch": p.n, "dtype": p.dtype, "layout": p.layout}
        for p in (problem, replace(problem, layout="channels_last"), replace(problem, n=1))
    ]
    assert [r["problem"] for r in report.Unit(rows).shown()] == [problem.label]
