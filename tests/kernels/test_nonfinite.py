"""NaN and Inf in x or dy give non-finite results where exact arithmetic does, and elsewhere only by the sample's gates.

Finite maps give finite results, even if they are so large that products of two of their numbers overflow.
"""

from __future__ import annotations

import pytest
import torch

from steam_kernels import config, reference
from tests.support import nonfinite, tolerances
from tests.support.cases import Case
from tests.support.nonfinite import CASES, LARGE_MAPS, MAGNITUDES, VALUES, exact, make_large

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_one_bad_value_in_x(case: Case, backend: str, value: float) -> None:
    nonfinite.one_bad_value_in_x(case, backend, value)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_one_bad_value_in_dy(case: Case, backend: str, value: float) -> None:
    nonfinite.one_bad_value_in_dy(case, backend, value)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("space,grid", [((14, 14), (7, 7)), ((57, 61), (13, 21)), ((28, 28), (2, 4))])
def test_nan_spreads_only_along_the_graphs(
    backend: str, space: tuple[int, int], grid: tuple[int, int], layout: str
) -> None:
    nonfinite.nan_spreads_only_along_the_graphs(backend, space, grid, layout)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_relu_keeps_nan(backend: str, layout: str) -> None:
    nonfinite.relu_keeps_nan(backend, layout)


def test_float16_overflow_in_y_is_inf(backend: str) -> None:
    nonfinite.float16_overflow_in_y_is_inf(backend)


@pytest.mark.parametrize("dtype,magnitude", MAGNITUDES, ids=str)
@pytest.mark.parametrize("case", LARGE_MAPS, ids=lambda c: c.id)
def test_finite_maps_of_any_size(case: Case, dtype: torch.dtype, magnitude: float, any_backend: str) -> None:
    nonfinite.finite_maps_of_any_size(case, dtype, magnitude, any_backend)


@pytest.mark.parametrize("dtype,magnitude", MAGNITUDES, ids=str)
@pytest.mark.parametrize("case", LARGE_MAPS, ids=lambda c: c.id)
def test_finite_maps_of_any_size_through_open_gates(
    case: Case, dtype: torch.dtype, magnitude: float, any_backend: str
) -> None:
    nonfinite.finite_maps_of_any_size_through_open_gates(case, dtype, magnitude, any_backend)


@pytest.mark.parametrize("dtype,magnitude", MAGNITUDES, ids=str)
@pytest.mark.parametrize("case", LARGE_MAPS, ids=lambda c: c.id)
def test_the_closed_form_is_as_good(case: Case, dtype: torch.dtype, magnitude: float) -> None:
    """The closed-form backward of the reference, which the operators run without kernels, keeps the same bounds."""
    case = case.but(dtype=dtype, tail="none")
    inputs, dy = make_large(case, magnitude)
    given, options = config.Inputs(**inputs), config.Options(**case.options)
    grid = options.check(given)
    _, saved = reference.forward(given, options, grid)
    found = reference.backward(dy, given, saved, options, grid)
    truth = exact(case, inputs, dy)
    del truth["y"]
    bounds = {k: tolerances.rounding(v, torch.float32) for k, v in truth.items()}
    tolerances.Judge(truth, bounds).check(dict(zip(truth, found, strict=True)), case.id)
