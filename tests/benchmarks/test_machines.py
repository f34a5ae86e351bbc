"""The short benchmark: the folders of processors, and the page that has them side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, machines

ROOT = machine.ROOT


@pytest.mark.parametrize(
    ("processor", "folder"),
    [
        ("AMD EPYC (family 25, model 1)", "amd-epyc-25-1"),
        ("AMD EPYC 9B14 (family 25, model 17)", "amd-epyc-9b14-25-17"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz (family 6, model 85)", "intel-xeon-6-85"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz (family 6, model 158)", "intel-core-i7-8700k-6-158"),
        ("aarch64 (family None, model None)", "aarch64-none-none"),
    ],
)
def test_a_processor_has_a_folder(processor: str, folder: str) -> None:
    assert machines.slug(processor) == folder


def written(results: Path, name: str, over_floor: float, price: float) -> None:
    """A short benchmark of two rows, one network and one layer."""
    unit = [
        {"contender": "fused", "direction": d, "dtype": t, "problem": f"map-{t}", "over_floor": over_floor * k}
        for d in ("forward", "both", "backward")
        for k, t in ((1, "float32"), (4, "bfloat16"))
    ]
    key = {"network": "resnet50", "task": "training", "mode": "eager", "layout": "channels_last"}
    row = key | {"contender": "steam", "time_over_plain": price, "time_over_plain_quartiles": [price, price]}
    networks = [row, row | {"layout": "nchw", "units_over_plain": 0.0114}]
    layers = [{"section": "layers", "layer": "FusedSTEAM", "no grad": 30.4, "forward + backward": 90.0}]
    parts: dict[str, list[dict[str, Any]]] = {"unit": unit, "end_to_end": networks, "host": layers}
    (results / name).mkdir(parents=True)
    for part, rows in parts.items():
        content = {"rows": rows, "machine": {"processor": name, "commit": "abc"}, "quick": False}
        (results / name / f"{part}.json").write_text(json.dumps(content))


def test_the_page_has_a_column_for_each_machine(tmp_path: Path) -> None:
    written(tmp_path, "one", 1.0, 1.02)
    written(tmp_path, "two", 1.5, 1.1)
    written(tmp_path, "latest", 9.0, 9.0)
    (tmp_path / "incomplete").mkdir()
    page = machines.page(machines.runs_of(tmp_path))
    for line in (
        "| machine | one | two |",
        "| commit | abc | abc |",
        "| forward, float32 | **1.00** (1.00 to 1.00) | **1.50** (1.50 to 1.50) |",
        "| forward, all 16 rows | **2.00** (1.00 to 4.00) | **3.00** (1.50 to 6.00) |",
        "| map-bfloat16 | 4.00 | 6.00 |",
        "| resnet50, training, eager, channels_last | **+2.0 %** (+2.0 to +2.0) | **+10.0 %** (+10.0 to +10.0) |",
        "| resnet50, training, eager, nchw | **+2.0 %** (+2.0 to +2.0), units alone 1.1 % "
        "| **+10.0 %** (+10.0 to +10.0), units alone 1.1 % |",
        "| FusedSTEAM, no grad | 30 | 30 |",
    ):
        assert line in page.splitlines()


def test_without_a_short_benchmark_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["machines", "--results", str(tmp_path), "--page", str(page)])
    with pytest.raises(SystemExit, match=r"no folder in it holds unit\.json, end_to_end\.json, host\.json"):
        machines.main()
    assert not page.exists()


def test_the_committed_page_is_of_the_committed_results() -> None:
    assert machines.page(machines.runs_of(machines.RESULTS)) == (ROOT / "docs" / "machines.md").read_text()
