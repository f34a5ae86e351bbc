"""The page docs/benchmarks.md and its pictures, from the files of a run.

    python -m benchmarks.report [--run benchmarks/results/latest] [--before benchmarks/results/before]
                                [--page docs/benchmarks.md] [--images docs/images]

A run is a folder with unit.json, end_to_end.json, latency.json, host.json, scaling.json and conditions.json, as
``make bench`` writes them. The report adds unit.csv, with the rows of unit.json, and leaves out the sections of missing
files. The run before it, if there is one, is in the folder of ``--before``. The same files give the same bytes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.commandline import parser_of
from benchmarks.compare import ratios
from benchmarks.machine import ROOT
from benchmarks.pictures import draw
from benchmarks.runs import (
    DIRECTIONS,
    LATENCY,
    Row,
    Run,
    UnitRows,
    alone,
    geometric_mean,
    is_quick,
    name_of,
    networks_of,
    percent,
    price,
    read,
    shape_name,
    times,
    write_csv,
)
from benchmarks.tables import markdown_table, say

#: The facts of the machine that the page has, in this order.
FACTS = (
    "processor", "cpu_capability", "cores", "threads", "cpu_variant", "torch", "python", "steam_kernels", "commit",
    "malloc", "date",
)  # fmt: skip


def _facts(run: Run) -> tuple[list[tuple[str, str]], list[str]]:
    """The facts of the machine, and the names of the facts in which the parts of the run differ. A fact has one value
    if the parts agree, and else the value of each part. The date is a span, because the parts run one after the
    other."""
    table, differ = [], []
    for key in FACTS:
        values = {part: str(content["machine"].get(key, "not recorded")) for part, content in run.items()}
        distinct = sorted(set(values.values()))
        name = key.replace("_", " ")
        if distinct == ["not recorded"]:
            continue
        if len(distinct) == 1:
            table.append((name, distinct[0]))
        elif key == "date":
            table.append((name, f"{distinct[0]} to {distinct[-1]}"))
        else:
            differ.append(name)
            table.append((name, "; ".join(f"{part}: {value}" for part, value in values.items())))
    return table, differ


def _header(run: Run) -> list[str]:
    facts, differ = _facts(run)
    out = [
        "# What a unit costs",
        "",
        "`make bench` (`benchmarks/report.py`) made this page from one run on the machine below.",
        "[benchmarking.md](benchmarking.md) describes the method, the contenders and the floor.",
        "",
    ]
    if is_quick(run):
        out += ["**A quick run: it shows that the benchmarks run. Its times mean nothing.**", ""]
    ours = {"fused", "steam"}
    if any(r.get("contender") in ours and r.get("backend") == "reference" for c in run.values() for r in c["rows"]):
        out += ["**The unit ran on the backend reference, which is plain PyTorch: no kernel is measured here.**", ""]
    if differ:
        out += [f"**Not one run: its parts differ in {', '.join(differ)}.**", ""]
    if any(str(content["machine"].get("commit", "")).endswith("-dirty") for content in run.values()):
        out += ["**Measured with changes that are in no commit.**", ""]
    out += markdown_table(("what", "value"), facts)
    return out


def _price_section(rows: list[Row], images: str) -> list[str]:
    out = ["## The price of attention", "", f"![price of attention]({images}/price_of_attention.svg)", ""]
    first = rows[0]
    out += [
        f"Whole networks with batch {first['batch']} at {first['size']}×{first['size']} in float32: the extra time",
        "and the extra peak memory over the same network without attention. STEAM is at the sites of",
        "`insert_steam()`. SE and ECA (timm's) are in every block, at the end of its branch. Each time is compared",
        "with the plain network of the same round. The brackets have the quartiles over the rounds. *Units alone* is",
        "the sum of the times of the network's units, each called alone, over the time of the plain network. It is the",
        "better figure where the quartiles are further apart than the extra time.",
        "",
    ]
    body = []
    for key, table in networks_of(rows).items():
        for name, r in table.items():
            if name == "plain":
                continue
            body.append(
                (
                    ", ".join(key),
                    f"{name_of(name, r.get('backend'))} ({r['layers']})",
                    price(r),
                    alone(r),
                    f"{percent(r['memory_over_plain'])}",
                    r["parameters"] - table["plain"]["parameters"],
                    r["rounds"],
                )
            )
    head = (
        *("network", "attention (layers)", "extra time", "units alone"),
        *("extra peak memory", "extra parameters", "rounds"),
    )
    return out + markdown_table(head, body)


def _latency_section(rows: list[Row]) -> list[str]:
    body = []
    for (network, layout, batch), table in networks_of(rows, *LATENCY).items():
        for name, r in table.items():
            body.append(
                (
                    f"{network}, {layout}, batch {batch}",
                    "none" if name == "plain" else f"{name_of(name, r.get('backend'))} ({r['layers']})",
                    f"{1e3 * r['seconds']:.1f}",
                    f"{1e3 * r['seconds_95']:.1f}",
                    "" if name == "plain" else price(r),
                    r["rounds"],
                )
            )
    head = ("network", "attention (layers)", "median, ms", "95th percentile, ms", "extra time", "rounds")
    out = ["## Latency", "", "One inference in eager mode, in float32, with the images of a small batch.", ""]
    return out + markdown_table(head, body)


def _unit_section(unit: UnitRows, images: str) -> list[str]:
    out = ["## Speed-ups of the fused unit", "", f"![speed-ups]({images}/speedup.svg)", ""]
    body = []
    for name in unit.contenders:
        if name == "fused":
            continue
        cells: list[object] = [unit.name(name)]
        for direction in DIRECTIONS:
            found = unit.speedups(name, direction)
            cells.append(
                f"**{times(geometric_mean(found))}** ({times(min(found))} to {times(max(found))})" if found else ""
            )
        body.append((*cells, len(unit.speedups(name, "both"))))
    out += [
        "The time of each contender divided by the time of the fused unit: the geometric mean, and in brackets the",
        "range, over all shapes at which both ran. A number below 1 means that the contender is faster. SE, ECA, CBAM",
        "and GCT compute other functions than STEAM.",
        "",
    ]
    head = ("contender", "forward", "forward + backward", "shapes")
    out += markdown_table(head, body)
    out += ["## Time over the floor", "", f"![time over the floor]({images}/over_floor.svg)", ""]
    out += ["Maps are N×C×H×W. The *floor* is a plain pass over the same memory in the same run.", ""]
    for direction, title in DIRECTIONS.items():
        body = []
        for label in unit.labels:
            values = [unit.value(label, c, direction, "over_floor") for c in unit.contenders]
            seconds = unit.value(label, "fused", direction, "seconds")
            spread = unit.value(label, "fused", direction, "spread")
            micro = "" if seconds is None else f"{seconds * 1e6:.0f} µs ± {100 * (spread or 0) / 2:.0f} %"
            body.append((label, *map(times, values), micro))
        out += [f"### {title[0].upper()}{title[1:]}", ""]
        out += markdown_table(("map", *map(unit.column, unit.contenders), "fused takes"), body)
    out += ["## Memory", "", f"![memory]({images}/memory.svg)", ""]
    out += [
        "Bytes over the bytes of x. *kept* is kept from forward for backward, besides x and y. *peak* is the largest",
        "sum that is allocated at one time in forward + backward, besides x, y and the gradients. `torch.profiler`",
        "counts both; it does not see the working memory of oneDNN and of the CPU kernels. If *peak* is below *kept*,",
        "Inductor has kept a channels_last copy of x for the gate's convolution. It frees the copy before it allocates",
        "dx, which *peak* does not count.",
        "",
    ]
    body = []
    for row in unit.shown():
        cells = [shape_name(row)]
        for name in unit.contenders:
            kept, extra = (unit.value(row["problem"], name, "both", k) for k in ("kept_bytes", "extra_bytes"))
            have = kept is not None and extra is not None
            cells.append(f"{kept / row['map_bytes']:.3f} / {extra / row['map_bytes']:.3f}" if have else "")  # type: ignore[operator]
        body.append(cells)
    out += markdown_table(("map: kept / peak", *map(unit.column, unit.contenders)), body)
    counts = {c: next((r["parameters"] for r in unit.rows if r["contender"] == c), None) for c in unit.contenders}
    first = next(iter(unit.labels.values()))
    named = ", ".join(f"{c} {v}" for c, v in counts.items() if v is not None and not c.endswith("compiled"))
    out += [f"Parameters at {shape_name(first)}: {named}.", ""]
    return out


def _host_section(rows: list[Row]) -> list[str]:
    layers = [r for r in rows if r["section"] == "layers"]
    columns = ("no grad", "forward with grad", "forward + backward")
    out = ["## Host overhead", "", "Microseconds per call at (1, 64, 7, 7), float32.", ""]
    out += markdown_table(("layer", *columns), [(r["layer"], *(f"{r[c]:.0f}" for c in columns)) for r in layers])
    small = [r for r in rows if r["section"] == "small"]
    out += ["Small maps in float32: the time of `reference.STEAM` divided by the time of `FusedSTEAM`.", ""]
    keys = ("speedup no grad", "speedup forward + backward")
    out += markdown_table(
        ("map", "forward", "forward + backward"), [(r["problem"], *(times(r[k]) for k in keys)) for r in small]
    )
    slower = [r["problem"] for r in small if min(r[k] for k in keys) < 1]
    out += [f"Plain PyTorch is faster at: {', '.join(slower) or 'none of these'}.", ""]
    return out


def _scaling_section(rows: list[Row], images: str) -> list[str]:
    out = ["## Scaling", "", f"![scaling]({images}/scaling.svg)", ""]
    out += [
        "One size varies at a time, from (8, 256, 28, 28) in float32, NCHW, with 7×7 cells. The dashed lines are the",
        "floor.",
        "",
    ]
    threads = sorted({r["threads"] for r in rows})
    body = []
    for key in dict.fromkeys((r["axis"], r["value"]) for r in rows):
        cells: list[object] = [f"{key[0]} = {key[1]}"]
        own = {r["threads"]: r for r in rows if (r["axis"], r["value"]) == key}
        for direction in ("forward", "backward"):
            cells += [times(own[t][f"{direction}_over_floor"]) for t in threads]
            cells.append(times(own[threads[0]][direction] / own[threads[-1]][direction]))
        body.append(cells)
    head = ["varied"]
    for direction in ("forward", "backward"):
        head += [f"{direction} over floor, {t} thr." for t in threads] + [
            f"{threads[-1]} over {threads[0]}: times as fast"
        ]
    return out + markdown_table(head, body)


def _conditions_section(rows: list[Row]) -> list[str]:
    conditions = list(dict.fromkeys(r["condition"] for r in rows))
    at = {(r["problem"], r["condition"]): r for r in rows}
    out = [
        "## Other conditions",
        "",
        "The fused unit over the floor of the same number of threads. The first three rows after *default* are the",
        "ways to store the output. The plain pass over denormal numbers is among the rows. The *copy with streaming",
        "stores* is the C library's `memmove` of x, which shows what the memory can do: the plain pass reads each line",
        "of its output before it writes it.",
        "",
    ]
    body = []
    for condition in conditions:
        cells: list[object] = [condition]
        for direction in ("forward", "backward"):
            key = f"{direction}_over_floor"
            found = [r[key] for r in rows if r["condition"] == condition and key in r]
            range_ = f"({times(min(found))} to {times(max(found))})" if found else ""
            cells.append(f"**{times(geometric_mean(found))}** {range_}" if found else "")
        body.append(cells)
    out += markdown_table(("condition: mean and range", "forward", "backward"), body)
    for direction in ("forward", "backward"):
        key = f"{direction}_over_floor"
        shown = [c for c in conditions if any(key in r for r in rows if r["condition"] == c)]
        body = [
            (problem, *(times(at[problem, c].get(key)) if (problem, c) in at else "" for c in shown))
            for problem in dict.fromkeys(r["problem"] for r in rows)
        ]
        out += [
            f"### {direction[0].upper()}{direction[1:]} under each condition",
            "",
            *markdown_table(("map", *shown), body),
        ]
    return out


def _change_section(before: Run, now: Run) -> list[str]:
    """The ratios of two runs, row by row. Smaller is better."""
    was, is_ = ratios(before), ratios(now)
    facts = [next(iter(run.values()))["machine"] for run in (before, now)]
    names = [str(f.get("commit") or "an unknown commit") for f in facts]
    out = [
        f"## What changed since {names[0]}",
        "",
        f"`python -m benchmarks.compare` of two runs: commit {names[0]} of {str(facts[0].get('date', ''))[:10]}, and",
        "this run. Each figure is a ratio within its own run, and smaller is better.",
        "[performance.md](performance.md#what-changed) says why.",
        "",
    ]
    if facts[0].get("processor") != facts[1].get("processor"):
        out += [f"**The run before was on another processor: {facts[0].get('processor')}.**", ""]
    groups = [g for g in is_ if g in was and not g.startswith(("scaling", "over the floor, backward"))]
    body = []
    for group in groups:
        shared = [name for name in is_[group] if name in was[group]]
        if shared:
            mean = geometric_mean(is_[group][name] / was[group][name] for name in shared)
            body.append((group, len(shared), f"**{mean:.2f}**"))
    out += markdown_table(("ratio: its geometric mean over the mean before", "rows", "now over before"), body)
    for group in groups:
        body = [
            (name, times(was[group][name]), times(is_[group][name]), f"{is_[group][name] / was[group][name]:.2f}")
            for name in is_[group]
            if name in was[group]
        ]
        if body:
            out += [
                f"### {group[0].upper()}{group[1:]}",
                "",
                *markdown_table(("row", "before", "now", "now over before"), body),
            ]
    return out


def page(run: Run, images: str, before: Run | None = None) -> str:
    """The Markdown page; ``images`` is the path from the page to the folder of the pictures, and ``before`` an older
    run."""
    out = _header(run)
    if "end_to_end" in run:
        out += _price_section(run["end_to_end"]["rows"], images)
    if "latency" in run:
        out += _latency_section(run["latency"]["rows"])
    if "unit" in run:
        out += _unit_section(UnitRows(run["unit"]["rows"]), images)
    if "host" in run:
        out += _host_section(run["host"]["rows"])
    if "scaling" in run:
        out += _scaling_section(run["scaling"]["rows"], images)
    if "conditions" in run:
        out += _conditions_section(run["conditions"]["rows"])
    if before and is_quick(before) == is_quick(run):
        out += _change_section(before, run)
    return "\n".join(out).rstrip() + "\n"


def main() -> None:
    parser = parser_of("report", __doc__)
    parser.add_argument(
        "--run", type=Path, default=ROOT / "benchmarks" / "results" / "latest", help="folder of the run"
    )
    parser.add_argument(
        "--before", type=Path, default=ROOT / "benchmarks" / "results" / "before", help="folder of the run before"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page to write")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    args = parser.parse_args()
    try:
        run = read(args.run)
    except FileNotFoundError as error:
        sys.exit(f"--run {error}")
    before = read(args.before) if args.before.is_dir() else None
    say(f"report: draws the pictures of {args.run}")
    pictures = draw(run, args.images)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(run, os.path.relpath(args.images, args.page.parent).replace(os.sep, "/"), before))
    if "unit" in run:
        write_csv(run["unit"]["rows"], args.run / "unit.csv")
    say(f"wrote {args.page} and {len(pictures)} pictures in {args.images}")


if __name__ == "__main__":
    main()
