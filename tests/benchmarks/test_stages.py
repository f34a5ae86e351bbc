"""The shares of the stages: which function belongs to which stage, and how samples are counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, stages
from steam_kernels.backends import native

RECORDED = f"""
            7f0000001010 ({native.CPU.path})
            7f0000001010 ({native.CPU.path})
            7f0000001020 ({native.CPU.path})
            7f0000001030 ({native.CPU.path})
            7f0000001040 ({native.CPU.path})
            7f0000001010 (/usr/lib/libgomp.so.1)
        ffffffff81000000 ([kernel.kallsyms])
                       0 ([unknown])
"""
NAMED = """0x0000000000001010
vec.h:31
gate.h:121 (discriminator 3)
forward.cpp:330
0x0000000000001020
pool.h:31
gate_walk.h:9
0x0000000000001030
graph_triples.h:7
graph.h:12
0x0000000000001040
vec.h:31
forward.cpp:330
"""


def test_every_file_of_a_stage_exists() -> None:
    names = {path.name for path in (machine.ROOT / "csrc" / "cpu").iterdir()}
    assert set(stages.FILES) <= names and set(stages.FILES.values()) == set(stages.STAGE_NAMES)


def test_the_shares_of_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address belongs to the innermost function of a stage. All samples outside of the stages are "other"."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[0] == "addr2line":
            assert options["input"].split() == ["0x1010", "0x1020", "0x1030", "0x1040"]
        return subprocess.CompletedProcess(command, 0, {"perf": RECORDED, "addr2line": NAMED}[command[0]], "")

    monkeypatch.setattr(subprocess, "run", run)
    found, samples = stages.shares(Path("recorded"), 0x7F0000000000)
    assert samples == 8
    assert found == {"gate": 2 / 8, "pool": 1 / 8, "graph": 1 / 8, "other": 4 / 8}


def test_a_library_without_line_numbers_has_no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {"perf": RECORDED, "addr2line": "0x1010\n??:0\n0x1020\n??:0\n0x1030\n??:0\n0x1040\n??:0\n"}
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, printed[command[0]], "")
    )
    with pytest.raises(SystemExit, match="has no line numbers: build it with CXXFLAGS=-g"):
        stages.shares(Path("recorded"), 0x7F0000000000)


def test_without_perf_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["stages"])
    with pytest.raises(SystemExit, match="perf is not on the PATH; Debian's package linux-perf has it"):
        stages.main()
