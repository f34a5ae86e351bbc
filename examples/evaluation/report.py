"""Makes a page of finished runs: a table of the paper's kind, plots, and what was run.

    python examples/evaluation/report.py RUNS... --out DIR
    python examples/evaluation/report.py benchmarks/results/evaluation --page docs/evaluation.md

RUNS are folders of runs of classification.py and detection.py, or folders above them. The page report.md has one table
for each set of runs that differ only in gate, variant and seed, so that their rows can be compared. Unfinished runs are
listed, and have no row. With --page, the tables replace those of a page of the documentation, between its lines
<!-- runs --> and <!-- end of runs -->, and the plots are written to images/evaluation beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import fill_marks, markdown_table, say  # noqa: E402

NAMES = {"none": "none", "se": "SE", "eca": "ECA", "cbam": "CBAM", "gct": "Gaussian GCT", "steam": "STEAM"}
#: The figures of a task, with their titles; the first is the one that the plot shows.
FIGURES = {
    "classification": {"top1": "top-1", "top5": "top-5"},
    "detection": {
        "box_ap": "box AP", "box_ap50": "box AP50", "box_ap75": "box AP75",
        "mask_ap": "mask AP", "mask_ap50": "mask AP50", "mask_ap75": "mask AP75",
    },
}  # fmt: skip
#: Settings by which the rows of one table differ.
ROWS = ("gate", "variant", "seed")
COLOURS = ("#888888", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#d62728", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
Run = dict[str, Any]


def read(folders: Iterable[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs in and below ``folders``, and the folders of the others.

    Raises:
        SystemExit: a folder has no run.
    """
    runs, unfinished = [], []
    for folder in folders:
        found = sorted(folder.rglob("settings.json"))
        if not found:
            sys.exit(f"error: {folder} must have a run of classification.py or detection.py, but has no settings.json")
        for path in found:
            results = path.parent / "results.json"
            if results.exists():
                runs.append(json.loads(results.read_text()))
            else:
                unfinished.append(path.parent)
    return runs, unfinished


def comparable(runs: list[Run]) -> list[list[Run]]:
    """The runs by all settings but gate, variant and seed, each set in the order of gates."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run["settings"].items() if k not in ROWS}, sort_keys=True)
        sets.setdefault(key, []).append(run)
    order = list(NAMES)
    return [
        sorted(of, key=lambda r: (order.index(r["settings"]["gate"]), r["settings"]["variant"], r["settings"]["seed"]))
        for of in sets.values()
    ]


def by_row(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each gate and variant, by its name in the table.

    Raises:
        SystemExit: a seed comes twice.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        s = run["settings"]
        name = NAMES[s["gate"]] + (f" ({s['variant'].replace(',', ', ')})" if s["variant"] else "")
        if s["seed"] in [other["settings"]["seed"] for other in rows.get(name, [])]:
            sys.exit(
                f"error: two runs of {s['model']}, {name}, have the seed {s['seed']}; name only one of their folders"
            )
        rows.setdefault(name, []).append(run)
    return rows


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, with the standard deviation if there are several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def middle(runs: list[Run], key: str) -> float:
    return statistics.median(run["figures"][key] for run in runs)


def table(runs: list[Run]) -> list[str]:
    """The Markdown table of runs that can be compared."""
    rows = by_row(runs)
    titles = {k: v for k, v in FIGURES[runs[0]["settings"]["task"]].items() if k in runs[0]["figures"]}
    head = ["attention", "parameters", "of the gates", "GFLOPs", *titles.values()]
    head += ["seeds", "step", "extra step time", "quartiles", "peak memory", "extra"]
    lines = []
    for name, of in rows.items():
        f = of[0]["figures"]
        quartiles = [statistics.median(r["figures"]["step_over_none_quartiles"][i] for r in of) for i in (0, 1)]
        extra = [""] * 3
        if of[0]["settings"]["gate"] != "none":
            extra = [
                f"{100 * (middle(of, 'step_over_none') - 1):+.1f} %",
                " to ".join(f"{100 * (q - 1):+.1f}" for q in quartiles),
                f"{100 * (f['peak_bytes'] / f['peak_bytes_none'] - 1):+.1f} %",
            ]
        lines.append(
            [
                name,
                f"{f['parameters']:,}",
                f"{f['parameters_of_gates']:,}",
                f"{f['gflops']:.5g}",
                *(spread([r["figures"][key] for r in of]) for key in titles),
                len(of),
                f"{1e3 * middle(of, 'step_seconds'):.1f} ms",
                *extra[:2],
                f"{f['peak_bytes'] / 2**20:.1f} MiB",
                extra[2],
            ]
        )
    return markdown_table(head, lines)


def conditions(runs: list[Run]) -> list[str]:
    """What was run: settings, and the code and machine of each run."""
    s, shown = runs[0]["settings"], []
    for key, value in s.items():
        if key not in (*ROWS, "task", "model", "images") and value not in ("", None):
            shown.append(f"{key} {value}")
    places: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        m = run["machine"]
        key = (m["commit"] or "no commit", m["torch"], m.get("gpu", m["processor"]), str(m["threads"]))
        places.setdefault(key, []).append(f"{NAMES[run['settings']['gate']]} {run['settings']['seed']}")
    backends = sorted({r["figures"]["backend"] for r in runs if r["figures"]["backend"]})
    lines = [
        f"{s['images']['train']} training and {s['images']['val']} validation images. Settings: {', '.join(shown)}.",
        "",
    ]
    lines += [f"STEAM ran on the backend {', '.join(backends)}.", ""] if backends else []
    for (commit, version, processor, threads), names in places.items():
        what = "all runs" if len(places) == 1 else ", ".join(names)
        many = "threads" if threads != "1" else "thread"
        lines.append(f"- Commit {commit}, torch {version}, {processor}, {threads} {many}: {what}")
    return [*lines, ""]


def plots(runs: list[Run], path: Path) -> None:
    """Accuracy against extra time, and the curves of loss and accuracy: means over the seeds, ranges as bands."""
    import numpy as np

    from benchmarks.plots import new_figure, save_figure

    key, title = next(iter(FIGURES[runs[0]["settings"]["task"]].items()))
    figure, (cost, loss, accuracy) = new_figure(1, 3, (11, 3.4))
    for i, (name, of) in enumerate(by_row(runs).items()):
        colour = COLOURS[i % len(COLOURS)]
        final = [run["figures"][key] for run in of]
        extra = 0.0 if of[0]["settings"]["gate"] == "none" else 100 * (middle(of, "step_over_none") - 1)
        error = statistics.stdev(final) if len(final) > 1 else None
        cost.errorbar(extra, statistics.fmean(final), yerr=error, fmt="o", color=colour, label=name, capsize=2)
        for axis, column in ((loss, "train_loss"), (accuracy, key)):
            values = np.array([[row[column] for row in run["history"]] for run in of])
            epochs = np.arange(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), color=colour, linewidth=1.5)
            axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    cost.set(xlabel="extra time of a training step, %", ylabel=title)
    cost.legend(frameon=False, fontsize=7)
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="epoch", ylabel=title)
    save_figure(figure, path)


def text_of(folders: list[Path], link: str = "") -> tuple[str, dict[str, list[Run]]]:
    """The text of a report, and the runs of each of its plots by the plot's name; ``link`` begins the links to them.

    Raises:
        SystemExit: there is no finished run, or a seed comes twice.
    """
    runs, unfinished = read(folders)
    if not runs:
        sys.exit(f"error: none of the runs is finished: {', '.join(map(str, unfinished))}")
    lines, shown = [], {}
    for number, of in enumerate(comparable(runs), 1):
        s = of[0]["settings"]
        name = f"{s['task']}_{number}.svg"
        shown[name] = of
        lines += [f"## {s['model']}, {s['task']}", "", *table(of)]
        lines += ["Accuracies are those of the last epoch, in per cent: mean ± standard deviation over the seeds."]
        lines += ["The extra step time is the median over interleaved rounds of the ratio to the same network without"]
        lines += ["gates, with its quartiles.", "", *conditions(of), f"![accuracy, cost and curves]({link}{name})", ""]
    if unfinished:
        lines += ["## Unfinished runs", "", *(f"- {path}" for path in unfinished), ""]
    return "\n".join(lines), shown


def report(folders: list[Path], images: Path, link: str = "") -> str:
    """The text of a report, whose plots are written to the folder ``images``; otherwise as ``text_of``."""
    text, shown = text_of(folders, link)
    for name, of in shown.items():
        plots(of, images / name)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or folders above them")
    parser.add_argument(
        "--out", type=Path, default=Path("build/evaluation/report"), help="the folder (build/evaluation/report)"
    )
    parser.add_argument("--page", type=Path, help="a page of the documentation, which gets the tables instead")
    args = parser.parse_args(arguments)
    if args.page is None:
        wrote, text = args.out / "report.md", f"# Report\n\n{report(args.runs, args.out)}"
    else:
        wrote = args.page
        try:  # before any plot is written
            fill_marks(wrote.read_text(), "runs", "")
        except (OSError, ValueError) as error:
            sys.exit(f"error: --page {wrote}: {error}")
        text = report(args.runs, wrote.parent / "images" / "evaluation", "images/evaluation/")
        text = fill_marks(wrote.read_text(), "runs", f"\n{text}\n")
    wrote.write_text(text)
    say(text)
    say(f"wrote {wrote}")


if __name__ == "__main__":
    main()
