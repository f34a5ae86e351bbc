"""The PTX that nvcc emits for the CUDA kernels, executed: by the rule, without faults, and with planted mistakes."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from steam_kernels import backends, ops
from tests.support import cases
from tests.support.cases import Case
from tests.support.ptx import emitted, nvcc

pytestmark = [
    pytest.mark.skipif(nvcc.is_missing(), reason=nvcc.WHY_NOT),
    pytest.mark.slow,
    pytest.mark.xdist_group("emitted_cuda"),  # one process reads the PTX, for all of these tests
]

#: Shared memory of one block: none, so that no sample fits, and what an A100 has.
LIMITS = {"general": 0, "fused": 163 << 10}
PATHS = ("general", "fused")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> nvcc.Device:
    """The CUDA kernels as the backend "cuda", on the executor."""
    device = nvcc.Device()
    monkeypatch.setitem(ops.OPERATORS, "cuda", device.operators())
    usable = backends.BACKENDS["cuda"]._replace(why_not=lambda call: "")
    monkeypatch.setitem(backends.BACKENDS, "cuda", usable)
    return device


CALLS = [
    *emitted.sample(PATHS),
    (Case(space=(20, 12), channels=10, layout="offset_nchw", dtype=torch.float16, radius=4), "general", "sm_90"),
    (Case(space=(20, 12), channels=10, layout="offset_nhwc", tail="residual", radius=2), "fused", "sm_80"),
    (Case(space=(12, 12), channels=9, grid=12, batch=1), "general", "sm_80"),
    (Case(space=(7, 7), channels=260, batch=1), "general", "sm_90"),
    (Case(space=(7, 7), channels=136, batch=1, radius=9, layout="nhwc", dtype=torch.float16), "general", "sm_80"),
    (Case(space=(24, 24), channels=12, batch=1, grid="w1", tail="residual_relu"), "general", "sm_80"),
    (Case(space=(3, 2), channels=1, batch=3, tail="x_relu"), "fused", "sm_90"),
    (Case(space=(56, 56), channels=4, batch=1, dtype=torch.bfloat16, tail="residual_relu"), "general", "sm_80"),
]


@pytest.mark.parametrize("case,path,target", [pytest.param(*c, id=f"{c[0].id}-{c[1]}-{c[2]}") for c in CALLS])
def test_case(case: Case, path: str, target: str, device: nvcc.Device) -> None:
    """Forward and backward by the rule; no launch has a fault or a conflict."""
    device.shared_memory_limit, device.target = LIMITS[path], target
    cases.check(case, "cuda", *cases.make(case))
    assert device.found.faults == []
    assert device.found.conflicts == {}
    assert ("steam_forward" in device.found.kernels) == (path == "fused")


def test_cases_cover() -> None:
    assert emitted.uncovered(CALLS, PATHS) == []


@pytest.mark.parametrize("needs", emitted.NEEDS, ids=str)
def test_gradients(needs: tuple[bool, ...], device: nvcc.Device) -> None:
    device.shared_memory_limit = LIMITS[PATHS[sum(needs) % 2]]
    device.target = emitted.TARGETS[needs[0]]
    emitted.check_gradients(Case(space=(9, 8), channels=6, tail="residual_relu"), "cuda", needs)
    assert device.found.faults == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_in_place(layout: str, path: str, device: nvcc.Device) -> None:
    device.shared_memory_limit = LIMITS[path]
    case = Case(space=(9, 10), channels=6, layout=layout, tail="residual_relu")
    emitted.check_in_place(case, "cuda")
    assert device.found.faults == []


#: The instructions of the threads of Triton's kernels for one float32 sample of 256x56x56 in NCHW, from their PTX for
#: sm_90 (Triton 3.8). The CUDA kernels once had five times as many, most of them integer arithmetic.
TRITON_INSTRUCTIONS = {"steam_pool": 11.28e6, "steam_gate_forward": 9.98e6}


def test_pool_and_gate_have_no_more_instructions_than_in_triton(device: nvcc.Device) -> None:
    device.shared_memory_limit, device.target = LIMITS["general"], "sm_90"
    case = Case(space=(56, 56), channels=256, batch=1)
    steam_kernels.steam(**cases.make(case)[0], backend="cuda", **case.options)
    found = {result.kernel: sum(map(sum, result.executed.values())) for result in device.found.launches}
    for kernel, most in TRITON_INSTRUCTIONS.items():
        assert most / 3 < found[kernel] <= most, kernel


#: Kernel -> a path on which it is launched.
KERNELS = {
    "steam_pool": "general",
    "steam_graph_forward": "general",
    "steam_lattice_forward": "general",
    "steam_gate_forward": "general",
    "steam_graph_backward_cells": "general",
    "steam_lattice_backward": "general",
    "steam_graph_backward_ring": "general",
    "steam_gate_backward": "general",
    "steam_weight_grad": "fused",
    "steam_forward": "fused",
    "steam_backward": "fused",
}


def case_of(kernel: str, device: nvcc.Device, layout: str = "nhwc") -> Case:
    """A case that launches the kernel; sets the device's path."""
    device.shared_memory_limit = LIMITS[KERNELS[kernel]]
    # A lattice with few heads has no launch of its own backward.
    attention = (16, 16) if kernel == "steam_lattice_backward" else (8, 4)
    return Case(space=(28, 28), channels=16, batch=1, layout=layout, attention=attention)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_number_for_an_address(kernel: str, layout: str, device: nvcc.Device) -> None:
    emitted.check_one_number_for_an_address(kernel, case_of(kernel, device, layout), "cuda", device)


@pytest.mark.parametrize("kernel", KERNELS)
def test_planted_mistakes_are_caught(kernel: str, device: nvcc.Device) -> None:
    emitted.check_planted(kernel, case_of(kernel, device), "cuda", device, 0.4)
