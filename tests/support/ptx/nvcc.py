"""The CUDA backend on a pretended GPU: its own host code, whose launches run the PTX that nvcc emits.

``csrc/cuda`` is compiled by nvcc for one virtual architecture and linked with ``cudart_stub.cpp`` in place of CUDA's
runtime. Pointers that the host code passes on are addresses of the executor's memory, and it follows none of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support import on_host
from tests.support.on_host import IS_X, READ, WRITTEN, Problem
from tests.support.ptx import executor
from tests.support.ptx.executor import Findings, Launch, Memory, Result
from tests.support.ptx.parse import Kernel
from tests.support.ptx.triton import Edit

ROOT = Path(__file__).resolve().parents[3]
STUB = Path(__file__).with_name("cudart_stub.cpp")
SOURCES = ("forward", "backward")
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", f"-I{ROOT / 'include'}"]


def compiler() -> str | None:
    return shutil.which("nvcc")


def is_missing() -> bool:
    """Whether tests of the emitted code are skipped: nvcc is optional, in CI too."""
    return compiler() is None or executor.is_missing()


WHY_NOT = f"no nvcc on the PATH, or {executor.WHY_NOT}"


class Emitted:
    """The CUDA kernels for one target: host code as a library, and the PTX of each kernel."""

    def __init__(self, target: str) -> None:
        folder = _built(target)
        self.library = ctypes.CDLL(str(folder / "host.so"))
        self._modules = [(folder / f"{name}.ptx").read_text() for name in SOURCES]

    @functools.cache  # noqa: B019 (one object lives as long as the process)
    def ptx(self, name: str) -> str:
        """A module that has this entry alone."""
        begins = rf"(?:\.visible\s+|\.weak\s+)?\.entry\s+{re.escape(name)}\b"
        for module in self._modules:
            if found := re.search(begins, module):
                return (
                    module[: module.index(".entry")].rpartition("\n")[0]
                    + module[found.start() - 1 : module.index("\n}", found.start()) + 3]
                )
        raise KeyError(name)

    @functools.cache  # noqa: B019
    def kernel(self, name: str) -> Kernel:
        return Kernel(self.ptx(name), name)


@functools.cache
def emitted(target: str) -> Emitted:
    return Emitted(target)


def _built(target: str) -> Path:
    """The folder with host.so and the modules, compiled where it is not there yet."""
    nvcc, cxx = compiler(), executor.compiler()
    assert nvcc is not None and cxx is not None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version} {FLAGS} {target}".encode())
    for file in sorted([*(ROOT / "csrc").glob("c*/*"), *(ROOT / "include" / "steam").glob("*"), STUB]):
        digest.update(file.read_bytes())
    executor.BUILD.mkdir(parents=True, exist_ok=True)
    folder = executor.BUILD / f"nvcc-{target}-{digest.hexdigest()[:20]}"
    with on_host.locked(folder.with_suffix(".lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=executor.BUILD) as work:
                _compile(nvcc, cxx, target.replace("sm_", "compute_"), Path(work))
                kept = Path(work) / "kept"
                kept.mkdir()
                for name in ("host.so", *(f"{name}.ptx" for name in SOURCES)):
                    (Path(work) / name).rename(kept / name)
                kept.rename(folder)
    return folder


def _compile(nvcc: str, cxx: str, architecture: str, work: Path) -> None:
    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile(name: str) -> None:
        target = f"-arch={architecture}", f"-code={architecture}", "-Xcompiler=-fPIC"
        source = str(ROOT / "csrc" / "cuda" / f"{name}.cu")
        # One run makes both the host code and the PTX, so that they have the same names of kernels.
        run(nvcc, "-c", *FLAGS, *target, "--keep", f"--keep-dir={work}", source, "-o", str(work / f"{name}.o"))

    with ThreadPoolExecutor(len(SOURCES)) as pool:
        list(pool.map(compile, SOURCES))
    objects = [str(work / f"{name}.o") for name in SOURCES]
    c_api = str(ROOT / "csrc" / "cuda" / "c_api.cpp")
    shared = "-shared", "-fPIC", "-Wl,-Bsymbolic"
    run(cxx, *FLAGS[:1], *FLAGS[2:], *shared, c_api, str(STUB), *objects, "-o", str(work / "host.so"))


class SteamProblem(ctypes.Structure):
    """steam_problem of include/steam/steam.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("samples", "channels", "height", "width", "grid_h", "grid_w", "channel_radius")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "embed_dim",
                "num_heads",
                "spatial_neighbors",
                "self_loops",
                "sequential",
                "channels_last",
                "relu",
                "dtype",
                "weight_dtype",
            )
        ),
        ("scale", ctypes.c_double),
    ]


#: steam_forward_args and steam_backward_args after the problem, by the names of on_host.ARRAYS.
POINTERS = {
    False: ("channel_weight", "spatial_weight", "x", "residual", "y", "saved"),
    True: ("channel_weight", "spatial_weight", "dy", "x", "y", "saved", "dx", "dresidual", "dchannel", "dspatial"),
}
CALLBACK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass
class Device(on_host.Host):
    """on_host.Host, with the executor in place of the host's compiler."""

    target: str = "sm_80"
    first_wins: bool = False
    edit: Edit | None = None
    found: Findings = field(default_factory=Findings)  # by all calls; a test may put a new one in its place

    def call(self, problem: Problem, weight_dtype: torch.dtype, backward: bool, **arrays: tuple[int, Tensor]) -> None:
        memory, addresses, stored = Memory(), dict[str, int](), []
        for name, (role, t) in arrays.items():
            if role == IS_X:
                addresses[name] = addresses["x"]
                continue
            size = t.numel() * t.element_size()
            written = None if role == READ else np.zeros(size, np.uint8)
            if role == WRITTEN:
                stored.append(written)
            addresses[name] = memory.add(t.data_ptr(), size, written, t.element_size().bit_length() - 1)
        given = _steam_problem(problem, weight_dtype)
        direction = "backward" if backward else "forward"
        library = emitted(self.target).library
        message = ctypes.create_string_buffer(256)
        failures: list[Exception] = []
        told = CALLBACK(self._launcher(memory, failures))
        library.stub_use(told, ctypes.c_int(self.shared_memory_limit))

        room = ctypes.c_int64()
        status = getattr(library, f"steam_cuda_{direction}_workspace")(ctypes.byref(given), ctypes.byref(room), message)
        workspace = np.full(max(room.value, 1), 0xFF, np.uint8)
        place = memory.add(workspace.ctypes.data, room.value, np.zeros(max(room.value, 1), np.uint8))
        if status == 0:
            pointers = (ctypes.c_uint64 * len(POINTERS[backward]))(*(addresses.get(n, 0) for n in POINTERS[backward]))
            args = ctypes.create_string_buffer(bytes(given) + bytes(pointers))
            workspace_at = ctypes.c_void_p(place) if room.value else None
            status = getattr(library, f"steam_cuda_{direction}")(args, workspace_at, None, message)
        if failures:
            raise failures[0]
        if status != 0:
            raise on_host.Failed(message.value.decode())
        self.found.unstored += sum(int((written == 0).sum()) for written in stored if written is not None)

    def _launcher(self, memory: Memory, failures: list[Exception]) -> Callable[..., None]:
        seeds = random.Random(self.seed)

        def launch(name: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> None:
            if failures:
                return
            try:
                self.found.launches.append(self._launch(name.decode(), grid, block, shared, arguments, memory, seeds))
            except Exception as error:  # would be lost in the host code
                failures.append(error)

        return launch

    def _launch(
        self, name: str, grid: Any, block: Any, shared: int, arguments: Any, memory: Memory, seeds: random.Random
    ) -> Result:
        of, plain = emitted(self.target), plain_name(name)
        kernel = of.kernel(name) if self.edit is None else Kernel(self.edit(plain, of.ptx(name)), name)
        raw = bytearray(kernel.parameter_bytes)
        for k, p in enumerate(kernel.parameters):
            raw[p.offset : p.offset + p.bytes] = ctypes.string_at(arguments[k], p.bytes)
        how = Launch(grid[:3], block[:3], bytes(raw), shared, seeds.getrandbits(60), self.first_wins)
        result = executor.launch(kernel, how, memory)
        result.kernel = plain
        return result


def plain_name(name: str) -> str:
    """A kernel's name in the source, of a mangled one."""
    found = re.search(r"\d(steam_[a-z_]+)", name)
    assert found is not None, name
    return found[1]


def _steam_problem(p: Problem, weight_dtype: torch.dtype) -> SteamProblem:
    return SteamProblem(
        p.samples,
        p.channels,
        p.height,
        p.width,
        p.grid_h,
        p.grid_w,
        p.radius,
        p.embed_dim,
        p.num_heads,
        p.neighbors,
        p.self_loops,
        p.sequential,
        p.channels_last,
        p.relu,
        p.dtype,
        on_host.DTYPES[weight_dtype],
        p.scale,
    )
