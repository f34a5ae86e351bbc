"""Fixtures: poisoned memory, fresh compiler state, seeds, and the backends that the kernel tests run on."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# pytest rewrites the asserts of tests.support, so that they show their values. It must know before the import.
pytest.register_assert_rewrite("tests.support")
from tests.support.gpu_files import gpu_files  # noqa: E402

# This is set before torch is imported, because torch may import Triton. Without a GPU, calls that name Triton run in
# its interpreter.
if not gpu_files():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from tests.support import slow, tolerances  # noqa: E402
from tests.support.backends import unusable_backends, usable_backends  # noqa: E402
from tests.support.poison import POISONED  # noqa: E402
from tests.support.processes import PACKAGE  # noqa: E402

# Without these variables, Ultralytics uses the network and writes into the home directory from its import on.
_ULTRALYTICS = tempfile.TemporaryDirectory(prefix="steam_kernels_ultralytics_")
os.environ.setdefault("YOLO_CONFIG_DIR", _ULTRALYTICS.name)
os.environ.setdefault("YOLO_OFFLINE", "true")

# The keys of compilers' caches lack what some tests read. Triton's keys lack the folder of the source, and Inductor's
# lack the tags of operators. So a run has caches of its own, which its workers and processes share.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHES = tempfile.TemporaryDirectory(prefix="steam_kernels_caches_")
    for _name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[_name] = os.path.join(_CACHES.name, _name)

_importorskip = pytest.importorskip


def import_or_skip(name: str, *args: Any, **options: Any) -> Any:
    """Like pytest's importorskip, but a missing package is an error in CI, which installs all packages."""
    return importlib.import_module(name) if os.environ.get("CI") else _importorskip(name, *args, **options)


pytest.importorskip = import_or_skip


def restore(variables: dict[str, str]) -> None:
    """Sets the environment variables to ``variables`` and removes all others."""
    for name in (os.environ.keys() | variables.keys()) - {"PYTEST_CURRENT_TEST"}:  # pytest changes that one itself
        if name not in variables:
            del os.environ[name]
        elif os.environ.get(name) != variables[name]:
            os.environ[name] = variables[name]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Restores the environment after imports of test files: peft's BOFT sets CXX=gcc, which breaks later builds."""
    variables = dict(os.environ)
    result = yield
    restore(variables)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow.mark(items)  # before pytest selects by markers
    if turn := os.environ.get(slow.TURN):
        items[:], others = slow.of_turn(items, turn)
        config.hook.pytest_deselected(items=others)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: runs a backend's kernels; repeated for each CPU variant")
    # One worker of several leaves the other cores to the other workers. Tests that need threads set their number.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    lines = [f"steam_kernels: kernel tests run on {', '.join(usable_backends()) or 'no backend'}"]
    lines += [f"steam_kernels: {name} NOT RUN: {why}" for name, why in unusable_backends().items()]
    if not POISONED:
        lines.append("steam_kernels: this C library cannot poison memory, unwritten outputs may go unseen")
    return lines


#: The environment variable with the file of ratios that this run has begun. Workers and runs inside tests inherit it.
_BEGUN = f"{tolerances.RECORD}_BEGUN"
#: The file of ratios that this process began and judges at its end.
_RECORD = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    path = os.environ.get(tolerances.RECORD)
    # A worker, or a pytest that a test starts, appends to the file of this run.
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
    # pytest does not show the header under -q, so the summary has these lines too.
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
    # Thousands of empty records of the compiler would hide the report of a failure.
    report.sections = [(name, text) for name, text in report.sections if "torch.__trace" not in text]
    return report


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts with the same seed, threads and environment variables, independent of earlier tests."""
    threads, variables = torch.get_num_threads(), dict(os.environ)
    torch.manual_seed(0)
    if "compile" in request.node.nodeid:
        torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)
    restore(variables)


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without its compiled libraries."""
    target = tmp_path_factory.mktemp("plain")
    shutil.copytree(
        PACKAGE, target / "steam_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.txt")
    )
    return target
