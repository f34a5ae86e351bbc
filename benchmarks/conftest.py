"""The benchmarks' part of pytest: options, the malloc setting, progress lines, and the closing table.

pytest runs twice. The first process only starts the second one, with the malloc setting, and must not wait for torch.
So the modules that import torch are imported where they are used.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import malloc
from benchmarks.progress import Progress
from benchmarks.tables import WIDTH, say

if TYPE_CHECKING:
    from benchmarks.bench_unit import Row
    from benchmarks.shapes import Shape

#: The options of pytest-benchmark whose results are part of its own table.
NEED_ITS_TABLE = ("benchmark_compare", "benchmark_histogram", "benchmark_cprofile")
ROWS: pytest.StashKey[dict[Shape, Row]] = pytest.StashKey()
#: The shapes of the tests that -k, -m or --deselect have left out.
LEFT_OUT: pytest.StashKey[Counter[Shape]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    allowed: dict[str, list[str]] = {}
    if malloc.is_set():  # only the second process shows the help
        from benchmarks import grid

        allowed = grid.ALLOWED
    group = parser.getgroup("steam_kernels benchmarks")
    group.addoption(
        "--quick", action="store_true", help="two shapes at batch 1, few rounds; the times of a quick run mean nothing"
    )
    group.addoption("--full", action="store_true", help="every shape, batch, dtype, layout and contender: hours")
    group.addoption("--device", default="cpu", help="cpu or cuda (cpu)")
    group.addoption("--batch", default="", help="comma list of batch sizes")
    for option, what in (
        ("--size", "shapes"),
        ("--dtype", "dtypes"),
        ("--layout", "memory formats"),
        ("--options", "options of the unit"),
        ("--contender", "contenders"),
    ):
        group.addoption(option, default="", help=f"comma list of {what}: {', '.join(allowed.get(option, ()))}")
    group.addoption("--backend", default="", help="the backend of the contender fused (the package's choice)")
    group.addoption("--wide", action="store_true", help="the closing table has all contenders and all figures")
    group.addoption("--json", default="", metavar="PATH", help="write the rows of all contenders as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Runs pytest again in a child process that has the malloc setting, so that the user need not set it."""
    if malloc.is_set() or hasattr(config, "workerinput"):
        return None
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)  # otherwise the child writes into this process's capture file
    say("benchmarks: loads PyTorch and finds the shapes")
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    return subprocess.call(command, cwd=config.invocation_params.dir, env=malloc.environment())


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Turns off the table of pytest-benchmark, of 350 columns: the closing table replaces it."""
    if not any(config.getoption(option, None) for option in NEED_ITS_TABLE):
        config.option.benchmark_quiet = True


def pytest_report_header(config: pytest.Config) -> list[str]:
    from benchmarks import cuda, grid, machine

    lines = ["steam_kernels benchmarks: " + machine.describe(machine.facts())]
    if grid.device(config) == "cuda":
        lines.append("on the GPU: " + ", ".join(f"{k} {v}" for k, v in cuda.facts().items()))
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        from benchmarks import grid
        from benchmarks.shapes import DIRECTIONS

        cases = [
            pytest.param(shape, contender, direction, id=f"{shape.label}-{direction}-{contender}")
            for shape in grid.shapes(metafunc.config)
            for direction in DIRECTIONS
            for contender in grid.contenders_at(metafunc.config, shape)
        ]
        metafunc.parametrize(("shape", "contender", "direction"), cases)


def _shapes_of(items: list[pytest.Item]) -> Counter[Shape]:
    """The shapes of the benchmarks among the tests, with the number of the tests of each."""
    from benchmarks.shapes import Shape

    given = (item.callspec.params.get("shape") for item in items if hasattr(item, "callspec"))
    return Counter(shape for shape in given if isinstance(shape, Shape))


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash.setdefault(LEFT_OUT, Counter()).update(_shapes_of(items))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Says how much is measured, or names the shapes if the selection has no benchmark."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    shapes, left_out = _shapes_of(session.items), session.config.stash.get(LEFT_OUT, Counter())
    if reporter is None:  # a worker of pytest-xdist prints nothing
        return
    if shapes:
        reporter.write_line(f"benchmarks: {len(shapes)} shapes, {sum(shapes.values())} measurements")
    elif left_out:
        reporter.write_line(nothing_selected(session.config.option.keyword, left_out))
    reporter.flush()


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> dict[Shape, Row]:
    """The measured rows of this run, by shape. The closing table shows them."""
    return pytestconfig.stash.setdefault(ROWS, {})


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Progress:
    """The progress of the run: a row for each shape of the selected tests."""
    from benchmarks import grid
    from benchmarks.bench_unit import kind_of

    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")

    def write(line: str) -> None:
        if reporter is None:
            return
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)
            reporter.flush()

    shapes = _shapes_of(request.session.items)
    return Progress([kind_of(grid.contenders_at(pytestconfig, shape)) for shape in shapes], write)


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """Leaves out the dots of measured contenders, which would stand between the progress lines."""
    ours = "bench_unit.py::" in report.nodeid
    if ours and report.passed and report.when == "call" and config.get_verbosity() <= 0:
        return "passed", "", ""
    return None


def nothing_selected(keyword: str, shapes: Iterable[Shape]) -> str:
    """The sentence for a selection without a benchmark."""
    selection = f"-k {keyword!r}" if keyword else "the selection"
    sentence = f"{selection} selects no benchmark: the shapes of this run are {', '.join(s.label for s in shapes)}"
    return textwrap.fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from benchmarks import closing, cuda, grid, machine, runs

    found = [line for row in config.stash.get(ROWS, {}).values() for line in row.lines()]
    if not found:
        return
    wide, on_gpu = config.getoption("--wide"), grid.device(config) == "cuda"
    for table in closing.tables(found, wide, on_gpu):
        terminalreporter.write_line("\n" + table)
    terminalreporter.write_line("")
    for line in closing.legend(found, wide, on_gpu):
        terminalreporter.write_line(line)
    if config.getoption("--json"):
        facts = machine.facts() | (cuda.facts() if on_gpu else {})
        runs.write(Path(config.getoption("--json")), "unit", found, facts, config.getoption("--quick"))
