"""The guard around Triton's interpreter: it must catch planted bugs, pass right kernels, and count traffic exactly."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from tests.support import triton_guard  # noqa: E402
from tests.support.triton_guard import Guard, GuardError, Traffic  # noqa: E402


def interpreted(fn: Callable[..., None]) -> Any:
    """``triton.jit`` as it is under TRITON_INTERPRET=1, whatever this process was started with."""
    return InterpretedFunction(fn)


@interpreted
def scale_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    tl.store(y + o, 2 * tl.load(x + o, mask=m), mask=m)


@interpreted
def unmasked_load_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o), mask=o < n)


@interpreted
def unmasked_store_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n))


@interpreted
def before_the_start_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o - 1, mask=o < n), mask=o < n)


@interpreted
def overlapping_stores_kernel(x, y, n, BLOCK: tl.constexpr):
    """The last tile is moved back to end at n, as is done to spare the mask: both programs store the same values."""
    o = tl.program_id(0) * BLOCK
    o = tl.minimum(o, n - BLOCK) + tl.arange(0, BLOCK)
    tl.store(y + o, 2 * tl.load(x + o))


@interpreted
def read_after_write_kernel(x, y, n, BLOCK: tl.constexpr):
    """Each program reads what the one before it stored."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(y + o - BLOCK, mask=o >= BLOCK, other=0.0)
    tl.store(y + o, tl.load(x + o, mask=o < n) + before, mask=o < n)


@interpreted
def write_after_read_kernel(x, y, n, BLOCK: tl.constexpr):
    """In place, each program reads a neighbour's first element."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after = tl.load(x + o + 1, mask=o + 1 < n, other=0.0)
    tl.store(x + o, after, mask=o < n)


@interpreted
def through_memory_kernel(x, y, n, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """One program stores a tile and loads it back reversed."""
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o))
    if BARRIER:
        tl.debug_barrier()
    back = tl.load(y + (BLOCK - 1 - o))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + o, back)


@interpreted
def pairs_kernel(x, y, n, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    """Moves two float32 at a time as one int64, from element FIRST on."""
    o = tl.arange(0, BLOCK)
    p_x = (x + FIRST).to(tl.pointer_type(tl.int64))
    p_y = (y + FIRST).to(tl.pointer_type(tl.int64))
    tl.store(p_y + o, tl.load(p_x + o, mask=2 * o + 1 < n), mask=2 * o + 1 < n)


@interpreted
def hint_kernel(x, y, n, stride, BLOCK: tl.constexpr, DIVISOR: tl.constexpr, RUN: tl.constexpr, ALIKE: tl.constexpr):
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    o = tl.max_contiguous(tl.multiple_of(o, DIVISOR), RUN)
    i = tl.max_constancy(tl.arange(0, BLOCK) // 4, ALIKE)
    tl.store(y + o, tl.load(x + o, mask=o < n) + 0 * i, mask=o < n)


@interpreted
def pointer_hint_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(tl.multiple_of(y + o, 16), tl.load(x + o))


@interpreted
def last_wins_kernel(x, y, n, BLOCK: tl.constexpr):
    """Every lane stores its own value to one element."""
    o = tl.arange(0, BLOCK)
    tl.store(y + o * 0, tl.load(x + o))


@interpreted
def atomic_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(y + o % 2, tl.load(x + o))


@interpreted
def forgetful_kernel(x, y, n, BLOCK: tl.constexpr):
    """Leaves out the last element."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n), mask=o < n - 1)


@interpreted
def running_kernel(x, y, n, BLOCK: tl.constexpr):
    """Depends on the order of programs: what is stored says whether program 0 has run."""
    first = tl.load(y)
    i = tl.program_id(0)
    tl.store(y + i, first + 1)


@interpreted
def tile_kernel(x, y, rows, columns, stride, R: tl.constexpr, Q: tl.constexpr):
    r = tl.program_id(1) * R + tl.arange(0, R)[:, None]
    q = tl.program_id(0) * Q + tl.arange(0, Q)[None, :]
    m = (r < rows) & (q < columns)
    tl.store(y + r * columns + q, tl.load(x + r * stride + q, mask=m), mask=m)


def between(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """n numbers in the middle of a wider buffer, where a stray access would read real numbers and not crash."""
    return torch.randn(n + 512).to(dtype)[256 : 256 + n]


def run(kernel: Any, n: int = 100, grid: tuple[int, ...] = (4,), seed: int | None = 0, **options: Any) -> torch.Tensor:
    y = between(n)
    with Guard(seed):
        kernel[grid](between(n), y, n, **{"BLOCK": 32, **options})
    return y


# ---- planted bugs ----------------------------------------------------------------------------------------------------

PLANTED = [
    (unmasked_load_kernel, {}, r"loads x out of bounds in 28 of 32 lanes, the first at element 100 of 100"),
    (unmasked_store_kernel, {}, r"stores y out of bounds in 28 of 32 lanes"),
    (before_the_start_kernel, {}, r"loads x out of bounds in 1 of 32 lanes, the first at element -1"),
    (overlapping_stores_kernel, {}, r"race: stores to y where program \(\d,\) stores"),
    (read_after_write_kernel, {}, r"race: (loads of y what|stores to y where) program \(\d,\) (stores|loads)"),
    (write_after_read_kernel, {}, r"race: (loads of x what|stores to x where) (program \(\d,\)|several programs)"),
    (through_memory_kernel, {"grid": (1,), "BARRIER": False}, "loads of y what it stored itself, without a barrier"),
    (pairs_kernel, {"grid": (1,), "FIRST": 1}, r"loads x misaligned: 8 bytes"),
    (last_wins_kernel, {"grid": (1,)}, "two lanes store different values to one element of y"),
    (atomic_kernel, {"grid": (1,)}, "an atomic"),
    (hint_kernel, {"stride": 24, "DIVISOR": 16, "RUN": 32, "ALIKE": 4}, r"the hint tt.divisibility = \[16\] is false"),
    (hint_kernel, {"stride": 32, "DIVISOR": 16, "RUN": 64, "ALIKE": 8}, r"the hint tt.constancy = \[8\] is false"),
    (hint_kernel, {"stride": 0, "DIVISOR": 16, "RUN": 32, "ALIKE": 4}, "race: stores to y where"),
    (running_kernel, {"BLOCK": 1}, r"race: (loads of y what|stores to y where)"),
    (scale_kernel, {"grid": (1, 70000)}, "CUDA's limits"),
]


@pytest.mark.parametrize("kernel,options,message", PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_planted_bug_is_caught(kernel: Any, options: dict[str, Any], message: str) -> None:
    for seed in (None, 0, 1, 2):
        with pytest.raises(GuardError, match=message) as caught:
            run(kernel, seed=seed, **options)
        assert str(caught.value).startswith(f"{kernel.__name__}, program (")
        assert " test_guard.py:" in str(caught.value) or "CUDA's limits" in message


def test_a_neighbouring_tensor_is_out_of_bounds() -> None:
    """A pointer stays bound to its tensor: y lies right behind x, and x + n is y's first element."""
    both = torch.randn(200)
    with Guard(), pytest.raises(GuardError, match="loads x out of bounds"):
        unmasked_load_kernel[(4,)](both[:100], both[100:], 100, BLOCK=32)


def test_gaps_of_a_view_are_out_of_bounds() -> None:
    """The columns that a slice leaves out belong to somebody else."""
    x, y = torch.randn(8, 20)[:, 3:13], torch.empty(8, 10)
    with Guard() as guard:
        tile_kernel[(1, 2)](x, y, 8, 10, 20, R=4, Q=16)
    assert torch.equal(x, y) and guard.traffic(x).loaded.bytes == 320
    with (
        Guard(None),
        pytest.raises(GuardError, match=r"loads x out of bounds in 6 of 40 lanes, the first at element 19"),
    ):
        tile_kernel[(1, 2)](x, y, 8, 10, 19, R=4, Q=16)


def test_misaligned_pointer_hint() -> None:
    """multiple_of on pointers is of bytes, from the first element of each run."""
    x = torch.randn(64)
    with Guard():
        pointer_hint_kernel[(1,)](x, torch.empty(64), 32, BLOCK=32)
    with Guard(), pytest.raises(GuardError, match=r"the hint tt.divisibility = \[16\] is false"):
        pointer_hint_kernel[(1,)](x, torch.empty(64)[1:33], 32, BLOCK=32)


def test_unwritten_elements_are_nan_and_counted() -> None:
    x = torch.randn(100)
    with Guard() as guard:
        y = torch.empty_like(x)
        forgetful_kernel[(4,)](x, y, 100, BLOCK=32)
        z = x.new_empty(7)
    assert y[99].isnan() and torch.equal(y[:99], x[:99]) and z.isnan().all()
    assert guard.unwritten(y) == 1 and guard.unwritten(y[:99]) == 0 and guard.unwritten(z) == 7


def test_order_dependence_changes_bits() -> None:
    """Where races are not looked for, the order still shows: not every seed gives the interpreter's own result."""

    class Blind(Guard):
        def _load(self, *args: Any) -> None:
            pass

        _store = _load

    results = []
    for seed in (None, 0, 1, 2, 3):
        y = torch.zeros(9)
        with Blind(seed):
            running_kernel[(9,)](y, y, 9, BLOCK=1)
        results.append(y)
    assert any(not torch.equal(results[0], other) for other in results[1:])


# ---- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_right_kernels_pass(seed: int | None) -> None:
    for n in (1, 31, 32, 33, 100, 128):
        x, y = between(n), between(n)
        with Guard(seed) as guard:
            scale_kernel[(-(-n // 32),)](x, y, n, BLOCK=32)
        assert torch.equal(y, 2 * x) and guard.unwritten(y) == 0
    run(through_memory_kernel, grid=(1,), BARRIER=True)
    run(pairs_kernel, grid=(1,), FIRST=0)
    run(hint_kernel, stride=32, DIVISOR=16, RUN=32, ALIKE=4)
    run(scale_kernel, n=32, grid=(1, 1))


def test_in_place_is_no_race() -> None:
    x = torch.randn(100)
    before = x.clone()
    with Guard() as guard:
        scale_kernel[(4,)](x, x, 100, BLOCK=32)
    assert torch.equal(x, 2 * before)
    assert guard.traffic(x) == (Traffic(400, 13), Traffic(400, 13))


def test_launches_follow_one_another() -> None:
    """What one launch stores, the next may load."""
    x, y, z = torch.randn(64), torch.empty(64), torch.empty(64)
    with Guard() as guard:
        scale_kernel[(2,)](x, y, 64, BLOCK=32)
        scale_kernel[(4,)](y, z, 64, BLOCK=16)
    assert torch.equal(z, 4 * x)
    assert [(launch.kernel, launch.grid) for launch in guard.launches] == [
        ("scale_kernel", (2,)),
        ("scale_kernel", (4,)),
    ]
    assert guard.traffic(y) == (Traffic(256, 8), Traffic(256, 8))
    assert guard.others(x, z) == guard.traffic(y) and guard.others(x, y, z) == (Traffic(), Traffic())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_traffic_is_exact(dtype: torch.dtype) -> None:
    """Bytes of active lanes only; sectors by address, once for each load or store that touches them."""
    size = dtype.itemsize
    buffer = torch.zeros(16 * 24 + 64, dtype=dtype)
    start = -buffer.data_ptr() % 64 // size  # at the start of a sector
    x = buffer[start : start + 16 * 24].view(16, 24)
    y = torch.empty(10 * 20, dtype=dtype)
    with Guard() as guard:
        tile_kernel[(3, 2)](x, y, 10, 20, 24, R=8, Q=8)
    loaded, stored = guard.traffic(x).loaded, guard.traffic(y).stored
    assert loaded.bytes == stored.bytes == 200 * size
    rows = [(24 * r + 8 * q, 24 * r + min(8 * q + 8, 20)) for r in range(10) for q in range(3)]
    assert loaded.sectors == sum(-(-b * size // 32) - a * size // 32 for a, b in rows)
    tiles = [[20 * r + q for r in range(8 * i, min(8 * i + 8, 10)) for q in range(8 * j, min(8 * j + 8, 20))]
             for i in range(2) for j in range(3)]  # fmt: skip
    assert stored.sectors == sum(len({(y.data_ptr() + o * size) // 32 for o in tile}) for tile in tiles)


def test_repeated_loads_count_each_time() -> None:
    x, y = torch.randn(32), torch.empty(32)
    with Guard() as guard:
        for _ in range(3):
            scale_kernel[(1,)](x, y, 32, BLOCK=32)
    assert guard.traffic(x).loaded.bytes == 3 * 128


def test_random_order_is_a_permutation_and_seeded() -> None:
    """Every program runs once, whatever the order; one seed gives one order."""

    def order(seed: int | None) -> list[int]:
        seen: list[int] = []

        class Listening(Guard):
            def _store(self, *args: Any) -> None:
                seen.append(self._program)

        with Listening(seed):
            scale_kernel[(4, 2, 1)](torch.randn(128), torch.empty(128), 128, BLOCK=32)
        return seen

    assert order(None) == list(range(8))
    assert sorted(order(1)) == list(range(8)) and order(1) != order(None)
    assert order(1) == order(1) != order(2)


@interpreted
def wrapping_kernel(x, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets that are widened before, or after, the multiplication by BLOCK."""
    i = tl.program_id(0)
    o = i.to(tl.int64) * BLOCK if WIDE else (i * BLOCK).to(tl.int64)
    o += tl.arange(0, BLOCK)
    tl.store(x + o, tl.load(x + o, mask=o < n) + 1, mask=o < n)


def test_last_programs_of_a_huge_tensor() -> None:
    """A tensor of more than 2**31 elements that nobody touches: 32-bit offsets wrap, 64-bit ones arrive."""
    n = 2**31 + 100
    x = torch.frombuffer(mmap.mmap(-1, 2 * n), dtype=torch.float16)
    grid = (-(-n // 1024),)
    with Guard(last=2) as guard:
        wrapping_kernel[grid](x, n, BLOCK=1024, WIDE=True)
    assert guard.launches[0].highest == {"x": n - 1}
    assert x[-1124:].tolist() == [1.0] * 1124 and x[-1125] == 0  # two programs, and each once
    assert x[:2048].tolist() == [1.0] * 2048 and x[2048] == 0
    with Guard(last=2), pytest.raises((GuardError, InterpreterError)):
        wrapping_kernel[grid](x, n, BLOCK=1024, WIDE=False)


def test_nothing_stays_patched() -> None:
    before = torch.empty, triton_guard.interpreter.GridExecutor.__call__, triton_guard.interpreter._implicit_cvt
    with pytest.raises(GuardError):
        run(unmasked_load_kernel)
    after = torch.empty, triton_guard.interpreter.GridExecutor.__call__, triton_guard.interpreter._implicit_cvt
    assert before == after
    y = torch.zeros(100)
    scale_kernel[(4,)](torch.ones(100), y, 100, BLOCK=32)
    assert torch.equal(y, torch.full((100,), 2.0))


def test_another_triton_skips_a_test_with_a_sentence_and_fails_it_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    sentence = r"the guard replaces private names of Triton 3\.8\.0, and this is Triton 3\.9\.0"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=sentence), Guard():
        pass
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=sentence), Guard():
        pass
