"""Builds against a torch that Python does not import, and for another processor."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.build import ROOT, empty_sources, report, setup_py, tool, write_torch


def named_torch(tree: Path, version: str) -> Path:
    """The folder of a torch that cannot be imported, whose header has the minor version."""
    torch = tree.parent / f"torch-{version}"
    (torch / "lib").mkdir(parents=True)
    (torch / "include").mkdir()
    (torch / "version.py").write_text(f"__version__ = '{version}'\n")
    (torch / "include" / "which.h").write_text(f"#define WHICH {version.split('.')[1]}\n")
    shutil.copy(tree.parent / "modules" / "torch" / "lib" / "libtorch_cpu.so", torch / "lib")
    return torch


def test_another_named_torch_is_built_against_anew(tree: Path) -> None:
    empty_sources(tree)
    write_torch(tree, 'raise AssertionError("the build must not import torch")')
    (tree / "csrc" / "cpu" / "bindings.cpp").write_text(
        '#include <which.h>\nextern "C" __attribute__((visibility("default"))) int steam_which() { return WHICH; }\n'
    )
    for version in ("2.10.0", "2.11.0+cpu"):
        torch = str(named_torch(tree, version))
        done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require", STEAM_KERNELS_TORCH=torch)
        assert done.returncode == 0, done.stdout + done.stderr
        cpu, cuda = report(tree)
        assert cpu.endswith(f"; against torch {version}") and cuda.endswith(f"torch {version} is built without CUDA")
        library = shutil.copy(tree / "steam_kernels" / "libsteam_cpu.so", tree.parent / f"{version}.so")
        assert ctypes.CDLL(str(library)).steam_which() == int(version.split(".")[1])


@pytest.mark.parametrize("missing", ["version.py", "include", "lib/libtorch_cpu.so", "the folder", "a value"])
def test_a_named_folder_without_torch_is_one_error(tree: Path, missing: str) -> None:
    torch = named_torch(tree, "2.10.0")
    if missing == "the folder":
        torch, missing = tree / "nowhere", "version.py"
    elif missing != "a value":
        (torch / missing).rename(tree.parent / "elsewhere")
    value, missing = ("", "version.py") if missing == "a value" else (str(torch), missing)
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_TORCH=value)
    assert done.returncode != 0
    expected = f"STEAM_KERNELS_TORCH is {value!r}; it must be the folder of a torch package, with {missing}\n"
    assert done.stderr == "steam_kernels: " + expected
    assert not (tree / "build").exists() and not (tree / "steam_kernels" / "_build.txt").exists()


def test_a_named_torch_that_is_too_old_is_a_reason(tree: Path) -> None:
    torch = str(named_torch(tree, "2.9.1+cpu"))
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require", STEAM_KERNELS_TORCH=torch)
    assert done.returncode != 0
    assert "torch is 2.9.1+cpu; 2.10 or newer is needed" in done.stderr


def test_a_cross_build_has_a_folder_of_its_own(tree: Path) -> None:
    empty_sources(tree)
    compiler = tool("c++", "g++", "clang++")
    lines = ("SYSTEM_NAME Linux", "SYSTEM_PROCESSOR aarch64", f"CXX_COMPILER {compiler}")
    toolchain = tree.parent / "other.cmake"
    toolchain.write_text("".join(f"set(CMAKE_{line})\n" for line in lines))
    torch = str(named_torch(tree, "2.10.0"))
    env = {"STEAM_KERNELS_BUILD": "require", "STEAM_KERNELS_TORCH": torch, "CMAKE_TOOLCHAIN_FILE": str(toolchain)}
    done = setup_py(tree, "build_ext", "--inplace", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)[0] == "libsteam_cpu: built: generic; against torch 2.10.0"
    assert sorted(path.name for path in (tree / "build").glob("cmake*")) == ["cmake-other"]


def test_kernels_for_64_bit_arm_convert_float16_by_instructions(tmp_path: Path) -> None:
    source = f"""
#include "{ROOT}/csrc/cpu/vec.h"
using namespace steam;
VecF from_half(VecH h) {{ return widen(h, Float16{{}}); }}
VecH to_half(VecF v) {{ return narrow(v, Float16{{}}); }}
"""
    (tmp_path / "half.cpp").write_text(source)
    command = [tool("aarch64-linux-gnu-g++"), "-std=c++20", "-O2", "-S", "half.cpp", "-o", "half.s"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = (tmp_path / "half.s").read_text()
    assert re.search(r"from_half.*:\n(?:\s*\.\w+.*\n|\.\w+:\n)*\s*fcvtl\s+v0\.4s, v0\.4h\n\s*ret", code), code
    assert re.search(r"to_half.*:\n(?:\s*\.\w+.*\n|\.\w+:\n)*\s*fcvtn\s+v0\.4h, v0\.4s\n\s*ret", code), code


def test_make_names_the_missing_cross_compiler_before_it_does_anything() -> None:
    env = {"PATH": "/nowhere", "HOME": os.environ.get("HOME", "/")}
    command = [tool("make"), "--silent", "--no-print-directory", "-C", str(ROOT), "wheel-aarch64"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    said = "steam_kernels: aarch64-linux-gnu-g++ was not found (apt-get install g++-aarch64-linux-gnu)"
    assert done.stdout.splitlines() == [said], done.stdout + done.stderr
