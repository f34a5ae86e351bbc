"""The CUDA kernels on this machine's memory: builds cuda_on_host with a host compiler and runs it as a backend.

The runner is a process that takes one call after another over pipes. If a call kills the process, its output is the
error message.

    python -m tests.support.on_host     writes docs/cuda_verification.md's table of shared memory
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.tables import fill_marks
from steam_kernels.config import Arguments
from steam_kernels.ops import Operators, from_arguments, with_any_strides
from steam_kernels.schemas import Backward, Forward
from tests.support.cases import Case

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("cuda_on_host")
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_on_host"

FLAGS = ["-std=c++20", "-O1", "-g1", "-DSTEAM_CUDA_ON_HOST", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
#: The compiler flags and the environment of each variant.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": ([], {}),
    "address": (
        # GCC's "undefined" does not include float-cast-overflow.
        ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"],
        {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": (["-fsanitize=thread"], {"TSAN_OPTIONS": "halt_on_error=1"}),
}

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ARRAYS = (
    "channel_weight",
    "spatial_weight",
    "x",
    "residual",
    "dy",
    "y",
    "saved",
    "dx",
    "dresidual",
    "dchannel",
    "dspatial",
)
ABSENT, READ, WRITTEN, IS_X = range(4)


class Failed(Exception):
    """The runner reported that a call failed, or a call killed it."""


def compiler() -> str | None:
    """The path of GCC, or None. The header knows only GCC's names of the sanitizers."""
    return shutil.which("g++") if sys.platform == "linux" else None


#: The sources of the runner and the kernels.
RUNNER = (SHIM / "runner.cpp", KERNELS / "forward.cu", KERNELS / "backward.cu")


def build(variant: str, sources: Sequence[Path] = RUNNER, kernels: Path = KERNELS) -> Path:
    """Compiles a program in one of the VARIANTS, unless it exists already. ``kernels`` is csrc/cuda or a copy of it."""
    cxx = compiler()
    assert cxx is not None
    flags = [*FLAGS, *VARIANTS[variant][0], f"-I{SHIM}", f"-I{kernels}"]
    headers = [
        *SHIM.glob("*.h"),
        *kernels.glob("*.cuh"),
        kernels / "kernels.h",
        *(kernels.parent / "common").glob("*.h"),
    ]
    BUILD.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        digest = hashlib.sha256(" ".join([cxx, *flags]).encode())
        for file in sorted([source, *headers]):
            digest.update(file.read_bytes())
        target = BUILD / f"{source.stem}-{digest.hexdigest()[:20]}.o"
        return made(target, [cxx, *flags, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compiled, sources)]
    name = hashlib.sha256("".join(objects).encode()).hexdigest()[:20]
    return made(BUILD / f"{sources[0].stem}-{variant}-{name}", [cxx, *flags, *objects])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock of this file."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made(target: Path, command: list[str]) -> Path:
    """Makes ``target`` by a compiler, unless it exists. Only one process does so, and no partial file remains."""
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            beside = target.with_suffix(".tmp")
            done = subprocess.run([*command, "-o", str(beside)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(beside, target)
    return target


class Problem(ctypes.Structure):
    """The struct of csrc/common/problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "channels", "height", "width", "grid_h", "grid_w", "radius")),
        *((name, ctypes.c_int32) for name in ("embed_dim", "num_heads", "neighbors")),
        *((name, ctypes.c_bool) for name in ("self_loops", "sequential", "channels_last", "relu")),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int32),
    ]


class Array(ctypes.Structure):
    _fields_ = [("role", ctypes.c_int64), ("bytes", ctypes.c_int64), ("offset", ctypes.c_int64)]


class Call(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("weight_dtype", ctypes.c_int32),
        ("backward", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("shared_memory_limit", ctypes.c_int64),
        ("failing_launch", ctypes.c_int64),
        ("only_plans", ctypes.c_int64),
        ("arrays", Array * len(ARRAYS)),
    ]


def raw(t: Tensor) -> bytes:
    """The bytes of a dense tensor in the order of its memory."""
    flat = t.detach().as_strided((t.numel(),), (1,))
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if t.numel() else b""


def fill(t: Tensor, data: bytes) -> None:
    assert len(data) == t.numel() * t.element_size()
    if data:
        ctypes.memmove(t.data_ptr(), data, len(data))


class Launch(NamedTuple):
    blocks: int
    threads: int
    shared_bytes: int


@dataclass
class Host:
    """The kernels of one variant. The attributes set options that a call does not have."""

    variant: str = "plain"
    sources: Sequence[Path] = RUNNER
    kernels: Path = KERNELS
    seed: int = 1
    shared_memory_limit: int = 99 << 10
    failing_launch: int = 0  # counted from 1; 0 is none
    #: Whether results have the same offset from a 16-byte boundary as their inputs, which C callers may have. Otherwise
    #: results are aligned, as in torch.
    keeps_phase: bool = False
    launched: list[Launch] = field(default_factory=list)  # the launches of the last call
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log: Any = field(default=None, repr=False)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._log.close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            self._process = subprocess.Popen(
                [build(self.variant, self.sources, self.kernels)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **VARIANTS[self.variant][1]},
            )
        return self._process

    def _read(self, count: int) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise BrokenPipeError
        return data

    def call(self, problem: Problem, weight_dtype: torch.dtype, backward: bool, **arrays: tuple[int, Tensor]) -> None:
        """Runs one call, which fills the tensors with the role WRITTEN."""
        call = Call(problem, DTYPES[weight_dtype], backward, self.seed, self.shared_memory_limit, self.failing_launch)
        data = []
        for k, name in enumerate(ARRAYS):
            role, t = arrays.get(name, (ABSENT, None))
            if t is not None:
                call.arrays[k] = Array(role, t.numel() * t.element_size(), t.data_ptr() % 16)
                if role == READ:
                    data.append(raw(t))
        results = [arrays[name][1] for name in ARRAYS if arrays.get(name, (ABSENT,))[0] in (WRITTEN, IS_X)]
        self._exchange(call, data, results)

    def plan(self, problem: Problem, backward: bool) -> list[Launch]:
        """The launches of a call with a gradient for every input. No launch is run, so any size is possible."""
        call = Call(problem, problem.dtype, backward, self.seed, self.shared_memory_limit, 0, True)
        for k, name in enumerate(ARRAYS):
            if name not in ("residual", "dresidual"):
                call.arrays[k] = Array(READ, 0, 0)
        self._exchange(call, [], [])
        return self.launched

    def _exchange(self, call: Call, data: Sequence[bytes], results: Sequence[Tensor]) -> None:
        process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(b"".join([bytes(call), *data]))
            process.stdin.flush()
            error = self._read(self._read_int()).decode()
            if error:
                raise Failed(error)
            self.launched = [Launch(*(self._read_int() for _ in Launch._fields)) for _ in range(self._read_int())]
            for t in results:
                fill(t, self._read(t.numel() * t.element_size()))
        except BrokenPipeError:
            process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")
            self._process = None
            raise Failed(f"the runner exited with {process.returncode}: {said}") from None

    def _read_int(self) -> int:
        return int.from_bytes(self._read(8), "little")

    # ---- the operators of steam_kernels/ops.py

    def operators(self) -> Operators:
        return from_arguments(with_any_strides(Operators(self.forward, self.backward, self.forward_)))

    def forward(self, call: Forward) -> Any:
        x, grid = call.inputs.x, call.grid
        y = self.poisoned_like(x)
        saved = torch.empty(
            (x.shape[0], 2 * (x.shape[1] + grid[0] * grid[1])) if call.save else (0,),
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )
        arrays = {"x": (READ, x), "y": (WRITTEN, y)}
        if call.save:
            arrays["saved"] = (WRITTEN, saved)
        self._forward(call, arrays)
        return y, saved

    def forward_(self, call: Forward) -> None:
        self._forward(call, {"x": (READ, call.inputs.x), "y": (IS_X, call.inputs.x)})

    def _forward(self, call: Forward, arrays: dict[str, tuple[int, Tensor]]) -> None:
        x, channel_weight, spatial_weight, residual = call.inputs
        arrays |= {"channel_weight": (READ, channel_weight), "spatial_weight": (READ, spatial_weight)}
        if residual is not None:
            arrays["residual"] = (READ, residual)
        self.call(problem_of(x, channel_weight, call.grid, call.arguments), channel_weight.dtype, False, **arrays)

    def backward(self, call: Backward) -> tuple[Tensor, ...]:
        x, channel_weight, spatial_weight, _ = call.inputs
        arrays = {
            "channel_weight": (READ, channel_weight),
            "spatial_weight": (READ, spatial_weight),
            "x": (READ, x),
            "dy": (READ, call.dy),
            "saved": (READ, call.saved),
        }
        if call.y is not None:
            arrays["y"] = (READ, call.y)
        results = []
        names, like = ("dx", "dchannel", "dspatial", "dresidual"), (x, channel_weight, spatial_weight, x)
        for name, of, need in zip(names, like, call.needs, strict=True):
            results.append(self.poisoned_like(of) if need else of.new_empty(0))
            if need:
                arrays[name] = (WRITTEN, results[-1])
        problem = problem_of(x, channel_weight, call.grid, call.arguments)
        self.call(problem, channel_weight.dtype, True, **arrays)
        return tuple(results)

    def poisoned_like(self, t: Tensor) -> Tensor:
        """Like ``empty_like``, but full of NaN and at the address that ``keeps_phase`` asks for."""
        offset = t.data_ptr() % 16 // t.element_size() if self.keeps_phase else 0
        room = t.new_full((t.numel() + 16 + offset,), float("nan"))
        return room[offset:].as_strided(t.shape, torch.empty_like(t).stride())


def problem_of(x: Tensor, weight: Tensor, grid: tuple[int, int], o: Arguments) -> Problem:
    graphs = o.channel_radius, weight.shape[1], o.num_heads, o.spatial_neighbors, o.self_loops, o.sequential
    return Problem(*x.shape, *grid, *graphs, not x.is_contiguous(), o.relu, o.scale, DTYPES[x.dtype])


def problem_at(case: Case) -> Problem:
    """Like problem_of, but without making the tensors."""
    return Problem(
        *case.shape,
        *case.resolved_grid,
        case.radius,
        *case.attention,
        case.neighbors,
        case.self_loops,
        case.order == "sequential",
        "nhwc" in case.layout,
        case.tail.endswith("relu"),
        case.scale,
        DTYPES[case.dtype],
    )


PAGE = ROOT / "docs" / "cuda_verification.md"
#: The ends of a ResNet-50's four stages at 224 x 224.
STAGES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))


def walk(problem: Problem, backward: bool, launches: list[Launch]) -> dict[str, Launch]:
    """The launches of a call with a gradient for every input, by the names of their stages."""
    has_pool = (problem.height, problem.width) != (problem.grid_h, problem.grid_w)
    if len(launches) <= 2:
        names = ["whole", "weights"] if backward else ["whole"]
    elif backward:
        names = ["pool"] * has_pool + ["cells"] + ["lattice"] * (len(launches) == 4 + has_pool) + ["ring", "gate"]
    else:
        names = ["pool"] * has_pool + ["graph", "lattice", "gate"]
    return dict(zip(names, launches, strict=True))


def shared_memory(host: Host) -> str:
    """A table of the dynamic shared memory per block of each launch, by stage, dtype and memory order."""
    lines = ["| x of a sample | dtype | order | forwards | backwards |", "|---|---|---|---|---|"]
    for channels, height, width in STAGES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("nchw", "nhwc"):
                problem = problem_at(Case((height, width), channels, batch=64, layout=layout, dtype=dtype))
                cells = [f"{channels}×{height}×{width}", str(dtype).removeprefix("torch."), layout.upper()]
                for backward in (False, True):
                    launches = host.plan(problem, backward)
                    stages = walk(problem, backward, launches).items()
                    cells.append(", ".join(f"{name} {launch.shared_bytes}" for name, launch in stages))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page_with(table: str) -> str:
    """The text of the documentation page with this table."""
    return fill_marks(PAGE.read_text(), "shared memory", table)


if __name__ == "__main__":
    host = Host(shared_memory_limit=227 << 10)
    PAGE.write_text(page_with(shared_memory(host)))
    host.close()
