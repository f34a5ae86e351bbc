"""The CUDA kernels on this machine's memory: builds tests/cuda_on_host with a host compiler and runs it as a backend.

The runner is a process that takes one call after another over pipes; when a call kills it, what it said is the error.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steam_kernels.ops import Operators

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_on_host"
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_on_host"

FLAGS = ["-std=c++20", "-O1", "-g1", "-DSTEAM_CUDA_ON_HOST", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
#: Variant -> compiler flags and environment.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": ([], {}),
    "address": (
        # GCC's "undefined" does not hold the conversions
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
    """The runner said that a call failed, or died of it."""


def compiler() -> str | None:
    """GCC, whose names for the sanitizers the header knows."""
    return shutil.which("g++") if sys.platform == "linux" else None


#: The runner with the kernels behind it.
RUNNER = (SHIM / "runner.cpp", KERNELS / "forward.cu", KERNELS / "backward.cu")


def build(variant: str, sources: Sequence[Path] = RUNNER) -> Path:
    """A program in one of the VARIANTS, compiled where it is not there yet."""
    cxx = compiler()
    assert cxx is not None
    flags = [*FLAGS, *VARIANTS[variant][0], f"-I{SHIM}", f"-I{KERNELS}"]
    headers = [
        *SHIM.glob("*.h"),
        *KERNELS.glob("*.cuh"),
        KERNELS / "kernels.h",
        *(ROOT / "csrc" / "common").glob("*.h"),
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


def made(target: Path, command: list[str]) -> Path:
    """``target``, from a compiler's run where it is not there: by one process, and whole or not at all."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            beside = target.with_suffix(".tmp")
            done = subprocess.run([*command, "-o", str(beside)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(beside, target)
    return target


class Problem(ctypes.Structure):
    """csrc/common/problem.h."""

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
        ("arrays", Array * len(ARRAYS)),
    ]


def raw(t: Tensor) -> bytes:
    """A dense tensor's memory, in its own order."""
    flat = t.detach().as_strided((t.numel(),), (1,))
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if t.numel() else b""


def fill(t: Tensor, data: bytes) -> None:
    assert len(data) == t.numel() * t.element_size()
    if data:
        ctypes.memmove(t.data_ptr(), data, len(data))


@dataclass
class Host:
    """The kernels of one variant. What a call leaves open is set here."""

    variant: str = "plain"
    sources: Sequence[Path] = RUNNER
    seed: int = 1
    shared_memory_limit: int = 99 << 10
    failing_launch: int = 0  # counted from 1; 0: none
    #: Results lie beside a 16-byte boundary as their inputs do, as C's callers may have it; else on one, as torch's.
    keeps_phase: bool = False
    launches: int = 0  # of the last call
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
                [build(self.variant, self.sources)],
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
        """One call; the tensors with the role WRITTEN are filled."""
        call = Call(problem, DTYPES[weight_dtype], backward, self.seed, self.shared_memory_limit, self.failing_launch)
        data = []
        for k, name in enumerate(ARRAYS):
            role, t = arrays.get(name, (ABSENT, None))
            if t is not None:
                call.arrays[k] = Array(role, t.numel() * t.element_size(), t.data_ptr() % 16)
                if role == READ:
                    data.append(raw(t))
        process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(b"".join([bytes(call), *data]))
            process.stdin.flush()
            error = self._read(int.from_bytes(self._read(8), "little")).decode()
            if error:
                raise Failed(error)
            self.launches = int.from_bytes(self._read(8), "little")
            for name in ARRAYS:
                role, t = arrays.get(name, (ABSENT, None))
                if role in (WRITTEN, IS_X):
                    assert t is not None
                    fill(t, self._read(t.numel() * t.element_size()))
        except BrokenPipeError:
            process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")
            self._process = None
            raise Failed(f"the runner exited with {process.returncode}: {said}") from None

    # ---- the operators of steam_kernels/ops.py

    def operators(self) -> Operators:
        return Operators(self.forward, self.backward, self.forward_)

    def forward(
        self, x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None, *rest: Any
    ) -> Any:
        *options, save = rest
        y = self.poisoned_like(x)
        grid = options[0]
        saved = torch.empty(
            (x.shape[0], 2 * (x.shape[1] + grid[0] * grid[1])) if save else (0,),
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )
        arrays = {"x": (READ, x), "y": (WRITTEN, y)}
        if save:
            arrays["saved"] = (WRITTEN, saved)
        self._forward(x, channel_weight, spatial_weight, residual, options, arrays)
        return y, saved

    def forward_(
        self, x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None, *options: Any
    ) -> None:
        self._forward(x, channel_weight, spatial_weight, residual, options, {"x": (READ, x), "y": (IS_X, x)})

    def _forward(
        self,
        x: Tensor,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        residual: Tensor | None,
        options: Sequence[Any],
        arrays: dict[str, tuple[int, Tensor]],
    ) -> None:
        *unit, relu = options
        arrays |= {"channel_weight": (READ, channel_weight), "spatial_weight": (READ, spatial_weight)}
        if residual is not None:
            arrays["residual"] = (READ, residual)
        self.call(problem_of(x, channel_weight, relu, *unit), channel_weight.dtype, False, **arrays)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        saved: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *unit, need_x, need_channel, need_spatial, need_residual = rest
        arrays = {
            "channel_weight": (READ, channel_weight),
            "spatial_weight": (READ, spatial_weight),
            "x": (READ, x),
            "dy": (READ, dy),
            "saved": (READ, saved),
        }
        if y is not None:
            arrays["y"] = (READ, y)
        results = []
        wanted = {
            "dx": (x, need_x),
            "dchannel": (channel_weight, need_channel),
            "dspatial": (spatial_weight, need_spatial),
            "dresidual": (x, need_residual),
        }
        for name, (like, need) in wanted.items():
            results.append(self.poisoned_like(like) if need else like.new_empty(0))
            if need:
                arrays[name] = (WRITTEN, results[-1])
        problem = problem_of(x, channel_weight, y is not None, *unit)
        self.call(problem, channel_weight.dtype, True, **arrays)
        return tuple(results)

    def poisoned_like(self, t: Tensor) -> Tensor:
        """As ``empty_like``, full of NaN, where ``keeps_phase`` says."""
        offset = t.data_ptr() % 16 // t.element_size() if self.keeps_phase else 0
        room = t.new_full((t.numel() + 16 + offset,), float("nan"))
        return room[offset:].as_strided(t.shape, torch.empty_like(t).stride())


def problem_of(
    x: Tensor,
    weight: Tensor,
    relu: bool,
    grid: Sequence[int],
    num_heads: int,
    radius: int,
    neighbors: int,
    self_loops: bool,
    sequential: bool,
    scale: float,
) -> Problem:
    return Problem(
        *x.shape,
        *grid,
        radius,
        weight.shape[1],
        num_heads,
        neighbors,
        self_loops,
        sequential,
        not x.is_contiguous(),
        relu,
        scale,
        DTYPES[x.dtype],
    )
