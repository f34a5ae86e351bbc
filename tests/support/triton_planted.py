"""Toy kernels with planted faults, for the readers of compiled code. ``wide_copy`` has no fault."""

import triton
import triton.language as tl


@triton.jit
def wide_copy(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, 2 * tl.load(x + o, mask=o < n), mask=o < n)


@triton.jit
def half_wide(x, y, n, step, BLOCK: tl.constexpr):
    """Reads whole runs, and writes each number ``step`` elements after the last."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o * step, tl.load(x + o, mask=o < n), mask=o * step < n)


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    """A program of one warp that holds three times BLOCK numbers: 384 per thread if BLOCK is 128 per thread."""
    o = tl.arange(0, BLOCK).to(tl.int64)
    a = tl.load(x + o)
    b = tl.load(x + BLOCK + o)
    c = tl.load(x + 2 * BLOCK + o)
    total = tl.sum(a * b + c, 0)
    for _ in range(3):
        a, b, c = b * total, c + total, a - total
        total += tl.sum(a * b * c, 0)
    tl.store(y + o, a * total)
    tl.store(y + BLOCK + o, b * total)
    tl.store(y + 2 * BLOCK + o, c * total)


@triton.jit
def narrow_copy(x, y, few, n, BLOCK: tl.constexpr):
    """Accesses two maps by 32-bit offsets, and a small vector, for which 32 bits are enough."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(few + tl.program_id(0))
    tl.store(y + o, factor * tl.load(x + o, mask=o < n), mask=o < n)


@triton.jit
def narrow_walk(x, y, n, BLOCK: tl.constexpr):
    """A 32-bit loop index is an offset into x. The offset into y is a place within the tile, which is no fault."""
    o = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        total += tl.load(x + (first + o))
    tl.store(y + o, total)
