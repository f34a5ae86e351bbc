"""Tests that need a GPU: ``pytest -m gpu``. They run every backend that can run on the GPU, by name.

Without a GPU the tests are collected and skipped, and one sentence gives the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import steam_kernels
from benchmarks import cuda, memory
from tests.support import cases
from tests.support.cases import Case

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STAGES = {"56": (256, 56), "28": (512, 28), "14": (1024, 14), "7": (2048, 7)}


def gpu_backends() -> tuple[list[str], str]:
    """The backends that can run on this machine's GPU, and the reason if there is none."""
    if not torch.cuda.is_available():
        return [], f"PyTorch {torch.__version__} sees no GPU, so no GPU backend was run"
    reasons = {k: why for k, why in steam_kernels.available_backends().items() if k not in ("cpu", "reference")}
    usable = [name for name, why in reasons.items() if not why]
    return usable, "" if usable else "; ".join(f"{name}: {why}" for name, why in reasons.items())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "gpu" in metafunc.fixturenames:
        names, why = gpu_backends()
        metafunc.parametrize("gpu", names or [pytest.param("none", marks=pytest.mark.skip(reason=why))])


@pytest.fixture(autouse=True)
def _leave_no_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """Synchronises after each test, so that an asynchronous error fails the test that caused it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def on_device(t: Tensor, device: str) -> Tensor:
    """A copy of ``t`` with its whole storage, and with the same strides and offset."""
    size = t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((size,), (1,), 0).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def make(case: Case, device: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """``cases.make`` on a device. A tensor that occurs twice has one copy."""
    inputs, dy = cases.make(case)
    device = device or DEVICE
    moved: dict[int, Tensor] = {}
    for t in (*inputs.values(), dy):
        if id(t) not in moved:
            moved[id(t)] = on_device(t, device)
    return {k: moved[id(v)] for k, v in inputs.items()}, moved[id(dy)]


def run(case: Case, backend: str | None, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    return cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)


def check(case: Case, backend: str | None, got: dict[str, Tensor]) -> None:
    """Checks results against their bounds on the CPU."""
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy)
    bounds.check({k: v.cpu() for k, v in got.items()}, f"{backend} {case.id}")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name].to(a[name].device)) for name in a)


# ---- right -----------------------------------------------------------------------------------------------------------

GRID = cases.all_pairs()
LARGE = [
    Case(space=(size, size), channels=channels, batch=batch, layout=layout, dtype=dtype, tail=tail)
    for channels, size in STAGES.values()
    for layout in ("nchw", "nhwc")
    for dtype, tail in ((torch.float32, "none"), (torch.bfloat16, "residual_relu"))
    for batch in (1, 8)
]
LARGE += [
    Case(space=(100, 167), channels=256, grid=grid, layout=layout, dtype=dtype)
    for grid in (None, (13, 21))
    for layout in ("nchw", "nhwc")
    for dtype in (torch.float32, torch.float16)
]


@pytest.mark.parametrize("case", GRID + LARGE, ids=lambda c: c.id)
def test_right(case: Case, gpu: str) -> None:
    """The output and every gradient are within the bounds, inputs are unchanged, and strides are as promised."""
    inputs, dy = make(case)
    before = {k: v.clone() for k, v in inputs.items()}
    got = run(case, gpu, inputs, dy)
    assert all(torch.equal(v, before[k]) for k, v in inputs.items())
    if case.layout in cases.DENSE_LAYOUTS:
        assert got["y"].stride() == got["dx"].stride() == torch.empty_like(inputs["x"]).stride()
    check(case, gpu, got)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_automatic_choice_is_a_gpu_backend(layout: str, gpu: str) -> None:
    """A call that names no backend gives the bits of the first usable backend."""
    case = Case(space=(28, 28), channels=64, layout=layout)
    inputs, dy = make(case)
    assert equal(run(case, None, inputs, dy), run(case, gpu_backends()[0][0], inputs, dy))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_empty_and_single(layout: str, batch: int, gpu: str) -> None:
    case = Case(space=(7, 7), channels=5, batch=1, layout=layout)
    inputs, dy = make(case)
    inputs["x"], dy = inputs["x"][:batch], dy[:batch]
    got = run(case, gpu, inputs, dy)
    assert got["y"].shape == (batch, 5, 7, 7) and got["dchannel_weight"].isfinite().all()
    if batch == 0:
        assert not got["dchannel_weight"].any() and not got["dspatial_weight"].any()


def test_in_place_has_the_same_bits(gpu: str) -> None:
    for layout in ("nchw", "nhwc"):
        case = Case(space=(28, 28), channels=40, layout=layout, tail="residual_relu")
        inputs, _ = make(case)
        with torch.no_grad():
            y = steam_kernels.steam(**inputs, backend=gpu, **case.options)
            x = inputs["x"]
            out = steam_kernels.steam(**inputs, backend=gpu, inplace=True, **case.options)
        assert out is x and torch.equal(x, y)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.id)
def test_gradcheck(case: Case, gpu: str) -> None:
    inputs, _ = make(case.but(dtype=torch.float64, weights="x"))

    def call(x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return steam_kernels.steam(x, channel_weight, spatial_weight, residual, backend=gpu, **case.options)

    assert torch.autograd.gradcheck(call, tuple(v.requires_grad_() for v in inputs.values()))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_compiled_has_the_same_bits(layout: str, gpu: str) -> None:
    case = Case(space=(28, 28), channels=40, layout=layout)
    inputs, dy = make(case)
    torch._dynamo.reset()

    def unit(*args: Any, **kwargs: Any) -> Tensor:
        return steam_kernels.steam(*args, backend=gpu, **kwargs)

    compiled = torch.compile(unit, fullgraph=True)
    got = cases.forward_backward(compiled, inputs, dy, **case.options)
    assert equal(got, run(case, gpu, inputs, dy))


def test_offsets_beyond_32_bits(gpu: str) -> None:
    """In a map with more than 2**31 elements, the last sample has the same bits as alone."""
    shape = (2, 40, 5200, 5200)  # 2.2e9 half-precision numbers: x, y, dy and dx are 17 GB
    free, _ = torch.cuda.mem_get_info()
    if free < 24e9:
        pytest.skip(f"needs 24 GB of free GPU memory, and there are {free / 1e9:.0f} GB")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=memory_format).normal_()
        weights = torch.randn(2, 4, 8, device=DEVICE)
        x.requires_grad_()
        y = steam_kernels.steam(x, *weights, backend=gpu)
        (dx,) = torch.autograd.grad(y, x, x.detach())
        alone = x.detach()[1:].clone(memory_format=memory_format).requires_grad_()
        y_alone = steam_kernels.steam(alone, *weights, backend=gpu)
        (dx_alone,) = torch.autograd.grad(y_alone, alone, alone.detach())
        assert torch.equal(y[1:], y_alone) and torch.equal(dx[1:], dx_alone)
        del x, y, dx, alone, y_alone, dx_alone
        gc.collect()


# ---- deterministic ---------------------------------------------------------------------------------------------------

DETERMINISM = [
    Case(space=(size, size), channels=channels, batch=16, layout=layout, dtype=dtype, tail=tail)
    for channels, size in STAGES.values()
    for layout in ("nchw", "nhwc")
    for dtype, tail in ((torch.float32, "none"), (torch.bfloat16, "residual_relu"))
] + [Case(space=(57, 61), channels=130, batch=5, grid=(13, 21), layout=layout) for layout in ("nchw", "nhwc")]


@pytest.mark.parametrize("case", DETERMINISM, ids=lambda c: c.id)
def test_a_hundred_runs_have_equal_bits(case: Case, gpu: str) -> None:
    """The bits are equal even while another stream runs, which changes the schedule of the blocks."""
    inputs, dy = make(case)
    first = run(case, gpu, inputs, dy)
    noise, other = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    for i in range(100):
        if i % 2:
            with torch.cuda.stream(other):
                noise @ noise
        assert equal(first, run(case, gpu, inputs, dy)), f"run {i} differs"
    torch.cuda.synchronize()


def test_deterministic_algorithms(gpu: str) -> None:
    """With deterministic algorithms no operation raises, in forward, backward and second derivatives."""
    case = cases.SMALL[0]
    inputs, _ = make(case)
    leaves = [t.requires_grad_() for t in inputs.values()]
    torch.use_deterministic_algorithms(True)
    try:
        y = steam_kernels.steam(**inputs, backend=gpu, **case.options)
        gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    finally:
        torch.use_deterministic_algorithms(False)


def test_equal_bits_can_fail(gpu: str) -> None:
    """The control: changing one number of x changes every result."""
    case = Case(space=(28, 28), channels=9)
    inputs, dy = make(case)
    first = run(case, gpu, inputs, dy)
    inputs["x"][0, 0, 0, 0] *= 1.5
    second = run(case, gpu, inputs, dy)
    assert all(not torch.equal(first[name], second[name]) for name in first)


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", STAGES)
def test_graph_capture_and_replay(size: str, layout: str, gpu: str) -> None:
    """A graph that is captured once and replayed on other values gives the bits of an eager call."""
    channels, side = STAGES[size]
    case = Case(space=(side, side), channels=channels, batch=4, layout=layout, tail="residual_relu")
    inputs, dy = make(case)
    captured: dict[str, Tensor] = {}
    (replay,) = cuda.capture(lambda: captured.update(run(case, gpu, inputs, dy)))
    for seed in (1, 2):
        others, other_dy = make(case.but(seed=seed))
        with torch.no_grad():
            for name, value in others.items():
                inputs[name].copy_(value)
            dy.copy_(other_dy)
        replay()
        torch.cuda.synchronize()
        assert equal(run(case, gpu, others, other_dy), captured)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_runs_on_the_current_stream(layout: str, gpu: str) -> None:
    """x is written late on the current stream, so a kernel on another stream would read the old values."""
    case = Case(space=(28, 28), channels=64, batch=8, layout=layout)
    inputs, dy = make(case)
    expected = run(case, gpu, inputs, dy)
    late = {k: torch.full_like(v, float("nan")) for k, v in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        for name, value in inputs.items():
            late[name].copy_(value)
        got = run(case, gpu, late, dy)
    stream.synchronize()
    assert equal(expected, got)


def test_no_synchronisation(gpu: str) -> None:
    """Forward and backward do not wait for the GPU, but the control does."""
    case = Case(space=(28, 28), channels=64, batch=8)
    inputs, dy = make(case)
    run(case, gpu, inputs, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, gpu, inputs, dy)
        with pytest.raises(RuntimeError, match="synchroniz"):
            dy.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_device(gpu: str) -> None:
    """With tensors on cuda:1 while cuda:0 is current, kernels are launched on x's device."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and there are {torch.cuda.device_count()}")
    case = Case(space=(28, 28), channels=64, tail="residual_relu")
    first, second = (make(case, device) for device in ("cuda:0", "cuda:1"))
    with torch.cuda.device(0):
        got = run(case, gpu, *second)
    torch.cuda.synchronize(1)
    assert {v.device for v in got.values()} == {torch.device("cuda:1")}
    check(case, gpu, got)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert equal(run(case, gpu, *first), got)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak(call: Callable[[], Any]) -> int:
    """The peak of the bytes that a second call requests, with its result."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    return memory.traced(call)[1].peak


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", STAGES)
def test_peak_memory(size: str, layout: str, gpu: str) -> None:
    """Forward allocates y, P and a few numbers for each node. Backward allocates dx, P, R and a few numbers.

    If each cell is one pixel, neither P nor R is allocated. Of the five numbers for a node in the forward pass, two are
    saved, one is its gate, and the others are the windows and partials of blocks of channels. If a cell has four
    pixels, the Triton kernels do not allocate P forward, and have six numbers for a node, because they have twice the
    blocks. They also have more: backward K + 1 + 2 heads derivatives for a node, and two rows of cells for each program
    that computes the lattice, one for at least 2048 numbers of the map forward and for 64 channels backward.
    """
    channels, side = STAGES[size]
    case = Case(space=(side, side), channels=channels, batch=8, layout=layout)
    inputs, dy = make(case)
    x_bytes, cells = inputs["x"].nbytes, 49
    sums = 0 if side == 7 else 4 * case.batch * channels * cells
    nodes = 4 * case.batch * (channels + cells)
    slack = 12 * 128  # the working memory of a call is one allocation, whose at most 12 parts begin at 128 bytes
    lattices, derivatives = (x_bytes * 2 * cells // 2048, 12) if gpu == "triton" else (0, 0)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    with torch.no_grad():
        forward = peak(lambda: steam_kernels.steam(**inputs, backend=gpu, **case.options))
    kept, numbers = (0, 6) if gpu == "triton" and side == 14 else (sums, 5)
    assert forward <= x_bytes + kept + numbers * nodes + lattices + slack

    y = steam_kernels.steam(**leaves, backend=gpu, **case.options)
    backward = peak(lambda: torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True))
    assert backward <= x_bytes + 2 * sums + (8 + derivatives) * nodes + slack


def test_training_does_not_leak(gpu: str) -> None:
    case = Case(space=(28, 28), channels=64, batch=4)
    inputs, dy = make(case)

    def allocated(runs: int) -> int:
        for _ in range(runs):
            run(case, gpu, inputs, dy)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    assert allocated(3) == allocated(20)
