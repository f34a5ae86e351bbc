"""Checks of tokens far from zero and of saturated gates, for which naive formulas lose every digit.

The tests of every backend with kernels use these checks.
"""

from __future__ import annotations

import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case
from tests.support.tolerances import within


def far_from_zero(backend: str, mean: float, spread: float, case: Case) -> None:
    # With these weights, tokens near 50 that differ by 0.01 have scores of the order of 1.
    inputs, dy = cases.make(case, mean=mean, spread=spread, weight_scale=0.5)
    cases.check(case, backend, inputs, dy)


def constant_maps_are_not_noisy(
    backend: str, space: tuple[int, int], channels: int, layout: str, mean: float, spread: float
) -> None:
    """If all tokens are equal, every variance is 0, so the gradients of the query and key rows are zero."""
    case = Case(space=space, channels=channels, layout=layout, order="parallel")
    inputs, dy = cases.make(case)
    inputs["x"].fill_(mean)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    value_rows = got["dchannel_weight"][2:].abs().max()
    # A token is a mean of equal numbers, with an error of at most a few eps. The square of the error enters the
    # gradient.
    noise = (8 * torch.finfo(torch.float32).eps * mean) ** 2 * abs(mean)
    bound = max(noise, 1e-6) * max(value_rows.item(), 1.0)
    assert within(got["dchannel_weight"][:2].abs().max().item(), bound, f"query and key rows {case.id}")


def saturated_gates(backend: str, dtype: torch.dtype, layout: str, which: str, sign: float, strength: float) -> None:
    """At pre-activations of 12, 40 and 80, 1 - g must be computed as sigma(-o), because g is rounded to 1."""
    case = Case(space=(14, 14), channels=12, layout=layout, dtype=dtype)
    inputs, dy = cases.make(case, mean=1.0, spread=0.1)
    for name in ("channel", "spatial"):
        weight = inputs[name + "_weight"]
        if which in (name, "both"):
            # o = sum_k b_k m_i, and m is near the channels' token of 1, so the b_k sum to the strength.
            weight[2] = 1.0
            weight[3] = sign * strength / 8
    if which == "both" and sign < 0 and strength > 40:
        # In sequential order u is pooled from the gated map and is only 1e-35, so the spatial gate cannot saturate.
        case = case.but(order="parallel")
    cases.check(case, backend, inputs, dy)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert all(v.isfinite().all() for v in got.values())


def sharp_attention(backend: str, layout: str, sign: float) -> None:
    """With scores of hundreds the softmax is one-hot. It neither overflows nor divides by zero."""
    case = Case(space=(14, 14), channels=24, layout=layout, radius=2, neighbors=8)
    inputs, dy = cases.make(case, mean=0.0, spread=5.0)
    for name in ("channel_weight", "spatial_weight"):
        inputs[name][0] = 30.0
        inputs[name][1] = sign * 30.0
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert all(v.isfinite().all() for v in got.values())
    cases.check(case, backend, inputs, dy)
