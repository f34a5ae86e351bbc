"""Runs decoded PTX on the CPU.

    memory = Memory()
    address = memory.add(tensor.data_ptr(), tensor.nbytes)
    result = launch(Kernel(ptx, name), Launch(grid, block, [address, 3], dynamic_shared), memory)

What a kernel cannot survive raises :class:`Fault`: an access out of bounds or misaligned, lanes that wait for ever, a
mask that names the wrong lanes. What leaves a result open is counted and noted in the :class:`Result`: races, loads of
unwritten memory, and stores of different numbers to one address. Shared memory and registers begin as ones in every
bit, which is NaN in every float type. ``executor.cpp`` does the work; g++ builds it on first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import random
import re
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.on_host import made
from tests.support.ptx import parse
from tests.support.ptx.parse import Kernel

HERE = Path(__file__).parent
BUILD = Path(__file__).resolve().parents[3] / "build" / "ptx"
# Each operation rounds once and by the mode in force.
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-frounding-math", "-fno-math-errno", "-shared", "-fPIC"]
WHY_NOT = "no g++ on Linux to build the PTX executor with"
#: The lists of program.h, in its order; the last one names the fields of Counts.
LISTS = (
    parse.TYPES,
    parse.OPERATIONS,
    parse.FLAGS,
    parse.SPACES,
    parse.COMPARISONS,
    parse.SHUFFLES,
    parse.COMBINATIONS,
    parse.SPECIALS,
    parse.words("instructions barriers rounds races unwritten conflicts unordered divisions_by_zero"),
)
#: Counts that are 0 where a kernel is right, apart from conflicts, for which tests have a check of their own.
FAULTS = ("races", "unwritten", "unordered", "divisions_by_zero")
#: Bytes between the pieces of global memory.
PIECE = 1 << 40


class Fault(Exception):
    """A kernel could not go on."""


def compiler() -> str | None:
    return shutil.which("g++") if sys.platform == "linux" else None


def is_missing() -> bool:
    """Whether tests of the executor are skipped. In CI they fail instead."""
    return compiler() is None and not os.environ.get("CI")


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The executor, compiled where it is not there yet; its lists of names are compared with those of parse.py."""
    cxx = compiler()
    assert cxx is not None, WHY_NOT
    digest = hashlib.sha256(" ".join([cxx, *FLAGS]).encode())
    for source in sorted([*HERE.glob("*.h"), HERE / "executor.cpp"]):
        digest.update(source.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"executor-{digest.hexdigest()[:20]}.so"
    found = ctypes.CDLL(str(made(target, [cxx, *FLAGS, str(HERE / "executor.cpp")])))
    found.ptx_names.restype = ctypes.c_char_p
    assert tuple(found.ptx_names(k).decode().split() for k in range(len(LISTS))) == LISTS
    return found


class Allocation(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("host", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("shift", ctypes.c_int64),
        ("loaded", ctypes.c_int64),
        ("stored", ctypes.c_int64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("code_length", "registers")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "register_bits",
                "constant_slots",
                "constant_values",
                "special_slots",
                "special_names",
                "parameters",
                "allocations",
                "blocks",
                "executed",
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("constants", "specials", "parameter_bytes", "allocation_count", "block_count")
        ),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("static_shared", "dynamic_shared", "local", "first_wins")),
        ("seed", ctypes.c_uint64),
    ]


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in LISTS[-1]]


#: An instruction of program.h.
INSTRUCTION = np.dtype(
    [(name, "<i4") for name in parse.words("op type other flags predicate negated results sources")]
    + [("d", "<i4", 8), ("s", "<i4", 8)]
    + [(name, "<i4") for name in parse.words("target space width count combine line")]
    + [("immediate", "<i8")]
)


class Memory:
    """Global memory: pieces of this process's memory, at addresses so far apart that none is beside another."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._kept: list[Any] = []

    def add(self, host: int, bytes: int, written: np.ndarray | None = None, shift: int = 2) -> int:
        """The address of a piece, aligned as it is here.

        Args:
            written: 1 for each byte that holds a value, kept up to date; None where all do.
            shift: log2 of the bytes whose accesses are ordered as one, at most those of a number.
        """
        address = (len(self.allocations) + 1) * PIECE + (1 << 20) + host % 4096
        pointer = None if written is None else written.ctypes.data
        self.allocations.append(Allocation(address, host, bytes, pointer, shift, 0, 0))
        self._kept.append(written)
        return address

    def add_array(self, array: np.ndarray, written: np.ndarray | None = None) -> int:
        self._kept.append(array)
        return self.add(array.ctypes.data, array.nbytes, written, int(array.itemsize).bit_length() - 1)


@dataclass
class Launch:
    """How a kernel is launched. Parameters are numbers, or the bytes of all of them."""

    grid: Sequence[int]
    block: Sequence[int]
    parameters: Sequence[int | float] | bytes
    dynamic_shared: int = 0
    seed: int = 0
    first_wins: bool = False  # of lanes that store to one address in one instruction, the first one's number stays
    blocks: Sequence[int] | None = None  # those that are run; None: all


@dataclass
class Result:
    """Counts of a launch, and where in the PTX the first findings of each kind are."""

    kernel: str
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)
    #: Of each instruction of the code, by operation and space: how often a lane has executed it.
    executed: dict[str, list[int]] = field(default_factory=dict)
    #: For each piece of global memory: the 32-byte sectors that were loaded and stored, each once for each block.
    traffic: list[tuple[int, int]] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """A sentence if anything but conflicts was found, with the notes."""
        found = [f"{self.counts[name]} {name}" for name in FAULTS if self.counts[name]]
        return [f"{self.kernel}: {', '.join(found)}: {'; '.join(self.notes)}"] if found else []


@dataclass
class Findings:
    """What the launches of some calls had."""

    launches: list[Result] = field(default_factory=list)
    unstored: int = 0  # bytes of the calls' results

    @property
    def kernels(self) -> list[str]:
        return [result.kernel for result in self.launches]

    @property
    def faults(self) -> list[str]:
        """What no launch may have, conflicts apart."""
        found = [fault for result in self.launches for fault in result.faults]
        return found + ([f"{self.unstored} bytes of results were not stored"] if self.unstored else [])

    @property
    def conflicts(self) -> dict[str, list[str]]:
        """Kernels that stored different numbers to one address, and where."""
        return {result.kernel: result.notes for result in self.launches if result.counts["conflicts"]}


@functools.lru_cache(maxsize=256)
def _packed(kernel: Kernel) -> tuple[np.ndarray, ...]:
    """A kernel in the executor's form."""
    code = np.zeros(len(kernel.code), INSTRUCTION)
    for out, i in zip(code, kernel.code, strict=True):
        out["op"], out["type"] = parse.OPERATIONS.index(i.op), parse.TYPES.index(i.type)
        out["flags"] = sum(1 << parse.FLAGS.index(flag) for flag in set(i.flags))
        out["space"], out["combine"] = parse.SPACES.index(i.space), parse.COMBINATIONS.index(i.combine)
        for name in ("other", "predicate", "negated", "target", "width", "count", "line", "immediate"):
            out[name] = getattr(i, name)
        out["results"], out["sources"] = len(i.results), len(i.sources)
        out["d"][: len(i.results)], out["s"][: len(i.sources)] = i.results, i.sources
    specials = [parse.SPECIALS.index(name) for name in kernel.specials]
    return (
        code,
        np.array(kernel.bits, np.uint8),
        np.array(list(kernel.constants.values()), np.int32),
        np.array(list(kernel.constants), np.uint64),
        np.array(list(kernel.specials.values()), np.int32),
        np.array(specials, np.int32),
    )


def _parameters(kernel: Kernel, values: Sequence[int | float] | bytes) -> bytes:
    if isinstance(values, bytes):
        assert len(values) == kernel.parameter_bytes
        return values
    out = bytearray(kernel.parameter_bytes)
    # Triton's kernels end with parameters that no launch of ours sets.
    padded = [*values, *[0] * (len(kernel.parameters) - len(values))]
    for p, value in zip(kernel.parameters, padded, strict=True):
        if isinstance(value, float):
            raw = struct.pack("<d" if p.bytes == 8 else "<f", value)
        else:
            raw = (int(value) % (1 << 8 * p.bytes)).to_bytes(p.bytes, "little")
        out[p.offset : p.offset + p.bytes] = raw
    return bytes(out)


def _three(sizes: Sequence[int]) -> Any:
    return (ctypes.c_int32 * 3)(*(*sizes, 1, 1)[:3])


def launch(kernel: Kernel, how: Launch, memory: Memory) -> Result:
    """Runs the blocks in a random order; raises Fault where a kernel cannot go on."""
    grid, block = _three(how.grid), _three(how.block)
    if block[0] * block[1] * block[2] > kernel.most_threads:
        raise Fault(f"{kernel.name}: {list(block)} threads, and the kernel allows {kernel.most_threads}")
    arrays = _packed(kernel)
    every = range(grid[0] * grid[1] * grid[2])
    blocks = np.array(every if how.blocks is None else how.blocks, dtype=np.int32)
    np.random.default_rng(how.seed).shuffle(blocks)
    executed = np.zeros(len(kernel.code), np.int64)
    parameters = _parameters(kernel, how.parameters)
    allocations = (Allocation * len(memory.allocations))(*memory.allocations)
    code, bits, constant_slots, constant_values, special_slots, special_names = (array.ctypes.data for array in arrays)
    call = _Launch(
        code=code,
        code_length=len(kernel.code),
        registers=len(kernel.bits),
        register_bits=bits,
        constant_slots=constant_slots,
        constant_values=constant_values,
        special_slots=special_slots,
        special_names=special_names,
        parameters=ctypes.cast(ctypes.c_char_p(parameters), ctypes.c_void_p),
        allocations=ctypes.cast(allocations, ctypes.c_void_p),
        blocks=blocks.ctypes.data,
        executed=executed.ctypes.data,
        constants=len(kernel.constants),
        specials=len(kernel.specials),
        parameter_bytes=len(parameters),
        allocation_count=len(memory.allocations),
        block_count=len(blocks),
        grid=grid,
        block=block,
        static_shared=kernel.static_shared,
        dynamic_shared=how.dynamic_shared,
        local=kernel.local,
        first_wins=how.first_wins,
        seed=random.Random(how.seed).getrandbits(63),
    )
    counts, message = _Counts(), ctypes.create_string_buffer(1 << 14)
    failed = library().ptx_run(ctypes.byref(call), ctypes.byref(counts), message, len(message))
    text = message.value.decode()
    text = re.sub(r"line (\d+)\)", lambda m: f"line {m[1]}: {kernel.source(int(m[1]))})", text)
    if failed:
        raise Fault(f"{kernel.name}: {text}")
    of_operation: dict[str, list[int]] = {}
    for i, count in zip(kernel.code, executed.tolist(), strict=True):
        name = f"{i.op}.{i.space}" if i.op in ("ld", "st") else i.op
        of_operation.setdefault(name, []).append(count)
    found = {name: getattr(counts, name) for name in LISTS[-1]}
    traffic = [(a.loaded, a.stored) for a in allocations]
    return Result(kernel.name, found, text.splitlines(), of_operation, traffic)
