"""The contenders compute the functions that they are named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import contenders, gates, judging, plain
from benchmarks.shapes import NAMED_OPTIONS, Options, Shape
from tests.support import cases

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


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_two_steps_are_the_tail(layout: str) -> None:
    """Each contender computes ``relu(gate(x) + residual)``. The contenders of this package do it in one pass."""
    shape = Shape(2, 8, 9, 9, "float64", layout, Options(tail=True))
    tensors = shape.tensors()
    plain_shape = shape.with_options(tail=False)
    for name in ("eager", "plain", *gates.GATES):
        found = judging.outputs(contenders.CONTENDERS[name](shape), shape, tensors)
        gated = judging.outputs(contenders.CONTENDERS[name](plain_shape), plain_shape, tensors)
        for y in ("y", "inference"):
            torch.testing.assert_close(found[y], (gated[y] + tensors["residual"]).relu())
        assert torch.equal(found["dresidual"], tensors["dy"] * (found["y"] > 0))
    for name in ("fused", "eager"):
        contender = contenders.two_steps(contenders.Fused("reference")) if name == "fused" else contenders.eager()
        judging.judge(shape, tensors).check(judging.outputs(contender, shape, tensors))


def test_a_unit_without_a_tail_does_not_read_the_residual() -> None:
    shape = Shape(1, 8, 7, 7)
    tensors = shape.with_options(tail=True).tensors()
    for name in ("fused", "eager", "se"):
        call = contenders.call_of(contenders.CONTENDERS[name](shape), shape, tensors, True)
        assert "residual" not in call.leaves and all(arg is not tensors["residual"] for arg in call.args)


def test_options_are_in_the_label() -> None:
    labels = {Shape(2, 8, 14, 14, options=options).label for options in NAMED_OPTIONS.values()}
    assert len(labels) == len(NAMED_OPTIONS)
    assert Shape(2, 8, 14, 14).label == "2x8x14x14-float32-nchw"
    assert Shape(2, 8, 14, 14, options=NAMED_OPTIONS["grid"]).label == "2x8x14x14-grid13x14-float32-nchw"
    assert Shape(2, 8, 14, 14, options=NAMED_OPTIONS["tail"]).label == "2x8x14x14-float32-nchw-tail"
