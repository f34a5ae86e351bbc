"""First and second derivatives agree with finite differences. Only the requested gradients are computed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case


def function(case: Case, backend: str) -> Any:
    def call(x: torch.Tensor, cw: torch.Tensor, sw: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return steam_kernels.steam(x, cw, sw, residual, backend=backend, **case.options)

    return call


def leaves(case: Case) -> tuple[torch.Tensor, ...]:
    inputs, _ = cases.make(case.but(dtype=torch.float64, weights="x"))
    return tuple(v.requires_grad_() for v in inputs.values())


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.id)
def test_gradcheck(case: Case, any_backend: str, seed: int) -> None:
    assert torch.autograd.gradcheck(function(case, any_backend), leaves(case.but(seed=seed)))


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.id)
def test_gradgradcheck(case: Case, any_backend: str) -> None:
    assert torch.autograd.gradgradcheck(function(case, any_backend), leaves(case), fast_mode=True)


@pytest.mark.parametrize("tail", ["none", "residual_relu"])
def test_gradient_penalty_counts(any_backend: str, tail: str) -> None:
    """The gradient of a penalty on |dx| at the weights equals the finite difference. dy requires no gradient."""
    case = Case(space=(6, 6), channels=4, dtype=torch.float64, weights="x", tail=tail)
    inputs, _ = cases.make(case)

    def penalty(weight: torch.Tensor) -> torch.Tensor:
        x = inputs["x"].detach().requires_grad_()
        y = steam_kernels.steam(**{**inputs, "x": x, "channel_weight": weight}, backend=any_backend, **case.options)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return dx.square().sum()

    weight = inputs["channel_weight"].clone().requires_grad_()
    value = penalty(weight)
    assert value.requires_grad
    (gradient,) = torch.autograd.grad(value, weight)
    direction = torch.randn(4, 8, dtype=torch.float64)
    step = 1e-6
    difference = (penalty(weight.detach() + step * direction) - penalty(weight.detach() - step * direction)) / (
        2 * step
    )
    assert gradient.abs().max() > 1e-6
    assert math.isclose(difference.item(), (gradient * direction).sum().item(), rel_tol=1e-5)


# ---- dependent inputs ------------------------------------------------------------------------------------------------


def _connected(a: str, b: str, how: str, leaf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of a call in which the input ``b`` is ``a`` or depends on ``a``."""
    given = dict(leaf)
    if how == "same":
        given[b] = given[a]
    elif given[a].shape == given[b].shape:
        given[b] = given[b] * 0.5 + torch.sin(given[a])
    else:
        given[b] = given[b] * (1 + torch.tanh(given[a]).mean())
    return given


TAILS = ("none", "residual", "residual_relu")
CONNECTED = [
    (a, b, how, tail)
    for a, b in itertools.permutations(("x", "channel_weight", "spatial_weight", "residual"), 2)
    for how in ("depends", "same")
    if how == "depends" or {a, b} in ({"x", "residual"}, {"channel_weight", "spatial_weight"})
    for tail in TAILS
    if tail != "none" or "residual" not in (a, b)
]


def _first_and_second(backend: str, call: Any, leaf: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All first gradients with create_graph, and all gradients of a penalty on the first gradients."""
    asked = list(leaf.values())
    y = call(backend)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    first = torch.autograd.grad((weight * y.square()).sum(), asked, create_graph=True, allow_unused=True)
    penalty = sum((g.square().sum() for g in first if g is not None), start=y.sum())
    second = torch.autograd.grad(penalty, asked, allow_unused=True)
    return [torch.zeros(()) if g is None else g.detach() for g in (*first, *second)]


def _agree(backend: str, call: Any, leaf: dict[str, torch.Tensor]) -> None:
    """The backend's gradients equal those of the reference, with and without create_graph."""
    expected = _first_and_second("reference", call, leaf)
    got = _first_and_second(backend, call, leaf)
    y = call(backend)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    plain = torch.autograd.grad((weight * y.square()).sum(), list(leaf.values()), allow_unused=True)
    got += [torch.zeros(()) if g is None else g for g in plain]
    # Each derivative has about fifty dependent roundings in float64, and sums a hundred numbers of its size.
    for a, b in zip(got, expected + expected[: len(plain)], strict=True):
        size = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() <= 100 * torch.finfo(torch.float64).eps * size


@pytest.mark.kernels
@pytest.mark.parametrize("a,b,how,tail", CONNECTED)
def test_inputs_that_depend_on_each_other(backend: str, a: str, b: str, how: str, tail: str) -> None:
    case = Case(space=(5, 4), channels=3, grid=(2, 3), dtype=torch.float64, weights="x", tail="residual")
    inputs, _ = cases.make(case)
    leaf = {k: v.requires_grad_() for k, v in inputs.items()}

    def call(backend: str) -> torch.Tensor:
        given = _connected(a, b, how, leaf)
        residual = given.pop("residual")
        if tail != "none":
            given["residual"] = residual
        activation = "relu" if tail.endswith("relu") else None
        return steam_kernels.steam(**given, **case.options, activation=activation, backend=backend)

    _agree(backend, call, leaf)


@pytest.mark.kernels
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("times", [2, 3])
def test_one_unit_several_times(backend: str, times: int, tail: str) -> None:
    case = Case(space=(5, 4), channels=3, grid=(2, 3), dtype=torch.float64, weights="x", tail="residual")
    inputs, _ = cases.make(case)
    leaf = {k: v.requires_grad_() for k, v in inputs.items()}

    def call(backend: str) -> torch.Tensor:
        y, weights = leaf["x"], (leaf["channel_weight"], leaf["spatial_weight"])
        residual = None if tail == "none" else leaf["residual"]
        activation = "relu" if tail.endswith("relu") else None
        for _ in range(times):
            y = steam_kernels.steam(y, *weights, residual, **case.options, activation=activation, backend=backend)
        return y

    _agree(backend, call, leaf)


NAMES = ("x", "channel_weight", "spatial_weight", "residual")


@pytest.mark.kernels
@pytest.mark.parametrize("tail", ["residual", "residual_relu"])
@pytest.mark.parametrize(
    "wanted", [s for n in range(5) for s in itertools.combinations(NAMES, n)], ids=lambda s: "+".join(s) or "none"
)
def test_each_subset_of_inputs(any_backend: str, wanted: tuple[str, ...], tail: str) -> None:
    """Frozen inputs get None, y has the same bits as with all gradients, and the requested gradients are right."""
    case = Case(space=(9, 8), channels=6, batch=3, tail=tail)
    inputs, dy = cases.make(case)
    everything = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    given = {k: v.detach().requires_grad_(k in wanted) for k, v in inputs.items()}
    y = steam_kernels.steam(**given, backend=any_backend, **case.options)
    assert torch.equal(y.detach(), everything["y"])
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    y.backward(dy)
    for name, value in given.items():
        if name in wanted:
            assert value.grad is not None, name
        else:
            assert value.grad is None, name
    bounds = cases.bounds_of(case, inputs, dy)
    bounds.check(everything | {"d" + name: given[name].grad for name in wanted}, case.id)


@pytest.mark.kernels
def test_gradients_accumulate(backend: str) -> None:
    """The gradients of two calls of one unit add up. The second call does not change the inputs of the first."""
    case = Case(space=(9, 8), channels=6)
    inputs, dy = cases.make(case)
    one = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    given = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    for _ in range(2):
        steam_kernels.steam(**given, backend=backend, **case.options).backward(dy)
    for name, value in given.items():
        assert value.grad is not None and torch.equal(value.grad, 2 * one["d" + name]), name


@pytest.mark.kernels
@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
def test_training_step_in_half_precision(backend: str, weights: torch.dtype) -> None:
    """With float16 maps and float32 or float16 parameters, parameter gradients have the right dtype and are nonzero."""
    case = Case(space=(14, 14), channels=8, dtype=torch.float16, weights="x" if weights == torch.float16 else "float32")
    inputs, dy = cases.make(case)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    for name in ("dchannel_weight", "dspatial_weight"):
        assert got[name].dtype == weights and got[name].abs().max() > 0


def test_version_counter_guards_saved_x(backend: str) -> None:
    """Changing x between forward and backward raises an error and gives no wrong gradient."""
    case = Case(space=(9, 8), channels=6)
    inputs, dy = cases.make(case)
    x = inputs["x"].requires_grad_()
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)
