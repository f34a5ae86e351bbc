"""examples/evaluation/report.py: the table's figures are those of the runs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.tables import fill_marks
from examples.evaluation import report

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {"task": "classification", "model": "resnet18", "lr": 0.1, "images": {"train": 9, "val": 4}}
FIGURES = {
    "parameters": 11000, "parameters_of_gates": 0, "gflops": 3.628151, "top1": 50.0, "train_loss": 1.0,
    "step_seconds": 0.02, "step_seconds_quartiles": [0.01, 0.03], "step_over_none": 1.0,
    "step_over_none_quartiles": [0.9, 1.1], "peak_bytes": 3 << 20, "peak_bytes_none": 2 << 20, "backend": "",
}  # fmt: skip


def write(folder: Path, gate: str, seed: int, variant: str = "", lr: float = 0.1, **figures: Any) -> None:
    settings = SETTINGS | {"gate": gate, "seed": seed, "variant": variant, "lr": lr}
    machine = {"commit": "abc123", "torch": "2.14.1", "processor": "a processor", "threads": 2}
    found = copy.deepcopy(FIGURES) | figures
    history = [{"epoch": e, "train_loss": 2.0 / e, "top1": found["top1"]} for e in (1, 2)]
    out = folder / f"{gate}{variant}{seed}{lr}"
    out.mkdir(parents=True)
    (out / "settings.json").write_text(json.dumps(settings))
    content = {"settings": settings, "machine": machine, "figures": found, "history": history}
    (out / "results.json").write_text(json.dumps(content))


def rows(text: str) -> dict[str, dict[str, str]]:
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}


def test_the_table(tmp_path: Path) -> None:
    for seed, top in enumerate((50.0, 52.0, 54.0)):
        write(tmp_path / "runs", "none", seed, top1=top)
        faster = {"step_over_none": 1.1 + seed / 100, "step_over_none_quartiles": [1.05, 1.2]}
        write(
            tmp_path / "runs", "steam", seed, "radius=2", top1=top + 1, parameters_of_gates=256, backend="cpu", **faster
        )
    write(tmp_path / "runs", "se", 0)
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "half" / "settings.json").write_text("{}")
    text = report.report([tmp_path / "runs"], tmp_path / "out")
    found = rows(text)
    assert list(found) == ["none", "SE", "STEAM (radius=2)"]
    steam = found["STEAM (radius=2)"]
    assert steam["top-1"] == "53.00 ± 2.00" and steam["seeds"] == "3" and steam["of the gates"] == "256"
    assert steam["extra step time"] == "+11.0 %" and steam["quartiles"] == "+5.0 to +20.0"
    assert steam["peak memory"] == "3.0 MiB" and steam["extra"] == "+50.0 %" and steam["GFLOPs"] == "3.6282"
    assert found["none"]["top-1"] == "52.00 ± 2.00" and found["none"]["extra step time"] == ""
    assert found["SE"]["top-1"] == "50.00"
    assert "Commit abc123, torch 2.14.1, a processor, 2 threads: all runs" in text and "backend cpu" in text
    assert "lr 0.1" in text and str(tmp_path / "runs" / "half") in text
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.md").read_text() == f"# Report\n\n{text}"
    (name,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / "out" / name).read_bytes().startswith(b"<?xml")


def test_runs_of_other_settings_have_other_tables(tmp_path: Path) -> None:
    write(tmp_path, "none", 0)
    write(tmp_path, "none", 0, lr=0.2)
    assert report.report([tmp_path], tmp_path / "out").count("## resnet18, classification") == 2


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"must have a run of .*, but has no settings\.json"):
        report.report([tmp_path / "nowhere"], tmp_path / "out")
    write(tmp_path / "a", "none", 0)
    write(tmp_path / "b", "none", 0)
    with pytest.raises(SystemExit, match="two runs of resnet18, none, have the seed 0"):
        report.report([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for path in (tmp_path / "a").rglob("results.json"):
        path.unlink()
    with pytest.raises(SystemExit, match="none of the runs is finished"):
        report.report([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_page_of_the_documentation(tmp_path: Path) -> None:
    """The tables replace those between the marks, again and again, and the rest of the page stays."""
    write(tmp_path / "runs", "none", 0)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n\n<!-- runs -->\nold\n<!-- end of runs -->\n\nafter\n")
    for _ in range(2):
        report.main([str(tmp_path / "runs"), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n\n<!-- runs -->\n\n## resnet18") and text.endswith(
        "<!-- end of runs -->\n\nafter\n"
    )
    assert "old" not in text and text.count("## resnet18") == 1
    (link,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (page.parent / link).read_bytes().startswith(b"<?xml")
    other = tmp_path / "other" / "page.md"
    other.parent.mkdir()
    other.write_text("no marks")
    with pytest.raises(SystemExit, match="must have the lines <!-- runs -->"):
        report.main([str(tmp_path / "runs"), "--page", str(other)])
    assert list(other.parent.iterdir()) == [other] and other.read_text() == "no marks"


def test_the_page_says_what_the_committed_runs_show() -> None:
    text = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    assert "No gate is above the network without one here, in the mean of three seeds." in text
    found: dict[str, dict[int, float]] = {}
    for path in (ROOT / "benchmarks" / "results" / "evaluation" / "cells").glob("*/results.json"):
        run = json.loads(path.read_text())
        found.setdefault(run["settings"]["gate"], {})[run["settings"]["seed"]] = run["figures"]["top1"]
    assert all(set(seeds) == {0, 1, 2} for seeds in found.values()) and len(found) == 6
    means = {gate: sum(seeds.values()) / 3 for gate, seeds in found.items()}
    assert max(means, key=lambda gate: means[gate]) == "none"


def test_the_committed_runs_make_their_page() -> None:
    page = ROOT / "docs" / "evaluation.md"
    runs = ROOT / "benchmarks" / "results" / "evaluation"
    text, shown = report.text_of([runs], "images/evaluation/")
    assert page.read_text() == fill_marks(page.read_text(), "runs", f"\n{text}\n")
    assert set(shown) == {p.name for p in (ROOT / "docs" / "images" / "evaluation").iterdir()}
