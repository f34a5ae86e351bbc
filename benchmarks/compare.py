"""Compares two runs of the benchmarks by their ratios.

    python -m benchmarks.compare OLD NEW [--row 1.35] [--mean 1.10] [--memory 1.10]

OLD and NEW are folders as ``make bench`` writes them. No times are compared. Each figure is a ratio within its own run,
because another machine, or another day, changes both sides of a ratio. The ratios are:

* the fused unit's time over the floor, by shape and direction, with a group for each dtype;
* the same along the axes of scaling, with a group for each number of threads;
* the time of the network with fused units over the plain network, by network, task, mode and layout, and in the runs of
  latency by network, layout and batch;
* the time of a call of ``FusedSTEAM`` over PyTorch's own ``x * 0.5``;
* the fused unit's extra memory in training over the bytes of x.

NEW is worse if a ratio is more than ``--row`` times the old one, if the geometric mean of a group is more than
``--mean`` times the old one, if a memory is more than ``--memory`` times the old one plus a hundredth of x, if NEW
lacks a figure of OLD, or if a row ran on another backend. Runs that share no figure cannot be compared, and a quick run
cannot be compared with a full one.

The program ends with 1 if NEW is worse, and with 2 if the runs cannot be compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.commandline import parser_of
from benchmarks.runs import LATENCY, Run, geometric_mean, networks_of, read

Ratios = dict[str, dict[str, float]]  # group -> name -> ratio


def ratios(run: Run) -> Ratios:
    """Every ratio of a run, in groups. Smaller is better."""
    out: Ratios = {}

    def add(group: str, name: str, value: float) -> None:
        out.setdefault(group, {})[name] = value

    for row in run.get("unit", {}).get("rows", []):
        if row["contender"] == "fused":
            add(f"over the floor, {row['direction']}, {row['dtype']}", row["problem"], row["over_floor"])
    for row in run.get("scaling", {}).get("rows", []):
        for direction in ("forward", "backward"):
            group = f"scaling, {direction} over the floor, threads: {row['threads']}"
            add(group, f"{row['axis']} = {row['value']}", row[f"{direction}_over_floor"])
    for (network, task, mode, layout), of in networks_of(run.get("end_to_end", {}).get("rows", [])).items():
        if row := of.get("steam"):
            name = f"{network}, {mode}, {layout}, batch {row['batch']} at {row['size']}"
            add(f"over the plain network, {task}", name, row["time_over_plain"])
    for (network, layout, batch), of in networks_of(run.get("latency", {}).get("rows", []), *LATENCY).items():
        if row := of.get("steam"):
            name = f"{network}, {layout}, batch {batch} at {row['size']}"
            add("latency over the plain network", name, row["time_over_plain"])
    host = {r["layer"]: r for r in run.get("host", {}).get("rows", []) if r["section"] == "layers"}
    if {"FusedSTEAM", "x * 0.5 (built in)"} <= set(host):
        for column in ("no grad", "forward + backward"):
            value = host["FusedSTEAM"][column] / host["x * 0.5 (built in)"][column]
            add("host, module over x * 0.5", column, value)
    return out


def backends(run: Run) -> dict[str, str]:
    """The recorded backends of the fused unit and of the networks with it, by row."""
    unit = [r for r in run.get("unit", {}).get("rows", []) if r["contender"] == "fused"]
    found = {("unit", r["problem"], r["direction"]): r.get("backend") for r in unit}
    for key, of in networks_of(run.get("end_to_end", {}).get("rows", [])).items():
        found[("end_to_end", *key)] = of.get("steam", {}).get("backend")
    return {", ".join(key): backend for key, backend in found.items() if backend}


def memories(run: Run) -> dict[str, float]:
    """Extra memory of the fused unit in training over the bytes of x, by shape."""
    rows = run.get("unit", {}).get("rows", [])
    own = (r for r in rows if r["contender"] == "fused" and r["direction"] == "both" and r["extra_bytes"] is not None)
    return {r["problem"]: r["extra_bytes"] / r["map_bytes"] for r in own}


def compare(old: Run, new: Run, row: float, mean: float, memory: float) -> tuple[list[str], list[str]]:
    """The lines to print, and a line for each figure that is worse. There are no lines if the runs share no figure."""
    lines, worse = [], []
    before, after = ratios(old), ratios(new)
    for group in before:
        shared = [name for name in before[group] if name in after.get(group, {})]
        if group not in after:
            worse.append(f"{group}: NEW has none of its {len(before[group])} figures")
        else:
            worse += [f"{group}, {name}: NEW has no such figure" for name in before[group] if name not in shared]
        if not shared:
            continue
        changes = {name: after[group][name] / before[group][name] for name in shared}
        overall = geometric_mean(changes.values())
        lines.append(f"{group}: {overall:.3f} times the old in the geometric mean of {len(shared)}")
        if overall > mean:
            worse.append(f"{group}: the geometric mean is {overall:.3f} times the old, allowed are {mean:g}")
        for name, change in changes.items():
            if change > row:
                figures = f"{before[group][name]:.3f} -> {after[group][name]:.3f}"
                worse.append(f"{group}, {name}: {figures}, {change:.2f} times the old, allowed are {row:g}")
    was, now = memories(old), memories(new)
    shared = [name for name in was if name in now]
    if shared:
        lines.append(f"extra memory over x: {len(shared)} shapes, at most {max(now[n] for n in shared):.4f}")
    worse += [f"extra memory over x, {name}: NEW has no such figure" for name in was if name not in now]
    ran, runs = backends(old), backends(new)
    for name in ran:
        if name in runs and ran[name] != runs[name]:
            worse.append(f"{name}: ran on {ran[name]}, and in NEW on {runs[name]}")
    for name in shared:
        allowed = memory * was[name] + 0.01
        if now[name] > allowed:
            worse.append(f"extra memory over x, {name}: {was[name]:.4f} -> {now[name]:.4f}, allowed are {allowed:.4f}")
    return lines, worse


def main() -> None:
    parser = parser_of("compare", __doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--row", type=float, default=1.35, help="the largest allowed growth of one ratio (1.35)")
    parser.add_argument("--mean", type=float, default=1.10, help="the largest allowed growth of a group's mean (1.10)")
    parser.add_argument("--memory", type=float, default=1.10, help="the largest allowed growth of a memory (1.10)")
    args = parser.parse_args()
    runs = []
    for folder in (args.old, args.new):
        try:
            runs.append(read(folder))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
    quick = [{name for name, part in run.items() if part.get("quick")} for run in runs]
    if mixed := [name for name in runs[0] if name in runs[1] and (name in quick[0]) != (name in quick[1])]:
        print(f"a quick run is not compared with a full one: {', '.join(mixed)}", file=sys.stderr)
        sys.exit(2)
    if any(quick):
        print("a quick run: its times mean nothing")
    lines, worse = compare(runs[0], runs[1], args.row, args.mean, args.memory)
    if not lines:
        print(f"{args.old} and {args.new} share no figure", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))
    print("\n".join(f"WORSE {line}" for line in worse) if worse else "nothing is worse")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
