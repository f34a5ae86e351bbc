"""Builds the package. CMakeLists.txt alone describes the native libraries; this file finds torch and calls CMake.

The environment variable STEAM_KERNELS_BUILD says what happens where a native library cannot be built:

    auto (default)  go on without it, and say in one line which one is missing and why
    require         fail
    skip            build none

What became of each library is also written to steam_kernels/_build.txt, one line each, since pip hides what a build
prints. MAX_JOBS (or CMAKE_BUILD_PARALLEL_LEVEL) limits the compilers that run at once; CXX and CXXFLAGS are CMake's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "steam_kernels"
LIBRARIES = ("steam_cpu",)  # names of CMake targets, each built into lib<name>.so inside the package
OLDEST_TORCH = (2, 10)
MODES = ("auto", "require", "skip")

MODE = os.environ.get("STEAM_KERNELS_BUILD", "auto")
if MODE not in MODES:
    sys.exit(f"steam_kernels: STEAM_KERNELS_BUILD is {MODE!r}; allowed are {', '.join(MODES)}")


class BuildError(Exception):
    """Why a native library cannot be built, as one sentence."""


def find_tool(name: str) -> str | None:
    """A program of this Python's environment, or else of the PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_torch() -> tuple[str, Path, Path]:
    """torch's version, include folder and libtorch_cpu."""
    try:
        import torch
    except Exception as error:  # a broken torch raises anything, OSError from its libraries among others
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        raise BuildError(
            f"torch cannot be imported while building ({'it is not there' if missing else repr(error)}); "
            "install torch first and use pip's --no-build-isolation"
        ) from None
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TORCH:
        raise BuildError(f"torch is {torch.__version__}; {'.'.join(map(str, OLDEST_TORCH))} or newer is needed")
    folder = Path(torch.__file__).parent
    library = folder / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    if not library.is_file():
        raise BuildError(f"torch {torch.__version__} has no {library}")
    return torch.__version__, folder / "include", library


def first_error(output: str) -> str:
    """The first complaint of CMake or of the compiler in `output`, in one line."""
    lines = output.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            block = [line] if not line.endswith(":") else []
            for text in lines[i + 1 :]:
                if text and not text.startswith(" "):
                    break
                block.append(text.strip())
            return re.split(r"(?<=\.) (?=[A-Z])", " ".join(" ".join(block).split()))[0][:300]
        if re.search(r"\berror: |undefined reference|undefined symbol", line):
            return line.strip()[:300]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def run(step: str, command: list[str]) -> str:
    """Runs a command, passes on what it prints, and returns that."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line)
    if process.wait() != 0:
        raise BuildError(f"{step} failed: {first_error(''.join(output))}")
    return "".join(output)


def build_library(name: str, build_dir: Path) -> tuple[Path, str]:
    """Builds one CMake target; returns the library and a sentence on what it was built from."""
    if os.name == "nt":
        raise BuildError("the native kernels are built on Linux and macOS only")
    torch_version, torch_include, torch_library = find_torch()
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None:
        raise BuildError("cmake was not found (pip install cmake)")
    if ninja is None and find_tool("make") is None:
        raise BuildError("neither ninja nor make was found (pip install ninja)")

    # CMake keeps its first compiler and generator for ever: other ones start afresh.
    signature = json.dumps([cmake, ninja, *map(os.environ.get, ("CXX", "CXXFLAGS", "LDFLAGS"))])
    signature_file = build_dir / "signature.json"
    if build_dir.exists() and not (signature_file.is_file() and signature_file.read_text() == signature):
        shutil.rmtree(build_dir)
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DSTEAM_TORCH_INCLUDE_DIR={torch_include}",
        f"-DSTEAM_TORCH_LIBRARY={torch_library}",
    ]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        configured = run("cmake", configure)
    except BuildError:
        shutil.rmtree(build_dir, ignore_errors=True)  # a half-made cache would outlive its cause
        raise
    signature_file.write_text(signature)

    jobs = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    run("the compiler", [cmake, "--build", str(build_dir), "--target", name, "--parallel", jobs])
    found = re.search(r"CPU variants: (.*)", configured)
    variants = found.group(1).replace(";", ", ") if found else "?"
    return build_dir / f"lib{name}.so", f"{variants}; against torch {torch_version}"


class BuildNative(build_ext):
    """Places the native libraries in the package, or says why they are not there."""

    def run(self) -> None:
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for name in LIBRARIES:
            target = folder / f"lib{name}.so"
            try:
                if MODE == "skip":
                    raise BuildError("STEAM_KERNELS_BUILD=skip")
                built, note = build_library(name, ROOT / "build" / "cmake")
            except BuildError as error:
                target.unlink(missing_ok=True)  # an older library would run in its place
                lines.append(f"lib{name}: not built: {error}")
                if MODE == "require":
                    (folder / "_build.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
                    sys.exit(f"steam_kernels: {lines[-1]} (STEAM_KERNELS_BUILD=require)")
            else:
                # A process that has the old library open keeps it whole.
                beside = target.with_suffix(f".{os.getpid()}.tmp")
                shutil.copyfile(built, beside)
                os.replace(beside, target)
                lines.append(f"lib{name}: built: {note}")
            print(f"steam_kernels: {lines[-1]}", flush=True)
        (folder / "_build.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in the name: no Python ABI in the library


class Wheel(bdist_wheel):
    """A wheel for any Python: the libraries use torch's stable ABI, and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if MODE == "skip" else super().get_tag()[2])


setup(
    ext_modules=[Extension(f"{PACKAGE}.lib{name}", sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
