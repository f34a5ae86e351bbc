"""``make bench`` runs every part, and fails at its end if a part failed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.machine import ROOT

RECORDER = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in *"$FAILS"*) exit 3 ;; esac
case "$*" in *--folder*) echo folder ;; esac
"""


PLACES = ("benchmarks/results/latest", "docs/benchmarks.md", "docs/images")


QUICK_PLACES = ("build/bench/results", "build/bench/benchmarks.md", "build/bench/images")


def make_bench(
    tmp_path: Path, *variables: str, fails: str = "nothing", target: str = "bench"
) -> tuple[int, list[str], str]:
    """Runs ``make bench`` in a folder of its own, with an interpreter that only records its commands. Returns make's
    exit status, the commands, and the output."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    recorder, calls = tmp_path / "recorder", tmp_path / "calls"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    calls.write_text("")
    done = subprocess.run(
        ["make", "-o", "venv", target, f"PY={recorder}", *variables],
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
    """A quick run writes neither the committed run nor the page and its pictures."""
    status, calls, printed = make_bench(tmp_path, *flags)
    assert status == 0, printed
    run, page, images = places
    given = flags[0].partition("=")[2].split() if flags else []
    quick = [flag for flag in given if flag == "--quick"]
    expected = [["-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--json", f"{run}/unit.json", *given]]
    parts = ("end_to_end", "latency", "host", "scaling", "conditions")
    expected += [["-m", f"benchmarks.{part}", "--json", f"{run}/{part}.json", *quick] for part in parts]
    before = "build/bench/before" if quick else "benchmarks/results/before"
    expected += [["-m", "benchmarks.report", "--run", run, "--before", before, "--page", page, "--images", images]]
    assert [call.split() for call in calls] == expected
    assert (tmp_path / run).is_dir()


def test_a_whole_run_becomes_the_run_before(tmp_path: Path) -> None:
    """A run that lacks its last part does not, and the run before stays."""
    run, before = tmp_path / "r", tmp_path / "b"
    run.mkdir()
    (run / "unit.json").write_text("1")
    (run / "conditions.json").write_text("1")
    status, _, printed = make_bench(tmp_path, "RUN=r", "BEFORE=b")
    assert status == 0, printed
    assert {path.name for path in before.iterdir()} == {"unit.json", "conditions.json"} and not list(run.iterdir())
    (run / "unit.json").write_text("2")
    status, _, printed = make_bench(tmp_path, "RUN=r", "BEFORE=b")
    assert status == 0 and (before / "unit.json").read_text() == "1" and not list(run.iterdir()), printed


@pytest.mark.parametrize(("fails", "named"), [("-m pytest", "unit"), ("benchmarks.host", "host"), ("report", "report")])
def test_make_bench_goes_on_and_fails_at_its_end(tmp_path: Path, fails: str, named: str) -> None:
    status, calls, printed = make_bench(tmp_path, fails=fails)
    assert status != 0 and f"failed: {named}\n" in printed and len(calls) == 7


@pytest.mark.parametrize(
    ("flags", "page"),
    [((), "docs/machines.md"), (("BENCH_FLAGS=--quick",), "build/bench/machines.md")],
)
def test_the_short_benchmark_runs_every_part(tmp_path: Path, flags: tuple[str, ...], page: str) -> None:
    """The parts write to the folder that the first command prints. Without that folder nothing is measured."""
    quick = ["--quick"] if flags else []
    results = "build/bench/machines" if flags else "benchmarks/results"
    status, calls, printed = make_bench(tmp_path, *flags, target="bench-short")
    assert status == 0, printed
    rows = "--size 56,28,14,7 --batch 32 --contender fused"
    networks = "--mode eager --contender steam --seconds 10"
    assert [call.split() for call in calls] == [
        ["-m", "benchmarks.machines", "--folder", "--results", results],
        ["-m", "pytest", "benchmarks", "--benchmark-only", "-q", *rows.split(), "--json", "folder/unit.json", *quick],
        ["-m", "benchmarks.end_to_end", *networks.split(), "--json", "folder/end_to_end.json", *quick],
        ["-m", "benchmarks.host", "--json", "folder/host.json", *quick],
        ["-m", "benchmarks.machines", "--results", results, "--page", page],
    ]
    status, calls, printed = make_bench(tmp_path, *flags, fails="benchmarks.host", target="bench-short")
    assert status != 0 and "failed: host\n" in printed and len(calls) == 5
    status, calls, printed = make_bench(tmp_path, *flags, fails="--folder", target="bench-short")
    assert status != 0 and len(calls) == 1, printed
