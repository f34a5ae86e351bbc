"""Memory formats are kept, need no copies and give equal results. Inputs are never written."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case

pytestmark = pytest.mark.kernels

SHAPES = [((7, 7), 16, 2), ((5, 3), 1, 3), ((1, 1), 9, 2), ((28, 28), 3, 1), ((1, 9), 4, 2), ((6, 1), 8, 1)]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("space,channels,batch", SHAPES)
def test_strides_of_outputs(any_backend: str, space: tuple[int, int], channels: int, batch: int, layout: str) -> None:
    """y, dx and dresidual have empty_like(x)'s strides if x is dense in one of the two formats, else those of NCHW."""
    case = Case(space=space, channels=channels, batch=batch, layout=layout, tail="residual_relu")
    inputs, dy = cases.make(case)
    x = inputs["x"]
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    expected = (torch.empty_like(x) if dense else torch.empty(x.shape)).stride()
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    assert got["y"].stride() == expected
    if any_backend != "reference":
        assert got["dx"].stride() == expected


@pytest.mark.parametrize("dy_layout", ["same", "other", "expanded"])
@pytest.mark.parametrize("tail", ["none", "relu", "residual", "residual_relu", "x_relu", "other_relu"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_all_layouts_of_all_arguments(backend: str, layout: str, tail: str, dy_layout: str) -> None:
    case = Case(space=(9, 11), channels=10, batch=2, layout=layout, tail=tail, dy_layout=dy_layout, seed=3)
    cases.check(case, backend, *cases.make(case))


@pytest.mark.parametrize("tail", ["none", "residual_relu"])
@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
def test_dense_inputs_are_not_copied(backend: str, layout: str, tail: str) -> None:
    """The forward pass of a dense x allocates y and the saved numbers, and nothing else of x's size."""
    case = Case(space=(28, 28), channels=32, batch=4, layout=layout, tail=tail)
    inputs, dy = cases.make(case)
    x_bytes = inputs["x"].numel() * 4
    for name in ("x", "residual", "channel_weight"):
        if name in inputs:
            inputs[name].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    assert largest_total(profile) < 1.5 * x_bytes, "forward"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y.backward(dy)
    # Backward allocates dx, and the residual's gradient if a ReLU masks it.
    assert largest_total(profile) < (2.5 if tail == "residual_relu" else 1.5) * x_bytes, "backward"


def largest_total(profile: torch.profiler.profile) -> int:
    """The bytes that torch allocated during profiling."""
    total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.nbytes() > 0:
            total += event.nbytes()
    assert total > 0
    return total


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "channel_slice", "offset_nhwc"])
@pytest.mark.parametrize("tail", ["none", "residual_relu"])
def test_inputs_are_never_written_and_backward_repeats(backend: str, layout: str, tail: str) -> None:
    """Forward and two backwards through one graph do not change the inputs, and the two results have equal bits."""
    case = Case(space=(14, 14), channels=20, batch=3, layout=layout, tail=tail)
    inputs, dy = cases.make(case)
    before = {k: v.clone() for k, v in inputs.items()}
    dy_before = dy.clone()
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    y = steam_kernels.steam(**leaves, backend=backend, **case.options)
    y_before = y.detach().clone()
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(before[k], v.detach()) for k, v in leaves.items())
    assert torch.equal(dy, dy_before) and torch.equal(y.detach(), y_before)


def test_around_a_slice_nothing_is_read_or_written(backend: str) -> None:
    """The memory around a slice is NaN. It does not reach the result and does not change."""
    case = Case(space=(9, 7), channels=6, layout="channel_slice")
    inputs, dy = cases.make(case)
    assert inputs["x"]._base is not None and inputs["x"]._base.isnan().any()
    before = inputs["x"]._base.nan_to_num(123.0)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert all(v.isfinite().all() for v in got.values())
    assert torch.equal(inputs["x"]._base.nan_to_num(123.0), before)
