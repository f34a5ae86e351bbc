"""Sixty random units, shapes, dtypes and layouts against the loop oracle, in the output and every gradient."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import Case
from tolerances import judge

import steam_kernels

pytestmark = pytest.mark.kernels


def truth_of(case: Case, inputs: dict[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    if case.tail == "x_relu":
        leaves = {k: inputs[k].detach().double().requires_grad_() for k in ("x", "channel_weight", "spatial_weight")}
        y = oracle.unit(**leaves, residual=leaves["x"], **case.options)
        found = torch.autograd.grad(y, list(leaves.values()), dy.double())
        return {"y": y.detach(), **{"d" + k: g for k, g in zip(leaves, found, strict=True)}}
    y, gradients = oracle.gradients(dy, **inputs, **case.options)
    return {"y": y, **{"d" + k: v for k, v in gradients.items()}}


@pytest.mark.parametrize("case", cases.random_cases(60, seed=2024), ids=lambda c: c.id)
def test_random_unit(case: Case, backend: str) -> None:
    inputs, dy = cases.make(case)
    bounds = judge(
        cases.reference_run(case),
        cases.judged_inputs(case, inputs, dy),
        cases.result_dtypes(inputs),
        case.resolved_grid,
        truth=truth_of(case, inputs, dy),
    )
    bounds.check(cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options), case.id)
