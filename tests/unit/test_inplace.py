"""inplace=True writes y into x if autograd does not record. Otherwise it raises an error and leaves x unchanged."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM
from tests.support import cases
from tests.support.cases import Case

pytestmark = pytest.mark.kernels

CASES = [
    Case(space=space, channels=channels, batch=batch, layout=layout, dtype=dtype, tail=tail, grid=grid)
    for space, channels, batch, grid in (
        ((7, 7), 130, 2, None),
        ((14, 14), 3, 3, (3, 5)),
        ((28, 28), 33, 1, None),
        ((57, 61), 9, 2, (13, 21)),
        ((5, 3), 16, 5, None),
        ((1, 1), 4, 1, None),
        ((3, 4), 5, 0, None),
    )
    for layout, dtype, tail in (
        ("nchw", torch.float32, "none"),
        ("nhwc", torch.float32, "residual_relu"),
        ("offset_nchw", torch.bfloat16, "residual"),
        ("offset_nhwc", torch.bfloat16, "relu"),
        ("channel_slice", torch.float32, "other_relu"),
        ("column_slice", torch.float64, "residual_relu"),
        ("nhwc", torch.float16, "other_relu"),
    )
]
# These maps are so large that outputs are written past the cache.
CASES += [
    Case(space=(57, 61), channels=35, batch=36, layout="offset_nchw", tail="residual_relu"),
    Case(space=(57, 61), channels=35, batch=36, layout="nhwc"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_equals_the_call_out_of_place(case: Case, any_backend: str) -> None:
    inputs, _ = cases.make(case)
    expected = steam_kernels.steam(**inputs, backend=any_backend, **case.options)
    x, residual = inputs["x"], inputs.get("residual")
    pointer, strides, version = x.data_ptr(), x.stride(), x._version
    residual_before = None if residual is None else residual.clone()
    y = steam_kernels.steam(**inputs, backend=any_backend, inplace=True, **case.options)
    assert y is x and x.data_ptr() == pointer and x.stride() == strides
    assert torch.equal(x, expected)
    assert x.numel() == 0 or x._version > version
    assert residual is None or torch.equal(residual, residual_before)
    if x._base is not None and case.layout == "channel_slice":
        assert x._base[:, :3].isnan().all() and x._base[:, 3 + case.channels :].isnan().all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "channel_slice"])
def test_inference_mode(any_backend: str, layout: str) -> None:
    case = Case(space=(9, 8), channels=6, layout=layout, tail="residual_relu")
    inputs, _ = cases.make(case)
    expected = steam_kernels.steam(**inputs, backend=any_backend, **case.options)
    with torch.inference_mode():
        made_here = {k: v.clone() for k, v in inputs.items()}
        y = steam_kernels.steam(**made_here, backend=any_backend, inplace=True, **case.options)
        assert y is made_here["x"] and torch.equal(y, expected)
    with torch.no_grad():
        assert torch.equal(steam_kernels.steam(**inputs, backend=any_backend, inplace=True, **case.options), expected)


@pytest.mark.parametrize("which", ["x", "channel_weight", "spatial_weight", "residual"])
def test_recorded_gradient_is_an_error(any_backend: str, which: str) -> None:
    case = Case(space=(9, 8), channels=6, tail="residual_relu")
    inputs, _ = cases.make(case)
    inputs[which].requires_grad_()
    before = inputs["x"].detach().clone()
    version = inputs["x"]._version
    with pytest.raises(RuntimeError, match="inplace=True"):
        steam_kernels.steam(**inputs, backend=any_backend, inplace=True, **case.options)
    assert torch.equal(inputs["x"].detach(), before) and inputs["x"]._version == version
    with torch.no_grad():
        steam_kernels.steam(**inputs, backend=any_backend, inplace=True, **case.options)
    assert not torch.equal(inputs["x"].detach(), before)


@pytest.mark.parametrize("how", ["same", "view", "overlap"])
def test_residual_that_shares_x_is_an_error(any_backend: str, how: str) -> None:
    wide = torch.randn(3, 6, 9, 8)
    x = wide[:2]
    residual = {"same": x, "view": wide.view(3, 6, 72).view(3, 6, 9, 8)[:2], "overlap": wide[1:]}[how]
    inputs, _ = cases.make(Case(channels=6))
    before = wide.clone()
    with pytest.raises(ValueError, match="residual must not share memory"):
        steam_kernels.steam(
            x, inputs["channel_weight"], inputs["spatial_weight"], residual, backend=any_backend, inplace=True
        )
    assert torch.equal(wide, before)


def test_expanded_x_is_an_error(any_backend: str) -> None:
    x = torch.randn(1, 6, 9, 8).expand(3, 6, 9, 8)
    inputs, _ = cases.make(Case(channels=6))
    with pytest.raises(ValueError, match="x must not overlap itself"):
        steam_kernels.steam(x, inputs["channel_weight"], inputs["spatial_weight"], backend=any_backend, inplace=True)


def test_who_saved_x_hears_of_it(any_backend: str) -> None:
    """If y overwrites a tensor that an earlier operation saved, its backward raises, as with an in-place ReLU."""
    inputs, _ = cases.make(Case(channels=6))
    weight = torch.randn(2, 6, 14, 14, requires_grad=True)
    x = inputs["x"]
    product = weight * x
    with torch.no_grad():
        steam_kernels.steam(x, inputs["channel_weight"], inputs["spatial_weight"], backend=any_backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_module(any_backend: str) -> None:
    unit = FusedSTEAM(6, inplace=True, activation="relu", backend=any_backend)
    x, residual = torch.randn(2, 6, 9, 8), torch.randn(2, 6, 9, 8)
    with pytest.raises(RuntimeError, match="inplace=True"):
        unit(x.clone(), residual)
    unit.requires_grad_(False)
    expected = torch.relu(
        FusedSTEAM.forward(unit, x.clone()) * 0
        + steam_kernels.steam(x, unit.channel_weight, unit.spatial_weight, backend=any_backend)
        + residual
    )
    assert unit(x, residual) is x
    assert torch.allclose(x, expected, rtol=1e-6, atol=1e-6)


def test_saves_the_allocation(backend: str) -> None:
    inputs, _ = cases.make(Case(space=(28, 28), channels=32, batch=4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        steam_kernels.steam(**inputs, backend=backend, inplace=True)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert sum(sizes) < inputs["x"].numel() * 4 / 10
