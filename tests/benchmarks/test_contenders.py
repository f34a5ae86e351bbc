"""The contenders compute the functions that they are named after."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch

from benchmarks import gates, plain

SERVED = cases.FACTORS | {
    "where": tuple(s for s in cases.SPACES if s[0][0] * s[0][1] <= 900 and not isinstance(s[1], str)),
    "channels": (1, 2, 3, 8, 17, 64),
    "layout": ("nchw", "nhwc"),
    "dtype": (torch.float64, torch.float32),
    "scale": (1.0,),
    "tail": ("none", "relu", "residual", "residual_relu"),
    "dy_layout": ("same",),
}


def test_the_honest_baseline_is_the_unit() -> None:
    """Output and gradients keep the tests' rule for every pair of values of the options that the baseline serves."""
    chosen = cases.all_pairs(SERVED)
    assert len(chosen) > 40
    for case in chosen:
        inputs, dy = cases.make(case)
        options = case.options | {"grid_size": case.resolved_grid}
        assert options.pop("scale") == 1
        cases.bounds_of(case, inputs, dy).check(cases.forward_backward(plain.steam, inputs, dy, **options), case.id)


def test_a_wrong_baseline_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is narrow enough to find one missing neighbour."""
    case = cases.Case(dtype=torch.float64)
    inputs, dy = cases.make(case)
    options = case.options | {"grid_size": case.resolved_grid, "self_loops": False}
    del options["scale"]
    with pytest.raises(AssertionError, match=r"y .*error"):
        cases.bounds_of(case, inputs, dy).check(cases.forward_backward(plain.steam, inputs, dy, **options), case.id)


def test_gaussian_gct_is_its_formula() -> None:
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    pooled = x.numpy().mean((2, 3))
    normal = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-5)
    expected = x.numpy() * np.exp(-2 * normal**2)[:, :, None, None]
    np.testing.assert_allclose(gates.GaussianGCT(6)(x).numpy(), expected, rtol=1e-13)
