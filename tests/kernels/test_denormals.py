"""Denormal numbers: every thread of a call has the caller's floating-point mode, and its own mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case
from tests.support.in_a_thread import in_a_thread

pytestmark = pytest.mark.kernels

CASES = [
    # The cases cover threads with different samples, threads that share a sample, and every walk of the CPU kernels.
    Case(space=(56, 56), channels=32, batch=2),
    Case(space=(57, 61), channels=33, batch=1, layout="nhwc"),
    Case(space=(14, 14), channels=300, batch=3, tail="residual_relu"),
    Case(space=(7, 7), channels=1100, batch=1, radius=3),
    Case(space=(100, 167), channels=3, batch=1, layout="nhwc", grid=(13, 21)),
    Case(space=(28, 28), channels=70, batch=1, radius=20, dtype=torch.float64),
]


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no mode that flushes denormal numbers")
    yield
    torch.set_flush_denormal(False)


class Call:
    """A forward and backward in which x, the residual and dy are denormal numbers, and so are the results."""

    def __init__(self, case: Case, backend: str) -> None:
        torch.set_num_threads(1)  # this thread makes the numbers, in its own mode
        self.options = {"backend": backend, **case.options}
        self.inputs, dy = cases.make(case)
        for name in ("x", "residual"):
            if name in self.inputs:
                self.inputs[name].mul_(torch.finfo(case.dtype).tiny / 8)
        self.dy = dy * (torch.finfo(case.dtype).tiny / 8)

    def __call__(self, threads: int) -> dict[str, torch.Tensor]:
        """The bits of all outputs as integers, because comparisons of floats also depend on the mode."""
        torch.set_num_threads(threads)
        results = cases.forward_backward(steam_kernels.steam, self.inputs, self.dy, **self.options)
        return {k: v.contiguous().view(torch.uint8) for k, v in results.items()}


def flushed(threads: int = 2) -> list[int]:
    """The number of denormals that a multiplication in PyTorch makes 0, in each half of a tensor of two threads."""
    torch.set_num_threads(threads)
    x = torch.full((1 << 20,), 1000, dtype=torch.int32).view(torch.float32)
    return [int((half == 0).sum()) for half in (x * 0.5).view(torch.int32).chunk(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("helpers_flush", [False, True])
def test_bits_do_not_depend_on_threads(backend: str, case: Case, helpers_flush: bool) -> None:
    """The bits depend on the caller's mode only, not on the modes of its helper threads.

    A helper thread has the mode that was set when it was started.
    """

    call = Call(case, backend)

    def check() -> None:
        torch.set_flush_denormal(helpers_flush)
        flushed()  # starts the helper threads
        results = {}
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            one, two = call(1), call(2)
            for name, bits in one.items():
                assert torch.equal(bits, two[name]), f"{name}, flush {flush}"
            results[flush] = one
        for name in ("y", "dx"):
            assert not torch.equal(results[False][name], results[True][name]), "the control: the mode shows in results"

    in_a_thread(check)


@pytest.mark.parametrize("helpers_flush", [False, True])
def test_helpers_get_their_own_mode_back(backend: str, helpers_flush: bool) -> None:
    calls = [Call(case, backend) for case in CASES]

    def check() -> None:
        torch.set_flush_denormal(helpers_flush)
        flushed()
        torch.set_flush_denormal(not helpers_flush)
        before = flushed()
        assert min(before) == 0 and max(before) == 1 << 19, "the control: caller and helper have different modes"
        for call in calls:
            call(2)
        assert flushed() == before

    in_a_thread(check)
