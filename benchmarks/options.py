"""What lies off the default path: options, CPU variants, the block's tail, and in place.

    python -m benchmarks.options [--only options,variants,tail,inplace] [--json PATH]

* *options*: radius 2 and 3, 8 neighbours, parallel order, 8 heads, relative to the default unit, at batch 32.
* *variants*: each variant of the CPU kernels that this processor runs, forced in a process of its own, over its own
  floor.
* *tail*: ``relu(gate(x) + residual)`` over its own floor (forward ``torch.add(x, residual, out=y)``; backward
  ``torch.add(x, dy, out=dx)`` and ``torch.mul(y, 0.5, out=dresidual)``: three reads, two writes) beside the plain form
  over its own.
* *inplace*: in place against out of place, with the stock malloc and with the benchmarks'.
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

from benchmarks import core
from benchmarks.core import Problem, say, torch

OPTIONS: dict[str, dict[str, Any]] = {
    "radius 2": {"channel_radius": 2},
    "radius 3": {"channel_radius": 3},
    "8 neighbours": {"spatial_neighbors": 8},
    "parallel": {"order": "parallel"},
    "8 heads": {"num_heads": 8},
}
VARIANTS = ("avx512", "avx2", "generic")
PASSES = ("forward", "backward")
OPTIONS_BAR, VARIANTS_BAR, TAIL_BAR = 1.3, 1.3, 1.15
Rows = list[dict[str, Any]]


class Settings:
    """What all sections take from the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.quick, self.check = args.quick, not args.no_check
        self.effort = core.Effort.quick() if args.quick else core.Effort(seconds=0.3)
        self.dtypes = tuple(args.dtype.split(","))
        self.batch = args.batch or (2 if args.quick else 32)

    def problems(self, layouts: tuple[str, ...] = tuple(core.LAYOUTS)) -> list[Problem]:
        sizes = ("14", "7") if self.quick else tuple(core.STAGES)
        return [
            Problem(self.batch, *core.STAGES[s], d, layout) for s in sizes for d in self.dtypes for layout in layouts
        ]

    def judged(self, problem: Problem, tensors: dict[str, Any]) -> None:
        if self.check:
            core.judge(problem, tensors).check(core.outputs(core.fused(), problem, tensors), problem.label)


def both(problem: Problem, tensors: dict[str, Any], prefix: str = "") -> dict[str, core.Block]:
    """Forward through ``steam()`` and backward by the operator."""
    return {
        f"{prefix}forward": core.forward_block(core.fused(), problem, tensors),
        f"{prefix}backward": core.op_backward_block(problem, tensors),
    }


def options(settings: Settings) -> Rows:
    rows: Rows = []
    for problem in settings.problems():
        tensors = problem.tensors()
        blocks = both(problem, tensors, "default ")
        for name, change in OPTIONS.items():
            changed = replace(problem, **change)
            settings.judged(changed, tensors)
            blocks |= both(changed, tensors, f"{name} ")
        m = core.interleaved(blocks, settings.effort)
        row: dict[str, Any] = {"problem": problem.label}
        for d in PASSES:
            row |= {f"{d} {name}": m.median(f"{name} {d}", d) / m.median(f"default {d}", d) for name in OPTIONS}
        rows.append(row)
        say(f"  options: {problem.label}")
    head = ("time over the default's", *(f"{d[0]}wd {name}" for name in OPTIONS for d in PASSES))
    body = [(r["problem"], *(r[f"{d} {name}"] for name in OPTIONS for d in PASSES)) for r in rows]
    say("\n" + core.table(f"== options (bar {OPTIONS_BAR}) ==", head, body) + "\n")
    return rows


def variants(settings: Settings, worker: list[str]) -> Rows:
    rows: Rows = []
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.options", "--worker", str(path), *worker]
            done = subprocess.run(
                command, cwd=core.ROOT, env=core.malloc_environment() | {"STEAM_KERNELS_CPU": variant}
            )
            if done.returncode == 3:
                say(f"  variants: {variant} does not run here (the line above says why)")
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
    head = ("shape", "variant", "fwd/floor", "bwd/floor", f"fwd over {best}", f"bwd over {best}")
    keys = (
        "problem",
        "variant",
        "forward_over_floor",
        "backward_over_floor",
        "forward_over_best",
        "backward_over_best",
    )
    say(
        "\n"
        + core.table(
            f"== CPU variants, batch {settings.batch} (bar {VARIANTS_BAR} over avx512) ==",
            head,
            [[r[k] for k in keys] for r in rows],
        )
    )
    say()
    return rows


def variant_worker(settings: Settings, path: Path) -> None:
    """In the child: the variant that the environment forces, at all stage shapes."""
    reason = core.machine()["backends"]["cpu"]
    if reason:
        say(f"  {reason}")
        raise SystemExit(3)
    rows = []
    for problem in settings.problems():
        tensors = problem.tensors()
        settings.judged(problem, tensors)
        m = core.interleaved(core.floor_blocks(problem, tensors) | both(problem, tensors), settings.effort)
        row: dict[str, Any] = {"problem": problem.label, "variant": core.cpu_variant()}
        for d in PASSES:
            row |= {d: m.median(d, d), f"{d}_over_floor": m.median(d, d) / m.median(f"floor-{d}", d)}
        rows.append(row)
        say(f"  variants: {row['variant']} {problem.label}")
    path.write_text(json.dumps(rows))


def tail(settings: Settings) -> Rows:
    rows: Rows = []
    for problem in settings.problems():
        tailed = replace(problem, tail=True)
        tensors = tailed.tensors()
        settings.judged(tailed, tensors)
        blocks = both(problem, tensors, "plain ") | both(tailed, tensors, "tail ")
        for prefix, p in (("plain", problem), ("tail", tailed)):
            blocks |= {f"{prefix} {k}": v for k, v in core.floor_blocks(p, tensors).items()}
        m = core.interleaved(blocks, settings.effort)
        row: dict[str, Any] = {"problem": problem.label}
        for d in PASSES:
            for prefix in ("plain", "tail"):
                row[f"{prefix}_{d}"] = m.median(f"{prefix} {d}", d)
                row[f"{prefix}_{d}_over_floor"] = row[f"{prefix}_{d}"] / m.median(f"{prefix} floor-{d}", d)
            row[f"{d}_ratio"] = row[f"tail_{d}_over_floor"] / row[f"plain_{d}_over_floor"]
        rows.append(row)
        say(f"  tail: {problem.label}")
    head = ("shape", "fwd plain", "fwd tail", "ratio", "bwd plain", "bwd tail", "ratio")
    keys = [k for d in PASSES for k in (f"plain_{d}_over_floor", f"tail_{d}_over_floor", f"{d}_ratio")]
    body = [(r["problem"], *(r[k] for k in keys)) for r in rows]
    say(
        "\n"
        + core.table(
            f"== the tail: time over its own floor, and that over the plain form's (bar {TAIL_BAR} forward) ==",
            head,
            body,
        )
        + "\n"
    )
    return rows


def inplace(settings: Settings, worker: list[str]) -> Rows:
    rows: Rows = []
    for stock in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.options", "--inplace-worker", str(path), *worker]
            subprocess.run(command, cwd=core.ROOT, env=core.malloc_environment(stock), check=True)
            rows += json.loads(path.read_text())
    body = [
        (
            r["problem"],
            r["malloc"],
            *(core.micro(r[k]) for k in ("inplace", "outofplace")),
            r["outofplace"] / r["inplace"],
        )
        for r in rows
    ]
    head = ("shape", "malloc", "in place", "out of place", "gain")
    say("\n" + core.table("== in place against out of place, forward without gradients ==", head, body) + "\n")
    return rows


def inplace_worker(settings: Settings, path: Path) -> None:
    """In the child: identity units (output rows zero, scale 4), so that x keeps its values however often it is
    overwritten."""
    from steam_kernels import steam

    rows = []
    for problem in settings.problems(("nchw",)):
        t = problem.tensors()
        for name in ("channel_weight", "spatial_weight"):
            t[name][3] = 0
        args, unit = (t["x"], t["channel_weight"], t["spatial_weight"]), problem.unit | {"scale": 4.0}
        with torch.no_grad():
            before = t["x"].clone()
            same = steam(*args, inplace=True, **unit)
            if same is not t["x"] or not torch.equal(before, same):
                raise SystemExit(f"{problem.label}: in place is not what out of place is")
            del before

            def written(args: tuple[Any, ...] = args, unit: dict[str, Any] = unit) -> object:
                return steam(*args, inplace=True, **unit)

            def returned(args: tuple[Any, ...] = args, unit: dict[str, Any] = unit) -> object:
                return steam(*args, **unit)

            blocks = {"inplace": core.timed("forward", written), "outofplace": core.timed("forward", returned)}
            m = core.interleaved(blocks, settings.effort)
        malloc = "benchmarks'" if core.malloc_is_set() else "stock"
        rows.append({"problem": problem.label, "malloc": malloc} | {k: m.median(k, "forward") for k in blocks})
    path.write_text(json.dumps(rows))


SECTIONS = ("options", "variants", "tail", "inplace")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help=f"comma list: {', '.join(SECTIONS)}")
    parser.add_argument("--dtype", default="float32", help="comma list (float32)")
    parser.add_argument("--batch", type=int, default=0, help="batch size (32)")
    parser.add_argument("--no-check", action="store_true", help="leave out the correctness gate")
    parser.add_argument(
        "--quick", action="store_true", help="two stages, batch 2, few rounds: that it runs, not what it takes"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inplace-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = Settings(args)
    if args.worker:
        return variant_worker(settings, args.worker)
    if args.inplace_worker:
        return inplace_worker(settings, args.inplace_worker)
    core.restart_with_malloc()
    wanted = [w for w in args.only.split(",") if w] or list(SECTIONS)
    if wrong := set(wanted) - set(SECTIONS):
        parser.error(f"--only {sorted(wrong)[0]!r}: allowed are {', '.join(SECTIONS)}")
    facts = core.machine()
    say(core.describe(facts))
    if not settings.check:
        say("correctness is NOT checked in this run")
    passed = ["--dtype", args.dtype, "--batch", str(settings.batch)]
    passed += [f for f, on in (("--quick", args.quick), ("--no-check", args.no_check)) if on]
    runs: dict[str, Callable[[], Rows]] = {
        "options": lambda: options(settings),
        "variants": lambda: variants(settings, passed),
        "tail": lambda: tail(settings),
        "inplace": lambda: inplace(settings, passed),
    }
    rows = [{"section": name} | row for name in wanted for row in runs[name]()]
    if args.json:
        core.write_json(args.json, "options", rows, facts, args.quick)


if __name__ == "__main__":
    main()
