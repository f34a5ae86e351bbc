"""Kernels stay inside their arguments and outputs. Inputs end at unmapped pages, and the C library checks the heap."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(sys.platform != "linux", reason="maps pages as Linux does")]

# This code runs in a separate process, because an overrun kills the process. Every input lies between two unmapped
# pages, and touches the page after it or the page before it. Reading one element too many is then a segmentation fault.
SWEEP = """
import ctypes, mmap, sys
import torch, steam_kernels
from tests.support.cases import Case, forward_backward, make

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE
maps = []

def fenced(values, at_end):
    bytes_ = values.numel() * values.element_size()
    room = -(-bytes_ // PAGE) * PAGE
    base = libc.mmap(None, room + 2 * PAGE, 3, 0x22, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value)
    assert libc.mprotect(base, PAGE, 0) == 0 and libc.mprotect(base + PAGE + room, PAGE, 0) == 0
    maps.append((base, room + 2 * PAGE))
    start = base + PAGE + (room - bytes_ if at_end else 0)
    flat = torch.frombuffer((ctypes.c_char * bytes_).from_address(start), dtype=values.dtype)
    return flat.as_strided(values.shape, values.stride()).copy_(values)

def check(case, backend, threads):
    torch.set_num_threads(threads)
    inputs, dy = make(case)
    expected = forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    for at_end in (True, False):
        near = {{k: fenced(v, at_end) for k, v in inputs.items()}}
        got = forward_backward(steam_kernels.steam, near, fenced(dy, at_end), backend=backend, **case.options)
        for name, value in got.items():
            assert torch.equal(value, expected[name]), (case.id, name)
        x = near["x"]
        with torch.no_grad():
            steam_kernels.steam(**near, backend=backend, inplace=True, **case.options)
        assert torch.equal(x, expected["y"]), case.id
        del near, got, x
        while maps:
            libc.munmap(*maps.pop())

if {overrun!r} == "read":
    t = fenced(torch.zeros(3), True)
    ctypes.c_float.from_address(t.data_ptr() + 12).value
if {overrun!r} == "write":
    t = torch.zeros(100)
    ctypes.c_float.from_address(t.data_ptr() + 400).value = 1.0
    del t
for tail in ("none", "residual_relu"):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for space, grid in (((1, 1), None), ((7, 7), None), ((5, 3), (2, 3)), ((20, 13), None), ((57, 61), None),
                            ((1, 300), (1, 5)), ((300, 1), None), ((9, 10), (9, 10))):
            for channels in (1, 3, 7, 8, 9, 17, 33, 40):
                few = 1 + channels % 2
                case = Case(space=space, grid=grid, channels=channels, batch=few, dtype=dtype, tail=tail)
                check(case.but(layout={layout!r}), {backend!r}, few)
print("inside")
"""

# glibc's checking allocator, if it is installed, aborts when a block is freed that was written past its end.
DEBUG = ctypes.util.find_library("c_malloc_debug")
CHECKED = {"LD_PRELOAD": DEBUG, "MALLOC_CHECK_": "3"} if DEBUG else {}


def sweep(backend: str, layout: str, overrun: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = SWEEP.format(backend=backend, layout=layout, overrun=overrun)
    path = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nothing_is_read_or_written_out_of_bounds(backend: str, layout: str) -> None:
    """Kernels do not read unmapped pages, and do not write past the blocks of the heap."""
    done = sweep(backend, layout, **CHECKED)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    assert done.stdout.endswith("inside\n")


def test_reading_too_far_is_seen(backend: str) -> None:
    """The control: reading one element past a fenced tensor ends the process by SIGSEGV."""
    assert sweep(backend, "nchw", overrun="read").returncode == -11


@pytest.mark.skipif(not DEBUG, reason="this C library has no libc_malloc_debug")
def test_writing_too_far_is_seen(backend: str) -> None:
    """The control: one element written past a block of the heap ends the process by SIGABRT."""
    assert sweep(backend, "nchw", overrun="write", **CHECKED).returncode == -6
