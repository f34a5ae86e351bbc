"""The report on a GPU, from made-up input; and the benchmarks' refusal where there is no GPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import contenders, cuda, gpu_host, gpu_report, grid, host, machine, passes  # noqa: E402
from benchmarks.bench_unit import Row, measure  # noqa: E402
from benchmarks.gates import GATES  # noqa: E402
from benchmarks.shapes import DIRECTIONS, STAGES, Shape  # noqa: E402
from benchmarks.timing import Effort, Measured  # noqa: E402
from tests.support.stand_in_gpu import Gpu  # noqa: E402

FACTS: dict[str, Any] = {
    "gpu": "Made-Up GPU 9000",
    "gpu_architecture": "sm_90",
    "gpu_memory_gbytes": 80.0,
    "cuda": "13.0",
    "cuda_library": "not built: nvcc was not found",
    "torch": "2.14.1",
    "date": "2027-01-02T03:04:05+00:00",
    "copy_gbytes": 2000.0,
    "backends": {"triton": "", "cuda": "not built"},
}
XML = """<testsuites><testsuite>
<testcase classname="tests.test_gpu" name="test_right[triton-a]"/>
<testcase classname="tests.test_gpu" name="test_right[triton-b]"/>
<testcase classname="tests.test_gpu" name="test_wrong[triton]"><failure message="dx|dy&#10;more"/></testcase>
<testcase classname="tests.test_gpu" name="test_setup[triton]"><error message=""/></testcase>
<testcase classname="tests.test_gpu" name="test_second_device[triton]"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


HOST_ROWS = [
    {"section": "host", "driver": "real", "backend": "triton", "shape": "1x8x7x7"}
    | dict(zip(host.COLUMNS, (20.0, 30.0, 90.0), strict=True))
]


def measured(device: str) -> Row:
    """A made-up measurement: the floor takes 1 ms, ours 1.25 ms and eager 5 ms, in each direction."""
    row = Row(Shape(32, *STAGES["56"], device=device))
    times = {"triton": 1.25e-3, "eager": 5e-3}
    samples = {f"floor-{d}": [{d: 1e-3}] for d in ("forward", "backward")}
    for name, seconds in times.items():
        samples[f"{name} forward"] = [{"forward": seconds}]
        samples[f"{name} training"] = [{"backward": seconds, "both": 2 * seconds}]
    row.measured = Measured(samples)
    row.timed_by = dict.fromkeys(samples, ("graph", "")) if device == "cuda" else {}
    if device == "cuda":
        row.timed_by["eager forward"] = row.timed_by["eager training"] = "events", "RuntimeError: it synchronises"
    return row


def test_report_on_made_up_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "copy_gbytes", lambda: FACTS["copy_gbytes"])
    rows = measured("cuda").lines()
    text = gpu_report.report(FACTS, gpu_report.read_tests(XML), rows, HOST_ROWS)
    lines = text.splitlines()
    assert lines[0] == "# steam_kernels on Made-Up GPU 9000"
    assert "| gpu architecture | sm_90 |" in lines and "| cuda | 13.0 |" in lines
    assert "| cuda library | not built: nvcc was not found |" in lines
    assert "This GPU copies a large buffer at 2000 GB/s, read and write counted." in lines
    assert "Backend triton: usable." in lines and "Backend cuda: not built." in lines
    assert "2 passed, 2 failed, 1 skipped." in lines
    assert "- `tests.test_gpu::test_wrong[triton]`: dx|dy" in lines
    assert "- `tests.test_gpu::test_second_device[triton]`: needs two GPUs" in lines
    assert [line for line in lines if line.startswith("#")][1:] == [
        "## The GPU suite",
        "## Benchmarks",
        "### Forward, without gradients",
        "### Backward, by autograd",
        "### Forward and backward, by autograd",
        "## The host: first calls and later calls",
    ]
    assert gpu_host.DRIVERS["real"] in lines and gpu_host.DRIVERS["stub"] not in lines
    assert "| 1x8x7x7, triton | 20.00 | 30.00 | 90.00 |" in lines
    # x is 32 x 256 x 56 x 56 float32: forward moves two maps of 102.76 MB in 1.25 ms
    ours = (
        "| 32x256x56x56-float32-nchw-cuda | triton | 1.25 ms | graph | 164 | 0.08 | 1.00 ms | 1.25 | 4.00 | - | - | - |"
    )
    assert lines.count(ours) == 1
    assert sum("| eager | " in line and "| events |" in line for line in lines) == 3
    assert lines.count("- eager was not captured: RuntimeError: it synchronises") == 1
    assert sum(line.startswith("| 32x256x56x56") for line in lines) == 6
    for line in lines:
        if line.startswith("| 32x"):
            assert line.count("|") == 13


def test_empty_and_quick_reports_say_so() -> None:
    text = gpu_report.report(FACTS, gpu_report.Tests(), [], [], quick=True)
    assert text.count("None was measured.") == 2 and "A quick run" in text and "0 passed, 0 failed, 0 skipped." in text


@pytest.mark.parametrize("missing", ["", "unit.json", "host.json"])
def test_every_part_runs_and_is_in_the_report(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made-up parts write their files. A part that writes none is named, and the program fails at its end."""
    monkeypatch.setattr(cuda, "copy_gbytes", lambda: FACTS["copy_gbytes"])
    monkeypatch.setattr(cuda, "facts", dict)
    monkeypatch.setattr(machine, "facts", lambda: FACTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows, ran = {"unit.json": measured("cuda").lines(), "host.json": HOST_ROWS}, []

    def run(*arguments: str) -> None:
        ran.append(arguments[0] if arguments[0] != "pytest" else arguments[1])
        path = Path(next(a for a in arguments if a.endswith((".json", ".xml"))).removeprefix("--junitxml="))
        if path.suffix == ".xml":
            path.write_text(XML.replace("failure", "skipped").replace("error", "skipped"))
        elif path.name != missing:
            path.write_text(json.dumps({"machine": FACTS, "rows": rows[path.name]}))

    monkeypatch.setattr(gpu_report, "_run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--output", str(tmp_path / "report.md")])
    with pytest.raises(SystemExit) if missing else contextlib.nullcontext():
        gpu_report.main()
    assert ran == ["tests", "benchmarks", "benchmarks.gpu_host"]
    text = (tmp_path / "report.md").read_text()
    assert text.count("None was measured.") == (1 if missing else 0)
    assert ("| triton | 1.25 ms |" in text) == (missing != "unit.json")
    assert ("| 1x8x7x7, triton |" in text) == (missing != "host.json")


def test_file_name_has_device_and_day() -> None:
    assert gpu_report.output_path(FACTS) == ROOT / "benchmarks/results/gpu_made_up_gpu_9000_2027-01-02.md"


def test_share_of_copy_is_of_a_gpu_alone() -> None:
    assert all(row["of_copy"] is None for row in measured("cpu").lines())


def test_replays_of_graphs_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is captured once, after calls that compile it. Each replay lies between two marks, and the cache is
    evicted before the first mark."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(cuda, "evict", lambda: gpu.enqueue("evict"))
    block = cuda.timed("forward", lambda: gpu.enqueue("call"), lambda: gpu.log.append("prepare"))
    # The later of two marks is one second after the replay, which is one second after the first mark.
    assert block(2) == {"forward": 2.0} and block.timed_by == "graph"
    timed = ["evict", "mark", "replayed call", "mark"]
    assert gpu.log == ["prepare", *["call"] * 3, "capture", "replayed call", *timed * 2, "wait"]
    gpu.log.clear()
    block(1)
    assert gpu.log == ["prepare", "replayed call", *timed, "wait"]

    gpu.log.clear()
    forward = lambda: gpu.enqueue("forward") or torch.zeros(1)  # noqa: E731
    assert cuda.timed_pair(forward, lambda y: gpu.enqueue("backward"))(1) == {"both": 4.0, "backward": 2.0}
    assert gpu.log[6:8] == ["capture", "capture with the memory of the first"]
    assert gpu.log[8:10] == ["replayed forward", "replayed backward"]
    assert gpu.log[10:] == ["evict", "mark", "replayed forward", "mark", "replayed backward", "mark", "wait"]


def test_events_time_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, refused="backward")
    monkeypatch.setattr(cuda, "evict", lambda: gpu.enqueue("evict"))
    forward = lambda: gpu.enqueue("forward") or torch.zeros(1)  # noqa: E731
    block = cuda.timed_pair(forward, lambda y: gpu.enqueue("backward"))
    assert block(1) == {"both": 4.0, "backward": 2.0}
    assert block.timed_by == "events" and block.why_not_graph == "RuntimeError: backward cannot be captured"
    assert gpu.log[-7:] == ["evict", "mark", "forward", "mark", "backward", "mark", "wait"]
    gpu.log.clear()
    block(1)
    assert "capture" not in gpu.log


def test_rows_say_how_their_contenders_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement of a shape on the stand-in, with tensors on the CPU. One of two contenders cannot be captured."""
    gpu = Gpu(monkeypatch, refused="eager")
    monkeypatch.setattr(cuda, "evict", lambda: gpu.enqueue("evict"))
    monkeypatch.setattr(cuda, "copy_gbytes", lambda: FACTS["copy_gbytes"])
    shape = Shape(1, 8, 7, 7, device="cuda")
    tensors = replace(shape, device="cpu").tensors()
    monkeypatch.setattr(Shape, "tensors", lambda self: tensors)

    def eager(*args: Any, **keywords: Any) -> torch.Tensor:
        gpu.enqueue("eager")
        return contenders.eager()(*args, **keywords)

    monkeypatch.setitem(contenders.CONTENDERS, "eager", lambda shape: eager)
    row = measure(shape, ["eager", "plain"], Effort.quick())
    assert not row.wrong
    found = {(r["contender"], r["direction"]): (r["timed_by"], r["why_not_graph"]) for r in row.lines()}
    events = "events", "RuntimeError: eager cannot be captured"
    assert found == {(c, d): events if c == "eager" else ("graph", "") for c in ("eager", "plain") for d in DIRECTIONS}
    assert all(r["speedup_plain"] > 0 and r["floor_seconds"] > 0 for r in row.lines())
    assert cuda.not_captured(row.lines()) == ["eager was not captured: RuntimeError: eager cannot be captured"]


def test_blocks_on_a_gpu_set_the_mode_of_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate with a batch norm computes another function in training."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(cuda, "evict", lambda: gpu.enqueue("evict"))
    shape = Shape(1, 8, 7, 7)
    gate, tensors = contenders.Gate("cbam", shape), shape.tensors()
    on_gpu = replace(shape, device="cuda")
    forward, training = (block(gate, on_gpu, tensors) for block in (passes.forward_block, passes.training_block))
    for block, mode in ((forward, False), (training, True), (forward, False)):
        block(1)
        assert gate.module.training == mode


def test_the_cache_is_evicted_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads a buffer larger than the L2 cache, and writes one number."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=50_000_000))
    made = {name: getattr(torch, name) for name in ("zeros", "empty")}
    for name, make in made.items():
        monkeypatch.setattr(torch, name, lambda *size, device, make=make: make(*size))
    cuda._evictor.cache_clear()
    try:
        buffer, target = cuda._evictor()
        assert buffer.nbytes == 100_000_000
        buffer[::1000] = 1
        written = buffer._version
        cuda.evict()
    finally:
        cuda._evictor.cache_clear()
    assert target.item() == buffer.numel() // 1000 and buffer._version == written


RECORDER = """#!/bin/sh
echo "$STEAM_KERNELS_BUILD $CMAKE_CUDA_ARCHITECTURES: $*" >>"$CALLS"
"""


@pytest.mark.parametrize("asked", ["", "90-real;100"])
def test_make_builds_for_the_gpu_before_the_report(tmp_path: Path, asked: str) -> None:
    """The build runs although a library is in place, which may be for another GPU. The user's architectures win."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    recorder, calls = tmp_path / "recorder", tmp_path / "calls"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    (tmp_path / "steam_kernels").mkdir()
    for name in ("libsteam_cpu.so", "libsteam_cuda.so"):
        (tmp_path / "steam_kernels" / name).touch()
    clean = {k: v for k, v in os.environ.items() if k not in ("STEAM_KERNELS_BUILD", "CMAKE_CUDA_ARCHITECTURES")}
    clean |= {"CMAKE_CUDA_ARCHITECTURES": asked} if asked else {}
    command = ["make", "-o", ".venv/.installed", "gpu-report", f"PY={recorder}", "REPORT_FLAGS=--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean | {"CALLS": str(calls)})
    assert done.returncode == 0, done.stdout + done.stderr
    architectures = asked or "native"
    assert calls.read_text().splitlines() == [
        f"auto {architectures}: setup.py --quiet build_ext --inplace",
        f"require {architectures}: -m benchmarks.gpu_report --quick",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [["-m", "benchmarks.gpu_report"], ["-m", "pytest", "benchmarks", "--benchmark-only", "--device", "cuda", "-q"]],
    ids=["report", "benchmarks"],
)
def test_without_a_gpu_one_sentence(command: list[str]) -> None:
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not a worker of pytest-xdist
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode != 0
    assert "sees no GPU" in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


def test_contenders_on_a_gpu_are_its_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU ours is one row; on a GPU each usable backend is one, by name."""

    class Config:
        def __init__(self, device: str) -> None:
            self.device = device

        def getoption(self, option: str) -> str:
            return {"--device": self.device}.get(option, "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda: {"backends": {"triton": "", "cuda": "not built", "cpu": ""}})
    peers = ["eager", "compiled", "plain", "plain-compiled"]
    peers += [*GATES, *(f"{name}-compiled" for name in GATES)]
    assert grid.contenders(Config("cpu")) == ["fused", *peers]  # type: ignore[arg-type]
    assert grid.contenders(Config("cuda")) == ["triton", *peers]  # type: ignore[arg-type]
    assert {p.device for p in grid.shapes(Config("cuda"))} == {"cuda"}  # type: ignore[arg-type]
