"""The facts of the machine on the page, and the commit of a run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, report


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
    """The first part need not be the part that differs."""
    text = header(unit=facts(), host=facts(), scaling=facts(**{fact: "other"}))
    assert f"**Not one run: its parts differ in {fact}.**" in text
    assert f"| {fact} | unit: {facts()[fact]}; host: {facts()[fact]}; scaling: other |" in text
    older = {k: v for k, v in facts().items() if k != fact}
    assert f"host: not recorded; scaling: {facts()[fact]} |" in header(host=older, scaling=facts())


def test_a_dirty_tree_is_named(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        names = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert machine.commit_of(tmp_path) == ""
    git("init", "-q")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tmp_path / "setup.py", results / "unit.json", tmp_path / "README.md"):
        path.write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = machine.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (results / "unit.json").write_text("2")  # a run writes this file itself
    (tmp_path / "README.md").write_text("2")
    assert machine.commit_of(tmp_path) == clean
    (tmp_path / "setup.py").write_text("2")
    assert machine.commit_of(tmp_path) == f"{clean}-dirty"
    git("commit", "-qam", "second")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new.h").write_text("1")  # a file that git does not track is compiled too
    assert machine.commit_of(tmp_path).endswith("-dirty")
    assert "**Measured with changes that are in no commit.**" in header(unit=facts(), host=facts(commit="1-dirty"))
