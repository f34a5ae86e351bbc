"""The figures of the README and of the pages agree with the committed results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare, end_to_end, pictures, report, runs, stages
from benchmarks.machine import ROOT

LATEST = ROOT / "benchmarks" / "results" / "latest"
BEFORE = LATEST.parent / "before"


def test_the_committed_page_is_of_the_committed_run(tmp_path: Path) -> None:
    """The page and the table agree byte for byte. Pictures agree to a hundredth of a point if this version of
    matplotlib drew them, and else in their words."""
    run = runs.read(LATEST)
    before = runs.read(BEFORE) if BEFORE.is_dir() else None
    assert report.page(run, "images", before) == (ROOT / "docs" / "benchmarks.md").read_text()
    runs.write_csv(run["unit"]["rows"], tmp_path / "unit.csv")
    assert (tmp_path / "unit.csv").read_bytes() == (LATEST / "unit.csv").read_bytes()
    for path in pictures.draw(run, tmp_path):
        made, kept = path.read_text(), (ROOT / "docs" / "images" / path.name).read_text()
        drawn_by = [re.findall(r"<dc:title>(Matplotlib [^,<]*)", text) for text in (made, kept)]
        assert drawn_by[1], f"{path.name} does not say which matplotlib drew it"
        if drawn_by[0] == drawn_by[1]:
            # names are hashes of coordinates, and the last digits of coordinates depend on the processor
            named = [re.sub(r'(id="|url\(#|href="#)[^")]*', "", text) for text in (made, kept)]
            places = [[float(n) for n in re.findall(r"-?\d+\.?\d*", text)] for text in named]
            assert len(places[0]) == len(places[1]) and np.allclose(*places, rtol=0, atol=0.01), path.name
        words = [sorted(re.findall(r"<text [^>]*>([^<]*)</text>", text)) for text in (made, kept)]
        assert words[0] == words[1] and words[0], path.name


def tables_of(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text, each as rows of cells with the head first."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if set("".join(cells)) - set("-: "):
                tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def agree(cell: str, printed: Sequence[object], what: str) -> None:
    """Checks that each number of a cell is a printed number, rounded to the digits that are written."""
    written = re.findall(r"[-+]?\d+(?:\.\d+)?", cell.replace("−", "-"))
    assert len(written) == len(printed), f"{what}: {cell!r} for {printed}"
    for text, number in zip(written, printed, strict=True):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - float(str(number))) <= half + 1e-9, (
            f"{what}: {text} is written, the results have {number}"
        )


def test_the_sentences_of_the_page_on_use_are_of_the_committed_run() -> None:
    run, text = runs.read(LATEST), re.sub(r"\s+", " ", (ROOT / "docs" / "when_to_use_it.md").read_text())
    networks = runs.networks_of(run["end_to_end"]["rows"])
    (found,) = re.findall(
        r"The units alone.*? take (.*?) % of the time of the ResNet-50, and (.*?) % of the time", text
    )
    for cell, name in zip(found, ("resnet50", "mobilenet_v2"), strict=True):
        shares = [100 * of["steam"]["units_over_plain"] for key, of in networks.items() if key[0] == name]
        agree(cell, span(shares), name)
    unit = runs.UnitRows(run["unit"]["rows"])
    (found,) = re.findall(r"The unit alone takes (.*?) times as long as a plain pass .*? and (.*?) times as long", text)
    for cell, direction in zip(found, runs.DIRECTIONS, strict=True):
        values = [unit.value(label, "fused", direction, "over_floor") for label in unit.of_default_unit()]
        agree(cell, span([v for v in values if v is not None]), direction)
    (found,) = re.findall(r"a call has about (\d+) µs of overhead", text)
    (row,) = [r for r in run["host"]["rows"] if r.get("layer") == "FusedSTEAM over the kernels"]
    agree(found, [row["no grad"]], "overhead")
    assert f"commit {run['unit']['machine']['commit']} " in text


README_NAMES = {
    "STEAM in plain PyTorch (the reference)": "eager",
    "STEAM in the fastest plain PyTorch we could write": "plain",
    "SE (timm)": "se",
    "ECA (timm)": "eca",
    "CBAM (timm)": "cbam",
    "Gaussian GCT": "gct",
}


UNDER = " under `torch.compile`"


def test_the_contenders_of_the_readme_are_of_the_committed_run() -> None:
    unit = runs.UnitRows(runs.read(LATEST)["unit"]["rows"])
    (table,) = [t for t in tables_of((ROOT / "README.md").read_text()) if t[0][0] == "contender"]
    assert table[0] == ["contender", *runs.DIRECTIONS.values()] and len(table) > 5
    last = ""
    for name, *cells in table[1:]:
        compiled = name.endswith(UNDER)
        name = name.removesuffix(UNDER)
        last = last if name == "the same" else README_NAMES[name]
        contender = last if not compiled else "compiled" if last == "eager" else f"{last}-compiled"
        for cell, direction in zip(cells, runs.DIRECTIONS, strict=True):
            found = unit.speedups(contender, direction)
            values = (runs.geometric_mean(found), min(found), max(found))
            agree(cell, [runs.times(v) for v in values], f"{contender}, {direction}")


def test_the_prices_of_the_page_on_use_are_of_the_committed_run() -> None:
    tables = runs.networks_of(runs.read(LATEST)["end_to_end"]["rows"])
    (table,) = [t for t in tables_of((ROOT / "docs" / "when_to_use_it.md").read_text()) if t[0][0] == "network"]
    names = {runs.NAMES[c]: c for c in end_to_end.CONTENDERS if c != "plain"}
    columns = [names[name] for name in table[0][1:]]
    assert {"steam", "steam-reference", "se", "eca"} == set(columns) and len(table) > 3
    networks = {"ResNet-50": "resnet50", "MobileNetV2": "mobilenet_v2"}
    own: dict[str, Any] = {}
    for name, *cells in table[1:]:
        memory_of = "memory" in name
        if not memory_of:
            network, _, task = name.partition(", ")
            mode = "compiled" if "compiled" in task else "eager"
            layout = "channels_last" if "channels_last" in task else "nchw"
            own = tables[networks[network], "training" if "training" in task else "inference", mode, layout]
        for contender, cell in zip(columns, cells, strict=True):
            if cell in ("", "–", "-") and contender not in own:
                continue
            row = own[contender]
            ratios = (
                [row["memory_over_plain"]] if memory_of else [row["time_over_plain"], *row["time_over_plain_quartiles"]]
            )
            agree(cell, [runs.percent(r).removesuffix(" %") for r in ratios], f"{name}, {contender}")


def test_the_sentences_of_the_readme_are_of_the_committed_run() -> None:
    run, text = runs.read(LATEST), re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    row = runs.networks_of(run["end_to_end"]["rows"])["resnet50", "training", "eager", "nchw"]["steam"]
    (found,) = re.findall(
        r"the five fused units of a ResNet-50 take about (.*?) of the time of a training step, and (.*?) more memory",
        text,
    )
    printed = [f"{100 * row['units_over_plain']:.6f}", runs.percent(row["memory_over_plain"]).removesuffix(" %")]
    agree(" ".join(found), printed, "training step")
    assert f"the commit was {run['unit']['machine']['commit']}." in text
    unit, direction = runs.UnitRows(run["unit"]["rows"]), next(iter(runs.DIRECTIONS))
    (found,) = re.findall(r"In the forward pass (SE is faster at .*?)\. The machine", text)
    speedups = [unit.speedups(contender, direction) for contender in ("se", "eca", "gct")]
    slower = [sum(ratio < 1 for ratio in ratios) for ratios in speedups]
    agree(found, [slower[0], len(speedups[0]), *slower[1:]], "faster gates")


def test_a_wrong_figure_of_the_readme_is_seen() -> None:
    agree("26.7 (3.9 to 75)", ["26.7", "3.91", "75.0"], "right")
    agree("3 (−2 to 6)", ["+3.0", "-1.9", "+6.0"], "right")
    for cell in ("26.8 (3.9 to 75)", "26.7 (3.9 to 76)", "26.7 (3.9)"):
        with pytest.raises(AssertionError, match="wrong"):
            agree(cell, ["26.7", "3.91", "75.0"], "wrong")


# ---- docs/performance.md ---------------------------------------------------------------------------------------------


def performance_table(*head: str) -> list[list[str]]:
    """The rows of the one table of docs/performance.md whose head begins with these cells."""
    text = (ROOT / "docs" / "performance.md").read_text()
    (table,) = [t for t in tables_of(text) if t[0][: len(head)] == list(head)]
    assert len(table) > 1
    return table[1:]


def results(name: str, **values: Any) -> list[dict[str, Any]]:
    """The rows of a committed file that have these values."""
    rows = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    return [r for r in rows if all(r.get(k) == v for k, v in values.items())]


def span(values: list[float]) -> list[str]:
    return [f"{min(values):.6f}", f"{max(values):.6f}"]


MACHINE = "intel-xeon-6-85"


def test_the_performance_page_names_its_files() -> None:
    """All of them are of one commit and machine, the same as of the page of ``make bench``."""
    latest = runs.read(LATEST)["unit"]["machine"]
    for name, *cells in performance_table("file"):
        content = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        found = content["machine"]
        assert cells == [found["processor"], found["cpu_variant"], found["commit"], found["date"][:10]]
        assert found["threads"] == 2 and found["torch"].startswith("2.14.1") and not content["quick"]
        assert (found["processor"], found["commit"]) == (latest["processor"], latest["commit"])


def test_the_options_of_the_performance_page() -> None:
    rows = results(f"{MACHINE}/options.json", section="options")
    table = performance_table("options")
    assert len(table) == 5 and len(rows) == 8
    for name, *cells in table:
        for cell, direction in zip(cells, ("forward", "backward"), strict=True):
            agree(cell, span([r[f"{direction} {name}"] for r in rows]), f"{name}, {direction}")


def test_the_variants_of_the_performance_page() -> None:
    table = performance_table("variant")
    assert [row[0] for row in table] == ["avx2", "generic"]
    for name, *cells in table:
        rows = results(f"{MACHINE}/options.json", section="variants", variant=name)
        for cell, direction in zip(cells, ("forward", "backward"), strict=True):
            agree(cell, span([r[f"{direction}_over_best"] for r in rows]), f"{name}, {direction}")


def test_the_inplace_calls_of_the_performance_page() -> None:
    table = performance_table("malloc")
    assert [row[0] for row in table] == ["stock", "benchmarks'"]
    for name, cell in table:
        rows = results(f"{MACHINE}/options.json", section="inplace", malloc=name)
        agree(cell, span([r["outofplace"] / r["inplace"] for r in rows]), name)


def test_the_shares_of_the_performance_page() -> None:
    rows = results(f"{MACHINE}/cache.json")
    text = (ROOT / "docs" / "performance.md").read_text()
    (head,) = [t[0] for t in tables_of(text) if t[0][0] == "share in MiB"]
    table = performance_table("share in MiB")
    default = {r["cache"] >> 20 for r in rows if r["default"]}
    assert default == {16}
    assert [row[0].removesuffix(" (default)") for row in table] == [
        str(m) for m in sorted({r["cache"] >> 20 for r in rows})
    ]
    assert {int(row[0].split()[0]) for row in table if "default" in row[0]} == default
    for share, *cells in table:
        own = [r for r in rows if r["cache"] >> 20 == int(share.split()[0])]
        for cell, column in zip(cells, head[1:], strict=True):
            if column.startswith("network, "):
                (row,) = [r for r in own if r.get("task") == column.removeprefix("network, ")]
                agree(cell, [row["time_over_plain"]], f"{share}, {column}")
            else:
                (row,) = [r for r in own if r.get("problem") == column]
                agree(cell, [row["forward_over_floor"], row["backward_over_floor"]], f"{share}, {column}")


def test_the_random_shapes_of_the_performance_page() -> None:
    rows = results(f"{MACHINE}/sweep.json", checked=True)
    large = [r for r in rows if r["bytes"] > 1 << 20]
    medians = [statistics.median(r[f"{d}_over_floor"] for r in large) for d in ("forward", "backward")]
    above = [r for r in large if r["worst"] > 4]
    small = [r[d] * 1e6 for r in rows if r["bytes"] <= 1 << 20 for d in ("forward", "backward")]
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "performance.md").read_text())
    (found,) = re.findall(r"measured and judged (\d+ shapes\. \d+ of them .*) take more than 4 times", text)
    agree(found.replace("1 MB", "a MB"), [len(rows), len(large), *medians, len(above)], "random shapes")
    (found,) = re.findall(r"Shapes of at most 1 MB take (.* µs per pass, with a median of .*) µs\.", text)
    agree(found, [*span(small), statistics.median(small)], "small shapes")
    table = performance_table("shape", "walk")
    assert [row[:2] for row in table] == [[r["problem"], r["walk"]] for r in above]
    for row, r in zip(table, above, strict=True):
        for cell, d in zip(row[2:], ("forward", "backward"), strict=True):
            agree(cell, [r[f"{d}_over_floor"]], f"{r['problem']}, {d}")


def test_the_ways_to_store_of_the_performance_page() -> None:
    rows = runs.read(LATEST)["conditions"]["rows"]
    for name, *cells in performance_table("condition"):
        of = [r for r in rows if r["condition"] == name]
        for cell, direction in zip(cells, ("forward", "backward"), strict=True):
            values = [r[f"{direction}_over_floor"] for r in of if f"{direction}_over_floor" in r]
            found = [runs.geometric_mean(values), min(values), max(values)] if values else []
            agree(cell, [f"{v:.6f}" for v in found], f"{name}, {direction}")


def test_the_stages_of_the_performance_page() -> None:
    """Every row of batch 8 and 32 is there, with each stage's part of its time over the floor."""
    rows = results(f"{MACHINE}/stages.json", section="stages")
    at = {(r["problem"], r["direction"]): r for r in rows}
    table = performance_table("map")
    assert [row[0] for row in table] == list(dict.fromkeys(r["problem"] for r in rows)) and len(table) == 32
    for problem, *cells in table:
        for cell, direction in zip(cells, ("forward", "backward"), strict=True):
            row = at[problem, direction]
            parts = [row["over_floor"], *(row[f"{s}_over_floor"] for s in (*stages.STAGE_NAMES, "other"))]
            agree(cell, parts, f"{problem}, {direction}")


def test_the_sizes_of_a_sample_of_the_performance_page() -> None:
    rows = results(f"{MACHINE}/stages.json", section="samples")
    table = performance_table("MB of a sample")
    assert len(table) == len(rows) > 4
    for cells, r in zip(table, rows, strict=True):
        agree(
            " ".join(cells), [r["sample_bytes"] / 1e6, r["forward_over_floor"], r["backward_over_floor"]], r["problem"]
        )


def test_the_changes_of_the_performance_page() -> None:
    """The means of the rows that the fused unit has in both runs."""
    was, now = (compare.ratios(runs.read(folder)) for folder in (BEFORE, LATEST))
    table = performance_table("time over the floor")
    assert len(table) == 4
    for name, *cells in table:
        group = f"over the floor, {name}"
        shared = [row for row in now[group] if row in was[group]]
        means = [runs.geometric_mean(of[group][row] for row in shared) for of in (was, now)]
        agree(" ".join(cells), [*(f"{m:.6f}" for m in means), f"{means[1] / means[0]:.6f}"], name)
