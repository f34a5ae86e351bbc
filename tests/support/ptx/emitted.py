"""What the tests of emitted code share: their cases, and the checks of a backend whose kernels the executor runs."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Protocol

import torch
from torch import Tensor

import steam_kernels
from tests.support import cases, tolerances
from tests.support.cases import Case
from tests.support.ptx import planted
from tests.support.ptx.executor import Fault, Findings
from tests.support.ptx.planted import Planted
from tests.support.ptx.triton import Edit

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TARGETS = ("sm_80", "sm_90")
TAILS = ("none", "residual_relu", "relu", "residual", "x_relu", "other_relu")

SPACES: list[dict[str, Any]] = [
    {"space": (14, 14), "channels": 16},
    {"space": (28, 28), "channels": 8, "batch": 1},
    {"space": (7, 7), "channels": 33},
    {"space": (19, 23), "channels": 5, "grid": (5, 9)},
    {"space": (1, 90), "channels": 17, "grid": (3, 5), "attention": (6, 3), "scale": 4.0},
]
GRAPHS: list[dict[str, Any]] = [
    {},
    {"order": "parallel"},
    {"neighbors": 8, "self_loops": False},
    {"order": "parallel", "radius": 3, "weights": "x"},
]


class Device(Protocol):
    """A pretended GPU with a backend's operators."""

    target: str
    seed: int
    first_wins: bool
    edit: Edit | None
    found: Findings


#: A case, one of the backend's two paths, and a target.
Call = tuple[Case, str, str]


def sample(paths: tuple[str, str]) -> list[Call]:
    """Every path, dtype, memory format and target; shapes, graphs and tails take turns."""
    out: list[Call] = []
    for k, (dtype, path, layout, target) in enumerate(
        itertools.product((F32, BF16, F16, F64), paths, ("nchw", "nhwc"), TARGETS)
    ):
        tail = TAILS[(k + k // 6) % 6]
        case = Case(**SPACES[k % 5], **GRAPHS[k % 4 ^ k // 16], tail=tail, layout=layout, dtype=dtype, seed=100 + k)
        out.append((case, path, target))
    return out


def uncovered(calls: list[Call], paths: tuple[str, str]) -> list[Any]:
    """Pairs of a path, dtype, memory format, target, tail and order that occur in no call."""
    seen = set()
    for case, path, target in calls:
        values = path, case.dtype, "nhwc" in case.layout, target, ("tail", case.tail), ("order", case.order)
        seen |= set(itertools.combinations(values, 2))
    axes: list[tuple[Any, ...]] = [paths, (F32, BF16, F16, F64), (False, True), TARGETS]
    axes += [tuple(("tail", tail) for tail in TAILS), tuple(("order", order) for order in ("sequential", "parallel"))]
    pairs = (pair for a, b in itertools.combinations(axes, 2) for pair in itertools.product(a, b))
    return [pair for pair in pairs if pair not in seen]


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """The output and every gradient."""
    inputs, dy = cases.make(case)
    return cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)


#: Each subset of the gradients of x, both weights and the residual in which a kernel has a part.
NEEDS = [needs for needs in itertools.product((False, True), repeat=4) if any(needs[:3])]


def check_gradients(case: Case, backend: str, needs: tuple[bool, ...]) -> None:
    """The output and a subset of the gradients, by the rule."""
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy)
    names = ("x", "channel_weight", "spatial_weight", "residual")
    wanted = [name for name, need in zip(names, needs, strict=True) if need]
    given: dict[str, Any] = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    y = steam_kernels.steam(**given, backend=backend, **case.options)
    found = torch.autograd.grad(y, [given[name] for name in wanted], dy)
    results = {"y": y.detach()} | {"d" + name: t for name, t in zip(wanted, found, strict=True)}
    tolerances.Judge({name: bounds.truth[name] for name in results}, bounds.bounds).check(results, case.id)


def check_in_place(case: Case, backend: str) -> None:
    """The same bits in x as in the output of an ordinary call."""
    inputs: dict[str, Any] = cases.make(case)[0]
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    steam_kernels.steam(**inputs, backend=backend, inplace=True, **case.options)
    assert torch.equal(inputs["x"], y)


def check_one_number_for_an_address(kernel: str, case: Case, backend: str, device: Device) -> None:
    """PTX leaves open which of several lanes stores last to an address, so all must store the same number.

    Fails if the kernel stores different ones, and if a result depends on which lane is last or on the order of warps.
    """
    results = []
    for device.first_wins, device.seed in ((False, 0), (True, 1)):
        results.append(run(case, backend))
    assert kernel in device.found.kernels
    assert kernel not in device.found.conflicts, device.found.conflicts[kernel]
    if not device.found.conflicts:  # of the kernels before it, on which its input depends
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name


@functools.lru_cache(maxsize=8)
def _judged(case: Case) -> tuple[dict[str, Tensor], Tensor, tolerances.Judge]:
    inputs, dy = cases.make(case)
    return inputs, dy, cases.bounds_of(case, inputs, dy)


def is_caught(mistake: Planted, case: Case, backend: str, device: Device) -> bool:
    """Whether the executor or the rule finds a mistake. A removed barrier may show for one order of warps alone."""
    inputs, dy, bounds = _judged(case)
    device.edit = mistake
    for device.seed in (0, 1, 2):
        device.found = Findings()
        try:
            got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
        except Fault:
            return True
        # Not by Judge.check, which records how near right results are to their bounds.
        errors = {name: tolerances.largest_error(value, bounds.truth[name]) for name, value in got.items()}
        if device.found.faults or not all(error <= bounds.bounds[name] for name, error in errors.items()):
            return True
    return False


def check_planted(kernel: str, case: Case, backend: str, device: Device, least: float) -> None:
    """Mistakes in instructions that the case executes: in masks and stores all are caught, of barriers this share.

    A barrier can be removed without effect at the end of a kernel, and beside another one if no access is between them.
    A lane may load a number that it does not use. So a mistake in some load must be caught.
    """
    run(case, backend)
    assert device.found.faults == []
    for kind, every in planted.in_executed(device.found.launches, kernel).items():
        some = every[:: max(1, -(-len(every) // (32 if kind == "barrier" else 4)))]
        missed = [mistake for mistake in some if not is_caught(mistake, case, backend, device)]
        caught = len(some) - len(missed)
        assert caught >= {"barrier": least * len(some), "load": min(1, len(some))}.get(kind, len(some)), missed
