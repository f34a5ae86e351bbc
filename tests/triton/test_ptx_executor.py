"""The PTX executor on kernels written by hand: single operations against known numbers, and planted faults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.ptx import executor
from tests.support.ptx.executor import Fault, Launch, Memory, Result
from tests.support.ptx.parse import Kernel, Unknown

pytestmark = pytest.mark.skipif(executor.is_missing(), reason=executor.WHY_NOT)

#: A thread loads its number of `in` into %r1, and stores %r2 at its place in `out`.
MODULE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out) .maxntid 64
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<20>;
    .shared .align 16 .b8 s[512];
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    ld.global.b32 %r1, [%rd1];
    {}
    st.global.b32 [%rd2], %r2;
    ret;
}}
"""
LANE = np.arange(32)
RANDOM = np.random.default_rng(0)
INTEGERS = RANDOM.integers(0, 2**32, 32, dtype=np.uint32)
SIGNED = INTEGERS.view(np.int32).astype(np.int64)
FLOATS = (RANDOM.standard_normal(32) * 100).astype(np.float32)


def u32(values: Any) -> np.ndarray:
    """The lower 32 bits of integers."""
    return np.asarray(values).astype(np.int64).astype(np.uint64).astype(np.uint32)


def f32(values: Any) -> np.ndarray:
    """The bits of floats."""
    return np.asarray(values, np.float32).view(np.uint32)


def run(
    body: str, data: np.ndarray = INTEGERS, written: np.ndarray | None = None, **options: Any
) -> tuple[np.ndarray, Result]:
    """What the kernel with this body stores, one thread for each number."""
    data = np.ascontiguousarray(data, np.uint32)
    out = np.zeros_like(data)
    memory = Memory()
    parameters = [memory.add_array(data, written), memory.add_array(out)]
    how = Launch((1,), (len(data),), parameters, **options)
    return out, executor.launch(Kernel(MODULE.format(body), "k"), how, memory)


#: Body, numbers of the threads, what each stores.
OPERATIONS: list[tuple[str, np.ndarray, Any]] = [
    ("bfe.u32 %r2, %r1, 5, 9;", INTEGERS, INTEGERS >> 5 & 511),
    ("bfe.s32 %r2, %r1, 28, 9;", INTEGERS, u32(SIGNED >> 28)),
    ("bfi.b32 %r2, %r1, 0, 4, 8;", INTEGERS, (INTEGERS & 255) << 4),
    ("shf.l.wrap.b32 %r2, %r1, %r1, 7;", INTEGERS, INTEGERS << 7 | INTEGERS >> 25),
    ("shf.r.clamp.b32 %r2, %r1, 9, 33;", INTEGERS, np.full(32, 9)),
    (
        "prmt.b32 %r2, %r1, 0x11223344, 0x7040;",
        INTEGERS,
        (INTEGERS & 255) | 0x44 << 8 | (INTEGERS & 255) << 16 | 0x11 << 24,
    ),
    (
        "lop3.b32 %r2, %r1, 0xff00ff, 0xf0f0f0f, 0xe8;",
        INTEGERS,
        (INTEGERS & 0xFF00FF) | (INTEGERS & 0xF0F0F0F) | (0xFF00FF & 0xF0F0F0F),
    ),
    ("mul.hi.s32 %r2, %r1, %r1;", INTEGERS, u32(SIGNED * SIGNED >> 32)),
    ("mad.lo.s32 %r2, %r1, 3, -1;", INTEGERS, u32(SIGNED * 3 - 1)),
    ("div.s32 %r2, %r1, -7;", INTEGERS, u32(np.trunc(SIGNED / -7))),
    ("rem.s32 %r2, %r1, 7;", INTEGERS, u32(SIGNED - 7 * np.trunc(SIGNED / 7).astype(np.int64))),
    ("shr.s32 %r2, %r1, 40;", INTEGERS, u32(SIGNED >> 31)),
    ("shr.u32 %r2, %r1, 40;", INTEGERS, 0 * INTEGERS),
    ("shl.b32 %r2, %r1, 32;", INTEGERS, 0 * INTEGERS),
    ("clz.b32 %r2, %r1;", INTEGERS, 32 - np.array([int(v).bit_length() for v in INTEGERS])),
    ("min.s32 %r2, %r1, 5;", INTEGERS, u32(np.minimum(SIGNED, 5))),
    ("cvt.s16.s32 %h1, %r1; cvt.s32.s16 %r2, %h1;", INTEGERS, u32(INTEGERS.astype(np.int16))),
    ("cvt.u32.s8 %r2, %r1;", INTEGERS, u32(INTEGERS.astype(np.int8))),
    ("cvt.sat.s16.s32 %h1, %r1; cvt.s32.s16 %r2, %h1;", INTEGERS, u32(np.clip(SIGNED, -(2**15), 2**15 - 1))),
    ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r2, {%h2, %h1};", INTEGERS, INTEGERS << 16 | INTEGERS >> 16),
    ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r2, 1, 2, %p1;", INTEGERS, np.where(SIGNED < 0, 1, 2)),
    (
        "setp.gt.u32 %p3, %r0, 7; setp.lt.and.s32 %p1, %r1, 0, !%p3; selp.b32 %r2, 1, 2, %p1;",
        INTEGERS,
        np.where((SIGNED < 0) & (LANE <= 7), 1, 2),
    ),
    (
        "setp.le.bf16x2 %p1|%p2, %r1, 0; selp.b32 %r2, 1, 0, %p1; @%p2 add.u32 %r2, %r2, 2;",
        np.tile([0x3F80BF80, 0xBF803F80, 0x80000000, 0x7FC0BF80], 8),
        np.tile([1, 2, 3, 1], 8),
    ),
    ("cvt.rni.s32.f32 %r2, %r1;", f32(FLOATS), u32(np.rint(FLOATS))),
    ("cvt.rzi.u32.f32 %r2, %r1;", f32(FLOATS), np.where(FLOATS > 0, np.trunc(FLOATS), 0).astype(np.uint32)),
    ("add.f32 %r2, %r1, 0fBF800000;", f32(FLOATS), f32(FLOATS - 1)),
    (
        "fma.rn.f32 %r2, %r1, %r1, 0f3F800000;",
        f32(FLOATS),
        f32((FLOATS.astype(np.float64) ** 2 + 1).astype(np.float32)),
    ),
    ("max.f32 %r2, %r1, 0f7FC00000;", f32(FLOATS), f32(FLOATS)),
    ("max.NaN.f32 %r2, %r1, 0f7FC00000;", f32(FLOATS), np.full(32, 0x7FFFFFFF)),
    ("setp.neu.f32 %p1, %r1, 0f7FC00000; selp.b32 %r2, 1, 0, %p1;", f32(FLOATS), np.ones(32)),
    ("div.full.f32 %r2, %r1, 0f40400000;", f32(FLOATS), f32(FLOATS / np.float32(3))),
    ("abs.f32 %r2, %r1;", f32(FLOATS), f32(abs(FLOATS))),
    ("neg.f32 %r2, %r1;", f32(FLOATS), f32(-FLOATS)),
    ("copysign.f32 %r2, %r1, 0f40000000;", f32(FLOATS), f32(np.copysign(2, FLOATS))),
    ("mul.ftz.f32 %r2, %r1, 0f00800000;", f32(np.full(32, 0.5)), 0 * INTEGERS),
    ("cvt.sat.f32.f32 %r2, %r1;", f32(FLOATS), f32(np.clip(FLOATS, 0, 1))),
    (
        "cvt.rn.f16.f32 %h1, %r1; cvt.f32.f16 %r2, %h1;",
        f32(FLOATS),
        f32(FLOATS.astype(np.float16).astype(np.float32)),
    ),
    # Ties go to the even one of two neighbours: 1 + 2^-8 to 1, and 1 + 3 * 2^-8 to 1 + 2^-6.
    ("cvt.rn.bf16x2.f32 %r2, %r1, 0f3F808000;", np.full(32, 0x3F818000), np.full(32, 0x3F823F80)),
    (
        "fma.rm.f32 %r2, %r1, 0f3DCCCCCD, 0f4B400001;",
        f32(FLOATS),
        f32(np.floor(FLOATS.astype(np.float64) * np.float64(np.float32(0.1)) + np.uint32(0x4B400001).view(np.float32))),
    ),
    (
        "mov.b32 %r2, 0; $L1: add.s32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, %r0; @%p1 bra $L1;",
        INTEGERS,
        np.maximum(LANE, 1),
    ),
    ("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;", INTEGERS, INTEGERS[LANE ^ 5]),
    ("shfl.sync.idx.b32 %r2, %r1, 3, 0x1c1f, -1;", INTEGERS, INTEGERS[LANE & 28 | 3]),
    ("shfl.sync.up.b32 %r2, %r1, 3, 0, -1;", INTEGERS, INTEGERS[np.where(LANE >= 3, LANE - 3, LANE)]),
    (
        "shfl.sync.down.b32 %r2|%p1, %r1, 4, 31, -1; @!%p1 mov.b32 %r2, 7;",
        INTEGERS,
        np.where(LANE < 28, INTEGERS[np.minimum(LANE + 4, 31)], 7),
    ),
    # Lanes that have gone two ways meet at the shuffle.
    (
        "and.b32 %r3, %r0, 1; setp.eq.b32 %p1, %r3, 0; @%p1 bra $E; add.s32 %r1, %r1, 1; "
        "$E: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        INTEGERS,
        (INTEGERS + (LANE & 1).astype(np.uint32))[LANE ^ 1],
    ),
    # Each half of the warp has a mask of its own.
    (
        "mov.b32 %r4, 0x0000ffff; setp.gt.u32 %p1, %r0, 15; @%p1 mov.b32 %r4, 0xffff0000; "
        "shfl.sync.bfly.b32 %r2, %r1, 8, 31, %r4;",
        INTEGERS,
        INTEGERS[LANE ^ 8],
    ),
]


@pytest.mark.parametrize("body,data,expected", OPERATIONS, ids=[body.partition(" ")[0] for body, _, _ in OPERATIONS])
def test_operation(body: str, data: np.ndarray, expected: Any) -> None:
    found, result = run(body, data)
    assert result.faults == []
    np.testing.assert_array_equal(found, np.asarray(expected).astype(np.uint64).astype(np.uint32))


def test_exponential() -> None:
    found, _ = run("ex2.approx.ftz.f32 %r2, %r1;", f32(FLOATS / 10))
    np.testing.assert_allclose(found.view(np.float32), np.exp2(FLOATS.astype(np.float64) / 10), rtol=1e-6)


def test_one_rounding_to_16_bits() -> None:
    """1 and a little more than half a step of bfloat16, of which a float would keep only the half step."""
    body = "mov.b64 %rd5, 0d3FF0100000000001; cvt.rn.bf16.f64 %h1, %rd5; cvt.u32.u16 %r2, %h1;"
    found, _ = run(body)
    assert set(found) == {0x3F81}


#: Lane l has the address of 16 bytes, row l % 8 of matrix l / 8.
ROW = "mov.u32 %r4, s; shl.b32 %r5, %r0, 4; add.s32 %r4, %r4, %r5; "
FOUR = "{%r5, %r6, %r7, %r8}"


BOTH = pytest.mark.parametrize("suffix", ["", ".trans"])


@BOTH
def test_load_matrices(suffix: str) -> None:
    found, result = run(
        ROW + "add.s32 %r5, %r1, 1; st.shared.v4.b32 [%r4], {%r1, %r5, %r5, %r1}; bar.warp.sync -1; "
        f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {FOUR}, [%r4]; mov.b32 %r2, %r7;"
    )
    rows = np.stack([INTEGERS, INTEGERS + 1, INTEGERS + 1, INTEGERS], 1).astype(np.uint32).view(np.uint16)
    matrix = rows[16:24].T if suffix else rows[16:24]
    expected = [int(matrix[k // 4, k % 4 * 2]) | int(matrix[k // 4, k % 4 * 2 + 1]) << 16 for k in LANE]
    assert found.tolist() == expected and result.faults == []


@BOTH
def test_store_matrices(suffix: str) -> None:
    found, result = run(
        ROW + "mov.b32 %r5, %r1; add.s32 %r6, %r1, 100; add.s32 %r7, %r1, 200; add.s32 %r8, %r1, 300; "
        f"stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r4], {FOUR}; bar.warp.sync -1; ld.shared.b32 %r2, [%r4+4];"
    )
    expected = []
    for lane in LANE:
        numbers = (INTEGERS + np.uint32(100 * (lane // 8))).view(np.uint16).reshape(8, 8)
        matrix = numbers.T if suffix else numbers
        expected.append(int(matrix[lane % 8, 2]) | int(matrix[lane % 8, 3]) << 16)
    assert found.tolist() == expected and result.faults == []


# ---- counts ----------------------------------------------------------------------------------------------------------

#: A load of the number that begins 512 bytes after the thread's own, at the address in %rd4.
FAR = "add.s64 %rd4, %rd1, {}; ld.global.b32 {}, [%rd4];"


@pytest.mark.parametrize(
    "body,rounds",
    [
        ("mov.b32 %r2, %r1;", 1),
        (FAR.format(128, "%r3") + "add.s32 %r2, %r1, %r3;", 1),  # both loads begin at once
        # The address of the second load needs the number of the first one.
        ("and.b32 %r4, %r1, 0; cvt.u64.u32 %rd5, %r4; add.s64 %rd1, %rd1, %rd5;" + FAR.format(128, "%r2"), 2),
        # No load is moved across a barrier, or across a branch that waits for a number.
        ("add.s32 %r4, %r1, 1; bar.sync 0;" + FAR.format(128, "%r2"), 2),
        ("setp.eq.u32 %p1, %r1, 77; @%p1 bra $A; $A: " + FAR.format(128, "%r2"), 2),
        ("setp.eq.u32 %p1, %r0, 77; @%p1 bra $A; $A: " + FAR.format(128, "%r2"), 1),
        # The block has loaded this sector already.
        ("add.s32 %r4, %r1, 1; bar.sync 0;" + FAR.format(0, "%r2"), 1),
        # A number that no instruction uses is not waited for.
        ("add.s32 %r4, %r1, 1; bar.sync 0; mov.b32 %r2, 0;" + FAR.format(128, "%r3"), 1),
    ],
)
def test_rounds_of_loads(body: str, rounds: int) -> None:
    """The second half of the numbers is loaded by no thread itself."""
    data, out, memory = np.zeros(64, np.uint32), np.zeros(32, np.uint32), Memory()
    how = Launch((1,), (32,), [memory.add_array(data), memory.add_array(out)])
    assert executor.launch(Kernel(MODULE.format(body), "k"), how, memory).counts["rounds"] == rounds


def test_a_barrier_waits_for_the_rounds_of_every_warp() -> None:
    """The second warp loads twice, one after the other. The first warp begins its second load behind the barrier."""
    body = (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $A; and.b32 %r4, %r1, 0; cvt.u64.u32 %rd5, %r4; add.s64 %rd6, %rd1, %rd5; "
        "ld.global.b32 %r5, [%rd6+256]; add.s32 %r6, %r5, 1; $A: bar.sync 0; ld.global.b32 %r2, [%rd1+512];"
    )
    data, out, memory = np.zeros(256, np.uint32), np.zeros(64, np.uint32), Memory()
    how = Launch((1,), (64,), [memory.add_array(data), memory.add_array(out)])
    assert executor.launch(Kernel(MODULE.format(body), "k"), how, memory).counts["rounds"] == 3


def sectors(count: int) -> np.ndarray:
    """So many sectors of zeros, at an address that begins one."""
    room = np.zeros(8 * count + 8, np.uint32)
    begin = -room.ctypes.data % 32 // 4
    return room[begin : begin + 8 * count]


@pytest.mark.parametrize("blocks,executed", [(None, 3), ([1], 1), ([2, 0], 2)])
def test_sectors_are_counted_once_for_each_block(blocks: list[int] | None, executed: int) -> None:
    """32 numbers are four sectors, however often a block loads them. Blocks may be left out."""
    memory = Memory()
    parameters = [memory.add_array(sectors(4)), memory.add_array(sectors(4))]
    kernel = Kernel(MODULE.format("bar.sync 0; ld.global.b32 %r2, [%rd1];"), "k")
    result = executor.launch(kernel, Launch((3,), (32,), parameters, blocks=blocks), memory)
    assert result.traffic == [(4 * executed, 0), (0, 4 * executed)]


# ---- planted faults --------------------------------------------------------------------------------------------------

SIXTY_FOUR = np.arange(64, dtype=np.uint32)
#: Two warps exchange numbers through shared memory.
EXCHANGE = (
    "mov.u32 %r4, s; shl.b32 %r5, %r0, 2; add.s32 %r6, %r4, %r5; st.shared.b32 [%r6], %r1; {} "
    "xor.b32 %r5, %r5, 128; add.s32 %r6, %r4, %r5; ld.shared.b32 %r2, [%r6];"
)


def test_a_barrier_orders_warps() -> None:
    found, result = run(EXCHANGE.format("bar.sync 0;"), SIXTY_FOUR)
    assert found.tolist() == (SIXTY_FOUR ^ 32).tolist()
    assert result.faults == [] and result.counts["barriers"] == 1


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
def test_a_removed_barrier_is_a_race(barrier: str) -> None:
    for seed in range(8):  # whichever warp goes first
        result = run(EXCHANGE.format(barrier), SIXTY_FOUR, seed=seed)[1]
        assert result.counts["races"] + result.counts["unwritten"] > 0 and result.faults


def test_lanes_of_a_warp_need_an_order_too() -> None:
    body = EXCHANGE.replace("128", "4")
    assert run(body.format("bar.warp.sync -1;"))[1].faults == []
    assert run(body.format(""))[1].counts["unordered"] > 0


def test_blocks_share_nothing_that_is_stored() -> None:
    data, out, memory = INTEGERS.copy(), np.zeros_like(INTEGERS), Memory()
    how = Launch((2,), (32,), [memory.add_array(data), memory.add_array(out)])
    of_block = "mov.u32 %r3, %ctaid.x; add.s32 %r2, %r1, %r3;"
    assert executor.launch(Kernel(MODULE.format("mov.b32 %r2, %r1;"), "k"), how, memory).faults == []
    assert executor.launch(Kernel(MODULE.format(of_block), "k"), how, memory).counts["races"] > 0


def test_unwritten_memory() -> None:
    written = np.ones(128, np.uint8)
    assert run("mov.b32 %r2, %r1;", written=written)[1].faults == []
    written[17] = 0
    assert run("mov.b32 %r2, %r1;", written=written)[1].counts["unwritten"] == 1
    found, result = run("ld.shared.b32 %r2, [s];")
    assert result.counts["unwritten"] == 32 and set(found) == {0xFFFFFFFF}


def test_stores_are_marked() -> None:
    written, out, memory = np.zeros(128, np.uint8), np.zeros(32, np.uint32), Memory()
    data = memory.add_array(INTEGERS.copy())
    how = Launch((1,), (32,), [data, memory.add_array(out, written)])
    executor.launch(Kernel(MODULE.format("setp.eq.u32 %p1, %r0, 3; @%p1 ret; mov.b32 %r2, 1;"), "k"), how, memory)
    assert np.flatnonzero(written == 0).tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("first", [False, True])
def test_lanes_store_to_one_address(first: bool) -> None:
    """Equal numbers are no conflict. Of different ones the first or the last lane's stays, as is asked for."""
    store = "st.shared.b32 [s], {}; bar.warp.sync -1; ld.shared.b32 %r2, [s];"
    assert run(store.format("7"), first_wins=first)[1].counts["conflicts"] == 0
    found, result = run(store.format("%r1"), first_wins=first)
    assert result.counts["conflicts"] == 31 and result.faults == []
    assert set(found) == {INTEGERS[0 if first else 31]}


@pytest.mark.parametrize("first", [False, True])
def test_lanes_store_rows_of_matrices_to_one_address(first: bool) -> None:
    """Two matrices in one place, whose numbers are equal or not."""
    body = (
        "mov.u32 %r4, s; and.b32 %r5, %r0, 7; shl.b32 %r5, %r5, 4; add.s32 %r4, %r4, %r5; add.s32 %r6, %r1, {}; "
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r4], {{%r1, %r6}}; bar.warp.sync -1; "
        "mov.u32 %r4, s; shl.b32 %r5, %r0, 2; add.s32 %r4, %r4, %r5; ld.shared.b32 %r2, [%r4];"
    )
    assert run(body.format(0), first_wins=first)[1].counts["conflicts"] == 0
    found, result = run(body.format(1), first_wins=first)
    assert result.counts["conflicts"] == 8 and result.faults == []
    assert found.tolist() == (INTEGERS + np.uint32(not first)).tolist()


def test_warps_store_to_one_address() -> None:
    """Numbers that differ by rounding are a conflict, and others a race."""
    store = "setp.gt.u32 %p1, %r0, 31; selp.b32 %r3, {}, 0f3F800000, %p1; st.shared.b32 [s], %r3; mov.b32 %r2, 0;"
    counts = [run(store.format(other), SIXTY_FOUR)[1].counts for other in ("0f3F800000", "0f3F800001", "0f40000000")]
    assert [(c["conflicts"] > 0, c["races"] > 0) for c in counts] == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(
    "body,said",
    [
        ("ld.global.b32 %r2, [%rd1+256];", "out of bounds"),
        ("ld.global.b32 %r2, [%rd1+-4];", "out of bounds"),
        ("ld.shared.b32 %r2, [s+512];", "out of bounds"),
        ("ld.param.b32 %r2, [in+16];", "out of bounds"),
        ("ld.global.b32 %r2, [%rd1+1];", "misaligned"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd1];", "misaligned"),
        ("mov.b64 %rd5, 64; ld.global.b32 %r2, [%rd5];", "wild"),
        ("trap;", "trap"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "exited"),
        ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 65535;", "outside of its own mask"),
        ("setp.gt.u32 %p1, %r0, 15; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 16, 31, 65535;", "does not take part"),
        # Half of the lanes wait for the others at another shuffle.
        (
            "setp.gt.u32 %p1, %r0, 15; @%p1 bra $A; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; bra $B; "
            "$A: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; $B: mov.b32 %r3, 0;",
            "for ever",
        ),
        ("setp.gt.u32 %p1, %r0, 15; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 0; $B: mov.b32 %r2, 0;", "different"),
        ("setp.gt.u32 %p1, %r0, 31; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 1; $B: mov.b32 %r2, 0;", "numbers"),
    ],
)
def test_fault(body: str, said: str) -> None:
    with pytest.raises(Fault, match=said):
        run(body, SIXTY_FOUR)


def test_too_many_threads() -> None:
    with pytest.raises(Fault, match="allows 64"):
        run("mov.b32 %r2, 0;", np.zeros(96))


@pytest.mark.parametrize(
    "body",
    [
        "atom.global.add.u32 %r2, [%rd2], 1;",
        "vote.sync.ballot.b32 %r2, %p1, -1;",
        "bar.sync 0, 32;",
        "cvt.rz.bf16.f32 %h1, %r1;",
        "mov.b32 %r2, %clock;",
        "add.cc.u32 %r2, %r1, 1;",
        "prmt.b32.f4e %r2, %r1, %r1, 0;",
    ],
)
def test_what_is_not_decoded_is_not_executed(body: str) -> None:
    with pytest.raises(Unknown):
        run(body)


@pytest.mark.parametrize("seed", range(3))
def test_seeds_change_the_order_of_warps_alone(seed: int) -> None:
    found = run(EXCHANGE.format("bar.sync 0;"), SIXTY_FOUR, seed=seed)[0]
    assert found.tolist() == (SIXTY_FOUR ^ 32).tolist()


def test_division_by_zero() -> None:
    assert run("sub.s32 %r3, %r1, %r1; div.s32 %r2, %r1, %r3;")[1].counts["divisions_by_zero"] == 32
