"""Poisoned memory, fresh compiler state, seeds, and the backends that the kernel tests run on."""

from __future__ import annotations

import glob
import importlib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before torch, which may import Triton: where there is no GPU, its kernels run in the interpreter, for who names them.
if not glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# Before its modules are imported, so that an assert in them shows its values.
pytest.register_assert_rewrite("tests.support")
from tests.support import tolerances  # noqa: E402
from tests.support.backends import unusable_backends, usable_backends  # noqa: E402
from tests.support.poison import POISONED  # noqa: E402
from tests.support.processes import PACKAGE  # noqa: E402

# Ultralytics asks the network and writes into the home directory from its import on, unless told not to.
_ULTRALYTICS = tempfile.TemporaryDirectory(prefix="steam_kernels_ultralytics_")
os.environ.setdefault("YOLO_CONFIG_DIR", _ULTRALYTICS.name)
os.environ.setdefault("YOLO_OFFLINE", "true")

_importorskip = pytest.importorskip


def import_or_skip(name: str, *args: Any, **options: Any) -> Any:
    """pytest's importorskip, but in CI, which installs all of them, a missing package fails instead of skipping."""
    return importlib.import_module(name) if os.environ.get("CI") else _importorskip(name, *args, **options)


pytest.importorskip = import_or_skip


def restore(variables: dict[str, str]) -> None:
    """Sets the environment variables to these."""
    for name in (os.environ.keys() | variables.keys()) - {"PYTEST_CURRENT_TEST"}:  # pytest itself sets that one
        if name not in variables:
            del os.environ[name]
        elif os.environ.get(name) != variables[name]:
            os.environ[name] = variables[name]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Takes back what imports of test files set: peft's BOFT leaves CXX=gcc, with which a later build does not link."""
    variables = dict(os.environ)
    result = yield
    restore(variables)
    return result


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: runs a backend's kernels; repeated for each CPU variant")
    # one worker of several leaves the other cores to its neighbours; tests that need threads ask for them
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    lines = [f"steam_kernels: kernel tests run on {', '.join(usable_backends()) or 'no backend'}"]
    lines += [f"steam_kernels: {name} NOT RUN: {why}" for name, why in unusable_backends().items()]
    if not POISONED:
        lines.append("steam_kernels: this C library cannot poison memory, unwritten outputs may go unseen")
    return lines


#: Says which file of ratios this run, with its workers and the runs that tests start, has begun.
_BEGUN = f"{tolerances.RECORD}_BEGUN"
#: The file of ratios that this process began and judges at its end.
_RECORD = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    path = os.environ.get(tolerances.RECORD)
    # A worker, or a pytest that a test starts, adds to the file that this run has begun.
    if path and os.environ.get(_BEGUN) != path:
        os.environ[_BEGUN] = path
        session.config.stash[_RECORD] = Path(path)
        Path(path).write_text("")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.stash.get(_RECORD, None)
    if path is not None and tolerances.too_near(path.read_text().splitlines()) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if path := terminalreporter.config.stash.get(_RECORD, None):
        lines = path.read_text().splitlines()
        for line in [*tolerances.summary(lines), *tolerances.too_near(lines)]:
            terminalreporter.write_line(line)
    # the header is not shown under -q
    for name, why in unusable_backends().items():
        terminalreporter.write_line(f"kernel tests NOT RUN on {name}: {why}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names: list[object] = list(usable_backends())
        if not names:
            reason = "; ".join(f"{name}: {why}" for name, why in unusable_backends().items())
            names = [pytest.param("none", marks=pytest.mark.skip(reason=f"no backend with kernels ({reason})"))]
        metafunc.parametrize("backend", names)
    if "any_backend" in metafunc.fixturenames:
        metafunc.parametrize("any_backend", [*usable_backends(), "reference"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # thousands of empty records of the compiler would bury a failure's report
    report.sections = [(name, text) for name, text in report.sections if "torch.__trace" not in text]
    return report


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test starts with the same seed, threads and environment variables, whichever tests ran before it."""
    threads, variables = torch.get_num_threads(), dict(os.environ)
    torch.manual_seed(0)
    if "compile" in request.node.nodeid:
        torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)
    restore(variables)


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, copied without its compiled libraries."""
    target = tmp_path_factory.mktemp("plain")
    shutil.copytree(
        PACKAGE, target / "steam_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.txt")
    )
    return target
