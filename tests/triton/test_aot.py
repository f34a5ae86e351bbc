"""Every launch, compiled for real targets: no spills, wide accesses, 64-bit offsets, resources as in the record."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.support import triton_aot, triton_record
from tests.support import triton_code as code
from tests.support.slow import parameters
from tests.support.triton_aot import TARGETS
from tests.support.triton_code import Access, Resources
from tests.support.triton_version import needs_known_triton

pytestmark = [
    pytest.mark.skipif(
        not triton_aot.tools(), reason="this Triton's wheel has no cuobjdump and nvdisasm that can be run"
    ),
    pytest.mark.slow,
    pytest.mark.xdist_group("aot"),  # one process compiles for all of these tests
]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of the targets of the tests that run."""
    found = triton_aot.rows(parameters(request, "target"))
    assert {name(row): row["error"] for row in found if "error" in row} == {}
    return found


def of(rows: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    found = [row for row in rows if row["target"] == target]
    assert len(found) > 40
    return found


def name(row: dict[str, Any]) -> str:
    return f"{row['target']} {row['case']} {row['kernel']}"


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(target: str, rows: list[dict[str, Any]]) -> None:
    assert {name(row): row["spills"] for row in of(rows, target) if row["spills"]} == {}


def least(row: dict[str, Any]) -> float:
    """The least share of wide accesses."""
    channels = row["channels"] if row["kernel"] == "forward graph" else None
    return 0.9 if channels is None else min(0.9, round(channels / (channels + 2), 3))


@pytest.mark.parametrize("target", TARGETS)
def test_accesses_to_maps_are_wide(target: str, rows: list[dict[str, Any]]) -> None:
    """In the vector class, by bytes. Every global access was traced to its tensor.

    The loads of the halo, two channels beside a program's own, are narrow. So a program of 16 channels, which it has if
    it pools in float64, has 16 / 18.
    """
    found = of(rows, target)
    assert {name(row): row["untraced"] for row in found if row["untraced"]} == {}
    judged = [row for row in found if row["vector"] and row["wide"] is not None]
    assert {m for row in judged for m in row["maps"]} >= {"x", "y", "dy", "dx", "residual", "dresidual"}
    assert {name(row): row["wide"] for row in judged if row["wide"] < least(row)} == {}
    assert min(row["wide"] for row in found if not row["vector"] and row["wide"] is not None) < 0.5, "the control"


@pytest.mark.parametrize("target", TARGETS)
def test_offsets_are_64_bit(target: str, rows: list[dict[str, Any]]) -> None:
    assert {name(row): row["narrow"] for row in of(rows, target) if row["narrow"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_ptx_is_plain(target: str, rows: list[dict[str, Any]]) -> None:
    """Every instruction of every launch is in the list. AMD's code has no PTX."""
    seen = {opcode for row in of(rows, target) for opcode in row["opcodes"]}
    if TARGETS[target][0] == "hip":
        assert seen == set()
        return
    assert seen >= {"ld.global.v4.b32", "st.global.v4.b32", "fma.rn.f32", "bar.sync", "ex2.approx.f32", "ret"}
    assert sorted(opcode for opcode in seen if not code.PLAIN_PTX.fullmatch(opcode)) == []


def test_the_oldest_gpu_has_every_kernel() -> None:
    """Every kernel compiles for the lowest compute capability that ``why_not`` accepts, also in bfloat16."""
    found = triton_aot.answer(triton_aot.worker("--oldest"))
    assert min(found.values()) > 0
    assert {key.split()[-1] for key in found} == {
        "pool_runs", "pool_tiles", "graph", "lattice", "gate", "whole",
        "graph_backward_cells", "lattice_backward", "graph_backward_ring", "gate_backward", "whole_backward",
        "weights_backward",
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_figures_are_those_recorded(target: str, rows: list[dict[str, Any]]) -> None:
    needs_known_triton("the record is of the code")
    found, recorded = triton_record.compiled(of(rows, target)), triton_record.compiled_for(target)
    changed = {k: (recorded.get(k), found.get(k)) for k in found | recorded if found.get(k) != recorded.get(k)}
    assert changed == {}, "was, is; python -m tests.support.triton_record --write records anew"


def test_the_page_shows_the_record() -> None:
    text = triton_record.PAGE.read_text()
    assert triton_record.page(text, triton_record.load()) == text, "python -m tests.support.triton_record --write"


def test_cases_cover() -> None:
    """Each target has both memory formats and each dtype in both classes, each stage, and small and large samples."""
    for target in TARGETS:
        found = triton_aot.cases_of(target)
        layouts, dtypes = ("nchw", "nhwc"), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        pairs = {(c.layout, c.vector) for c in found} | {(c.dtype, c.vector) for c in found}
        assert pairs == set(itertools.product((*layouts, *dtypes), (True, False)))
        assert {c.label for c in found} == {c.label for c in triton_aot.cases()}
        small = {c.layout for c in found if "small" in c.label}
        assert small == set(layouts) and {c.tail for c in found} == {c.sequential for c in found} == {True, False}


# ---- planted faults that the readers must see ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> dict[str, dict[str, Any]]:
    """The rows of the toy kernels for each target: {"target kernel": row}."""
    return triton_aot.answer(triton_aot.worker("--planted"))


@pytest.mark.parametrize("target", TARGETS)
def test_right_kernel(target: str, planted: dict[str, dict[str, Any]]) -> None:
    row = planted[f"{target} wide_copy"]
    assert row["wide"] == row["wide_all"] == 1.0 and row["spills"] == 0 and row["narrow"] == []
    assert row["maps"] == ["x", "y"] and row["untraced"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_narrow_accesses_are_seen(target: str, planted: dict[str, dict[str, Any]]) -> None:
    """A copy with a length of no known divisor has no wide access. If one of two maps is narrow, half are wide."""
    assert planted[f"{target} wide_copy odd"]["wide"] == 0.0
    assert planted[f"{target} half_wide"]["wide"] == 0.5


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target: str, planted: dict[str, dict[str, Any]]) -> None:
    assert planted[f"{target} spilling"]["spills"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_32_bit_offsets_are_seen(target: str, planted: dict[str, dict[str, Any]]) -> None:
    """Also in a loop. An offset into another tensor than a map does not count, nor does a place within a tile."""
    assert len(planted[f"{target} narrow_copy"]["narrow"]) == 2
    assert len(planted[f"{target} narrow_walk"]["narrow"]) == 1


def test_other_opcodes_are_seen() -> None:
    """After a predicate, a label, a brace and a source position. A directive and data are no opcodes."""
    ptx = """
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
{
\t.reg .pred %p<2>;
$L__BB0_1:
\t.loc 1 2 3
\t@%p1 atom.global.add.f32 %f1, [%rd1], %f2; // float atomics
\t{ mma.sync.aligned.m16n8k8.row.col.f32 {%f1}, {%f2}; }
\tmov.b32 {tmp, %rs1}, %r1;
\tret;
}
.section .debug_abbrev { .b8 1 }
"""
    opcodes = code.ptx_opcodes(ptx)
    assert opcodes == {"atom.global.add.f32", "mma.sync.aligned.m16n8k8.row.col.f32", "mov.b32", "ret"}
    assert {o for o in opcodes if code.PLAIN_PTX.fullmatch(o)} == {"mov.b32", "ret"}


def test_occupancy() -> None:
    """Each limit reduces the occupancy: registers, shared memory, warps, programs."""
    assert code.occupancy("sm_80", Resources(32, 0, 0), 4) == 1.0
    assert code.occupancy("sm_80", Resources(40, 0, 0), 4) == 0.75  # 12 programs of 4 x 1280 registers
    assert code.occupancy("sm_90", Resources(128, 0, 0), 8) == 0.25
    assert code.occupancy("sm_90", Resources(32, 0, 100 << 10), 4) == 0.125  # two programs of 101 KiB
    assert code.occupancy("sm_80", Resources(32, 0, 100 << 10), 4) == 0.0625  # one
    assert code.occupancy("sm_100", Resources(16, 0, 0), 1) == 0.5  # 32 programs
    assert code.occupancy("gfx942", Resources(64, 0, 0), 4) == 1.0
    assert code.occupancy("gfx942", Resources(65, 0, 0), 4) == 0.875  # 7 warps of 72 registers
    assert code.occupancy("gfx942", Resources(64, 0, 32 << 10), 4) == 0.25  # two programs


def test_share_of_wide_accesses_is_by_bytes() -> None:
    assert code.wide_share([]) is None
    assert code.wide_share([Access(frozenset({0}), False, size) for size in (16, 4, 4, 8)]) == 0.5
