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
"""


PLACES = ("benchmarks/results/latest", "docs/benchmarks.md", "docs/images")


QUICK_PLACES = ("build/bench/results", "build/bench/benchmarks.md", "build/bench/images")


def make_bench(tmp_path: Path, *variables: str, fails: str = "nothing") -> tuple[int, list[str], str]:
    """Runs ``make bench`` in a folder of its own, with an interpreter that only records its commands. Returns make's
    exit status, the commands, and the output."""
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
    """A quick run writes neither the committed run nor the page and its pictures."""
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
