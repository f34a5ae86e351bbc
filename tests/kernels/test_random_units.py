"""The output and every gradient of sixty random units, shapes, dtypes and layouts, against the loop oracle."""

from __future__ import annotations

import pytest

import steam_kernels
from tests.support import cases
from tests.support.cases import Case

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("case", cases.random_cases(60, seed=2024), ids=lambda c: c.id)
def test_random_unit(case: Case, backend: str) -> None:
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy, cases.exact_by_oracle(case, inputs, dy))
    bounds.check(cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options), case.id)
