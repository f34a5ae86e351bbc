"""The PTX that Triton emits for the kernels, executed: against the rule, without faults, and with planted mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

from steam_kernels import backends, ops
from tests.support import cases
from tests.support.cases import Case
from tests.support.ptx import emitted, executor
from tests.support.ptx.device import Device
from tests.support.ptx.emitted import BF16, F16, F64, TARGETS

pytestmark = [
    pytest.mark.skipif(executor.is_missing(), reason=executor.WHY_NOT),
    pytest.mark.xdist_group("emitted"),  # one process compiles, for all of these tests
]

#: One launch for each stage, or one for a whole sample.
PLANS = ("stages", "whole")


@pytest.fixture(scope="module")
def process() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


@pytest.fixture
def device(process: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The Triton kernels as the backend "triton", on the executor."""
    process.reset()
    monkeypatch.setitem(ops.OPERATORS, "triton", process.operators())
    usable = backends.BACKENDS["triton"]._replace(why_not=lambda call: "")
    monkeypatch.setitem(backends.BACKENDS, "triton", usable)
    return process


QUICK = [
    (Case(space=(14, 14), channels=16), "stages", "sm_80"),
    (Case(space=(14, 14), channels=16, layout="nhwc", dtype=BF16, tail="residual_relu"), "stages", "sm_90"),
    (Case(space=(7, 7), channels=17, dtype=F16, tail="relu"), "whole", "sm_90"),
    (Case(space=(9, 10), channels=8, layout="nhwc", order="parallel", tail="residual"), "whole", "sm_80"),
    (Case(space=(5, 6), channels=5, grid=(2, 3), dtype=F64), "whole", "sm_80"),
    (Case(space=(28, 28), channels=6, batch=1, dtype=F64, order="parallel", neighbors=8), "stages", "sm_90"),
]

SLOW = [
    *emitted.sample(PLANS),
    (Case(space=(3, 2), channels=1, batch=3, tail="x_relu"), "stages", "sm_80"),
    (Case(space=(20, 12), channels=10, layout="offset_nchw", dtype=F16, radius=4), "stages", "sm_90"),
    (Case(space=(20, 12), channels=10, layout="offset_nhwc", tail="residual", radius=2), "whole", "sm_80"),
    (Case(space=(9, 10), channels=7, layout="channel_slice", grid=1), "stages", "sm_80"),
    (Case(space=(9, 10), channels=7, layout="column_slice", dy_layout="expanded", grid=(9, 10)), "stages", "sm_90"),
    (Case(space=(12, 12), channels=9, grid=12, batch=1), "stages", "sm_80"),
    (Case(space=(7, 7), channels=260, batch=1), "stages", "sm_80"),
    (Case(space=(56, 56), channels=4, batch=1, dtype=BF16), "stages", "sm_90"),
]


def calls(sample: list[emitted.Call], *marks: Any) -> list[Any]:
    return [pytest.param(*call, id=f"{call[0].id}-{call[1]}-{call[2]}", marks=marks) for call in sample]


@pytest.mark.parametrize("case,plan,target", calls(QUICK) + calls(SLOW, pytest.mark.slow))
def test_case(case: Case, plan: str, target: str, device: Device) -> None:
    """Forward and backward by the rule, without a fault, and without two numbers for one address."""
    device.whole, device.target = plan == "whole", target
    cases.check(case, "triton", *cases.make(case))
    assert device.found.faults == [] and not device.found.conflicts
    assert ("whole" in device.found.kernels) == (plan == "whole")


def test_cases_cover() -> None:
    assert emitted.uncovered(QUICK + SLOW, PLANS) == []


@pytest.mark.slow
@pytest.mark.parametrize("needs", emitted.NEEDS, ids=str)
def test_gradients(needs: tuple[bool, ...], device: Device) -> None:
    device.whole, device.target = sum(needs) % 2 == 0, TARGETS[needs[0]]
    emitted.check_gradients(Case(space=(9, 8), channels=6, tail="residual_relu"), "triton", needs)
    assert device.found.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_in_place(layout: str, plan: str, device: Device) -> None:
    device.whole = plan == "whole"
    case = Case(space=(9, 10), channels=6, layout=layout, tail="residual_relu")
    emitted.check_in_place(case, "triton")
    assert device.found.faults == []


#: A plan, a memory format and a grid, and kernels that are launched with them. The lattice of 144 cells has launches.
LAUNCHED = {
    ("stages", "nchw", 7): ("pool_runs", "graph", "gate", "graph_backward_cells"),
    ("stages", "nhwc", 7): ("pool_tiles", "graph_backward_ring", "gate_backward"),
    ("stages", "nhwc", 12): ("lattice", "lattice_backward"),
    ("whole", "nchw", 7): ("whole", "whole_backward"),
    ("whole", "nhwc", 7): ("weights_backward",),
}
KERNELS = {kernel: how for how, kernels in LAUNCHED.items() for kernel in kernels}


def case_of(kernel: str, device: Device) -> Case:
    """A case that launches the kernel; sets the device's plan."""
    plan, layout, grid = KERNELS[kernel]
    device.whole = plan == "whole"
    return Case(space=(14, 14), channels=16, layout=layout, grid=grid)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_number_for_an_address(kernel: str, target: str, device: Device) -> None:
    device.target = target
    emitted.check_one_number_for_an_address(kernel, case_of(kernel, device), "triton", device)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_planted_mistakes_are_caught(kernel: str, device: Device) -> None:
    # A program of `pool_runs` has one run here, so the barrier between two runs, one of two, has no effect.
    least = 0.5 if kernel == "pool_runs" else 0.75
    emitted.check_planted(kernel, case_of(kernel, device), "triton", device, least)
