"""Tests of the GPU suite without a GPU: collection, the reason of the skip, helpers, and bodies of tests."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda import test_gpu  # the suite under test
from tests.support import cases
from tests.support.cases import Case

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the suite runs")
def test_skipped_with_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", str(HERE / "test_gpu.py")],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = {line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("SKIPPED")}
    assert reasons == {f"PyTorch {torch.__version__} sees no GPU, so no GPU backend was run"}
    assert " passed" not in done.stdout and " skipped" in done.stdout


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_copies_keep_strides_offset_and_surroundings(layout: str) -> None:
    t = cases.lay_out(torch.randn(2, 3, 5, 4), layout)
    copy = test_gpu.on_device(t, "cpu")
    assert torch.equal(copy, t) and copy.stride() == t.stride() and copy.storage_offset() == t.storage_offset()
    assert copy.data_ptr() != t.data_ptr() and copy.untyped_storage().nbytes() == t.untyped_storage().nbytes()
    if "slice" in layout:
        assert torch.as_strided(copy, (1,), (1,), 0).isnan().all()


def test_a_tensor_given_twice_stays_one() -> None:
    inputs, dy = test_gpu.make(Case(space=(5, 4), tail="x_relu", dy_layout="expanded"), "cpu")
    assert inputs["residual"] is inputs["x"]
    assert dy.stride() == (8, 1, 0, 0)


def test_wrong_results_are_out_of_bounds() -> None:
    case = Case(space=(9, 8), channels=6)
    got = test_gpu.run(case, "cpu", *test_gpu.make(case, "cpu"))
    test_gpu.check(case, "cpu", got)
    got["dx"] = got["dx"] + 1e-3
    with pytest.raises(AssertionError, match="dx"):
        test_gpu.check(case, "cpu", got)


def test_bodies_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the tests that need no CUDA functions, with the CPU kernels instead of a GPU backend."""
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(test_gpu, "gpu_backends", lambda: (["cpu"], ""))
    test_gpu.test_right(test_gpu.GRID[0], "cpu")
    test_gpu.test_right(Case(space=(9, 8), channels=6, layout="nhwc", tail="x_relu"), "cpu")
    test_gpu.test_automatic_choice_is_a_gpu_backend("nhwc", "cpu")
    for batch in (0, 1):
        test_gpu.test_empty_and_single("nchw", batch, "cpu")
    test_gpu.test_in_place_has_the_same_bits("cpu")
    test_gpu.test_gradcheck(cases.SMALL[0], "cpu")
    test_gpu.test_equal_bits_can_fail("cpu")


def test_memory_is_what_was_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator rounds a request up to its blocks, and the test of peaks must not depend on that."""
    requested, allocated, peaks = [100], [1024], [100]

    def call() -> None:
        requested[0] += 10
        peaks[0] = requested[0] + 5
        allocated[0] += 1024

    def stats() -> dict[str, int]:
        return {"requested_bytes.all.current": requested[0], "requested_bytes.all.peak": peaks[0]}

    for name, value in (
        ("is_available", lambda: True),
        ("synchronize", lambda: None),
        ("reset_peak_memory_stats", lambda: peaks.__setitem__(0, requested[0])),
        ("memory_stats", stats),
        ("memory_allocated", lambda: allocated[0]),
        ("max_memory_allocated", lambda: allocated[0]),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    assert test_gpu.peak(call) == 15
    assert test_gpu.memory.traced(call)[1] == (10, 15)


@pytest.mark.parametrize("size", test_gpu.STAGES)
def test_bounds_of_memory_hold_for_the_triton_operators(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators allocate on the CPU what they allocate on a GPU. No kernel is launched, so no result is right."""
    from triton.runtime import KernelInterface

    from steam_kernels.backends.triton import calls

    class NotLaunched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **constants: launched.update([self.name])

    launched: Counter[str] = Counter()
    for name, value in list(vars(calls).items()):
        if isinstance(value, KernelInterface):
            monkeypatch.setattr(calls, name, NotLaunched(name))
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    test_gpu.test_peak_memory(size, "nhwc", "triton")
    # Each pass launches its kernel of the gate once, whatever else its plan has.
    assert (launched["gate"], launched["gate_backward"]) == (3, 2)


def test_every_gpu_backend_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite reads the registry, so it includes any backend that becomes usable on the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {"triton": "", "cuda": "not built", "cpu": "", "reference": ""}
    monkeypatch.setattr(test_gpu.steam_kernels, "available_backends", lambda: found)
    assert test_gpu.gpu_backends() == (["triton"], "")
    found["triton"] = "no Triton"
    assert test_gpu.gpu_backends() == ([], "triton: no Triton; cuda: not built")
