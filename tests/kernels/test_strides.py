"""Operators take any strides of any tensor, give right results in the fakes' strides, and change no other memory."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import steam_kernels
from steam_kernels import ops
from tests.support import cases, strided
from tests.support.cases import Case
from tests.support.strided import FORMS, KEEPING

pytestmark = pytest.mark.kernels

CASE = Case(space=(5, 4), channels=6, grid=(2, 3), tail="residual_relu")
LAYOUTS = ("nchw", "nhwc")
TENSORS = ("x", "channel_weight", "spatial_weight", "residual", "dy", "y", "saved")
#: The prefixes of the operators that run here: the empty one of the automatic operators, and Triton's in its
#: interpreter.
PREFIXES = [
    prefix for prefix in ops.PREFIXES if not prefix or not steam_kernels.available_backends()[prefix.removesuffix("_")]
]


def forms_of(tensor: str) -> tuple[str, ...]:
    # Forms that change values are not used for y and saved, because backward needs the values that forward returned.
    return KEEPING if tensor in ("y", "saved") else tuple(FORMS)


GRID = [(tensor, form) for tensor in TENSORS for form in forms_of(tensor)]


@pytest.fixture(scope="module")
def judges() -> dict[Any, Any]:
    """The judges by the values of the inputs. Forms that keep the values share a judge."""
    return {}


def check(judges: dict[Any, Any], case: Case, inputs: dict[str, Tensor], dy: Tensor, got: dict[str, Tensor]) -> None:
    values = tuple(float(t.double().sum()) for t in (*inputs.values(), dy))
    if values not in judges:
        judges[values] = cases.bounds_of(case, inputs, dy, cases.exact_by_oracle(case, inputs, dy))
    judges[values].check(got, case.id)


def check_fakes(calls: list[Any]) -> None:
    """Checks that the operators' results have the shapes, strides and dtypes of the fakes."""
    for operator, arguments, real in calls:
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), operator


def storages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors' whole storages as bits, with the memory around a slice."""
    out = {}
    for name, t in tensors.items():
        whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
        out[name] = whole.clone()
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor,form", GRID, ids=lambda v: v.replace(" ", "_"))
@pytest.mark.parametrize("prefix", PREFIXES)
def test_operators(prefix: str, tensor: str, form: str, layout: str, judges: dict[Any, Any]) -> None:
    case = CASE.but(layout=layout)
    chosen = {tensor: FORMS[form]}
    inputs, dy = strided.formed(case, chosen)
    before = storages(inputs | {"dy": dy})
    got, calls = strided.run_operators(prefix, case, inputs, dy, chosen)
    check(judges, case, inputs, dy, got)
    after = storages(inputs | {"dy": dy})
    assert all(torch.equal(before[name], after[name]) for name in before)
    check_fakes(calls)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor,form", [(t, f) for t, f in GRID if t in strided.FORWARD], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_operator_in_place(prefix: str, tensor: str, form: str, layout: str) -> None:
    """``forward_`` has the bits of ``forward`` and does not change the memory around x, or it raises the reason."""
    case = CASE.but(layout=layout)
    inputs, _ = strided.formed(case, {tensor: FORMS[form]})
    tensors, options = tuple(inputs.values()), case.operator_options
    before = storages(inputs)
    refused = {"expanded": "x must not overlap itself", "negative": None}  # the dispatcher refuses a negative view
    if tensor == "x" and form.split()[0] in refused:
        with pytest.raises((ValueError, RuntimeError), match=refused[form.split()[0]]):
            strided.operator(prefix, "forward_")(*tensors, *options)
        assert torch.equal(storages(inputs)["x"], before["x"])
        return
    y, _ = strided.operator(prefix, "forward")(*tensors, False, *options)
    around = inputs["x"].clone()
    strided.operator(prefix, "forward_")(*tensors, *options)
    assert torch.equal(inputs["x"], y)
    with torch.no_grad():
        inputs["x"].copy_(around)
    after = storages(inputs)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tensor,form", [(t, f) for t, f in GRID if t not in ("y", "saved")], ids=str)
def test_steam(any_backend: str, tensor: str, form: str, judges: dict[Any, Any]) -> None:
    for layout in LAYOUTS:
        case = CASE.but(layout=layout)
        inputs, dy = strided.formed(case, {tensor: FORMS[form]})
        got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
        check(judges, case, inputs, dy, got)


@pytest.mark.parametrize("form", ["expanded in the first axis", "negative view"])
def test_in_place_refuses_what_cannot_be_written(any_backend: str, form: str) -> None:
    inputs, _ = strided.formed(CASE, {"x": FORMS[form]})
    before = storages(inputs)
    with pytest.raises(ValueError, match="x must not"):
        steam_kernels.steam(**inputs, backend=any_backend, inplace=True, **CASE.options)
    assert torch.equal(storages(inputs)["x"], before["x"])


@pytest.mark.parametrize("how", ["same", "view", "overlap"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_operator_in_place_refuses_a_residual_in_x(prefix: str, how: str) -> None:
    inputs, _ = strided.formed(CASE, {})
    wide = torch.cat((inputs["x"], inputs["x"]))
    x = inputs["x"] = wide[: CASE.batch]
    inputs["residual"] = {"same": x, "view": x.view_as(x), "overlap": wide[1 : 1 + CASE.batch]}[how]
    before = wide.clone()
    with pytest.raises((ValueError, RuntimeError), match="residual must not share memory with x"):
        strided.operator(prefix, "forward_")(*inputs.values(), *CASE.operator_options)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_column_and_no_samples(prefix: str) -> None:
    """Strides of an axis of length 1 have no meaning, but equal those of the fakes. An empty map has no overlap."""
    for case in (CASE.but(attention=(1, 1)), CASE.but(channels=1, space=(1, 4), grid=1)):
        for form in ("transposed", "sliced in the last axis", "every second of the first axis"):
            inputs, dy = strided.formed(case, dict.fromkeys(TENSORS[:5], FORMS[form]))
            _, calls = strided.run_operators(prefix, case, inputs, dy, {})
            check_fakes(calls)
    empty = torch.empty(0, 6, 1, 4).expand(0, 6, 5, 4)
    inputs, _ = strided.formed(CASE, {})
    weights = inputs["channel_weight"], inputs["spatial_weight"]
    strided.operator(prefix, "forward_")(empty, *weights, None, *CASE.operator_options)


def random_call(seed: int) -> tuple[Case, dict[str, Tensor], Tensor]:
    rng = random.Random(seed)
    (case,) = cases.random_cases(1, seed, largest_nodes=40)
    inputs, dy = cases.make(case)
    made: dict[int, Tensor] = {}  # a tensor that is given twice has one copy
    for t in (*inputs.values(), dy):
        if id(t) not in made:
            made[id(t)] = FORMS[rng.choice(list(FORMS if t is not inputs.get("residual") else KEEPING))](t)
    return case, {name: made[id(t)] for name, t in inputs.items()}, made[id(dy)]


@pytest.mark.parametrize("seed", range(100, 180))
def test_random_calls(backend: str, seed: int) -> None:
    case, inputs, dy = random_call(seed)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    # In float64 the reference is more precise than the oracle, whose scores are not made from differences of tokens.
    exact = cases.exact if case.dtype == torch.float64 else cases.exact_by_oracle
    cases.bounds_of(case, inputs, dy, exact(case, inputs, dy)).check(got, case.id)


WRONG = [
    ("channel_weight", lambda t: t[:3]),
    ("channel_weight", lambda t: t.flatten()),
    ("channel_weight", lambda t: t[:, :7]),
    ("channel_weight", lambda t: t.half()),
    ("spatial_weight", lambda t: t[:, :4]),
    ("spatial_weight", lambda t: t.flatten()),
    ("residual", lambda t: t[:1]),
    ("residual", lambda t: t.double()),
    ("dy", lambda t: t[:, :3]),
    ("dy", lambda t: t.half()),
    ("y", lambda t: t[..., :2]),
    ("saved", lambda t: t[:, :-1]),
    ("saved", lambda t: t.double()),
    ("x", lambda t: t[0]),
]


@pytest.mark.parametrize("tensor,wrong", WRONG, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRONG)])
def test_compiled_kernels_say_no_to_what_they_cannot_read(backend: str, tensor: str, wrong: Any) -> None:
    """A direct call of an operator with wrong sizes or dtypes raises an error that names the argument."""
    if backend == "triton":
        pytest.skip("shapes of weights are steam()'s to check there")
    prefix = "" if backend == "cpu" else f"{backend}_"
    inputs, dy = strided.formed(CASE, {})
    if tensor in strided.FORWARD:
        inputs[tensor] = wrong(inputs[tensor])
    form = {tensor: wrong} if tensor in ("y", "saved") else {}
    name = "num_heads" if tensor == "channel_weight" and inputs[tensor].shape[-1] == 7 else tensor
    with pytest.raises(RuntimeError, match=name):
        strided.run_operators(prefix, CASE, inputs, wrong(dy) if tensor == "dy" else dy, form)
