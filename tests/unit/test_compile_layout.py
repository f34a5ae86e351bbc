"""Inductor chooses the memory format. It makes no copy of a map before or after a unit, and needs no memory for one.

Inductor runs the convolutions of an NCHW network in channels_last. An operator that requires the traced strides would
make Inductor transpose each map before and after the unit. These tests read the code that Inductor generates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from steam_kernels import FusedSTEAM
from tests.support import networks


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    """Inductor's cache is off, because its key does not contain the tags of the operators."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def body(code: str) -> list[str]:
    """The lines of the generated function that calls the kernels."""
    return code[code.index("def call(") : code.index("runner = ")].splitlines()


def copies(code: str) -> list[str]:
    """The kernels of Inductor that change the strides of a map for an operator."""
    found, origin = [], ""
    for line in map(str.strip, body(code)):
        if line.startswith("#"):
            origin = line if "Original ATen" in line else origin
        elif re.match(r"cpp_fused\w*\(", line) and "steam_kernels" in origin:
            found.append(line)
        elif "steam_kernels" in line or "cpp_fused" in line or "extern_kernels" in line:
            origin = ""
    return found


def outputs(code: str, name: str) -> list[str]:
    """The names of the first result of each call of an operator."""
    text = "\n".join(body(code))
    return [
        re.search(rf"(\w+) = {call}\[0\]", text)[1]  # type: ignore[index]
        for call in re.findall(rf"(\w+) = torch\.ops\.steam_kernels\.{name}\.default\(", text)
    ]


def convolved(code: str) -> set[str]:
    """The inputs of the convolutions."""
    return set(re.findall(r"extern_kernels\.convolution\((\w+),", "\n".join(body(code))))


class Network(nn.Module):
    """Convolutions with units between them: a plain one, one after a normalisation, one with a residual and a ReLU."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            # The gradient of a bias before a normalisation would be only rounding errors.
            nn.Conv2d(a, b, 3, padding=1, bias=i != 1)
            for i, (a, b) in enumerate(((3, 16), (16, 16), (16, 16), (16, 4)))
        )
        self.norm = nn.BatchNorm2d(16)
        self.plain, self.normed = FusedSTEAM(16, backend=backend), FusedSTEAM(16, backend=backend)
        self.tail = FusedSTEAM(16, activation="relu", backend=backend)
        networks.strengthen(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.plain(torch.relu(self.first(x)))
        b = self.normed(torch.relu_(self.norm(self.second(a))))
        return self.last(self.tail(self.third(b), a))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_no_copies_at_inference(backend: str, layout: torch.memory_format) -> None:
    net = Network(backend).eval().to(memory_format=layout)
    x = torch.randn(2, 3, 20, 24).to(memory_format=layout)
    fast = torch.compile(net, fullgraph=True)
    with torch.no_grad():
        y, (code,) = run_and_get_code(fast, x)
        assert torch.allclose(y, net(x), rtol=1e-4, atol=1e-5)
    assert copies(code) == []
    assert len(outputs(code, "forward")) == 3 and set(outputs(code, "forward")) <= convolved(code)


def test_no_copies_in_training(backend: str) -> None:
    net = Network(backend)
    x = torch.randn(2, 3, 20, 24)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(net(x).square().mean(), parameters)
    fast = torch.compile(net, fullgraph=True)
    got, code = run_and_get_code(lambda: torch.autograd.grad(fast(x).square().mean(), parameters))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    forward, backward = code
    assert len(outputs(forward, "forward")) == 3 and set(outputs(forward, "forward")) <= convolved(forward)
    assert len(outputs(backward, "backward")) == 3
    assert copies(forward) == copies(backward) == []


@pytest.mark.parametrize("grad", [False, True])
def test_tail_of_two_memory_formats(backend: str, grad: bool) -> None:
    """The compiler runs the convolution in channels_last and the residual is in NCHW, and the other way round."""
    convolution, unit = nn.Conv2d(3, 16, 3, padding=1), FusedSTEAM(16, activation="relu", backend=backend)
    networks.strengthen(unit)

    def call(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return unit(convolution(x), residual)  # type: ignore[no-any-return]

    x, dy = torch.randn(2, 3, 20, 24), torch.randn(2, 16, 20, 24)
    parameters = [*convolution.parameters(), *unit.parameters()]
    for layout in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        residual = torch.randn(2, 16, 20, 24).to(memory_format=layout).requires_grad_(grad)
        fast = torch.compile(call, fullgraph=True)
        with torch.set_grad_enabled(grad):
            y, expected = fast(x, residual), call(x, residual)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
        if grad:
            inputs = [*parameters, residual]
            pairs = zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item()) for a, b in pairs)


def peak(function: Callable[[], object]) -> int:
    """The peak of the bytes that torch holds, minus the bytes at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = largest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest


@pytest.mark.slow
def test_resnet50_at_inference(backend: str) -> None:
    """Convolutions read four units' outputs, and the mean reads the last. Units do not raise the peak of memory."""
    pytest.importorskip("torchvision")
    x, peaks = torch.randn(2, 3, 96, 96), []
    for units in (True, False):
        torch._dynamo.reset()
        options = {"backend": backend} if units else {}
        model = networks.settle(networks.resnet("resnet50", units=units, **options))
        fast = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            y, (code,) = run_and_get_code(fast, x)
            peaks.append(peak(lambda fast=fast: fast(x)))  # type: ignore[misc]
            if units:
                assert torch.allclose(y, model(x), rtol=1e-3, atol=1e-3 * y.abs().max().item())
                assert copies(code) == []
                assert len(outputs(code, "forward")) == 5
                assert len(set(outputs(code, "forward")) & convolved(code)) == 4
    assert peaks[0] <= 1.02 * peaks[1]


@pytest.mark.slow
def test_resnet50_in_training(backend: str) -> None:
    pytest.importorskip("torchvision")
    fast = torch.compile(networks.resnet("resnet50", backend=backend), fullgraph=True)
    _, (forward, backward) = run_and_get_code(lambda: fast(torch.randn(2, 3, 64, 64)).square().mean().backward())
    assert copies(forward) == copies(backward) == []
    assert len(set(outputs(forward, "forward")) & convolved(forward)) == 4
    assert len(outputs(backward, "backward")) == 5
