"""Other options than the defaults, CPU variants, the tail, and in-place calls.

    python -m benchmarks.options [--only options,variants,tail,inplace] [--json PATH]

* *options*: radius 2 and 3, 8 neighbours, parallel order and 8 heads, relative to the default unit at batch 32.
* *variants*: each variant of the CPU kernels that this processor runs, in a process of its own, over its own floor.
* *tail*: ``relu(gate(x) + residual)`` in one pass, beside the same result in two steps. The two steps are a unit
  without a tail, and then the addition and the ReLU, both in place. The unit is the fused one or the honest baseline.
  All are measured forward, and forward + backward by autograd, over the floor of the tail (``passes.floor_blocks``).
* *inplace*: in-place calls beside calls that return a new map, with the stock malloc and with the benchmarks' setting.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

# The child process of inplace keeps the malloc that it is started with.
if __name__ == "__main__" and "--inplace-worker" not in sys.argv:
    malloc.restart()
    say("options: loads PyTorch")

import torch

from benchmarks import judging, machine, passes, runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.contenders import CONTENDERS, Contender, Fused, two_steps
from benchmarks.shapes import DIRECTIONS, DTYPES, LAYOUTS, OPTIONS, STAGES, Shape
from benchmarks.tables import micro, table
from benchmarks.timing import Block, Effort, interleaved, timed

VARIANTS = ("avx512", "avx2", "generic")
PASSES = ("forward", "backward")
Rows = list[dict[str, Any]]


class Settings:
    """The settings that all sections take from the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.quick, self.check = args.quick, not args.no_check
        self.effort = Effort.quick() if args.quick else Effort(seconds=0.3)
        self.dtypes = tuple(args.dtype.split(","))
        self.batch = args.batch or (2 if args.quick else 32)

    def shapes(self, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> list[Shape]:
        sizes = ("14", "7") if self.quick else tuple(STAGES)
        return [Shape(self.batch, *STAGES[s], d, layout) for s in sizes for d in self.dtypes for layout in layouts]

    def judged(self, shape: Shape, tensors: dict[str, Any]) -> None:
        if self.check:
            judging.judge(shape, tensors).check(judging.outputs(Fused(), shape, tensors), shape.label)


def both(shape: Shape, tensors: dict[str, Any], prefix: str = "") -> dict[str, Block]:
    """Forward by ``steam()`` and backward by the operator."""
    return {
        f"{prefix}forward": passes.forward_block(Fused(), shape, tensors),
        f"{prefix}backward": passes.backward_operator_block(shape, tensors),
    }


def options(settings: Settings) -> Rows:
    rows: Rows = []
    for shape in settings.shapes():
        tensors = shape.tensors()
        blocks = both(shape, tensors, "default ")
        for name, changed in OPTIONS.items():
            other = replace(shape, options=changed)
            settings.judged(other, tensors)
            blocks |= both(other, tensors, f"{name} ")
        m = interleaved(blocks, settings.effort)
        row: dict[str, Any] = {"problem": shape.label}
        for d in PASSES:
            row |= {f"{d} {name}": m.median(f"{name} {d}", d) / m.median(f"default {d}", d) for name in OPTIONS}
        rows.append(row)
        say(f"  options: {shape.label}")
    body = [(r["problem"], name, *(r[f"{d} {name}"] for d in PASSES)) for r in rows for name in OPTIONS]
    title = "== options: time over the time of the default unit =="
    say("\n" + table(title, ("shape", "options", *PASSES), body) + "\n")
    return rows


def variants(settings: Settings, worker: list[str]) -> Rows:
    rows: Rows = []
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.options", "--worker", str(path), *worker]
            done = subprocess.run(command, cwd=machine.ROOT, env=malloc.environment() | {"STEAM_KERNELS_CPU": variant})
            if done.returncode == 3:
                say(f"  variants: {variant} does not run here; the line above gives the reason")
                continue
            if done.returncode:
                raise SystemExit(f"variant {variant}: the measuring process ended with {done.returncode}")
            rows += json.loads(path.read_text())
    if not rows:
        raise SystemExit("no variant of the CPU kernels runs here")
    best = rows[0]["variant"]
    first = {r["problem"]: r for r in rows if r["variant"] == best}
    for r in rows:
        r |= {f"{d}_over_best": r[f"{d}_over_floor"] / first[r["problem"]][f"{d}_over_floor"] for d in PASSES}
    head = ("shape", "variant", "fwd/floor", "bwd/floor", f"fwd/{best}", f"bwd/{best}")
    keys = ("problem", "variant", *(f"{d}_over_{other}" for other in ("floor", "best") for d in PASSES))
    title = f"== CPU variants, batch {settings.batch}: time over the floor, and over the time of {best} =="
    say("\n" + table(title, head, [[r[k] for k in keys] for r in rows]) + "\n")
    return rows


def variant_worker(settings: Settings, path: Path) -> None:
    """In the child process: measures the variant that the environment sets, at all shapes of stages."""
    reason = machine.facts()["backends"]["cpu"]
    if reason:
        say(f"  {reason}")
        raise SystemExit(3)
    rows = []
    for shape in settings.shapes():
        tensors = shape.tensors()
        settings.judged(shape, tensors)
        m = interleaved(passes.floor_blocks(shape, tensors) | both(shape, tensors), settings.effort)
        row: dict[str, Any] = {"problem": shape.label, "variant": machine.cpu_variant()}
        for d in PASSES:
            row |= {d: m.median(d, d), f"{d}_over_floor": m.median(d, d) / m.median(f"floor-{d}", d)}
        rows.append(row)
        say(f"  variants: {row['variant']} {shape.label}")
    path.write_text(json.dumps(rows))


def tail_contenders(shape: Shape) -> dict[str, Contender]:
    """The contenders at a shape with a tail: the fused unit in one pass, and two forms in two steps."""
    return {"one pass": Fused(), "two steps": two_steps(Fused()), "plain, two steps": CONTENDERS["plain"](shape)}


def tail(settings: Settings) -> Rows:
    rows: Rows = []
    for plain in settings.shapes():
        shape = plain.with_options(tail=True)
        tensors = shape.tensors()
        blocks = passes.floor_blocks(shape, tensors)
        contenders = tail_contenders(shape)
        if settings.check:
            judge = judging.judge(shape, tensors)
            for name, contender in contenders.items():
                found = judge if name == "one pass" else judging.peers(judge)
                found.check(judging.outputs(contender, shape, tensors), f"{shape.label}, {name}")
        for name, contender in contenders.items():
            blocks[f"{name} forward"] = passes.forward_block(contender, shape, tensors)
            blocks[f"{name} both"] = passes.training_block(contender, shape, tensors)
        m = interleaved(blocks, settings.effort)
        for name in contenders:
            row: dict[str, Any] = {"problem": shape.label, "contender": name, "checked": settings.check}
            for d in ("forward", "both"):
                row[d] = m.median(f"{name} {d}", d)
                row[f"{d}_over_floor"] = row[d] / sum(m.median(f"floor-{p}", p) for p in DIRECTIONS[d])
                row[f"{d}_over_one_pass"] = row[d] / m.median(f"one pass {d}", d)
            rows.append(row)
        say(f"  tail: {shape.label}")
    head = ("shape", "tail", "fwd/floor", "fwd/one pass", "f+b/floor", "f+b/one pass")
    keys = ("problem", "contender", *(f"{d}_over_{o}" for d in ("forward", "both") for o in ("floor", "one_pass")))
    title = "== the tail: time over its floor, and over the time of the fused unit in one pass =="
    say("\n" + table(title, head, [[r[k] for k in keys] for r in rows]) + "\n")
    return rows


def inplace(settings: Settings, worker: list[str]) -> Rows:
    rows: Rows = []
    for stock in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.options", "--inplace-worker", str(path), *worker]
            subprocess.run(command, cwd=machine.ROOT, env=malloc.environment(stock), check=True)
            rows += json.loads(path.read_text())
    body = []
    for r in rows:
        both = (micro(r[k]) for k in ("inplace", "outofplace"))
        body.append((r["problem"], r["malloc"], *both, r["outofplace"] / r["inplace"]))
    head = ("shape", "malloc", "in place", "new map", "new map over in place")
    say("\n" + table("== in-place calls and calls that return a new map, without gradients ==", head, body) + "\n")
    return rows


def inplace_worker(settings: Settings, path: Path) -> None:
    """In the child process: measures identity units (output rows zero, scale 4). Every in-place call overwrites x, and
    x keeps its values."""
    from steam_kernels import steam

    rows = []
    for shape in settings.shapes(("nchw",)):
        t = shape.tensors()
        for name in ("channel_weight", "spatial_weight"):
            t[name][3] = 0
        args, keywords = (t["x"], t["channel_weight"], t["spatial_weight"]), shape.options.keywords | {"scale": 4.0}
        with torch.no_grad():
            before = t["x"].clone()
            same = steam(*args, inplace=True, **keywords)
            if same is not t["x"] or not torch.equal(before, same):
                raise SystemExit(f"{shape.label}: the in-place result differs from x")
            del before

            def written(args: tuple[Any, ...] = args, keywords: dict[str, Any] = keywords) -> object:
                return steam(*args, inplace=True, **keywords)

            def returned(args: tuple[Any, ...] = args, keywords: dict[str, Any] = keywords) -> object:
                return steam(*args, **keywords)

            blocks = {"inplace": timed("forward", written), "outofplace": timed("forward", returned)}
            m = interleaved(blocks, settings.effort)
        setting = "benchmarks'" if malloc.is_set() else "stock"
        rows.append({"problem": shape.label, "malloc": setting} | {k: m.median(k, "forward") for k in blocks})
    path.write_text(json.dumps(rows))


SECTIONS = ("options", "variants", "tail", "inplace")


def main() -> None:
    parser = parser_of("options", __doc__)
    parser.add_argument("--only", default="", help=f"comma list: {', '.join(SECTIONS)}")
    parser.add_argument("--dtype", default="float32", help="comma list (float32)")
    parser.add_argument("--batch", type=int, default=0, help="batch size (32)")
    parser.add_argument("--no-check", action="store_true", help="do not judge the results (the output says so)")
    add_run_options(parser, "two stages, batch 2, few rounds")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inplace-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    choices(parser, "--dtype", args.dtype, DTYPES)
    settings = Settings(args)
    if args.worker:
        return variant_worker(settings, args.worker)
    if args.inplace_worker:
        return inplace_worker(settings, args.inplace_worker)
    wanted = choices(parser, "--only", args.only, SECTIONS) or list(SECTIONS)
    facts = runs.begin()
    if not settings.check:
        say("the results are NOT judged in this run")
    passed = ["--dtype", args.dtype, "--batch", str(settings.batch)]
    passed += [f for f, on in (("--quick", args.quick), ("--no-check", args.no_check)) if on]
    sections: dict[str, Callable[[], Rows]] = {
        "options": lambda: options(settings),
        "variants": lambda: variants(settings, passed),
        "tail": lambda: tail(settings),
        "inplace": lambda: inplace(settings, passed),
    }
    rows = [{"section": name} | row for name in wanted for row in sections[name]()]
    runs.write(args.json, "options", rows, facts, args.quick)


if __name__ == "__main__":
    main()
