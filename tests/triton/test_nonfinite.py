"""Numerics and non-finite numbers of the Triton kernels, as every backend with kernels promises them."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from tests.support import cases, nonfinite, numerics
from tests.support.cases import Case
from tests.support.triton_cases import SMALL
from tests.support.triton_cases import launches as launches
from tests.support.triton_cases import rounds_to_bfloat16 as rounds_to_bfloat16

STRAIGHT = pytest.mark.parametrize("launches,layout", [("whole", "nchw"), ("stages", "nhwc")], indirect=["launches"])
CROSSED = pytest.mark.parametrize("launches,layout", [("whole", "nhwc"), ("stages", "nchw")], indirect=["launches"])
CENTRED = {"whole": {}, "stages": {"order": "parallel", "neighbors": 8, "self_loops": False, "attention": (8, 1)}}
BAD = Case(space=(5, 6), channels=5, grid=(3, 4), batch=3, attention=(2, 1))


@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
def test_non_finite_stays_in_its_sample(launches: str, layout: str) -> None:
    """A NaN or an Inf changes only its own sample, and y is NaN where the reference's y is NaN."""
    for bad in (float("nan"), float("inf")):
        case = SMALL.but(batch=3, layout=layout, tail="residual_relu")
        inputs, _ = cases.make(case)
        with torch.no_grad():
            clean = steam_kernels.steam(**inputs, backend="triton", **case.options)
            inputs["x"][1, 2, 3, 4] = bad
            y = steam_kernels.steam(**inputs, backend="triton", **case.options)
            expected = steam_kernels.reference.steam(**inputs, **case.options)
        assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
        assert torch.equal(y.isnan(), expected.isnan()) and y[1].isnan().any()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_variances_are_centred(launches: str, layout: str) -> None:
    """Tokens of 50 that differ by 0.01, and equal tokens, whose variance is 0."""
    options = CENTRED[launches]
    numerics.far_from_zero("triton", 50.0, 0.01, Case(space=(9, 8), channels=11, layout=layout).but(**options))
    numerics.constant_maps_are_not_noisy("triton", (5, 3), 7, layout, -50.0, 0.0)


@STRAIGHT
def test_saturated_gates(launches: str, layout: str) -> None:
    sign = -1.0 if layout == "nchw" else 1.0
    numerics.saturated_gates("triton", torch.float32, layout, "both", sign, 40.0)


@CROSSED
def test_sharp_attention(launches: str, layout: str) -> None:
    numerics.sharp_attention("triton", layout, 1.0 if layout == "nchw" else -1.0)


@CROSSED
def test_one_bad_value(launches: str, layout: str) -> None:
    """In x, then in dy. Results are finite where the reference's are, and the other samples keep their bits."""
    sequential = launches == "stages"
    order, tail = ("sequential", "residual_relu") if sequential else ("parallel", "none")
    case = BAD.but(layout=layout, order=order, tail=tail)
    nonfinite.one_bad_value_in_x(case, "triton", float("nan" if sequential else "-inf"))
    nonfinite.one_bad_value_in_dy(case, "triton", float("inf" if sequential else "nan"))


@CROSSED
def test_nan_spreads_only_along_the_graphs(launches: str, layout: str) -> None:
    nonfinite.nan_spreads_only_along_the_graphs("triton", (14, 14), (7, 7), layout)


@pytest.mark.parametrize("index", range(len(nonfinite.LARGE_MAPS)))
def test_finite_maps_of_any_size(launches: str, index: int) -> None:
    case, dtype = nonfinite.LARGE_MAPS[index], torch.float32
    nonfinite.finite_maps_of_any_size(case, dtype, 1e36, "triton")
    nonfinite.finite_maps_of_any_size_through_open_gates(case, dtype, 1e30, "triton")


@STRAIGHT
def test_relu_keeps_nan(launches: str, layout: str) -> None:
    nonfinite.relu_keeps_nan("triton", layout)


def test_float16_overflow_is_inf(launches: str) -> None:
    nonfinite.float16_overflow_in_y_is_inf("triton")
