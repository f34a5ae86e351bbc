"""The CPU kernels against their bars: time over the memory floor, and speed-up over the compiled honest baseline.

    python -m benchmarks.bars [--rows 56,28,14,7,det,batch1,kernel] [--no-compiled] [--runs 3] [--json PATH]
    python -m benchmarks.bars --page RUN.json [RUN.json ...]          several runs as one Markdown table

What is timed:

* *forward*: ``steam()`` without gradients, output allocated by it, over ``torch.mul(x, 0.5, out=y)``;
* *backward*: ``torch.ops.steam_kernels.backward`` on ready tensors, all three gradients, its outputs allocated by it,
  over ``torch.add(x, dy, out=dx)``;
* *kernel*: the operators with prepared arguments, less the same call on a batch of 0, which has the dispatch and the
  allocation only;
* *f+b against the baseline*: ``steam()`` and ``autograd.grad`` to x and both weights, for both sides; *forward* is
  without gradients.

Each run measures everything in interleaved rounds and takes medians; a figure is the median of the runs. The bars were
set on two threads of an AVX-512 machine. At the end stands which share of the rows meets each bar.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import core
from benchmarks.core import Problem, say

SPEEDUP = {"forward": 1.8, "both": 3.0}


class Bar(NamedTuple):
    """A row of the table: the most that forward and backward may take, over the floor or (``kernel``) in
    microseconds."""

    group: str
    problem: Problem
    forward: float
    backward: float
    kernel: bool = False


def bars() -> Iterator[Bar]:
    """Every row, in both dtypes and memory formats."""
    detection = (256, 100, 167)
    both = {"float32": 0, "bfloat16": 1}
    table: list[tuple[str, int, tuple[int, int, int], tuple[int, int], tuple[tuple[float, float], ...]]] = [
        ("56", 32, core.STAGES["56"], (7, 7), ((1.10, 1.15), (1.10, 1.15))),
        ("28", 32, core.STAGES["28"], (7, 7), ((1.30, 1.30), (1.40, 1.40))),
        ("14", 32, core.STAGES["14"], (7, 7), ((1.40, 1.60), (1.20, 1.35))),
        ("7", 32, core.STAGES["7"], (7, 7), ((2.1, 2.3), (1.55, 1.85))),
        ("det", 2, detection, (7, 7), ((1.15, 1.30), (1.30, 1.40))),
        ("det", 2, detection, (13, 21), ((1.30, 1.40), (1.55, 1.60))),
        ("batch1", 1, core.STAGES["56"], (7, 7), ((1.9, 2.0), (0.9, 1.1))),
        ("batch1", 1, core.STAGES["28"], (7, 7), ((1.9, 2.0), (0.9, 1.1))),
        ("batch1", 1, core.STAGES["14"], (7, 7), ((1.8, 2.2), (1.0, 1.2))),
        ("kernel", 1, core.STAGES["7"], (7, 7), ((17, 24), (16, 22))),
    ]
    channels_last = {
        ("28", "float32"): (1.30, 1.55),
        ("28", "bfloat16"): (1.40, 1.55),
        ("14", "float32"): (1.45, 1.85),
    }
    for group, n, (c, h, w), grid, limits in table:
        for dtype, column in both.items():
            for layout in core.LAYOUTS:
                limit = limits[column]
                if layout == "channels_last":
                    limit = channels_last.get((group, dtype), limit)
                yield Bar(group, Problem(n, c, h, w, dtype, layout, grid), *limit, kernel=group == "kernel")


def kernel_blocks(problem: Problem, tensors: dict[str, Any]) -> dict[str, core.Block]:
    """The operators on the problem and on a batch of 0."""
    none = {
        k: v[:0].contiguous(memory_format=core.LAYOUTS[problem.layout]) if v.dim() == 4 else v
        for k, v in tensors.items()
    }
    return {
        "op-forward": core.op_forward_block(problem, tensors),
        "op-backward": core.op_backward_block(problem, tensors),
        "host-forward": core.op_forward_block(problem, none),
        "host-backward": core.op_backward_block(problem, none),
    }


def measure(bar: Bar, compiled: bool, check: bool, runs: int, effort: core.Effort) -> dict[str, Any]:
    """Judge one row and measure it ``runs`` times."""
    problem = bar.problem
    tensors = problem.tensors()
    fused = core.fused()
    core.forget_compiled()
    units = {"fused": fused} | ({"plain": core.CONTENDERS["plain-compiled"](problem)} if compiled else {})
    if check:
        judge = core.judge(problem, tensors)
        for name, unit in units.items():
            found = judge if name == "fused" else core.peers(judge)
            found.check(core.outputs(unit, problem, tensors), label=f"{problem.label} {name}")
        del judge
    blocks = core.floor_blocks(problem, tensors)
    blocks |= {
        "forward": core.forward_block(fused, problem, tensors),
        "backward": core.op_backward_block(problem, tensors),
    }
    blocks |= kernel_blocks(problem, tensors) if bar.kernel else {}
    if compiled:
        blocks["training"] = core.training_block(fused, problem, tensors)
        for kind, make in (("forward", core.forward_block), ("training", core.training_block)):
            blocks[f"plain-{kind}"] = make(units["plain"], problem, tensors)
            blocks[f"plain-{kind}"](1)
        warmed = units["plain"]
        assert isinstance(warmed, core.Compiled)
        warmed.warmed()
    steady = core.Steady()
    each: list[dict[str, float]] = []
    for _ in range(runs):
        m = core.interleaved(blocks, effort)
        figures = {}
        for d in ("forward", "backward"):
            figures[d] = m.median(d, d)
            figures[f"{d}_floor"] = m.median(f"floor-{d}", d)
            figures[f"{d}_over_floor"] = figures[d] / figures[f"{d}_floor"]
            if bar.kernel:
                figures[f"{d}_kernel_us"] = (m.median(f"op-{d}", d) - m.median(f"host-{d}", d)) * 1e6
        if compiled:
            figures["plain_forward"] = m.median("plain-forward", "forward")
            figures["plain_both"] = m.median("plain-training", "both")
            figures["both"] = m.median("training", "both")
            figures["speedup_forward"] = figures["plain_forward"] / figures["forward"]
            figures["speedup_both"] = figures["plain_both"] / figures["both"]
        each.append(figures)
    steady.check()
    row: dict[str, Any] = {k: statistics.median(f[k] for f in each) for k in each[0]}
    row |= {
        "problem": problem.label,
        "checked": check,
        "backend": fused.ran,
        "forward_bar": bar.forward,
        "backward_bar": bar.backward,
        "kernel": bar.kernel,
    }
    key = "_kernel_us" if bar.kernel else "_over_floor"
    broken = [
        f"{d} {row[d + key]:.2f} > {getattr(bar, d):g}"
        for d in ("forward", "backward")
        if row[d + key] > getattr(bar, d)
    ]
    if compiled:
        broken += [
            f"x{row[f'speedup_{d}']:.2f} {d} < {SPEEDUP[d]}" for d in SPEEDUP if row[f"speedup_{d}"] < SPEEDUP[d]
        ]
    return row | {"missed": broken}


def line(row: dict[str, Any]) -> tuple[object, ...]:
    key = "_kernel_us" if row["kernel"] else "_over_floor"
    unit = " us" if row["kernel"] else ""
    bars_ = [f"{row[d + key]:.2f}{unit} ({row[d + '_bar']:g})" for d in ("forward", "backward")]
    times = [core.micro(row[d]) for d in ("forward", "forward_floor", "backward", "backward_floor")]
    ratios = [row.get("speedup_forward"), row.get("speedup_both")]
    return (
        row["problem"],
        *bars_,
        *times,
        *ratios,
        "; ".join(row["missed"]) or ("ok" if row["checked"] else "ok, unchecked"),
    )


def shares(rows: list[dict[str, Any]]) -> list[str]:
    """How many rows meet each bar, and how many meet all of theirs."""

    def share(what: str, met: list[bool]) -> str:
        return f"{what}: {sum(met)} of {len(met)} rows ({100 * sum(met) / len(met):.0f} %)"

    out = []
    for d in ("forward", "backward"):
        for kernel, key in ((False, "_over_floor"), (True, "_kernel_us")):
            if met := [r[d + key] <= r[f"{d}_bar"] for r in rows if r["kernel"] == kernel]:
                out.append(share(f"{d}, {'kernel alone' if kernel else 'over the floor'}", met))
    for d, least in SPEEDUP.items():
        if met := [r[f"speedup_{d}"] >= least for r in rows if f"speedup_{d}" in r]:
            name = "forward + backward" if d == "both" else d
            out.append(share(f"{name}, {least:g} times as fast as the compiled baseline", met))
    return [*out, share("all of these", [not r["missed"] for r in rows])]


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Files that ``--json`` wrote, side by side in one table, and under it what they were run on and which bars they
    meet."""

    def figures(row: dict[str, Any] | None) -> list[str]:
        if row is None:
            return ["", ""]
        key, unit = ("_kernel_us", " µs") if row["kernel"] else ("_over_floor", "")
        digits = 0 if row["kernel"] else 2
        times = " / ".join(f"{row[d + key]:.{digits}f}" for d in ("forward", "backward")) + unit
        return [times, " / ".join(f"{row[f'speedup_{d}']:.1f}" for d in SPEEDUP if f"speedup_{d}" in row)]

    def name(run: dict[str, Any]) -> str:
        return run["machine"]["cpu_variant"].upper().replace("AVX512", "AVX-512")

    by_problem = [{row["problem"]: row for row in run["rows"]} for run in runs]
    head = ["map", "bar"]
    for run in runs:
        head += [name(run), "times as fast"]
    rows = []
    for problem in dict.fromkeys(p for found in by_problem for p in found):
        of = [found.get(problem) for found in by_problem]
        row = next(r for r in of if r is not None)
        bar = f"{row['forward_bar']:g} / {row['backward_bar']:g}" + (" µs" if row["kernel"] else "")
        rows.append([problem, bar, *(cell for r in of for cell in figures(r))])
    out = core.markdown_table(head, rows)
    for run in runs:
        facts = run["machine"]
        met = "; ".join(shares(run["rows"]))
        out.append(
            f"- {name(run)}: {facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, commit "
            f"{facts['commit']}, {facts['date'][:10]}. Bars met, {met}."
        )
    return "\n".join(out) + "\n"


HEAD = ("row", "forward (bar)", "backward (bar)", "t fwd", "floor", "t bwd", "floor", "x fwd", "x f+b", "missed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", default="", help="comma list of row groups (56, 28, 14, 7, det, batch1, kernel) or parts of labels"
    )
    parser.add_argument("--no-compiled", action="store_true", help="leave out the compiled honest baseline")
    parser.add_argument("--no-check", action="store_true", help="leave out the correctness gate (the table says so)")
    parser.add_argument("--runs", type=int, default=3, help="a figure is the median of so many runs (3)")
    parser.add_argument("--quick", action="store_true", help="few rounds: that it runs, not what it takes")
    parser.add_argument("--threads", type=int, default=0, help="threads (torch's default)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--page", type=Path, nargs="+", help="measure nothing: print these runs as Markdown")
    args = parser.parse_args()
    if args.page:
        return say(markdown([json.loads(path.read_text()) for path in args.page]))
    core.restart_with_malloc()
    if args.threads:
        core.torch.set_num_threads(args.threads)
    wanted = [w for w in args.rows.split(",") if w]
    rows = [
        b for b in bars() if not wanted or any(w == b.group or (len(w) > 3 and w in b.problem.label) for w in wanted)
    ]
    if not rows:
        parser.error(f"--rows {args.rows!r} selects nothing")
    facts = core.machine()
    say(core.describe(facts))
    effort = core.Effort.quick() if args.quick else core.Effort(seconds=0.3)
    out = []
    for bar in rows:
        out.append(measure(bar, not args.no_compiled, not args.no_check, args.runs, effort))
        say("  ".join(str(v) if isinstance(v, str) else core.number(v) for v in line(out[-1])))
        if args.json:
            core.write_json(args.json, "bars", out, facts, args.quick)
    say(
        "\n"
        + core.table(f"== bars: median of {args.runs} runs, time over floor, bar in brackets ==", HEAD, map(line, out))
    )
    say("\nbars met, " + "\nbars met, ".join(shares(out)))


if __name__ == "__main__":
    main()
