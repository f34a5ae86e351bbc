"""Tokens far from zero and saturated gates, for which naive formulas lose every digit, forward and backward."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from tests.support import cases, numerics
from tests.support.cases import Case
from tests.support.tolerances import within

pytestmark = pytest.mark.kernels

OPTIONS = [
    {},
    {"order": "parallel", "neighbors": 8, "radius": 3},
    {"self_loops": False, "attention": (8, 1), "radius": 2},
    {"tail": "residual_relu", "attention": (8, 8)},
]
PLACES = [
    ((7, 7), 64, "nchw"),
    ((7, 7), 64, "nhwc"),
    ((28, 28), 33, "nchw"),
    ((57, 61), 9, "nhwc"),
    ((57, 61), 5, "nchw"),
    ((5, 3), 7, "nhwc"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("space,channels,layout", PLACES)
@pytest.mark.parametrize("mean,spread", [(50.0, 0.01), (-50.0, 0.01), (50.0, 1.0)])
def test_far_from_zero(
    backend: str,
    mean: float,
    spread: float,
    space: tuple[int, int],
    channels: int,
    layout: str,
    options: dict[str, object],
    dtype: torch.dtype,
) -> None:
    case = Case(space=space, channels=channels, layout=layout, dtype=dtype).but(**options)
    numerics.far_from_zero(backend, mean, spread, case)


@pytest.mark.parametrize("mean,spread", [(50.0, 0.01), (-50.0, 0.01)])
@pytest.mark.parametrize("space,channels,layout", PLACES)
def test_constant_maps_are_not_noisy(
    backend: str, space: tuple[int, int], channels: int, layout: str, mean: float, spread: float
) -> None:
    numerics.constant_maps_are_not_noisy(backend, space, channels, layout, mean, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("which", ["channel", "spatial", "both"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("strength", [12.0, 40.0, 80.0])
def test_saturated_gates(
    backend: str, dtype: torch.dtype, layout: str, which: str, sign: float, strength: float
) -> None:
    numerics.saturated_gates(backend, dtype, layout, which, sign, strength)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sharp_attention(backend: str, layout: str, sign: float) -> None:
    numerics.sharp_attention(backend, layout, sign)


def test_long_sums(backend: str) -> None:
    """A map with a megapixel of 1 + small noise in float32. One running sum would have an error of 1e-3."""
    case = Case(space=(1024, 1024), channels=1, batch=1, grid=1)
    for layout in ("nchw", "nhwc"):
        inputs, dy = cases.make(case.but(layout=layout), mean=100.0, spread=1.0)
        cases.check(case.but(layout=layout), backend, inputs, dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gate_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """y is the correctly rounded product, except near ties, because the gate is not rounded to x's dtype first."""
    case = Case(space=(28, 28), channels=32, dtype=dtype)
    inputs, _ = cases.make(case)
    wide = {k: v.double() for k, v in inputs.items()}
    exact = steam_kernels.reference.steam(**wide, **case.options)
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    error = (y.double() - exact).abs() / exact.abs().clamp(min=torch.finfo(dtype).tiny)
    # The error is at most half an ulp, plus the error of the float32 gate.
    half = 0.5 * torch.finfo(dtype).eps
    assert within(error.max().item() - half, 5 * torch.finfo(torch.float32).eps, f"beyond half an ulp of {dtype}")
