"""Ahead-of-time compilation of every launch for real GPUs, and the figures of the result. Needs no GPU and no driver.

    python -m tests.support.triton_aot --rows sm_80,gfx942      # prints the figures as JSON

A case is one call of the backend, forward and backward, on CPU tensors whose memory is never accessed. Its launches are
recorded and not run. Triton's own binder specialises them as the launcher would, and they are compiled for each target.
The figures of a kernel are:

* registers, shared memory and stack from ``cuobjdump``. Spills are the ``LDL`` and ``STL`` of ``nvdisasm``. For AMD all
  of them are in the metadata of the assembly.
* the share of 128-bit accesses *to maps* (tensors of x's size), weighted by bytes. In the PTX, or in AMD's LLVM IR, the
  address of each access is traced back to a parameter of the kernel.
* the share of 128-bit accesses among all accesses of the machine code.
* the occupancy, from registers, shared memory and warps.
* the width of every offset that is added to a pointer to a map, in Triton's IR.

Compilation needs a process without TRITON_INTERPRET. :func:`rows` starts such processes, two at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support import triton_code as code

ROOT = Path(__file__).resolve().parents[2]
#: Name -> backend, architecture and threads of a warp, as Triton's GPUTarget takes them,
#: and the launch table's family.
TARGETS: dict[str, tuple[str, int | str, int, str]] = {
    "sm_80": ("cuda", 80, 32, "sm80"),
    "sm_90": ("cuda", 90, 32, "sm90"),
    "sm_100": ("cuda", 100, 32, "sm100"),
    "gfx942": ("hip", "gfx942", 64, "gfx9"),
}
#: Targets for which the tests do not compile every launch.
OTHERS: dict[str, tuple[str, int | str, int, str]] = {"sm_89": ("cuda", 89, 32, "sm80")}


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """One call to compile.

    In the ``vector`` class the pointers are aligned, and a run of memory is a multiple of 128 bits. In the ``odd``
    class maps start one element past an aligned address, and no power of two divides the sizes.
    """

    label: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str
    vector: bool = True
    grid: tuple[int, int] = (7, 7)
    tail: bool = False  # residual and ReLU
    sequential: bool = True
    heads: int = 4

    @property
    def id(self) -> str:
        kind = "" if self.vector else " odd"
        return f"{self.label} {str(self.dtype).removeprefix('torch.')} {self.layout}{kind}{' tail' * self.tail}"

    def empty(self) -> Tensor:
        """A map in memory that is never accessed, and so costs nothing."""
        n, c, h, w = self.shape
        flat = torch.empty(n * c * h * w + 1, dtype=self.dtype)[not self.vector :]
        flat = flat[: n * c * h * w]
        return flat.view(self.shape) if self.layout == "nchw" else flat.view(n, h, w, c).permute(0, 3, 1, 2)


STAGES = {"56": (256, 56, 56), "28": (512, 28, 28), "14": (1024, 14, 14), "7": (2048, 7, 7)}


def cases() -> Iterator[Compiled]:
    """Ten kinds of call in both memory formats.

    They have every stage of a ResNet, every dtype in both classes, tails, both orders, small samples and larger ones.
    """
    for layout in ("nchw", "nhwc"):
        yield Compiled("56", (32, *STAGES["56"]), torch.float32, layout)
        yield Compiled("28", (32, *STAGES["28"]), torch.float16, layout, tail=True)
        yield Compiled("14", (32, *STAGES["14"]), torch.bfloat16, layout)
        yield Compiled("7", (32, *STAGES["7"]), torch.bfloat16, layout, tail=True)
        yield Compiled("14", (32, *STAGES["14"]), torch.float64, layout, sequential=False)
        yield Compiled("57x61", (3, 33, 57, 61), torch.float32, layout, vector=False, grid=(13, 21), tail=True)
        yield Compiled("30x17", (3, 41, 30, 17), torch.bfloat16, layout, vector=False)
        yield Compiled("7, small", (3, 37, 7, 7), torch.float16, layout, vector=False, heads=8)
        yield Compiled("16, small", (32, 32, 16, 16), torch.float32, layout, grid=(8, 8))
        yield Compiled("15x9", (2, 67, 15, 9), torch.float64, layout, vector=False)


def cases_of(target: str) -> list[Compiled]:
    """Half of the cases: each kind of call in one memory format for this target, in the other for the next target."""
    every = list(cases())
    half, turn = len(every) // 2, list(TARGETS).index(target)
    return [case for i, case in enumerate(every) if (i % half + i // half + turn) % 2 == 0]


# ---- recording (in the worker) ---------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """One launch that was not run."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


def record(run: Callable[[], Any]) -> list[Recorded]:
    """The launches of ``run``, none of which is executed."""
    from triton.runtime.jit import JITFunction

    found: list[Recorded] = []
    original = JITFunction.run

    def note(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        found.append(Recorded(self, args, kwargs, grid))

    JITFunction.run = note
    try:
        run()
    finally:
        JITFunction.run = original
    return found


def launches(case: Compiled, family: str) -> Iterator[tuple[str, Recorded, list[Tensor]]]:
    """For each launch of a case: the direction, the launch, and the maps of the case."""
    from steam_kernels.backends.triton import operators
    from steam_kernels.config import Arguments, Inputs
    from steam_kernels.schemas import Backward, Forward

    x, dy = case.empty(), case.empty()
    residual = case.empty() if case.tail else None
    weights = torch.empty(4, 8), torch.empty(4, 8)
    grid = min(case.grid[0], case.shape[2]), min(case.grid[1], case.shape[3])
    arguments = Arguments(case.heads, 1, 4, True, case.sequential, 1.0, case.tail)
    returned: dict[str, Any] = {}

    def forward() -> None:
        given = Forward(Inputs(x, *weights, residual), True, grid, arguments)
        returned["forward"] = operators.forward(given, family)

    def backward() -> None:
        y, saved = returned["forward"]
        needs = (True, True, True, case.tail)
        masked = y if case.tail else None
        given = Backward(dy, Inputs(x, *weights), masked, saved, needs, grid, arguments)
        returned["backward"] = operators.backward(given, family)

    for direction, run in (("forward", forward), ("backward", backward)):
        found = record(run)
        given = [x, dy, *([residual] if residual is not None else [])]
        maps = given + [t for out in returned.values() for t in out if t.numel() == x.numel()]
        for launch in found:
            yield direction, launch, maps


# ---- compiling (in the worker) ---------------------------------------------------------------------------------------


class Specialised(NamedTuple):
    """A launch as Triton compiles it for one target."""

    source: Any
    options: Any
    #: The arguments that are no constants, by the names of their parameters.
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.source.hash()} {self.options.hash()}"


def specialise(launch: Recorded, backend: Any) -> Specialised:
    """What JITFunction.run does with the arguments, for a backend that is not of this machine's GPU."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import create_function_from_signature

    fn = launch.kernel
    kwargs = {**launch.kwargs, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = bind(*launch.args, **kwargs)
    kinds = [kind for kind, *_ in specialization]
    values = {k: v for (k, v), kind in zip(bound.items(), kinds, strict=True) if kind != "constexpr"}
    options, signature, constants, attributes = fn._pack_args(backend, kwargs, bound, specialization, options)
    return Specialised(ASTSource(fn, signature, constants, attributes), options, values)


class Kernel(NamedTuple):
    """The compiled code of one launch."""

    name: str
    warps: int
    resources: code.Resources
    occupancy: float
    accesses: list[code.Access]
    #: The names of the parameters, by the numbers that accesses have.
    parameters: list[str]
    #: All accesses of the machine code.
    machine: list[code.Access]
    ttir: str
    #: The opcodes of the PTX; empty on AMD.
    opcodes: set[str]


class Compiler:
    """Compiles recorded launches for one target, and equal launches once."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self.name = target
        self.target = GPUTarget(*(TARGETS | OTHERS)[target][:3])
        self.backend = make_backend(self.target)
        self.kernels: dict[str, Kernel] = {}

    def __call__(self, launch: Recorded) -> Kernel:
        from triton.compiler import compile

        found = specialise(launch, self.backend)
        if found.key not in self.kernels:
            compiled = compile(found.source, target=self.target, options=found.options.__dict__)
            self.kernels[found.key] = self._read(compiled, found.options.num_warps, list(found.arguments))
        return self.kernels[found.key]

    def _read(self, compiled: Any, warps: int, parameters: list[str]) -> Kernel:
        shared, assembly = compiled.metadata.shared, compiled.asm
        if self.target.backend == "hip":
            text = assembly["amdgcn"]
            resources, machine = code.amd_resources(text, shared), code.amd_accesses(text)
            accesses, opcodes = code.llvm_accesses(assembly["llir"]), set[str]()
        else:
            usage = tool("cuobjdump", "--dump-resource-usage", assembly["cubin"])
            text = tool("nvdisasm", "-c", assembly["cubin"])
            resources, machine = code.nvidia_resources(usage, text, shared), code.sass_accesses(text)
            accesses, opcodes = code.ptx_accesses(assembly["ptx"]), code.ptx_opcodes(assembly["ptx"])
        occupancy = code.occupancy(self.name, resources, warps)
        return Kernel(
            compiled.metadata.name,
            warps,
            resources,
            occupancy,
            accesses,
            parameters,
            machine,
            assembly["ttir"],
            opcodes,
        )


def tools() -> dict[str, Path]:
    """The CUDA tools of Triton's wheel; empty if one is missing or cannot be executed."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = {name: folder / name for name in ("cuobjdump", "nvdisasm")}
    return found if all(os.access(path, os.X_OK) for path in found.values()) else {}


def tool(name: str, option: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools()[name]), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def row_of(compiler: Compiler, launch: Recorded, maps: list[Tensor]) -> dict[str, Any]:
    """The figures of one launch on one target; ``maps`` are the arguments whose accesses count."""
    kernel = compiler(launch)
    given = {k: v for k, v in launch.kwargs.items() if k in launch.kernel.signature.parameters}
    bound = launch.kernel.signature.bind_partial(*launch.args, **given)
    names = {name for name, value in bound.arguments.items() if any(value is m for m in maps)}
    numbers = {i for i, name in enumerate(kernel.parameters) if name in names}
    to_maps = [a for a in kernel.accesses if a.parameters & numbers]
    tile = launch.kwargs.get("TILE")
    return {
        "channels": tile.CHANNELS.value if hasattr(tile, "HALO") else None,
        "programs": launch.grid[0],
        "warps": kernel.warps,
        "registers": kernel.resources.registers,
        "spills": kernel.resources.spills,
        "shared": kernel.resources.shared,
        "occupancy": round(kernel.occupancy, 3),
        "maps": sorted({kernel.parameters[i] for a in to_maps for i in a.parameters & numbers}),
        "wide": _rounded(code.wide_share(to_maps)),
        "wide_all": _rounded(code.wide_share(kernel.machine)),
        "untraced": sum(not a.parameters for a in kernel.accesses),
        "narrow": code.narrow_offsets(kernel.ttir, names),
        "opcodes": sorted(kernel.opcodes),
    }


def compiled_rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each launch of each case on each target. A launch that does not compile has "error" and no figures."""
    from triton.compiler.errors import CompilationError

    for target in targets:
        compiler = Compiler(target)
        for case in cases_of(target):
            for direction, launch, maps in launches(case, TARGETS[target][3]):
                row = {"target": target, "case": case.id, "vector": case.vector}
                row["kernel"] = f"{direction} {launch.kernel.__name__}"
                try:
                    row |= row_of(compiler, launch, maps)
                except CompilationError as error:
                    row["error"] = str(error)
                yield row


def planted_rows() -> dict[str, dict[str, Any]]:
    """Rows of the toy kernels of ``triton_planted``, whose figures are known."""
    from tests.support import triton_planted as toy

    x, y, few = torch.empty(1 << 14), torch.empty(1 << 14), torch.empty(64)
    runs: dict[str, Callable[[], Any]] = {
        "wide_copy": lambda: toy.wide_copy[(4,)](x, y, 1 << 14, BLOCK=4096),
        "wide_copy odd": lambda: toy.wide_copy[(4,)](x, y, (1 << 14) - 1, BLOCK=4096),
        "half_wide": lambda: toy.half_wide[(4,)](x, y, 1 << 14, 3, BLOCK=4096),
        "spilling": lambda: toy.spilling[(1,)](x, y, BLOCK=128 * compiler.target.warp_size, num_warps=1),
        "narrow_copy": lambda: toy.narrow_copy[(4,)](x, y, few, 1 << 14, BLOCK=4096),
        "narrow_walk": lambda: toy.narrow_walk[(1,)](x, y, 1 << 14, BLOCK=4096),
    }
    out = {}
    for compiler in map(Compiler, TARGETS):
        for name, run in runs.items():
            (launch,) = record(run)
            out[f"{compiler.name} {name}"] = row_of(compiler, launch, [x, y])
    return out


class _Oldest(Compiler):
    """Compiles for the lowest compute capability that the backend accepts, and reads only the machine code's size."""

    def __init__(self) -> None:
        from steam_kernels.backends.triton import LEAST_CAPABILITY

        major, minor = LEAST_CAPABILITY
        TARGETS[f"sm_{major}{minor}"] = "cuda", 10 * major + minor, 32, f"sm{major}0"
        super().__init__(f"sm_{major}{minor}")

    def _read(self, compiled: Any, *_: Any) -> Any:
        return len(compiled.asm["cubin"])


def oldest_rows() -> dict[str, int]:
    """The bytes of machine code of every kernel, also in bfloat16, for the lowest compute capability."""
    compiler, out = _Oldest(), {}
    for case in (
        Compiled("14", (32, *STAGES["14"]), torch.bfloat16, "nchw", tail=True),
        Compiled("14", (32, *STAGES["14"]), torch.float16, "nhwc", sequential=False),
        Compiled("14 by pixels", (2, 128, 14, 14), torch.bfloat16, "nchw", grid=(14, 14)),
        Compiled("7, small", (3, 37, 7, 7), torch.bfloat16, "nchw", vector=False),
    ):
        for direction, launch, _ in launches(case, TARGETS[compiler.name][3]):
            out[f"{case.id} {direction} {launch.kernel.__name__}"] = compiler(launch)
    return out


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


# ---- running the workers ---------------------------------------------------------------------------------------------


def worker(*arguments: str) -> subprocess.Popen[str]:
    """A process that runs this file without TRITON_INTERPRET; its standard output is JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.triton_aot", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """The parsed output of a worker."""
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"compiling failed:\n{errors[-4000:]}")
    return json.loads(out)


def rows(targets: Sequence[str] = tuple(TARGETS)) -> list[dict[str, Any]]:
    """All rows of the targets, from two processes."""
    running = [worker("--rows", ",".join(part)) for part in (targets[::2], targets[1::2]) if part]
    return [row for process in running for row in answer(process)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", metavar="TARGETS", help="compile the cases for these targets and print the rows")
    parser.add_argument("--planted", action="store_true", help="compile the toy kernels for every target")
    parser.add_argument("--oldest", action="store_true", help="compile every kernel for the least compute capability")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if args.oldest:
            found: Any = oldest_rows()
        else:
            found = planted_rows() if args.planted else list(compiled_rows(args.rows.split(",")))
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
