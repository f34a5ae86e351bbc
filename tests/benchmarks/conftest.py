"""Fixtures of the tests of the benchmarks: programs in processes of their own, and a quick run of all parts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

QUICK = {
    "unit": [
        *("-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q"),
        *("--contender", "fused,eager,se,eca,cbam,gct"),
    ],
    "end_to_end": ["-m", "benchmarks.end_to_end", "--quick", "--contender", "steam,se"],
    "latency": ["-m", "benchmarks.latency", "--quick", "--contender", "steam"],
    "host": ["-m", "benchmarks.host", "--quick"],
    "scaling": ["-m", "benchmarks.scaling", "--quick", "--axis", "N,grid", "--threads", "1"],
    "conditions": ["-m", "benchmarks.conditions", "--quick"],
}


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python`` with the given arguments and environment variables, and returns the finished process."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Without these variables the process is not taken for a worker of pytest-xdist.
        alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        env = alone | {"OMP_NUM_THREADS": "1"} | environment
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env)

    return run


@pytest.fixture(scope="session")
def python(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., str]:
    """Runs ``python`` as ``run_python`` does, checks that it succeeded, and returns its output."""

    def run(*arguments: str) -> str:
        done = run_python(*arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., str]) -> Path:
    """The folder of a quick run of every part, as ``make bench`` makes one. It also has the output of each part, and
    the file of pytest-benchmark."""
    folder = tmp_path_factory.mktemp("run")
    for name, command in QUICK.items():
        more = ["--benchmark-json", str(folder / "pytest_benchmark.json")] if name == "unit" else []
        printed = python(*command, *more, "--json", str(folder / f"{name}.json"))
        (folder / f"{name}.txt").write_text(printed)
    return folder
