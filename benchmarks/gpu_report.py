"""The results of the GPU suite and of the benchmarks on this machine's GPU, in one Markdown file.

    python -m benchmarks.gpu_report [--quick] [--output PATH]

The program runs ``pytest tests -m gpu``, ``pytest benchmarks --benchmark-only --device cuda`` and ``python -m
benchmarks.gpu_host``, and writes their results, the device and the versions under ``benchmarks/results/``. If a test
failed, the report names it, and the program ends with 1. It also ends with 1 if a benchmark has no row.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda, gpu_host, machine
from benchmarks.commandline import parser_of
from benchmarks.tables import markdown_table, micro, number, say

#: The facts of the machine that the report has, in this order.
FACTS = (
    "gpu", "gpu_architecture", "gpu_multiprocessors", "gpu_memory_gbytes", "gpu_l2_mbytes", "driver", "cuda", "triton",
    "cuda_library", "torch", "python", "steam_kernels", "commit", "processor", "date",
)  # fmt: skip
TITLES = {
    "forward": "Forward, without gradients",
    "backward": "Backward, by autograd",
    "both": "Forward and backward, by autograd",
}


@dataclass
class Tests:
    """The results of the GPU suite."""

    passed: int = 0
    #: By name of the test: the first line of the reason.
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def read_tests(xml: str) -> Tests:
    """The results in pytest's JUnit XML."""
    tests = Tests()
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        wrong = [part for tag in ("failure", "error") for part in case.findall(tag)]
        skipped = case.find("skipped")
        if wrong:
            tests.failed[name] = _first_line(wrong[0].get("message"))
        elif skipped is not None:
            tests.skipped[name] = _first_line(skipped.get("message"))
        else:
            tests.passed += 1
    return tests


def _first_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[0] if lines else ""


Rows = Sequence[Mapping[str, Any]]


def report(facts: Mapping[str, Any], tests: Tests, rows: Rows, host_rows: Rows, quick: bool = False) -> str:
    """The Markdown file: device and versions, the suite's results, a table for each direction, and the host's times.

    ``rows`` are those of the benchmarks of the unit, and ``host_rows`` those of :mod:`benchmarks.gpu_host`.
    """
    out = [f"# steam_kernels on {facts['gpu']}", ""]
    out += markdown_table(("what", "value"), [(k.replace("_", " "), facts[k]) for k in FACTS if k in facts])
    out += [f"This GPU copies a large buffer at {facts['copy_gbytes']:g} GB/s, read and write counted."]
    for name, why in facts["backends"].items():
        out.append(f"Backend {name}: {why or 'usable'}.")
    out += ["", "## The GPU suite", ""]
    out.append(f"{tests.passed} passed, {len(tests.failed)} failed, {len(tests.skipped)} skipped.")
    for title, found in (("Failed", tests.failed), ("Skipped", tests.skipped)):
        if found:
            out += ["", f"{title}:", ""] + [f"- `{name}`: {why}" for name, why in found.items()]
    out += ["", "## Benchmarks", ""]
    if quick:
        out += ["A quick run: it shows that the benchmarks run. Its times mean nothing.", ""]
    if not rows:
        out += ["None was measured.", ""]
    else:
        out += [
            "The times are medians of interleaved rounds with a cold L2 cache. *Timed by* says whether the GPU "
            "replayed a CUDA graph of the call, so that the host's time is not in the figure, or events enclosed a "
            "call that cannot be captured. GB/s is the least traffic over the time, and *of copy* is GB/s over the "
            "copy bandwidth above. The floor is `torch.mul(x, 0.5, out=y)` forward and `torch.add(x, dy, out=dx)` "
            "backward. The output and the gradients of each contender were judged in the same run.",
            "",
        ]
        out += [f"- {line}" for line in cuda.not_captured(rows)] + [""]
    head = ("shape", "contender", "time", "timed by", "GB/s", "of copy", "floor", "over floor")
    head += ("x eager", "x compiled", "x plain", "x plain-compiled")
    keys = ("over_floor", "speedup_eager", "speedup_compiled", "speedup_plain", "speedup_plain_compiled")
    for direction, title in TITLES.items():
        body = [
            (
                *(r["problem"], r["contender"], micro(r["seconds"]), r["timed_by"]),
                *(number(r["gbytes"]), number(r["of_copy"]), micro(r["floor_seconds"])),
                *(number(r[k]) for k in keys),
            )
            for r in rows
            if r["direction"] == direction
        ]
        if body:
            out += [f"### {title}", "", *markdown_table(head, body)]
    out += ["## The host: first calls and later calls", "", *(gpu_host.markdown(host_rows) or ["None was measured."])]
    return "\n".join(out).rstrip() + "\n"


def output_path(facts: Mapping[str, Any]) -> Path:
    """The path of a report: it has the device's name and the day."""
    device = re.sub(r"[^a-z0-9]+", "_", str(facts["gpu"]).lower()).strip("_")
    return machine.ROOT / "benchmarks" / "results" / f"gpu_{device}_{str(facts['date'])[:10]}.md"


def _run(*arguments: str) -> None:
    """Runs ``python -m`` with these arguments in the project's root. The files that it writes show its success."""
    command = [sys.executable, "-m", *arguments]
    say("$ " + " ".join(command[1:]))
    subprocess.run(command, cwd=machine.ROOT)


def _read(path: Path) -> dict[str, Any]:
    """The content of a benchmark's file; without rows if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def main() -> None:
    parser = parser_of("gpu_report", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few shapes and rounds; the times of a quick run mean nothing"
    )
    parser.add_argument("--output", type=Path, help="the file (benchmarks/results/gpu_<device>_<date>.md)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"there is nothing to report: PyTorch {torch.__version__} sees no GPU")
    with tempfile.TemporaryDirectory() as folder:
        xml, unit, host = (Path(folder, name) for name in ("tests.xml", "unit.json", "host.json"))
        quick = ["--quick"] if args.quick else []
        _run("pytest", "tests", "-m", "gpu", "-q", f"--junitxml={xml}")
        _run("pytest", "benchmarks", "--benchmark-only", "-q", "--device", "cuda", "--json", str(unit), *quick)
        _run("benchmarks.gpu_host", "--json", str(host), *quick)
        tests, measured, of_host = read_tests(xml.read_text()), _read(unit), _read(host)
        facts = measured.get("machine") or machine.facts() | cuda.facts()
    path = args.output or output_path(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(facts, tests, measured["rows"], of_host["rows"], args.quick))
    say(f"wrote {path}")
    if tests.failed or not measured["rows"] or not of_host["rows"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
