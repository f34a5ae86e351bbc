"""Tokens far from zero and saturated gates: where the naive forms lose every digit, forwards and backwards."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from tolerances import within

import steam_kernels

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
    # weights that make scores of the order of 1 from tokens of 50 that differ by 0.01
    inputs, dy = cases.make(case, mean=mean, spread=spread, weight_scale=0.5)
    cases.check(case, backend, inputs, dy)


@pytest.mark.parametrize("mean,spread", [(50.0, 0.01), (-50.0, 0.01)])
@pytest.mark.parametrize("space,channels,layout", PLACES)
def test_constant_maps_are_not_noisy(
    backend: str, space: tuple[int, int], channels: int, layout: str, mean: float, spread: float
) -> None:
    """All tokens equal: every variance is 0, so the query and key rows get no gradient at all."""
    case = Case(space=space, channels=channels, layout=layout, order="parallel")
    inputs, dy = cases.make(case)
    inputs["x"].fill_(mean)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    value_rows = got["dchannel_weight"][2:].abs().max()
    # a token is a mean of equal numbers: off by a few eps at most, and its square counts
    noise = (8 * torch.finfo(torch.float32).eps * mean) ** 2 * abs(mean)
    bound = max(noise, 1e-6) * max(value_rows.item(), 1.0)
    assert within(got["dchannel_weight"][:2].abs().max().item(), bound, f"query and key rows {case.id}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("which", ["channel", "spatial", "both"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("strength", [12.0, 40.0, 80.0])
def test_saturated_gates(
    backend: str, dtype: torch.dtype, layout: str, which: str, sign: float, strength: float
) -> None:
    """Pre-activations of 12, 40, 80: 1 - g is sigma(-o), not 1 minus a rounded 1, which keeps the digits."""
    case = Case(space=(14, 14), channels=12, layout=layout, dtype=dtype)
    inputs, dy = cases.make(case, mean=1.0, spread=0.1)
    for name in ("channel", "spatial"):
        weight = inputs[name + "_weight"]
        if which in (name, "both"):
            # o = sum_k b_k m_i with m near the channels' token of 1, so b sums to the strength
            weight[2] = 1.0
            weight[3] = sign * strength / 8
    if which == "both" and sign < 0 and strength > 40:
        # u, pooled from the gated map, is then 1e-35: nothing left to saturate
        case = case.but(order="parallel")
    cases.check(case, backend, inputs, dy)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert all(v.isfinite().all() for v in got.values())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sharp_attention(backend: str, layout: str, sign: float) -> None:
    """Scores of hundreds: the softmax is one-hot and neither overflows nor divides by zero."""
    case = Case(space=(14, 14), channels=24, layout=layout, radius=2, neighbors=8)
    inputs, dy = cases.make(case, mean=0.0, spread=5.0)
    for name in ("channel_weight", "spatial_weight"):
        inputs[name][0] = 30.0
        inputs[name][1] = sign * 30.0
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert all(v.isfinite().all() for v in got.values())
    cases.check(case, backend, inputs, dy)


def test_long_sums(backend: str) -> None:
    """A megapixel of 1 + small noise in float32: one running sum would be off by 1e-3."""
    case = Case(space=(1024, 1024), channels=1, batch=1, grid=1)
    for layout in ("nchw", "nhwc"):
        inputs, dy = cases.make(case.but(layout=layout), mean=100.0, spread=1.0)
        cases.check(case.but(layout=layout), backend, inputs, dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gate_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """y is the correctly rounded product except near ties: the gate is not rounded to x's dtype first."""
    case = Case(space=(28, 28), channels=32, dtype=dtype)
    inputs, _ = cases.make(case)
    wide = {k: v.double() for k, v in inputs.items()}
    exact = steam_kernels.reference.steam(**wide, **case.options)
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    error = (y.double() - exact).abs() / exact.abs().clamp(min=torch.finfo(dtype).tiny)
    # half an ulp, and beyond it what the float32 gate itself loses
    half = 0.5 * torch.finfo(dtype).eps
    assert within(error.max().item() - half, 5 * torch.finfo(torch.float32).eps, f"beyond half an ulp of {dtype}")
