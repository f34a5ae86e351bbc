"""Programs that build the package, and setup.py on a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIR = ROOT / "build" / "cmake"


def tool(*names: str) -> str:
    """The first of these programs that is installed. Skips the test if none is."""
    for name in names:
        found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
        if found:
            return found
    pytest.skip(f"needs {' or '.join(names)}")


def write_torch(tree: Path, source: str) -> None:
    torch = tree.parent / "modules" / "torch"
    (torch / "lib").mkdir(parents=True, exist_ok=True)
    (torch / "lib" / "libtorch_cpu.so").touch()
    (torch / "lib" / "libtorch_cpu.dylib").touch()
    (torch / "__init__.py").write_text(source)


# The variables of the environment that would change the build.
BUILD_VARIABLES = (
    "STEAM_KERNELS_BUILD",
    "STEAM_KERNELS_CUDA",
    "STEAM_KERNELS_CPU_VARIANTS",
    "STEAM_KERNELS_TORCH",
    "CMAKE_TOOLCHAIN_FILE",
    "CMAKE_CUDA_ARCHITECTURES",
    "CUDAFLAGS",
)


def setup_py(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    env = {**inherited, "PYTHONPATH": str(tree.parent / "modules"), "PYTHONDONTWRITEBYTECODE": "1", **env}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120)


def report(tree: Path) -> list[str]:
    """The build's report of each library."""
    return (tree / "steam_kernels" / "_build.txt").read_text().splitlines()


def empty_sources(tree: Path) -> None:
    """Replaces the sources by ones that compile quickly, and makes libraries of the stub that can be linked."""
    for folder in ("cpu", "cuda"):
        for source in (tree / "csrc" / folder).glob("*.c*"):
            source.write_text("")
    library = tree.parent / "modules" / "torch" / "lib" / "libtorch_cpu.so"
    compiler = tool("c++", "g++", "clang++")
    subprocess.run([compiler, "-shared", "-x", "c++", "/dev/null", "-o", str(library)], check=True)
