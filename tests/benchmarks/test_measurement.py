"""The shapes and contenders that are measured: each is judged before it is timed, and is named correctly."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_unit, cache, conditions, contenders, end_to_end, gates, grid, judging, malloc, memory
from benchmarks.machine import ROOT
from benchmarks.shapes import LAYOUTS, SHAPES, Shape
from benchmarks.timing import Effort, Measured
from steam_kernels.backends import native
from tests.support import tolerances

pytestmark = pytest.mark.xdist_group("benchmarks")


@pytest.fixture
def share() -> cache.Share:
    return cache.Share()


@pytest.mark.parametrize("way", conditions.WAYS)
def test_a_way_to_store_with_other_bits_has_no_time(
    monkeypatch: pytest.MonkeyPatch, share: cache.Share, way: str
) -> None:
    shape = Shape(2, 8, 7, 7)
    conditions.judge(share, shape)
    right, now = judging.outputs, [""]

    @contextmanager
    def storing(bytes_: int, claims: bool) -> Iterator[None]:
        now[0] = next(name for name, of in conditions.WAYS.items() if of == (bytes_, claims))
        yield
        now[0] = ""

    def outputs(*arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        found = right(*arguments, **keywords)
        if now[0] == way:
            found["dx"][0, 0, 0, 0] *= 1 + 2**-20
        return found

    monkeypatch.setattr(share, "storing", storing)
    monkeypatch.setattr(judging, "outputs", outputs)
    with pytest.raises(AssertionError, match=f"2x8x7x7-float32-nchw: dx has other bits with {way}"):
        conditions.judge(share, shape)


def test_a_share_leaves_the_choice_to_the_kernels_again(share: cache.Share) -> None:
    library = ctypes.CDLL(str(native.CPU.path))
    claims = library.steam_cpu_probe_claims
    bytes_ = library.steam_cpu_cache_bytes
    bytes_.restype = ctypes.c_int64
    before = claims(), bytes_()
    for ways in conditions.WAYS.values():
        with share.storing(*ways):
            assert (bytes_(), bool(claims())) == ways
        assert (claims(), bytes_()) == before


def test_more_tunables_stand_beside_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.a.b=1:glibc.c.d=2")
    found = malloc.environment(more={"glibc.c.d": "3"})["GLIBC_TUNABLES"]
    assert found == f"glibc.a.b=1:glibc.c.d=3:{malloc.TUNABLES}" and malloc.is_set({"GLIBC_TUNABLES": found})


class Config:
    """Command-line options, as pytest would hold them."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def getoption(self, option: str) -> Any:
        default: dict[str, Any] = {"--device": "cpu", "--quick": False, "--full": False}
        return self.given.get(option[2:], default.get(option, ""))


def test_default_grid() -> None:
    """It has every promised shape, and the compiled contenders at few shapes."""
    every = grid.shapes(Config())  # type: ignore[arg-type]
    assert len(set(every)) == len(every)
    assert {p.name for p in every} == set(SHAPES) and {p.n for p in every} == {1, 2, 8, 32}
    assert {(p.dtype, p.layout) for p in every} == {(d, o) for d in ("float32", "bfloat16") for o in LAYOUTS}
    assert set(grid.COMPILED_AT) < set(every)
    for p in every:
        names = set(grid.contenders_at(Config(), p))  # type: ignore[arg-type]
        assert {"fused", "eager", *gates.GATES} <= names
        assert (set(grid.COMPILED) <= names) == (p in grid.COMPILED_AT)
        assert p in grid.COMPILED_AT or not names & set(grid.COMPILED)
    full = grid.shapes(Config(full=True))  # type: ignore[arg-type]
    assert len(full) == 4 * (3 * 8 + 1)
    assert set(grid.COMPILED) <= set(grid.contenders_at(Config(full=True), full[0]))  # type: ignore[arg-type]
    chosen = grid.shapes(Config(size="m14", batch="4", dtype="float32", layout="nchw"))  # type: ignore[arg-type]
    assert chosen == [Shape(4, 96, 14, 14)]
    assert len(grid.shapes(Config(quick=True))) == 2  # type: ignore[arg-type]
    with pytest.raises(pytest.UsageError, match=r"--size 'm5': allowed are 56, 28"):
        grid.shapes(Config(size="m5"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("bfloat16", 1.5)])
def test_no_time_without_a_check(monkeypatch: pytest.MonkeyPatch, dtype: str, factor: float) -> None:
    """Wrong gates get a reason and no time, and the right gate gets a time. The bound in bfloat16 is wider."""

    class Off(contenders.Gate):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * factor

    monkeypatch.delenv(tolerances.RECORD, raising=False)  # a planted error may be within a bound, and near it
    for name in ("se", "eca", "cbam"):
        monkeypatch.setitem(contenders.CONTENDERS, name, lambda p, name=name: Off(name, p))
    row = bench_unit.measure(Shape(2, 16, 9, 9, dtype), ["fused", *gates.GATES], Effort.quick())
    assert set(row.wrong) == {"se", "eca", "cbam"}
    assert all("error" in why and "bound" in why for why in row.wrong.values())
    timed = {block.split()[0] for block in row.measured.samples}
    assert timed == {"fused", "gct", "floor-forward", "floor-backward"}


PLANTED = """
from benchmarks import contenders
from tests.support import tolerances

def check(self):
    raise RuntimeError("planted")

contenders.Steady.check = check
"""


def test_a_spoilt_measurement_is_made_once(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A compilation during the measurement leaves no times. All tests of the shape fail, and none measures again."""
    (tmp_path / "planted.py").write_text(PLANTED)
    rows = tmp_path / "rows.json"
    done = run_python(
        *("-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "planted", "--quick", "--size", "m7"),
        *("--dtype", "float32", "--layout", "nchw", "--contender", "fused,gct", "--json", str(rows)),
        PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))),
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("[1/1] 1x320x7x7-float32-nchw, 2 contenders") == 1
    assert "6 failed" in done.stdout and done.stdout.count("AssertionError: RuntimeError: planted") >= 6
    assert not rows.exists(), "there is no time to be kept"


def test_backend_of_the_fused_contender() -> None:
    """``--backend`` reaches the unit. A backend that cannot run is an error, and no other backend is timed."""
    row = bench_unit.measure(Shape(1, 8, 7, 7), ["fused"], Effort.quick(), "reference")
    assert not row.wrong
    assert {line["backend"] for line in row.lines()} == {"reference"}
    assert row.memory["fused"]["kept_bytes"] > 8 * 7 * 7 * 4, "plain PyTorch keeps maps"
    if not torch.cuda.is_available():
        row = bench_unit.measure(Shape(1, 8, 7, 7), ["fused"], Effort.quick(), "cuda")
        assert "cuda" in row.wrong["fused"] and not row.measured.samples.get("fused forward")


def test_without_kernels_nothing_is_called_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row and a network fail, although both could run on the reference."""
    monkeypatch.setattr(native, "CPU", replace(native.CPU, reason="not built"))
    row = bench_unit.measure(Shape(1, 8, 7, 7), ["fused", "gct"], Effort.quick())
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


def test_memory_is_counted() -> None:
    x = torch.zeros(1024)

    def call() -> torch.Tensor:
        held = x.neg()
        return held.neg()[:512]

    result, taken = memory.traced(call)
    assert taken == memory.Memory(kept=4096, peak=8192)
    assert result.shape == (512,)


def test_spread() -> None:
    measured = Measured({"b": [{"forward": float(v)} for v in (1, 2, 3, 4, 5)]})
    assert measured.spread("b", "forward") == pytest.approx(2 / 3)
