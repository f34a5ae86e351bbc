"""The machine and the code of a run: the facts that each result file has beside its rows."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import malloc
from benchmarks.tables import WIDTH

ROOT = Path(__file__).resolve().parent.parent
#: The tests' rule of tolerance, which the benchmarks share.
RULE = "tests/support/tolerances.py"
#: The files on which a figure depends. A run writes its own results, page and pictures, so they are not among them.
CODE = (
    "steam_kernels", "csrc", "include", "cmake", "CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile",
    RULE, "benchmarks", "examples", ":(exclude)benchmarks/results",
)  # fmt: skip


def facts() -> dict[str, Any]:
    """Processor, threads, versions, backends, CPU variant, malloc setting, date and commit."""
    import steam_kernels

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steam_kernels": getattr(steam_kernels, "__version__", "unknown"),
        "backends": steam_kernels.available_backends(),
        "cpu_variant": cpu_variant(),
        "malloc": "benchmark setting" if malloc.is_set() else "stock",
        "commit": commit_of(ROOT),
    }


def cpu_variant() -> str:
    """The instruction-set variant of the CPU kernels in use, or the reason why there is none."""
    import steam_kernels
    from steam_kernels.backends import native

    reason = steam_kernels.available_backends()["cpu"]
    return f"none ({reason})" if reason else native.CPU.variant


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit_of(root: Path) -> str:
    """The commit that is checked out at ``root``, with ``-dirty`` if the code differs from it; "" without a commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "--verify", "HEAD")
        return commit + ("-dirty" if commit and git("status", "--porcelain", "--", *CODE) else "")
    except OSError:
        return ""


def describe(found: Mapping[str, Any]) -> str:
    """The facts in words, in lines of at most :data:`benchmarks.tables.WIDTH` columns."""
    text = (
        f"{found['processor']}, torch sees {found['cpu_capability']}; {found['threads']} threads; "
        f"torch {found['torch']}; "
        f"steam_kernels {found['steam_kernels']}, cpu variant {found['cpu_variant']}; malloc: {found['malloc']}"
    )
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")
