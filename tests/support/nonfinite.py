"""Checks of maps with NaN and Inf, and of finite maps so large that products of two of their numbers overflow.

The tests of every backend with kernels use these checks.
"""

from __future__ import annotations

import math

import torch

import steam_kernels
from steam_kernels import reference
from tests.support import cases, tolerances
from tests.support.cases import Case

CASES = [
    Case(space=space, channels=channels, batch=3, layout=layout, dtype=dtype, order=order, tail=tail)
    for space, channels, order, dtype, tail in (
        ((7, 7), 9, "sequential", torch.float32, "none"),
        ((14, 14), 40, "parallel", torch.float32, "none"),
        ((28, 28), 16, "sequential", torch.bfloat16, "residual"),
        ((30, 17), 5, "sequential", torch.float32, "residual_relu"),
        ((57, 61), 3, "parallel", torch.float16, "relu"),
        ((9, 2), 130, "sequential", torch.float64, "none"),
    )
    for layout in ("nchw", "nhwc")
]

VALUES = [float("nan"), float("inf"), float("-inf")]


def classes(t: torch.Tensor) -> torch.Tensor:
    """The class of each number: 0 for finite, 1 for NaN, 2 for +Inf, 3 for -Inf."""
    return t.isnan() * 1 + (t == float("inf")) * 2 + (t == float("-inf")) * 3


def compare(case: Case, backend: str, inputs: dict[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Checks that non-finite values are in the same places as in the reference, and that finite values are near."""
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    expected = cases.forward_backward(reference.steam, inputs, dy, **case.options)
    for name, value in got.items():
        assert torch.equal(value.isfinite(), expected[name].isfinite()), (
            f"{name}: finite where the reference is not, or not so"
        )
    assert torch.equal(classes(got["y"]), classes(expected["y"])), "y"
    return got


def one_bad_value_in_x(case: Case, backend: str, value: float) -> None:
    inputs, dy = cases.make(case)
    good = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    inputs["x"][1, case.channels // 2, -1, 0] = value
    bad = compare(case, backend, inputs, dy)
    for n in (0, 2):
        for name in ("y", "dx"):
            assert torch.equal(good[name][n], bad[name][n]), f"{name} of sample {n} changed"
    assert not bad["y"][1].isfinite().all()
    assert not bad["dchannel_weight"].isfinite().any()


def one_bad_value_in_dy(case: Case, backend: str, value: float) -> None:
    """An overflow in dy appears in dx of its sample, as a gradient scaler needs, and does not change other samples."""
    inputs, dy = cases.make(case)
    good = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    spot = (1, case.channels // 2, -1, 0)
    if case.tail.endswith("relu"):
        spot = tuple((good["y"][1] > 0).nonzero()[-1].tolist())
        spot = (1, *spot)
    dy[spot] = value
    bad = compare(case, backend, inputs, dy)
    assert not bad["dx"][spot].isfinite()
    assert torch.equal(good["y"], bad["y"])
    for n in (0, 2):
        assert torch.equal(good["dx"][n], bad["dx"][n]), f"dx of sample {n} changed"


def nan_spreads_only_along_the_graphs(backend: str, space: tuple[int, int], grid: tuple[int, int], layout: str) -> None:
    """In parallel order, a NaN in one cell reaches only the neighbours of its channel and of its cell."""
    case = Case(space=space, channels=12, batch=1, grid=grid, layout=layout, order="parallel")
    inputs, _ = cases.make(case)
    inputs["x"][0, 5, 0, 0] = float("nan")
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)[0]
    rows = torch.arange(space[0]) * grid[0] // space[0]
    columns = torch.arange(space[1]) * grid[1] // space[1]
    near = (rows[:, None] + columns[None, :]) <= 1
    expected = near[None] | torch.tensor([c in (4, 5, 6) for c in range(12)])[:, None, None]
    assert torch.equal(y.isnan(), expected)


def relu_keeps_nan(backend: str, layout: str) -> None:
    """relu(NaN) is NaN, as in torch. Otherwise a broken activation would become zeros."""
    case = Case(space=(14, 14), channels=6, batch=2, layout=layout, tail="residual_relu")
    inputs, dy = cases.make(case)
    inputs["residual"][0, 3, 2, 1] = float("nan")
    inputs["residual"][1, 0, 0, 0] = float("inf")
    got = compare(case, backend, inputs, dy)
    assert got["y"][0, 3, 2, 1].isnan() and got["y"][1, 0, 0, 0] == float("inf")
    assert got["y"].isnan().sum() == 1


def float16_overflow_in_y_is_inf(backend: str) -> None:
    case = Case(space=(8, 8), channels=16, dtype=torch.float16, scale=4.0)
    inputs, _ = cases.make(case, mean=40000.0, spread=1.0, weight_scale=0.0)
    inputs["x"][0] *= 1.5
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    # With zero weights both gates are 1/2, and the scale of 4 makes the unit the identity.
    assert torch.equal(y, inputs["x"])
    case = case.but(scale=8.0)
    assert torch.isinf(steam_kernels.steam(**inputs, backend=backend, **case.options)).all()


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

# The sums over a map's pixels are in range at all magnitudes. The scores of its tokens are out of range from 1e20
# (1e155 in float64) on.
MAGNITUDES = [(F32, 1e10), (F32, 1e20), (F32, 1e30), (F32, 1e36), (BF16, 1e20), (BF16, 1e36)]

MAGNITUDES += [(F64, 1e100), (F64, 1e200), (F64, 1e300)]

LARGE_MAPS = [
    Case(space=(7, 5), channels=6, grid=(3, 2)),
    Case(space=(4, 5), channels=9, radius=2, neighbors=8, self_loops=False, attention=(8, 1), tail="residual_relu"),
    Case(space=(5, 3), channels=11, radius=4, attention=(12, 6), layout="nhwc", order="parallel"),
    Case(space=(4, 3), channels=3, batch=3, self_loops=False, attention=(16, 2), scale=4.0),
]


def make_large(case: Case, magnitude: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs, dy = cases.make(case)
    for name in ("x", "residual"):
        if name in inputs:
            inputs[name] = cases.lay_out((inputs[name].double() * magnitude).to(case.dtype), case.layout)
    return inputs, dy


def exact(case: Case, inputs: dict[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The results of the loop oracle.

    Its float64 can represent the squares of float32 numbers. Float64 maps are first multiplied by a power of two, 2^-k.
    Gates as saturated as these are the same for 2^-k x, and y is 2^k times as large.
    """
    if case.dtype != F64:
        return cases.exact_by_oracle(case, inputs, dy)
    shift = 2.0 ** -round(math.log2(inputs["x"].abs().max().item() / 1e100))
    near = {k: v * shift if v.dim() == 4 else v for k, v in inputs.items()}
    found = cases.exact_by_oracle(case, near, dy)
    return found | {"y": found["y"] / shift}


def finite_maps_of_any_size(case: Case, dtype: torch.dtype, magnitude: float, any_backend: str) -> None:
    """Scores of both signs are beyond the dtype's range. Gates are 0 and 1, and gradients are within the bounds."""
    case = case.but(dtype=dtype)
    inputs, dy = make_large(case, magnitude)
    truth = exact(case, inputs, dy)
    assert all(v.isfinite().all() for v in truth.values())
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    rounded = {k: tolerances.rounding(v, got[k].dtype) for k, v in truth.items()}
    tolerances.Judge(truth, rounded).check(got, case.id)


def finite_maps_of_any_size_through_open_gates(
    case: Case, dtype: torch.dtype, magnitude: float, any_backend: str
) -> None:
    """With zero output rows the gates are 1/2 for tokens of any size, and y has the size of x.

    No gradient flows through the tokens, although the tokens' own derivatives are out of range.
    """
    case = case.but(dtype=dtype)
    inputs, dy = make_large(case, magnitude)
    for name in ("channel_weight", "spatial_weight"):
        inputs[name][3] = 0
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    y = case.scale / 4 * inputs["x"].double()
    arrived = dy.double()
    if "residual" in inputs:
        y = torch.relu(y + inputs["residual"].double())
        arrived = arrived.where(y > 0, 0)
    truth = {"y": y, "dx": case.scale / 4 * arrived}
    bounds = {k: tolerances.rounding(v, dtype) for k, v in truth.items()}
    tolerances.Judge(truth, bounds).check({k: got[k] for k in truth}, case.id)
