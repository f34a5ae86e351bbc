"""The native build: what each STEAM_KERNELS_BUILD does, what the compilers are told, and what the libraries let out."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "steam_kernels" / "libsteam_cpu.so"
BUILD_DIR = ROOT / "build" / "cmake"
X86_64 = platform.machine() in ("x86_64", "AMD64")
MARCH = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3"}


def tool(*names: str) -> str:
    """The first of these programs that is there; a test that needs one is skipped where none is."""
    for name in names:
        found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
        if found:
            return found
    pytest.skip(f"needs {' or '.join(names)}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, beside a stand-in for torch that is found but not imported for real."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "steam_kernels").mkdir()
    for name in ("__init__.py", "py.typed"):
        (copy / "steam_kernels" / name).touch()
    write_torch(copy, '__version__ = "2.14.1"')
    return copy


def write_torch(tree: Path, source: str) -> None:
    torch = tree.parent / "modules" / "torch"
    (torch / "lib").mkdir(parents=True, exist_ok=True)
    (torch / "lib" / "libtorch_cpu.so").touch()
    (torch / "lib" / "libtorch_cpu.dylib").touch()
    (torch / "__init__.py").write_text(source)


def setup_py(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(tree.parent / "modules"), "PYTHONDONTWRITEBYTECODE": "1", **env}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120)


# --- STEAM_KERNELS_BUILD ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sometimes", "", "AUTO"])
def test_unknown_mode_is_refused(tree: Path, mode: str) -> None:
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD=mode)
    assert done.returncode != 0
    assert f"STEAM_KERNELS_BUILD is {mode!r}; allowed are auto, require, skip" in done.stderr
    assert not (tree / "steam_kernels" / "_build.txt").exists()


def test_auto_goes_on_without_a_compiler_and_says_why_in_one_line(tree: Path) -> None:
    tool("cmake")
    stale = tree / "steam_kernels" / LIBRARY.name
    stale.touch()
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="auto", CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("steam_kernels: ")]
    assert len(said) == 1
    assert re.match(r'steam_kernels: libsteam_cpu: not built: cmake failed: .*"/bin/false".*compile.*\.$', said[0])
    assert said[0] == "steam_kernels: " + (tree / "steam_kernels" / "_build.txt").read_text().rstrip("\n")
    assert not stale.exists(), "an older library would run instead of the one that could not be built"


def test_auto_names_the_first_error_of_the_compiler(tree: Path) -> None:
    tool("cmake")
    tool("c++", "g++", "clang++")
    (tree / "csrc" / "cpu" / "dispatch.cpp").write_text("int broken = ;\n")
    for name in ("forward.cpp", "backward.cpp", "bindings.cpp", "scratch.cpp"):
        (tree / "csrc" / "cpu" / name).write_text("")
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    reason = (tree / "steam_kernels" / "_build.txt").read_text()
    assert re.match(r"libsteam_cpu: not built: the compiler failed: .*dispatch\.cpp:1:.* error: .+\n$", reason)


def test_require_fails_without_a_compiler(tree: Path) -> None:
    tool("cmake")
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require", CXX="/bin/false")
    assert done.returncode != 0
    assert "libsteam_cpu: not built: cmake failed" in done.stderr


def test_skip_builds_nothing(tree: Path) -> None:
    write_torch(tree, 'raise AssertionError("skip has no use for torch")')
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tree / "steam_kernels" / "_build.txt").read_text() == "libsteam_cpu: not built: STEAM_KERNELS_BUILD=skip\n"
    assert not (tree / "build" / "cmake").exists()


@pytest.mark.parametrize(
    "torch, why",
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "--no-build-isolation"),
        ("raise OSError('libcudart.so: no such file')", "libcudart.so: no such file"),
        ("__version__ = '2.9.1+cpu'", "torch is 2.9.1+cpu; 2.10 or newer is needed"),
    ],
    ids=["missing", "broken", "old"],
)
def test_a_torch_that_cannot_serve_is_a_reason(tree: Path, torch: str, why: str) -> None:
    write_torch(tree, torch)
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert why in (tree / "steam_kernels" / "_build.txt").read_text()
    assert setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require").returncode != 0


@pytest.mark.parametrize("mode, platform_tag", [("auto", ".+_.+"), ("skip", "any")])
def test_wheel_is_for_any_python_and_carries_the_reason(tree: Path, mode: str, platform_tag: str) -> None:
    done = setup_py(tree, "bdist_wheel", STEAM_KERNELS_BUILD=mode, CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert re.fullmatch(rf"steam_kernels-[\d.]+-py3-none-{platform_tag}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        assert "not built" in content.read("steam_kernels/_build.txt").decode()
    assert "steam_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"steam_kernels"}


# --- CMake ------------------------------------------------------------------------------------------------------------


def configure(build_dir: Path, **env: str) -> tuple[str, dict[str, list[str]]]:
    """CMake without torch: what it printed, and for each target and source the words of the compiler's command."""
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
    command.append(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = {}
    for entry in json.loads((build_dir / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        target = re.search(r"CMakeFiles/(\w+)\.dir", words[words.index("-o") + 1])
        assert target is not None
        commands[f"{target.group(1)}/{Path(entry['file']).name}"] = words
    return done.stdout, commands


def test_without_torch_cmake_builds_the_kernels_alone(tmp_path: Path) -> None:
    tool("c++", "g++", "clang++")
    printed, commands = configure(tmp_path)
    variants = ("avx512", "avx2", "generic") if X86_64 else ("generic",)
    expected = {f"steam_cpu_{variant}/{source}.cpp" for variant in variants for source in ("forward", "backward")}
    assert set(commands) == expected | {"steam_cpu_common/dispatch.cpp", "steam_cpu_common/scratch.cpp"}
    assert f"CPU variants: {';'.join(variants)}" in printed
    for name, words in commands.items():
        assert {"-O2", "-std=c++20", "-fvisibility=hidden", "-fPIC"} <= set(words), name
        assert not [word for word in words if "fast-math" in word or "torch" in word.lower()], name
        variant = name.split("/")[0].removeprefix("steam_cpu_")
        assert [word for word in words if word.startswith("-m")] == ([MARCH[variant]] if variant in MARCH else []), name
        if variant != "common":
            assert f"-DSTEAM_CPU_VARIANT={variant}" in words
    offered = {word for word in commands["steam_cpu_common/dispatch.cpp"] if word.startswith("-DSTEAM_CPU_HAS_")}
    assert offered == {f"-DSTEAM_CPU_HAS_{variant.upper()}" for variant in variants if variant != "generic"}


@pytest.mark.skipif(not X86_64, reason="only x86-64 has variants to leave out")
def test_a_compiler_without_a_variants_flag_leaves_that_variant_out(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase " $* " in *" -march=x86-64-v4 "*) echo "error: bad value for -march=" >&2; exit 1;; esac\n'
        f'exec {tool("c++", "g++", "clang++")} "$@"\n'
    )
    compiler.chmod(0o755)
    printed, commands = configure(tmp_path / "build", CXX=str(compiler))
    assert "the avx512 kernels are left out: this compiler does not know -march=x86-64-v4" in printed
    assert "CPU variants: avx2;generic" in printed
    dispatch = commands["steam_cpu_common/dispatch.cpp"]
    assert "-DSTEAM_CPU_HAS_AVX2" in dispatch and "-DSTEAM_CPU_HAS_AVX512" not in dispatch
    assert not [name for name in commands if "avx512" in name]


# --- Symbols ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native library was not built in this tree")
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_library_depends_on_libtorch_cpu_alone_and_finds_it_in_the_process() -> None:
    dynamic = subprocess.run([tool("readelf"), "-d", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    others = ("libtorch", "libc10", "libpython")
    assert [name for name in needed if name.startswith(others)] == ["libtorch_cpu.so"]


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native library was not built in this tree")
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_library_lets_out_only_its_own_names() -> None:
    nm = [tool("nm"), "-D", "--defined-only", str(LIBRARY)]
    names = subprocess.run(nm, check=True, capture_output=True, text=True).stdout.split("\n")
    strong = {line.split()[-1] for line in names if re.search(r" [TDRB] ", line)}
    assert {"steam_cpu_supported", "steam_cpu_variant", "steam_cpu_select"} <= strong
    assert not [name for name in strong if not name.startswith("steam_cpu_")]
