"""The bits are equal on repetition, for any number of threads and with any other samples in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case

pytestmark = pytest.mark.kernels

CASES = [
    Case(space=space, channels=channels, batch=batch, layout=layout, dtype=dtype, tail=tail, radius=2, neighbors=8)
    for batch in (1, 2, 3, 5)
    for layout in ("nchw", "nhwc")
    for space, channels, dtype, tail in (
        ((7, 7), 130, torch.float32, "none"),
        ((28, 28), 64, torch.bfloat16, "residual_relu"),
        ((57, 61), 9, torch.float32, "residual_relu"),
    )
]
CASES += [
    Case(space=(56, 56), channels=96, batch=1, layout="nchw"),
    Case(space=(56, 56), channels=96, batch=1, layout="nhwc"),
    # Threads share a sample by ranges of channels. Few or many neighbours lie beyond a range.
    Case(space=(14, 14), channels=300, batch=1, radius=3),
    Case(space=(7, 7), channels=1100, batch=1, dtype=torch.bfloat16),
    Case(space=(28, 28), channels=70, batch=1, radius=20),
    Case(space=(100, 167), channels=3, batch=1, layout="nchw", grid=(13, 21)),
    Case(space=(100, 167), channels=3, batch=1, layout="nhwc", grid=(13, 21)),
    Case(space=(1, 500), channels=17, batch=1, dtype=torch.float64),
    Case(space=(30, 17), channels=33, batch=3, dtype=torch.float16, layout="nhwc"),
]


def run(case: Case, backend: str) -> dict[str, torch.Tensor]:
    inputs, dy = cases.make(case)
    return cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_bits_do_not_depend_on_threads_or_run(case: Case, backend: str) -> None:
    torch.set_num_threads(1)
    first = run(case, backend)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        again = run(case, backend)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} differs on {threads} threads"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("space,channels", [((7, 7), 64), ((28, 28), 33), ((57, 61), 5)])
def test_a_sample_does_not_depend_on_its_batch(
    backend: str, space: tuple[int, int], channels: int, layout: str
) -> None:
    """y and dx of a sample have the same bits alone and in a batch."""
    case = Case(space=space, channels=channels, batch=5, layout=layout)
    inputs, dy = cases.make(case)
    together = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    for n in range(5):
        one = inputs | {"x": cases.lay_out(inputs["x"][n : n + 1], layout)}
        alone = cases.forward_backward(
            steam_kernels.steam, one, cases.lay_out(dy[n : n + 1], layout), backend=backend, **case.options
        )
        for name in ("y", "dx"):
            assert torch.equal(alone[name][0], together[name][n]), f"{name} of sample {n}"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "column_slice"])
@pytest.mark.parametrize("tail", ["none", "residual_relu"])
def test_deterministic_algorithms(deterministic: None, any_backend: str, tail: str, layout: str) -> None:
    """With PyTorch's deterministic algorithms no operation raises an error, also in second derivatives."""
    case = Case(space=(14, 13), channels=9, layout=layout, tail=tail)
    first, again = run(case, any_backend), run(case, any_backend)
    assert all(torch.equal(first[name], again[name]) for name in first)
    inputs, _ = cases.make(case)
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = steam_kernels.steam(**inputs, backend=any_backend, **case.options)
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves))


def test_equal_bits_can_fail(backend: str) -> None:
    """The control: changing one input bit changes the result, so the comparisons above can fail."""
    case = Case(space=(28, 28), channels=9)
    inputs, dy = cases.make(case)
    first = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    inputs["x"][0, 0, 0, 0] *= 1.5
    second = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert all(not torch.equal(first[name], second[name]) for name in first)
