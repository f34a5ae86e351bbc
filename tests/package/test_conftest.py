"""Tests of tests/conftest.py: GPUs, clean environment variables, fresh caches, results well within their bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import slow, tolerances
from tests.support.build import ROOT
from tests.support.gpu_files import gpu_files

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


def test_one_worker_runs_the_tests_of_a_group(tmp_path: Path) -> None:
    """A fixture that takes minutes would be made by each worker."""
    (tmp_path / "test_grouped.py").write_text(
        "import os, pathlib, pytest\n@pytest.mark.xdist_group('group')\n@pytest.mark.parametrize('i', range(4))\n"
        "def test_worker(i):\n    pathlib.Path(f'ran_{i}').write_text(os.environ['PYTEST_XDIST_WORKER'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = [path.read_text() for path in tmp_path.glob("ran_*")]
    assert len(workers) == 4 and len(set(workers)) == 1


CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
FRESH = f"""
import os, pathlib

def test_caches():
    for name in {CACHES}:
        path = pathlib.Path(os.environ[name])
        assert not path.exists() or not any(path.iterdir()), path
"""


def run_pytest(path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A run of one file with this project's conftest."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-q", str(path)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_run_does_not_read_code_that_an_earlier_run_compiled(tmp_path: Path) -> None:
    (tmp_path / "test_fresh.py").write_text(FRESH)
    old = tmp_path / "old"
    old.mkdir()
    (old / "compiled").touch()
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    done = run_pytest(tmp_path / "test_fresh.py", environment | dict.fromkeys(CACHES, str(old)))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("files", "gpus"),
    [
        (["null", "nvidiactl", "nvidia-uvm", "dri"], []),
        (["nvidia0", "nvidia1", "nvidiactl"], ["nvidia0", "nvidia1"]),
        (["kfd", "dri"], ["kfd"]),
        (["dxg", "null"], ["dxg"]),
    ],
    ids=["none", "nvidia", "amd", "wsl2"],
)
def test_device_files_of_gpus(files: list[str], gpus: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert [path.name for path in gpu_files(tmp_path)] == gpus


ASK = """
import os
import pathlib
import tests.support.gpu_files as files
files.gpu_files = lambda: {found}
import tests.conftest
print("interpreted:", os.environ.get("TRITON_INTERPRET"))
"""


@pytest.mark.parametrize(("found", "interpreted"), [("[pathlib.Path('/dev/dxg')]", None), ("[]", "1")])
def test_triton_is_interpreted_without_a_gpu(found: str, interpreted: str | None) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(found=found)], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert f"interpreted: {interpreted}\n" in done.stdout, done.stdout + done.stderr


RUN = """
import pytest
from tests.support.tolerances import within

@pytest.mark.parametrize("error", {errors})
def test_result(error):
    assert within(error, 1.0, "a planted result")
"""


@pytest.mark.parametrize("errors,code,near", [([0.1, 0.6], 0, []), ([0.6, 0.61, 1.0], 1, [61.0, 100.0])])
def test_a_result_near_its_bound_fails_the_run(
    errors: list[float], code: int, near: list[float], tmp_path: Path
) -> None:
    """The run that began the record fails, with a sentence for each such result. No other run does."""
    path, record = tmp_path / "test_planted.py", tmp_path / "ratios.jsonl"
    path.write_text(RUN.format(errors=errors))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(tolerances.RECORD)}

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return run_pytest(path, clean | environment)

    done = run(**{tolerances.RECORD: str(record)})
    assert done.returncode == code and f"{len(errors)} passed" in done.stdout, done.stdout + done.stderr
    assert [json.loads(line)["ratio"] for line in record.read_text().splitlines()] == errors
    said = [line.partition(" in ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert said == [f"FAILED: {ratio} % of a bound, 60 % is allowed: a planted result" for ratio in near]
    # A run that another one began adds to the record, and the other one judges it.
    assert run(**{tolerances.RECORD: str(record), f"{tolerances.RECORD}_BEGUN": str(record)}).returncode == 0


def test_the_table_of_slow_tests_names_tests_that_exist() -> None:
    for key in slow.SLOW:
        file, _, name = key.partition("::")
        source = (ROOT / file).read_text()
        assert not name or f"def {name.split('[')[0]}" in source, key


def test_a_few_of_each_grid_stay_in_the_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid, self.marked = nodeid, False

        def add_marker(self, marker: pytest.MarkDecorator) -> None:
            assert marker.name == "slow"
            self.marked = True

    monkeypatch.setattr(slow, "SLOW", {"a.py": 0, "a.py::test_grid": 3, "b.py::test_grid[long": 2})
    names = [f"a.py::test_grid[{i}]" for i in range(7)] + ["a.py::test_one", "b.py::test_grid[short]"]
    items = [Item(name) for name in [*names, "b.py::test_grid[long0]", "b.py::test_grid[long1]"]]
    slow.mark(items)  # type: ignore[arg-type]
    stay = [item.nodeid for item in items if not item.marked]
    assert stay == [
        "a.py::test_grid[0]",
        "a.py::test_grid[3]",
        "a.py::test_grid[6]",
        *names[8:],
        "b.py::test_grid[long0]",
    ]


def test_the_turns_together_run_every_slow_case() -> None:
    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

        def get_closest_marker(self, name: str) -> bool:
            return "quick" not in self.nodeid

    names = [f"a.py::test_grid[{i}]" for i in range(9)] + ["a.py::test_pair[a]", "a.py::test_pair[b]", "a.py::test_one"]
    names += [f"a.py::test_quick[{i}]" for i in range(3)]
    runs = [[i.nodeid for i in slow.of_turn([Item(n) for n in names], f"{turn}/4")[0]] for turn in range(7, 11)]
    assert set().union(*runs) == set(names)
    for run in runs:
        assert len([n for n in run if "grid" in n]) in (2, 3)
        assert len([n for n in run if "pair" in n]) == 1
        assert {n for n in names if "one" in n or "quick" in n} <= set(run)
    with pytest.raises(pytest.UsageError, match="STEAM_KERNELS_TEST_TURN is '3'; allowed are a number and"):
        slow.of_turn([], "3")


def test_a_result_out_of_bounds_is_its_tests_failure() -> None:
    lines = [json.dumps({"ratio": ratio, "what": "", "test": ""}) for ratio in (0.3, 1.01, float("inf"))]
    assert tolerances.too_near(lines) == []
