"""Tests of tests/conftest.py: clean environment variables, and results well within their bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tolerances
from tests.support.build import ROOT

LEFT = "STEAM_TEST_LEFT"
os.environ[f"{LEFT}_BY_AN_IMPORT"] = os.environ[f"{LEFT}_BY_A_TEST"] = "1"


@pytest.mark.xdist_group("environment")  # one worker runs both tests in this order
def test_variables_that_an_import_set_are_gone() -> None:
    assert not [name for name in os.environ if name.startswith(LEFT)]
    os.environ[f"{LEFT}_BY_A_TEST"] = "1"
    del os.environ["PATH"]


@pytest.mark.xdist_group("environment")
def test_variables_that_a_test_set_are_gone() -> None:
    assert not [name for name in os.environ if name.startswith(LEFT)]
    assert "PATH" in os.environ


RUN = """
from tests.support.tolerances import within

def test_result():
    assert within({error}, 1.0, "a planted result")
"""


@pytest.mark.parametrize("error,code", [(0.6, 0), (0.61, 1), (1.0, 1), (1.01, 1)])
def test_a_result_near_its_bound_fails_the_run(error: float, code: int, tmp_path: Path) -> None:
    """The run that began the record fails with a sentence for each such result. A run without a record passes."""
    path, record = tmp_path / "test_planted.py", tmp_path / "ratios.jsonl"
    path.write_text(RUN.format(error=error))
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-q", str(path)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(tolerances.RECORD)}

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)

    done = run(**{tolerances.RECORD: str(record)})
    assert done.returncode == code, done.stdout + done.stderr
    assert ("1 passed" in done.stdout) == (error <= 1)
    assert [json.loads(line)["ratio"] for line in record.read_text().splitlines()] == [error]
    said = f"FAILED: {100 * error:.1f} % of a bound, 60 % is allowed: a planted result in "
    assert (said in done.stdout) == (0.6 < error <= 1)
    assert run().returncode == (error > 1)
    # Another run began the record and judges it.
    assert run(**{tolerances.RECORD: str(record), f"{tolerances.RECORD}_BEGUN": str(record)}).returncode == (error > 1)
