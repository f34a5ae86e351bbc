"""Counts of the launches of a call, from the code that Triton emits, for the model in ``benchmarks/gpu_model``.

    python -m tests.support.gpu_counts h100 "32x2048x7x7 nchw"     # prints the counts as JSON

needs g++ and a process without TRITON_INTERPRET, and no GPU. A launch is compiled for the GPU's target, and the
executor of PTX runs the programs of one sample in memory whose numbers do not matter: what the kernels execute depends
on sizes alone, and is the same for every sample. The counts of a launch are:

* programs, threads, and the tiles that a program has one after the other, from the launch;
* registers, shared memory and the length of the machine code, from the compiled code;
* of the graph stage forward: the instructions that belong to its tile, in the code of one warp;
* for each program: instructions of all warps (the mean), and rounds of loads from beyond the L1 cache, one after the
  other (the most). The first program has counts of its own, because it may have other work.
* for each tensor: its bytes, and the bytes that all programs load and store. A program moves a 32-byte sector once.

AMD's code is not executed. Its instructions and rounds are those of the same launch, with as many threads, for sm_90.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_model.gpus import GPUS, Gpu
from benchmarks.gpu_model.launches import CALLS, add_calls, name_of
from tests.support import triton_aot
from tests.support import triton_code as code
from tests.support.ptx import executor
from tests.support.ptx.executor import Memory
from tests.support.ptx.parse import Kernel
from tests.support.tile_instructions import of_tile
from tests.support.triton_aot import Compiled, Recorded

#: Bytes that a GPU moves between its L2 cache and a program at least.
SECTOR = 32
#: log2 of the bytes whose accesses are ordered as one; large, because these runs do not look for races.
SHIFT = 20

Row = dict[str, Any]


class Code(NamedTuple):
    """The compiled code of a launch."""

    ptx: str
    name: str
    resources: code.Resources
    #: Instructions in the machine code.
    machine: int


class Compiler(triton_aot.Compiler):
    """Compiles launches and keeps their code."""

    def _read(self, compiled: Any, warps: int, parameters: list[str]) -> Any:
        assembly, shared = compiled.asm, compiled.metadata.shared
        if self.target.backend == "hip":
            text = assembly["amdgcn"]
            machine = len(re.findall(r"^\t(?:[vs]|ds|global|buffer|flat|scratch)_\w+", text, re.M))
            return Code("", compiled.metadata.name, code.amd_resources(text, shared), machine)
        usage = triton_aot.tool("cuobjdump", "--dump-resource-usage", assembly["cubin"])
        sass = triton_aot.tool("nvdisasm", "-c", assembly["cubin"])
        machine = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", sass, re.M))
        resources = code.nvidia_resources(usage, sass, shared)
        return Code(assembly["ptx"], compiled.metadata.name, resources, machine)


class Counter:
    """Counts the launches of one GPU; keeps what was compiled."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.compiler = Compiler(gpu.target)
        self.is_executed = self.compiler.target.backend == "cuda"
        self.emitter = self.compiler if self.is_executed else Compiler("sm_90")
        self._parsed: dict[str, Kernel] = {}

    def call(self, case: Compiled, direction: str) -> Iterator[Row]:
        """The counts of the launches of one direction of a call."""
        names: dict[int, str] = {}
        for found, launch, maps in triton_aot.launches(case, self.gpu.family):
            names |= {t.data_ptr(): name for t, name in zip(maps, ("x", "dy"), strict=False)}
            if found == direction:
                yield self.launch(launch, case, names)

    def launch(self, launch: Recorded, case: Compiled, names: dict[int, str]) -> Row:
        compiled: Any = self.compiler(launch)
        threads = launch.kwargs.get("num_warps", 4) * self.gpu.warp
        emitted = launch._replace(kwargs={**launch.kwargs, "num_warps": threads // 32})
        ptx, arguments = self.emitter(emitted), triton_aot.specialise(emitted, self.emitter.backend).arguments
        run = self._runner(ptx, emitted, threads, arguments)
        programs, samples = launch.grid[0], case.shape[0]
        of_sample, more = divmod(programs, samples)
        first = middle = run(range(1))
        if of_sample:
            # gate_backward has one program more than the samples have, and it is the first.
            middle = run(range(more + samples // 2 * of_sample, more + (samples // 2 + 1) * of_sample))
        row = {
            "kernel": launch.kernel.__name__,
            "programs": programs,
            "threads": threads,
            "tiles": tiles(launch, arguments, case),
            "registers": compiled.resources.registers,
            "shared": compiled.resources.shared,
            "machine": compiled.machine,
            "instructions": -(-middle["instructions"] // max(of_sample, 1)),
            "rounds": middle["rounds"],
            "first": [first["instructions"], first["rounds"]],
            "evict_first": "evict_first" in accesses(ptx),
            "tensors": {},
        }
        if launch.kernel.__name__ == "graph":
            row["of_tile"] = of_tile(ptx.ptx, Path(inspect.getfile(launch.kernel.fn)))
        for name, t in arguments.items():
            if isinstance(t, Tensor):
                at = t.data_ptr()
                read, written = (samples * middle[at][i] + more * first[at][i] for i in (0, 1))
                # A tensor has one name in all launches of a call: its first.
                label = names.setdefault(at, name if name not in names.values() else f"{name} 2")
                row["tensors"][label] = [t.numel() * t.element_size(), SECTOR * read, SECTOR * written]
        return row

    def _runner(
        self, compiled: Any, launch: Recorded, threads: int, arguments: dict[str, Any]
    ) -> Callable[[range], dict[Any, Any]]:
        kernel = self._parsed.setdefault(compiled.ptx, Kernel(compiled.ptx, compiled.name))
        tensors = {t.data_ptr(): t for t in arguments.values() if isinstance(t, Tensor)}

        def run(programs: range) -> dict[Any, Any]:
            memory = Memory()
            at = {p: memory.add(p, t.numel() * t.element_size(), None, SHIFT) for p, t in tensors.items()}
            given = [at[v.data_ptr()] if isinstance(v, Tensor) else v for v in arguments.values()]
            shared = compiled.resources.shared
            how = executor.Launch(launch.grid, (threads,), given, shared, blocks=programs)
            result = executor.launch(kernel, how, memory)
            return {**result.counts, **dict(zip(tensors, result.traffic, strict=True))}

        return run


def accesses(compiled: Any) -> str:
    """The accesses to global memory in the emitted code."""
    return "\n".join(re.findall(r"^.*\b(?:ld|st)\.global.*$", compiled.ptx, re.M))


def tiles(launch: Recorded, arguments: dict[str, Any], case: Compiled) -> int:
    """The tiles that a program of a launch has one after the other."""
    name = launch.kernel.__name__
    tile = {member: getattr(value, "value", value) for member, value in launch.kwargs["TILE"]._asdict().items()}
    _, channels, height, width = case.shape
    grid_h, grid_w = (min(cells, size) for cells, size in zip(case.grid, (height, width), strict=True))

    def blocks(size: int, block: int) -> int:
        return -(-size // block)

    if name == "pool_tiles":
        return blocks(blocks(height, grid_h), tile["ROWS"]) * blocks(blocks(width, grid_w), tile["COLUMNS"])
    if name in ("pool_runs", "gate", "gate_backward"):
        walk = arguments["steps"]
        of_weights = launch.kwargs.get("WEIGHTS")
        return walk if of_weights is None else max(walk, blocks(arguments["rows"], of_weights.ROWS.value))
    if name in ("lattice", "lattice_backward"):
        return blocks(blocks(channels, tile["CHANNELS"]), tile["BLOCKS"])
    return blocks(grid_h * grid_w, tile["CELLS"])


def counted(gpu: str, calls: list[str]) -> dict[str, list[Row]]:
    """The counts of calls, by their names and directions."""
    counter, out = Counter(GPUS[gpu]), {}
    for name in calls:
        shape, layout = CALLS[name]
        case = Compiled(name, shape, torch.float32, layout)
        for direction in ("forward", "backward"):
            out[name_of(name, direction)] = list(counter.call(case, direction))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gpu", choices=GPUS)
    add_calls(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        json.dump(counted(args.gpu, args.calls or list(CALLS)), sys.stdout)


if __name__ == "__main__":
    main()
