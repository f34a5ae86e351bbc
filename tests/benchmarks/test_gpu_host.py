"""The host's part of GPU calls: measured with a stand-in for Triton's driver, and its tables. No time is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_host, host, stub_driver
from steam_kernels.backends import triton as backend

pytestmark = pytest.mark.xdist_group("benchmarks")
STUB = "No GPU ran anything for these figures: a stand-in for Triton's driver took the launches"
#: At 7x7 no pool stage runs.
KERNELS_AT_7 = 2 + 3


def test_units_of_the_network() -> None:
    assert list(gpu_host.unit_shapes().values()) == [
        (32, 256, 56, 56),
        (32, 512, 28, 28),
        (32, 1024, 14, 14),
        (32, 1024, 14, 14),
        (32, 2048, 7, 7),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and Triton has its real driver")
def test_measured_without_a_gpu(tmp_path: Path, python: Callable[..., str]) -> None:
    """Triton compiles each kernel of the unit once, though TRITON_INTERPRET is set. The output names the driver."""
    printed = python("-m", "benchmarks.gpu_host", "--quick", "--json", str(tmp_path / "rows.json"))
    assert STUB in printed and gpu_host.DRIVERS["real"] not in printed
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["quick"] and {row["driver"] for row in content["rows"]} == {"stub"}
    first, later = content["rows"]
    assert (first["section"], first["units"], first["kernels"]) == ("compile", 1, KERNELS_AT_7)
    assert first["processor_seconds"] > 0
    assert 0 < first["last_stage_seconds"] < first["compile_seconds"] < first["first_calls_seconds"]
    assert (later["section"], later["backend"], later["shape"]) == ("host", "triton", "1x2048x7x7")
    assert all(later[column] > 0 for column in host.COLUMNS)


def made_up(driver: str) -> list[dict[str, Any]]:
    first = {"section": "compile", "driver": driver, "dtype": "float32", "layout": "nchw", "units": 5, "kernels": 30}
    first |= {"first_calls_seconds": 9.0, "processor_seconds": 8.5, "compile_seconds": 8.0, "last_stage_seconds": 2.0}
    first["slowest"] = "graph, 1.00 s"
    later = {"section": "host", "driver": driver, "backend": "triton", "shape": "1x8x7x7"}
    return [first, later | dict.fromkeys(host.COLUMNS, 50.0)]


@pytest.mark.parametrize("driver", gpu_host.DRIVERS)
def test_tables_name_the_driver(driver: str) -> None:
    lines = gpu_host.markdown(made_up(driver))
    assert lines[0] == gpu_host.DRIVERS[driver] and (STUB in lines[0]) == (driver == "stub")
    assert "| 5, float32 nchw | 30 | 9.0 s | 8.5 s | 8.0 s | 2.0 s | graph, 1.00 s |" in lines
    assert "| 1x8x7x7, triton | 50.00 | 50.00 | 50.00 |" in lines
    assert gpu_host.markdown([]) == []


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.triton_kernels().module, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        stub_driver.install()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and Triton is not interpreted")
def test_calls_that_compile_nothing_are_no_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the interpreter runs the calls."""
    from triton import knobs

    monkeypatch.setattr(knobs.compilation, "listener", None)
    with pytest.raises(RuntimeError, match="Triton compiled no kernel"):
        gpu_host.first_calls({"a": (1, 8, 7, 7)}, "float32", "nchw", "cpu")
