"""Where the time of the CPU kernels goes: the share of each stage, by sampling.

    CXXFLAGS=-g python setup.py build_ext --inplace
    python -m benchmarks.stages [--size 56,28,14,7] [--batch 8,32] [--dtype float32,bfloat16]
                                [--layout nchw,channels_last] [--quick] [--json PATH]

For each shape, Linux's ``perf`` samples the processor clock of a process that calls forward or the backward operator
again and again, and ``addr2line`` names the functions that are inlined at each sampled address. The file of such a
function is the stage: pool, graph or gate. The same process measures the time over the floor before it is sampled. A
stage's share of this ratio is its time over the floor. *Other* is what the kernels do besides, and the time outside
of them: the operator, allocation, and waiting for the other threads.

A second table has the time over the floor for samples of different size in the same number of bytes. A sample that fits
into the second-level cache is read from there the second time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    if "--worker" not in sys.argv:
        say("stages: loads PyTorch")

from benchmarks import machine, passes, runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.contenders import Fused
from benchmarks.progress import Progress
from benchmarks.shapes import DTYPES, LAYOUTS, STAGES, Shape
from benchmarks.sweep import measure
from benchmarks.tables import table
from benchmarks.timing import Effort
from steam_kernels.backends import native

PASSES = ("forward", "backward")
#: By file of csrc: the stage of the functions in it. The innermost function of a list that has one of these files names
#: the stage.
FILES = {
    "pool.h": "pool",
    "pool_backward.h": "pool",
    "cells.h": "pool",
    "graph.h": "graph",
    "graph_triples.h": "graph",
    "branch.h": "graph",
    "weights.h": "graph",
    "gate.h": "gate",
    "gate_walk.h": "gate",
    "sink.h": "gate",
}
STAGE_NAMES = ("pool", "graph", "gate")
#: Samples per second of each processor.
RATE = 4000
#: (N, C) of maps with 28x28 pixels in float32, all of about 100 MB.
SAMPLES = ((512, 64), (128, 256), (64, 512), (32, 1024), (16, 2048), (8, 4096))


def stage_of(files: list[str]) -> str:
    """The stage of an address at which functions of these files are inlined, the innermost first."""
    return next((FILES[file] for file in files if file in FILES), "other")


def inlined(addresses: list[int]) -> dict[int, list[str]]:
    """The files of the functions at each address of the library, the innermost first."""
    text = "\n".join(map(hex, addresses))
    command = ["addr2line", "--exe", str(native.CPU.path), "--inlines", "--addresses", "--basenames"]
    printed = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found: dict[int, list[str]] = {}
    at: list[str] = []
    for line in printed.splitlines():
        if line.startswith("0x"):
            at = found.setdefault(int(line, 16), [])
        else:
            at.append(line.partition(":")[0])
    return found


def shares(recorded: Path, base: int) -> tuple[dict[str, float], int]:
    """The share of each stage in the samples of a recording, and the number of samples. ``base`` is the address of the
    library in the recorded process."""
    command = ["perf", "script", "--input", str(recorded), "--fields", "ip,dso"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    total, inside = 0, collections.Counter[int]()
    for match in re.finditer(r"^\s*([0-9a-f]+) \((.*)\)$", printed, re.MULTILINE):
        total += 1
        if match[2].endswith(native.CPU.path.name):
            inside[int(match[1], 16) - base] += 1
    if total == 0:
        raise SystemExit("perf took no sample")
    files = inlined(list(inside))
    counts = collections.Counter({"other": total - inside.total()})
    for address, count in inside.items():
        counts[stage_of(files.get(address, []))] += count
    if not any(counts[name] for name in STAGE_NAMES):
        raise SystemExit(f"{native.CPU.path} has no line numbers: build it with CXXFLAGS=-g")
    return {name: counts[name] / total for name in (*STAGE_NAMES, "other")}, total


def base_of_library() -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return int(next(line for line in lines if line.endswith(native.CPU.path.name)).partition("-")[0], 16)


def worker(shape: Shape, direction: str, seconds: float, effort: Effort, folder: Path) -> None:
    """In the child process: measures the shape, and then runs one direction of it while perf samples."""
    row = measure(shape, True, effort)
    tensors = shape.tensors()
    if direction == "forward":
        block = passes.forward_block(Fused(), shape, tensors)
    else:
        block = passes.backward_operator_block(shape, tensors)
    block(2)
    command = ["perf", "record", "--quiet", "--event", "cpu-clock", "--freq", str(RATE), "--pid", str(os.getpid())]
    with subprocess.Popen([*command, "--output", str(folder / "perf.data")], stdout=subprocess.DEVNULL) as perf:
        time.sleep(0.5)  # perf attaches itself meanwhile
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            block(3)
        perf.send_signal(signal.SIGINT)
    row |= {"base": base_of_library(), "direction": direction}
    (folder / "row.json").write_text(json.dumps(row))


def sampled(shape: Shape, direction: str, seconds: float, quick: bool) -> dict[str, Any]:
    """The row of a shape and a direction: the time over the floor, and the shares of the stages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [shape.n, shape.c, shape.h, shape.w, shape.dtype, shape.layout]
        task = json.dumps({"shape": given, "direction": direction, "seconds": seconds, "quick": quick, "folder": name})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.stages", "--worker", task], cwd=machine.ROOT, env=malloc.environment()
        )
        if done.returncode:
            raise SystemExit(f"{shape.label}: the measuring process ended with {done.returncode}")
        row = json.loads((folder / "row.json").read_text())
        found, samples = shares(folder / "perf.data", row["base"])
    over = row[f"{direction}_over_floor"]
    return {
        "section": "stages",
        "problem": shape.label,
        "batch": shape.n,
        "direction": direction,
        "walk": row["walk"],
        "over_floor": over,
        "samples": samples,
        **{f"{stage}_over_floor": share * over for stage, share in found.items()},
    }


def by_sample(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    rows = []
    for n, c in SAMPLES[: 1 if quick else None]:
        shape = Shape(n if not quick else 2, c, 28, 28)
        row = measure(shape, True, effort)
        of = {"section": "samples", "problem": shape.label, "sample_bytes": shape.map_bytes // shape.n}
        rows.append(of | {f"{d}_over_floor": row[f"{d}_over_floor"] for d in PASSES})
        say(f"  samples: {shape.label}")
    return rows


HEAD = ("shape, direction", "over floor", *STAGE_NAMES, "other")


def line(row: dict[str, Any]) -> tuple[object, ...]:
    parts = (row[f"{stage}_over_floor"] for stage in (*STAGE_NAMES, "other"))
    return f"{row['problem']}  {row['direction']}", row["over_floor"], *parts


def main() -> None:
    parser = parser_of("stages", __doc__)
    parser.add_argument("--size", default="", help=f"comma list: {', '.join(STAGES)} (all)")
    parser.add_argument("--batch", default="8,32", help="comma list (8,32)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma list (float32,bfloat16)")
    parser.add_argument("--layout", default="", help=f"comma list: {', '.join(LAYOUTS)} (both)")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of sampling for each row (1.5)")
    add_run_options(parser, "one shape, short samples")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        task = json.loads(args.worker)
        effort = Effort.quick() if task["quick"] else Effort(seconds=0.2)
        return worker(Shape(*task["shape"]), task["direction"], task["seconds"], effort, Path(task["folder"]))
    for tool, package in (("perf", "linux-perf"), ("addr2line", "binutils")):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not on the PATH; Debian's package {package} has it")
    if native.CPU.reason:
        sys.exit(f"the CPU kernels do not run: {native.CPU.reason}")
    sizes = choices(parser, "--size", args.size, STAGES) or (["7"] if args.quick else list(STAGES))
    dtypes = choices(parser, "--dtype", args.dtype, DTYPES)[: 1 if args.quick else None]
    layouts = choices(parser, "--layout", args.layout, LAYOUTS) or (["nchw"] if args.quick else list(LAYOUTS))
    batches = [2] if args.quick else [int(b) for b in args.batch.split(",")]
    facts = runs.begin()
    shapes = [Shape(n, *STAGES[s], d, layout) for n in batches for s in sizes for d in dtypes for layout in layouts]
    progress = Progress("shape" for _ in shapes)
    rows = []
    for shape in shapes:
        with progress.row(shape.label, "shape"):
            rows += [sampled(shape, d, 0.3 if args.quick else args.seconds, args.quick) for d in PASSES]
    say("\n" + table("== time over the floor, and each stage's part of it ==", HEAD, map(line, rows)) + "\n")
    effort = Effort.quick() if args.quick else Effort(seconds=0.3)
    samples = by_sample(args.quick, effort)
    head = ("maps of about 100 MB", "MB of a sample", *PASSES)
    body = [(r["problem"], r["sample_bytes"] / 1e6, *(r[f"{d}_over_floor"] for d in PASSES)) for r in samples]
    say(table("== time over the floor by the size of a sample ==", head, body))
    runs.write(args.json, "stages", rows + samples, facts, args.quick)


if __name__ == "__main__":
    main()
