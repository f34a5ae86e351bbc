"""The symbols of the compiled objects and libraries: what they let out, and what they need."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.build import BUILD_DIR, ROOT, tool

LIBRARY = ROOT / "steam_kernels" / "libsteam_cpu.so"
CUDA_LIBRARY = LIBRARY.with_name("libsteam_cuda.so")


@pytest.fixture(scope="module")
def check_symbols() -> ModuleType:
    tool("nm")
    spec = importlib.util.spec_from_file_location("check_symbols", ROOT / ".ci" / "check_symbols.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HIDDEN = "namespace { int answer(int x) { return x + 1; } }\n"
INLINE = "inline int shared(int x) { return x * 3; }\nint (*volatile keep)(int) = shared;"
STATIC_MEMBER = """
template <class T> struct S { static T value; };
template <class T> T S<T>::value = 2;
int use() { return ++S<int>::value; }
"""
CLEAN = HIDDEN + "namespace steam { int forward_avx2(int x) { return answer(x); } }\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
@pytest.mark.parametrize(
    "source, complaint",
    [
        (CLEAN, None),
        (CLEAN + INLINE, "weak symbol (W): shared"),
        (CLEAN + STATIC_MEMBER, "weak symbol (u): S<int>"),
        (CLEAN + "int leaked(int x) { return x; }", "exported beside forward_avx2 (T): leaked"),
        (CLEAN + "int stranger = 3;", "exported beside forward_avx2 (D): stranger"),
        (CLEAN.replace("avx2", "avx512"), "exported beside forward_avx2 (T): steam::forward_avx512"),
        (HIDDEN + "int (*volatile keep)(int) = answer;", "exports forward_avx2 0 times"),
    ],
    ids=["clean", "inline", "static member", "function", "data", "another variant's", "no entry"],
)
@pytest.mark.parametrize("level", ["-O1", "-O3"])
def test_symbol_check_finds_what_is_planted(
    check_symbols: ModuleType, tmp_path: Path, source: str, complaint: str | None, level: str
) -> None:
    (tmp_path / "planted.cpp").write_text(source)
    compiler = tool("g++", "c++", "clang++")
    subprocess.run([compiler, "-std=c++20", level, "-c", "planted.cpp", "-o", "planted.o"], cwd=tmp_path, check=True)
    found = check_symbols.complaints(tmp_path / "planted.o", "forward_avx2")
    if complaint is None:
        assert found == []
    else:
        assert any(complaint in text for text in found), found


def test_symbol_check_does_not_pass_on_nothing(check_symbols: ModuleType, tmp_path: Path) -> None:
    bad, objects = check_symbols.check(tmp_path)
    assert bad and not objects


@pytest.mark.skipif(not BUILD_DIR.is_dir(), reason="the native library was not built in this tree")
def test_built_objects_leak_nothing(check_symbols: ModuleType) -> None:
    bad, objects = check_symbols.check(BUILD_DIR)
    assert bad == []
    assert len(objects) >= 2


def built(library: Path) -> Path:
    """The path of the library. Skips the test if it is not built or its symbols cannot be read."""
    if not library.is_file():
        pytest.skip(f"{library.name} was not built in this tree")
    if sys.platform != "linux":
        pytest.skip("reads an ELF file")
    return library


@pytest.mark.parametrize(
    "library, torch",
    [(LIBRARY, ["libtorch_cpu.so"]), (CUDA_LIBRARY, ["libtorch_cpu.so", "libtorch_cuda.so"])],
    ids=["cpu", "cuda"],
)
def test_library_depends_on_torch_alone_and_finds_it_in_the_process(library: Path, torch: list[str]) -> None:
    readelf = [tool("readelf"), "-d", str(built(library))]
    dynamic = subprocess.run(readelf, check=True, capture_output=True, text=True).stdout
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    # The library contains CUDA's runtime, so it does not depend on the version that torch has.
    others = ("libtorch", "libc10", "libpython", "libcu", "libnv")
    assert sorted(name for name in needed if name.startswith(others)) == torch


@pytest.mark.parametrize(
    "library, names",
    [
        (LIBRARY, {"steam_cpu_supported", "steam_cpu_variant", "steam_cpu_select"}),
        (CUDA_LIBRARY, {"steam_cuda_usable", "steam_cuda_architectures"}),
    ],
    ids=["cpu", "cuda"],
)
def test_library_lets_out_only_its_own_names(library: Path, names: set[str]) -> None:
    nm = [tool("nm"), "-D", "--defined-only", str(built(library))]
    lines = subprocess.run(nm, check=True, capture_output=True, text=True).stdout.split("\n")
    strong = {line.split()[-1] for line in lines if re.search(r" [TDRB] ", line)}
    assert names <= strong
    assert not [name for name in strong if not name.startswith(("steam_cpu_", "steam_cuda_"))]
