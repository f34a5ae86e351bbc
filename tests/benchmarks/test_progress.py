"""Progress lines: the first line comes before the work, lines count up to the total, and the time left is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_unit, contenders, end_to_end, grid
from benchmarks.machine import ROOT
from benchmarks.progress import PAUSE, Progress, about
from benchmarks.shapes import DIRECTIONS, Shape
from benchmarks.tables import WIDTH
from benchmarks.timing import Effort
from tests.benchmarks.conftest import QUICK

pytestmark = pytest.mark.xdist_group("benchmarks")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A progress with a clock of its own, and the lines that it has written."""

    def __init__(self, *kinds: str) -> None:
        self.lines: list[str] = []
        self.clock = Clock()
        self.progress = Progress(kinds, self.lines.append, self.clock)

    def row(self, kind: str, seconds: float) -> None:
        with self.progress.row(f"a row of {kind}", kind):
            self.clock.now += seconds


def test_lines_count_up_to_the_total() -> None:
    run = Run("a", "b", "a")
    for kind in ("a", "a", "b"):
        run.row(kind, 60)
    assert run.lines == [
        "[1/3] a row of a",
        "[2/3] a row of a; about 2 min left",
        "[3/3] a row of b; about 1 min left",
    ]


def test_the_time_left_is_of_measured_rows() -> None:
    """The median of each kind counts its rows. Neither finished, failed nor skipped rows are counted or measured."""
    run = Run(*"aaaaaa", "slow", "slow")
    assert run.progress.seconds_left() is None, "nothing is measured"
    run.progress.skip("a", 1)
    assert run.progress.seconds_left() is None, "a skipped row has no duration"
    with pytest.raises(RuntimeError, match="failed"), run.progress.row("fails", "a"):
        run.clock.now += 1e6
        raise RuntimeError("failed")
    assert run.progress.seconds_left() is None, "a failed row has no duration"
    for seconds in (1.0, 5.0, 3.0):
        run.row("a", seconds)
    assert run.progress.seconds_left() == 3 * 3.0, "one row of a is left, and two of a kind without a measured row"
    run.row("slow", 100)
    assert run.progress.seconds_left() == 3.0 + 100
    run.row("a", 3)
    run.row("slow", 300)
    assert run.progress.seconds_left() == 0
    assert [line.split()[0] for line in run.lines] == [f"[{i}/8]" for i in range(2, 9)]
    assert ["left" in line for line in run.lines] == [False, False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "10 s"), (44, "40 s"), (56, "1 min"), (89, "1 min"), (91, "2 min"), (720, "12 min"), (3570, "1 h"),
     (3600, "1 h"), (6000, "1 h 40 min"), (7190, "2 h")],
)  # fmt: skip
def test_durations_in_words(seconds: float, text: str) -> None:
    assert about(seconds) == f"about {text}"


def test_short_steps_have_no_line_soon_after_another() -> None:
    run = Run("a")
    with run.progress.row("first", "a"):
        run.progress.step("short")
        run.progress.step("long", long=True)
        run.clock.now += PAUSE - 1
        run.progress.step("short again")
        run.clock.now += 1
        run.progress.step("at last")
    assert run.lines == ["[1/1] first", "  long", "  at last"]


TORCH = """
import os

with open(os.environ["PRINTED"]) as printed, open(os.environ["SEEN"], "w") as seen:
    seen.write(printed.read())
os._exit(7)
"""
BENCHMARKS = ["-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
FIRST_LINES = {
    "unit": (BENCHMARKS, "benchmarks: loads PyTorch and finds the shapes"),
    "end_to_end": (["-m", "benchmarks.end_to_end"], "end_to_end: loads PyTorch and torchvision"),
    "latency": (["-m", "benchmarks.latency"], "latency: loads PyTorch and torchvision"),
    "host": (["-m", "benchmarks.host"], "host: loads PyTorch"),
    "scaling": (["-m", "benchmarks.scaling"], "scaling: loads PyTorch"),
    "conditions": (["-m", "benchmarks.conditions"], "conditions: loads PyTorch"),
    "stages": (["-m", "benchmarks.stages"], "stages: loads PyTorch"),
    "sweep": (["-m", "benchmarks.sweep"], "sweep: loads PyTorch"),
    "options": (["-m", "benchmarks.options"], "options: loads PyTorch"),
    "cache": (["-m", "benchmarks.cache"], "cache: loads PyTorch and torchvision"),
    "train_digits": (["examples/train_digits.py"], "train_digits: loads PyTorch, scikit-learn and mlxtend"),
}


@pytest.mark.parametrize("program", FIRST_LINES)
def test_the_first_line_comes_before_torch_is_imported(program: str, tmp_path: Path) -> None:
    """The torch of this test ends the program, and keeps what has been printed into the file until then."""
    command, line = FIRST_LINES[program]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    printed, seen = tmp_path / "printed", tmp_path / "seen"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(tmp_path), "PRINTED": str(printed), "SEEN": str(seen)}
    with printed.open("w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=subprocess.PIPE)
    assert done.returncode == 7 and seen.exists(), done.stderr[-2000:]
    assert seen.read_text() == f"{line}\n"


def test_a_compilation_is_said_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    said: dict[str, list[str]] = {}

    def compiled(shape: Shape) -> contenders.Contender:
        said["unit"] = list(lines)
        return contenders.eager()

    monkeypatch.setitem(contenders.CONTENDERS, "compiled", compiled)
    progress = Progress((), lines.append)
    row = bench_unit.measure(Shape(1, 8, 7, 7), ["eager", "compiled"], Effort.quick(), progress=progress)
    assert not row.wrong
    assert said["unit"][-1] == "  compiles compiled and checks it"

    def fails(model: Any, **options: Any) -> Any:
        said["network"] = list(lines)
        raise RuntimeError("not compiled")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(end_to_end, "make", lambda *_: torch.nn.Linear(1, 1))
    judge = end_to_end.Judge("none", torch.zeros(1))
    with pytest.raises(RuntimeError, match="not compiled"):
        end_to_end.measure(judge, "inference", "compiled", ["plain"], torch.zeros(1), 0.0, progress)
    assert said["network"][-1] == "  compiles plain and checks it"


@pytest.mark.parametrize("part", QUICK)
def test_each_part_counts_its_rows(run: Path, part: str) -> None:
    """The lines count from 1 to the total. The time left is in no first line, and in each later one."""
    lines = (run / f"{part}.txt").read_text().splitlines()
    found = [match for line in lines if (match := re.fullmatch(r"\[(\d+)/(\d+)\] .*?(; about .* left)?", line))]
    total = {
        "unit": len(grid.quick_grid()),
        "end_to_end": 3 + 2,
        "latency": 2 + 1,
        "host": 1 + 3,
        "scaling": 4,
        "conditions": 1,
    }[part]
    assert [(int(m[1]), int(m[2])) for m in found] == [(i + 1, total) for i in range(total)]
    assert [m[3] is not None for m in found] == [i > 0 for i in range(total)]
    assert "\r" not in "".join(lines)


@pytest.mark.parametrize("part", QUICK)
def test_the_output_fits_a_terminal(run: Path, part: str) -> None:
    lines = (run / f"{part}.txt").read_text().splitlines()
    assert any(line.startswith("== ") for line in lines)
    too_long = [line for line in lines if len(line) > WIDTH and not line.startswith("wrote ")]
    assert not too_long


def test_the_closing_table_replaces_that_of_pytest_benchmark(run: Path) -> None:
    """Its file of results is written as before."""
    printed = (run / "unit.txt").read_text()
    assert "== forward (no grad) ==" in printed and "GFLOP/s" in printed
    assert "Name (time in" not in printed and "Rounds" not in printed
    kept = json.loads((run / "pytest_benchmark.json").read_text())["benchmarks"]
    rows = json.loads((run / "unit.json").read_text())["rows"]
    assert len(kept) == len(rows)
    seconds = {b["name"].partition("[")[2].rstrip("]"): b["stats"]["median"] for b in kept}
    for r in rows:
        assert seconds[f"{r['problem']}-{r['direction']}-{r['contender']}"] == pytest.approx(r["seconds"])


def test_a_selection_of_nothing_names_the_shapes(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python(*BENCHMARKS, "--quick", "-k", "m56 and fused")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    named = ", ".join(shape.label for shape in grid.quick_grid())
    sentence = f"-k 'm56 and fused' selects no benchmark: the shapes of this run are {named}"
    assert sentence in " ".join(done.stdout.split())
    assert len(DIRECTIONS) * 15 == int(re.findall(r"(\d+) deselected", done.stdout)[0])
