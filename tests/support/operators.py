"""Direct calls of the operators through the dispatcher."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import cases
from tests.support.cases import Case

OPS = torch.ops.steam_kernels


def forward_arguments(case: Case, save: bool = True) -> tuple[Any, ...]:
    inputs, _ = cases.make(case)
    weights = (inputs["channel_weight"], inputs["spatial_weight"])
    return inputs["x"], *weights, inputs.get("residual"), save, *case.operator_options


def in_place_arguments(case: Case) -> tuple[Any, ...]:
    *tensors, _ = forward_arguments(case)[:5]
    return *tensors, *case.operator_options


def backward_arguments(
    case: Case, need: tuple[bool, ...] = (True, True, True, True), prefix: str = ""
) -> tuple[Any, ...]:
    """The arguments of ``backward``; the forward operator with this prefix computed y and saved."""
    arguments = forward_arguments(case)
    y, saved = getattr(OPS, f"{prefix}forward")(*arguments)
    relu = case.tail.endswith("relu")
    x, channel_weight, spatial_weight = arguments[:3]
    dy = torch.empty_like(x).normal_()
    needs = (*need[:3], need[3] and relu)
    return dy, x, y if relu else None, channel_weight, spatial_weight, saved, needs, *case.operator_options


def same_layout(real: torch.Tensor, fake: torch.Tensor) -> bool:
    return real.shape == fake.shape and real.stride() == fake.stride() and real.dtype == fake.dtype
