"""The launches of a call, from the record of their counts, which ``tests/support/gpu_counts.py`` makes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu_model.gpus import GPUS
from benchmarks.shapes import STAGES

RECORD = Path(__file__).with_name("counts.json")
#: The counts of the kernels of commit 215d867, on an H100, as they were before the blocks of channels. The same program
#: made them from that commit's kernels.
BEFORE = Path(__file__).with_name("before.json")
BATCH, ITEMSIZE = 32, 4
DIRECTIONS = ("forward", "backward")
LAYOUTS = ("nchw", "channels_last")
#: The calls, by name: the stages of a ResNet-50 in float32.
CALLS = {
    f"{BATCH}x{c}x{h}x{w} {layout}": ((BATCH, c, h, w), layout) for layout in LAYOUTS for c, h, w in STAGES.values()
}
#: The kernels that begin with the last sample, which those of commit 215d867 did not.
REVERSED = ("gate", "gate_backward")


def name_of(call: str, direction: str) -> str:
    return f"{call} {direction}"


def call_of(text: str) -> str:
    """The name of a call on a command line."""
    if text not in CALLS:
        raise argparse.ArgumentTypeError(f"{text!r} is no call: allowed are {', '.join(CALLS)}")
    return text


def add_calls(parser: argparse.ArgumentParser) -> None:
    """The names of calls as positional arguments; none of them means all calls."""
    parser.add_argument("calls", nargs="*", metavar="CALL", type=call_of, help="the calls (all of them)")


def map_bytes(call: str) -> int:
    n, c, h, w = CALLS[call][0]
    return n * c * h * w * ITEMSIZE


@dataclass(frozen=True)
class Tensor:
    """A tensor of a launch: its bytes, and the bytes that all programs together load and store."""

    bytes: int
    read: int
    written: int


@dataclass(frozen=True)
class Program:
    """Instructions of all warps of a program, for warps of 32, and rounds of loads from beyond the L1 cache."""

    instructions: int
    rounds: int


@dataclass(frozen=True)
class Launch:
    """The counts of one launch of any backend. Without ``programs`` only the bytes are known."""

    kernel: str
    tensors: Mapping[str, Tensor] = field(hash=False)
    programs: int = 0
    threads: int = 32
    #: Tiles of a program one after the other.
    tiles: int = 1
    registers: int = 0
    shared: int = 0
    #: Instructions of the machine code.
    machine: int = 0
    program: Program = Program(0, 1)
    #: The first program, which may have other work than the others.
    first: Program = Program(0, 1)
    #: Of the graph stage forward: the instructions of a warp that belong to its tile.
    of_tile: int = 0
    #: Whether the samples are processed from the last to the first.
    is_reversed: bool = False
    #: Whether the cache is told to give up loaded lines first.
    evict_first: bool = False


def launch_of(row: Mapping[str, Any], reversed: Container[str] = REVERSED) -> Launch:
    """A launch from its row of the record, and the kernels that begin with the last sample."""
    known = {
        k: row[k] for k in ("programs", "threads", "tiles", "registers", "shared", "machine", "of_tile") if k in row
    }
    if "instructions" in row:
        known["program"] = Program(row["instructions"], row["rounds"])
        known["first"] = Program(*row["first"])
    return Launch(
        row["kernel"],
        {name: Tensor(*numbers) for name, numbers in row["tensors"].items()},
        is_reversed=row["kernel"] in reversed,
        evict_first=row.get("evict_first", False),
        **known,
    )


@dataclass(frozen=True)
class Record:
    """The launches of each call and direction: of this package on each GPU, of Inductor's code, and of 215d867."""

    ours: Mapping[str, Mapping[str, list[Launch]]]
    inductor: Mapping[str, list[Launch]]
    before: Mapping[str, list[Launch]]


def load() -> Record:
    raw, before = json.loads(RECORD.read_text()), json.loads(BEFORE.read_text())

    def launches(calls: Mapping[str, Any], reversed: Container[str] = REVERSED) -> dict[str, list[Launch]]:
        return {call: [launch_of(row, reversed) for row in rows] for call, rows in calls.items()}

    ours = {gpu: launches(calls) for gpu, calls in raw["triton"].items()}
    return Record(ours, launches(raw["inductor"]), launches(before["triton"], ()))


def text_of(raw: Any) -> str:
    """The record as JSON with a line for each launch."""
    if isinstance(raw, str):
        return json.dumps(raw)
    if isinstance(raw, list):
        return "[\n" + ",\n".join(json.dumps(row) for row in raw) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text_of(value)}" for key, value in raw.items()) + "\n}"


def counted(module: str, *arguments: str) -> Any:
    """The answer of a program of ``tests/support``, from a process in which Triton has its compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.support.{module}", *arguments]
    root = Path(__file__).resolve().parents[2]
    return json.loads(subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def count() -> None:
    """Counts every launch anew, and writes the record."""
    ours = {gpu: counted("gpu_counts", gpu) for gpu in GPUS}
    inductor = counted("inductor_counts")
    raw = {"torch": metadata.version("torch"), "triton": ours, "inductor": inductor}
    RECORD.write_text(text_of(raw) + "\n")
