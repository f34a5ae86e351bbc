"""The CPU kernels' working memory: any sequence of shapes, a bound on the kept bytes, a clear error without memory."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import steam_kernels
from steam_kernels import steam
from tests.support.in_a_thread import in_a_thread

pytestmark = pytest.mark.kernels

LIBRARY = Path(steam_kernels.__file__).parent / "libsteam_cpu.so"
MIB = 1 << 20


@pytest.fixture
def cpu(backend: str) -> ctypes.CDLL:
    if backend != "cpu":
        pytest.skip("the working memory is the CPU kernels'")
    library = ctypes.CDLL(str(LIBRARY))
    library.steam_cpu_probe_kept_bytes.restype = ctypes.c_int64
    return library


def forward_backward(shape: tuple[int, ...], options: dict[str, object], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    layout = torch.channels_last if sum(shape) % 2 else torch.contiguous_format
    x, dy = (torch.randn(shape, generator=generator, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
    weights = [torch.randn(4, 8, generator=generator).requires_grad_() for _ in range(2)]
    x.requires_grad_()
    y = steam(x, *weights, backend="cpu", **options)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]


def test_growing_maps_and_then_a_larger_one(cpu: ctypes.CDLL) -> None:
    """Each map needs a little more memory than the last one. There are more maps than rows in a table of blocks."""
    w = torch.randn(4, 8)
    for i in range(150):
        steam(torch.randn(1, 8, 2, 8200 + 8 * i), w, w, grid_size=(1, 7), backend="cpu")
    x = torch.randn(1, 32, 130, 2048, requires_grad=True)
    y = steam(x, w, w, grid_size=(128, 7), backend="cpu")
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def random_shapes(count: int) -> list[tuple[tuple[int, ...], dict[str, object], torch.dtype]]:
    """Shapes that grow and shrink, slowly and in large steps."""
    pick = random.Random(0)
    out: list[tuple[tuple[int, ...], dict[str, object], torch.dtype]] = []
    for i in range(count):
        most = 4 + (i % 400) // 8 if i % 3 else pick.randint(2, 60)
        h, w = pick.randint(1, most), pick.randint(1, most)
        options = {
            "grid_size": (pick.randint(1, h), pick.randint(1, w)),
            "channel_radius": pick.choice((1, 1, 2, 30)),
            "order": pick.choice(("sequential", "sequential", "parallel")),
        }
        dtype = pick.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
        out.append(((pick.randint(1, 3), pick.randint(1, 40), h, w), options, dtype))
    return out


@pytest.mark.parametrize("threads", [1, 2])
def test_two_thousand_shapes(cpu: ctypes.CDLL, threads: int) -> None:
    """A used and a fresh thread give equal bits, and a thread keeps at most twice the largest need."""
    torch.set_num_threads(threads)
    needs: list[int] = []
    wrong: list[object] = []
    kept: list[int] = []
    shapes = random_shapes(2000)

    def alone(call: tuple[object, ...], out: list[Tensor]) -> None:
        torch.set_num_threads(threads)
        out += forward_backward(*call)  # type: ignore[arg-type]
        needs.append(cpu.steam_cpu_probe_kept_bytes())

    def all_of_them() -> None:
        torch.set_num_threads(threads)
        for call in shapes:
            results, fresh = forward_backward(*call), []  # type: ignore[var-annotated]
            in_a_thread(partial(alone, call, fresh))
            if not all(torch.equal(a, b) for a, b in zip(results, fresh, strict=True)):
                wrong.append(call)
        kept.append(cpu.steam_cpu_probe_kept_bytes())

    in_a_thread(all_of_them)
    assert kept and len(needs) == len(shapes) and not wrong
    assert 0 < kept[0] <= 2 * max(needs) < 64 * MIB * threads


def test_a_large_block_is_not_kept(cpu: ctypes.CDLL) -> None:
    small = ((1, 8, 20, 20), {}, torch.float32)
    # Column sums take 32 bytes per channel and row of cells, or more with longer vectors: together at least 128 MiB.
    large = ((1, 2048, 2049, 8), {"grid_size": (2048, 1), "channel_radius": 400}, torch.float32)
    kept: list[int] = []
    same: list[bool] = []

    def check() -> None:
        torch.set_num_threads(1)
        first = forward_backward(*small)
        kept.append(cpu.steam_cpu_probe_kept_bytes())
        forward_backward(*large)
        kept.append(cpu.steam_cpu_probe_kept_bytes())
        same.extend(torch.equal(a, b) for a, b in zip(first, forward_backward(*small), strict=True))

    in_a_thread(check)
    assert 0 < kept[0] == kept[1] <= 64 * MIB
    assert len(same) == 4 and all(same)


# This code makes a call under increasing limits of the address space. It prints the error at each limit, checks that x
# is unchanged and that the thread stays usable, and prints the result at the end. Each direction has its own process,
# which has no working memory yet. The working memory of these calls is several times the size of their maps, so that
# some limits have room for the maps only.
LIMITED = """
import os, resource, sys, torch
from steam_kernels import steam

shape, options, threads = {shape}, {options}, {threads}
UNLIMITED = resource.RLIM_INFINITY
torch.set_num_threads(1)  # so that there are no helpers that a fork would lose
w = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
maps = torch.randn(shape, generator=torch.Generator().manual_seed(2))
if {channels_last}:
    maps = maps.contiguous(memory_format=torch.channels_last)

def in_place(x, **options):
    with torch.no_grad():
        return [steam(x, w, w, inplace=True, backend="cpu", **options)]

def forward(x, **options):
    with torch.no_grad():
        return [steam(x, w, w, backend="cpu", **options)]

def backward(x, **options):
    leaves = [t.detach().requires_grad_() for t in (x, w, w)]
    y = steam(*leaves, backend="cpu", **options)
    return list(torch.autograd.grad(y, leaves, x))

def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

def climb(call):
    torch.set_num_threads(threads)
    x = maps.clone()
    small = x[:, :4, :8, :8].clone()
    before = call(small.clone(), **options | {{"grid_size": (1, 1)}})  # the helpers are there now
    said, margin = set(), 1 << 20
    while True:
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + margin, UNLIMITED))
        try:
            limited, error = call(x, **options), None
        except (RuntimeError, MemoryError) as caught:
            limited, error = None, " ".join(str(caught).split())
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (UNLIMITED, UNLIMITED))
        assert same(call(small.clone(), **options | {{"grid_size": (1, 1)}}), before)
        if error is None:
            break
        assert torch.equal(x, maps), "a call that failed has written into x"
        said.add(error)
        margin += margin // 2
    assert same(call(maps.clone(), **options), limited)
    for error in sorted(said):
        print(call.__name__, error)
    print("done", flush=True)

for call in (forward, in_place, backward):
    child = os.fork()
    if child == 0:
        try:
            climb(call)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape, options, channels_last",
    [
        ((1, 256, 2049, 1), {"grid_size": (2048, 1), "channel_radius": 200}, False),
        ((3, 256, 2049, 1), {"grid_size": (2048, 1), "channel_radius": 200}, False),
        ((2, 17, 1025, 61), {"grid_size": (1024, 61)}, True),
    ],
    ids=["one sample", "three samples", "channels_last"],
)
def test_lack_of_memory_is_one_sentence_and_leaves_no_trace(
    cpu: ctypes.CDLL, shape: tuple[int, ...], options: dict[str, object], channels_last: bool, threads: int
) -> None:
    code = LIMITED.format(shape=shape, options=options, channels_last=channels_last, threads=threads)
    # With one arena and separate blocks, malloc reserves no address space. LD_PRELOAD could load another malloc.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=65536"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=LIBRARY.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines.count("done") == 3, done.stdout + done.stderr
    grid = " x ".join(map(str, options["grid_size"]))  # type: ignore[call-overload]
    end = re.escape(f"bytes of working space, needed for x of shape {shape} on a grid of {grid}")
    ours = re.compile(rf"(\w+) .*steam_kernels: there is no memory for (\d+) {end}")
    # This is the error if PyTorch cannot allocate an output.
    output = re.compile(r"\w+ .*steam_kernels: PyTorch could not allocate an output of shape \((\d+, )*\d+\)")
    found = [ours.match(line) for line in lines if line != "done"]
    assert {match[1] for match in found if match} == {"forward", "in_place", "backward"}, done.stdout
    for line, match in zip([line for line in lines if line != "done"], found, strict=True):
        assert match or output.match(line), line
        assert match is None or 4 * MIB < int(match[2]) < 512 * MIB
    assert any(map(output.match, lines))
