"""The native build: its environment variables, what it prints, the flags of the compilers."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from steam_kernels.backends import native
from tests.support.build import ROOT, empty_sources, report, setup_py, tool, write_torch

LIBRARY = ROOT / "steam_kernels" / "libsteam_cpu.so"
CUDA_LIBRARY = LIBRARY.with_name("libsteam_cuda.so")
X86_64 = platform.machine() in ("x86_64", "AMD64")
MARCH = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3"}


def torch_with_cuda(tree: Path) -> None:
    library = tree.parent / "modules" / "torch" / "lib" / "libtorch_cpu.so"
    shutil.copy(library, library.with_name("libtorch_cuda.so"))


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
    said = [line for line in done.stdout.splitlines() if line.startswith("steam_kernels: lib")]
    assert len(said) == 2
    for name, line in zip(("cpu", "cuda"), said, strict=True):
        assert re.match(rf'steam_kernels: libsteam_{name}: not built: cmake failed: .*"/bin/false".*compile.*\.$', line)
    assert said == ["steam_kernels: " + line for line in report(tree)]
    assert not stale.exists(), "an older library would run instead of the one that could not be built"


def test_auto_names_the_first_error_of_the_compiler(tree: Path) -> None:
    tool("cmake")
    tool("c++", "g++", "clang++")
    empty_sources(tree)
    (tree / "csrc" / "cpu" / "dispatch.cpp").write_text("int broken = ;\n")
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"libsteam_cpu: not built: the compiler failed: .*dispatch\.cpp:1:.* error: .+$", report(tree)[0])


def test_require_fails_without_a_compiler(tree: Path) -> None:
    tool("cmake")
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require", CXX="/bin/false")
    assert done.returncode != 0
    assert "libsteam_cpu: not built: cmake failed" in done.stderr


def test_skip_builds_nothing(tree: Path) -> None:
    write_torch(tree, 'raise AssertionError("skip has no use for torch")')
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree) == [f"libsteam_{name}: not built: STEAM_KERNELS_BUILD=skip" for name in ("cpu", "cuda")]
    assert not (tree / "build" / "cmake").exists()


@pytest.mark.parametrize(
    "torch, why",
    [
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            # pip's cache holds the package that was built without torch, so the advice must go past the cache.
            "pip's options --no-build-isolation --no-cache-dir --force-reinstall --no-deps",
        ),
        ("raise OSError('libcudart.so: no such file')", "libcudart.so: no such file"),
        ("__version__ = '2.9.1+cpu'", "torch is 2.9.1+cpu; 2.10 or newer is needed"),
    ],
    ids=["missing", "broken", "old"],
)
def test_a_torch_that_cannot_serve_is_a_reason(tree: Path, torch: str, why: str) -> None:
    write_torch(tree, torch)
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(why in line for line in report(tree))
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


# --- What pip shows ---------------------------------------------------------------------------------------------------


def test_an_older_setuptools_is_one_sentence(tree: Path) -> None:
    (tree.parent / "modules" / "sitecustomize.py").write_text(
        "import sys\nsys.modules['setuptools.command.bdist_wheel'] = None\n"  # an import of it raises ImportError
    )
    done = setup_py(tree, "build_ext", "--inplace")
    assert done.returncode != 0
    assert re.fullmatch(
        r"steam_kernels: setuptools is [\d.]+; 77 or newer is needed \(pip install 'setuptools>=77'\)\n", done.stderr
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process writes to its terminal as on Linux")
def test_a_build_under_pip_says_on_the_terminal_what_it_does(tree: Path) -> None:
    empty_sources(tree)
    program = (
        "import os, pty, subprocess, sys\n"
        "pid, terminal = pty.fork()\n"  # the child has a terminal of its own, and a standard output that is none
        "if pid == 0:\n"
        "    command = [sys.executable, 'setup.py', '--quiet', 'build_ext', '--inplace']\n"
        "    done = subprocess.run(command, capture_output=True)\n"
        "    sys.stdout.buffer.write(done.stdout + done.stderr) if done.returncode else None\n"
        "    os._exit(done.returncode)\n"
        "seen = b''\n"
        "try:\n"
        "    while piece := os.read(terminal, 4096):\n"
        "        seen += piece\n"
        "except OSError:\n"  # Linux reports the end of a terminal as an error
        "    pass\n"
        "sys.stdout.buffer.write(seen)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    for pip in (True, False):
        env = {**os.environ, "PYTHONPATH": str(tree.parent / "modules"), "STEAM_KERNELS_BUILD": "auto", "MAX_JOBS": "2"}
        env.update({"_PYPROJECT_HOOKS_BUILD_BACKEND": "setuptools.build_meta"} if pip else {})
        done = subprocess.run([sys.executable, "-c", program], cwd=tree, env=env, capture_output=True, timeout=120)
        seen = done.stdout.decode().replace("\r", "").splitlines()
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        expected = ["steam_kernels: compiling steam_cpu with 2 compilers at a time (MAX_JOBS)"]
        expected += ["steam_kernels: " + line for line in report(tree)]
        assert seen == (expected if pip else []), seen


# --- STEAM_KERNELS_CUDA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["yes", "", "ON"])
def test_unknown_cuda_mode_is_refused(tree: Path, value: str) -> None:
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_CUDA=value)
    assert done.returncode != 0
    assert f"STEAM_KERNELS_CUDA is {value!r}; allowed are auto, on, off" in done.stderr


def test_require_does_not_demand_cuda_of_a_torch_without_it(tree: Path) -> None:
    empty_sources(tree)
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    cpu, cuda = report(tree)
    assert cpu.startswith("libsteam_cpu: built: ")
    assert cuda == "libsteam_cuda: not built: torch 2.14.1 is built without CUDA"
    assert (tree / "steam_kernels" / LIBRARY.name).is_file()

    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_CUDA="on")
    assert done.returncode != 0
    assert "libsteam_cuda: not built: torch 2.14.1 is built without CUDA (STEAM_KERNELS_CUDA=on)" in done.stderr


def test_cuda_off_builds_none_and_removes_an_older_one(tree: Path) -> None:
    empty_sources(tree)
    torch_with_cuda(tree)
    stale = tree / "steam_kernels" / CUDA_LIBRARY.name
    stale.touch()
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require", STEAM_KERNELS_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)[1] == "libsteam_cuda: not built: STEAM_KERNELS_CUDA=off"
    assert not stale.exists()


def test_an_nvcc_that_does_not_work_costs_the_cuda_library_alone(tree: Path) -> None:
    empty_sources(tree)
    torch_with_cuda(tree)
    env = {"STEAM_KERNELS_BUILD": "require", "CUDACXX": "/bin/false"}
    done = setup_py(tree, "build_ext", "--inplace", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    cpu, cuda = report(tree)
    assert cpu.startswith("libsteam_cpu: built: ")
    assert cuda.startswith("libsteam_cuda: not built: no nvcc that works was found")
    assert setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_CUDA="on", **env).returncode != 0


def test_cuda_library_is_built_for_the_architectures_asked_for(tree: Path) -> None:
    tool("nvcc")
    empty_sources(tree)
    torch_with_cuda(tree)
    env = {"STEAM_KERNELS_CUDA": "on", "CMAKE_CUDA_ARCHITECTURES": "80-real;90"}
    done = setup_py(tree, "build_ext", "--inplace", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"libsteam_cuda: built: 80-real, 90, by nvcc [\d.]+; against torch 2\.14\.1$", report(tree)[1])
    assert (tree / "steam_kernels" / CUDA_LIBRARY.name).is_file()
    commands = (tree / "build" / "cmake" / "compile_commands.json").read_text()
    assert "arch=compute_80,code=[sm_80]" in commands and "arch=compute_90,code=[compute_90,sm_90]" in commands
    assert "compute_75" not in commands

    # The next build has no variable and takes the default: every major architecture, and the newest also as PTX.
    for source in (tree / "csrc" / "cuda").glob("*.cu"):
        source.write_text("int broken = ;\n")
    setup_py(tree, "build_ext", "--inplace")
    commands = (tree / "build" / "cmake" / "compile_commands.json").read_text()
    built = re.findall(r"code=\[sm_(\d+)\]", commands.split("backward.cu")[0])
    newest = re.findall(r"code=\[compute_(\d+)\]", commands.split("backward.cu")[0])
    assert {"75", "80", "90"} <= set(built) and not set(built) & {"86", "89"}
    assert set(newest) == {max(built, key=int)}
    assert re.match(r"libsteam_cuda: not built: the compiler failed: .*\.cu.* error: .+$", report(tree)[1])


NVCC = """#!/bin/sh
case "$*" in --list-gpu-arch) printf 'compute_%s\\n' 70 75 80 86 90 ;; *) exit 1 ;; esac
"""


@pytest.mark.parametrize(
    ("gpus", "built"),
    [
        ([], "80-real"),
        ([(9, 0)], "90-real"),
        ([(9, 0), (8, 6), (9, 0)], "86-real;90-real"),
        ([(7, 0)], "80-real"),
        ([(12, 1), (12, 0), (8, 9)], "86-virtual;90-virtual"),
    ],
    ids=["no GPU", "one GPU", "three GPUs", "older than the kernels", "newer than nvcc"],
)
def test_native_is_the_gpus_that_torch_sees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: list[tuple[int, int]], built: str
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    architectures = runpy.run_path(str(ROOT / "setup.py"))["native_architectures"]
    cuda = SimpleNamespace(
        is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_capability=lambda i: gpus[i]
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert architectures(str(nvcc)) == built
    assert architectures("/nowhere/nvcc") == architectures("/bin/false") == "80-real"


def test_native_build_is_for_the_gpu_that_is_there(tree: Path) -> None:
    tool("nvcc")
    empty_sources(tree)
    torch_with_cuda(tree)
    gpu = "is_available, device_count, get_device_capability = (lambda: True), (lambda: 1), (lambda index: (9, 0))"
    write_torch(tree, f'__version__ = "2.14.1"\nclass cuda:\n    {gpu}')
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_CUDA="on", CMAKE_CUDA_ARCHITECTURES="native")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)[1].startswith("libsteam_cuda: built: 90-real, by nvcc ")


# --- CMake ------------------------------------------------------------------------------------------------------------


def configure(build_dir: Path, *options: str, **env: str) -> tuple[str, dict[str, list[str]]]:
    """Configures CMake without torch. Returns its output, and the words of the compile command by target and source."""
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *options]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DSTEAM_CUDA=OFF"]
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
    objects = (*variants, "float64")
    expected = {f"steam_cpu_{name}/{source}.cpp" for name in objects for source in ("forward", "backward")}
    expected |= {f"steam_cpu_common/{source}.cpp" for source in ("cache", "dispatch", "scratch")}
    assert set(commands) == expected | {"steam_cpu_kernels/c_api.cpp"}
    assert f"CPU variants: {';'.join(variants)}" in printed
    for name, words in commands.items():
        assert {"-O2", "-std=c++20", "-fvisibility=hidden", "-fPIC"} <= set(words), name
        assert not [word for word in words if "fast-math" in word or "torch" in word.lower()], name
        variant = name.split("/")[0].removeprefix("steam_cpu_")
        assert [word for word in words if word.startswith("-m")] == ([MARCH[variant]] if variant in MARCH else []), name
        if variant in objects:
            assert f"-DSTEAM_CPU_VARIANT={variant}" in words
            assert ("-DSTEAM_CPU_FLOAT64" in words) == (variant == "float64")
    offered = {word for word in commands["steam_cpu_common/dispatch.cpp"] if word.startswith("-DSTEAM_CPU_HAS_")}
    assert offered == {f"-DSTEAM_CPU_HAS_{variant.upper()}" for variant in variants}


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


@pytest.mark.skipif(not X86_64, reason="only x86-64 has AVX-512")
@pytest.mark.parametrize("compiler", ["GNU", "Clang"])
def test_flags_of_gcc_alone_are_not_given_to_clang(tmp_path: Path, compiler: str) -> None:
    tool("c++", "g++", "clang++")
    told = {"ID": compiler, "ID_RUN": "1", "VERSION": "14", "FRONTEND_VARIANT": "GNU"}  # CMake asks no compiler then
    options = [f"-DCMAKE_CXX_COMPILER_{name}={value}" for name, value in told.items()]
    options += ["-DCMAKE_CXX_STANDARD_COMPUTED_DEFAULT=17", "-DSTEAM_CXX_AVX512=1", "-DSTEAM_CXX_AVX2=1"]
    _, commands = configure(tmp_path, *options)
    assert "steam_cpu_avx512/forward.cpp" in commands
    given = {name.split("/")[0] for name, words in commands.items() if "-Wno-maybe-uninitialized" in words}
    assert given == ({"steam_cpu_avx512"} if compiler == "GNU" else set())


def best_variant() -> str:
    """The best variant that this processor can run, by what the operating system says of it."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        pytest.skip("this system has no /proc/cpuinfo")
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma", "bmi1", "bmi2"} <= flags else "generic"


def test_a_library_for_this_processor_has_its_best_variant_alone(tmp_path: Path) -> None:
    tool("c++", "g++", "clang++")
    printed, commands = configure(tmp_path, "-DSTEAM_CPU_FOR=native")
    best = best_variant()
    assert f"CPU variants: {best}\n" in printed
    compiled = {name.split("/")[0] for name in commands if name.endswith("/forward.cpp")}
    assert compiled == {f"steam_cpu_{best}", "steam_cpu_float64"}
    offered = {word for word in commands["steam_cpu_common/dispatch.cpp"] if word.startswith("-DSTEAM_CPU_HAS_")}
    assert offered == {f"-DSTEAM_CPU_HAS_{best.upper()}"}


@pytest.mark.parametrize(
    "options, says",
    [
        (["-DSTEAM_CPU_FOR=mine"], "STEAM_CPU_FOR is mine; allowed are all, native"),
        (
            ["-DSTEAM_CPU_FOR=native", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"],
            "another processor",
        ),
    ],
    ids=["unknown", "cross compiler"],
)
def test_what_cannot_be_built_for_this_processor_is_one_error(tmp_path: Path, options: list[str], says: str) -> None:
    tool("c++", "g++", "clang++")
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path), "-DSTEAM_CUDA=OFF", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert says in done.stderr


@pytest.mark.parametrize("value", ["avx2", "", "Native"])
def test_unknown_cpu_variants_are_refused(tree: Path, value: str) -> None:
    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_CPU_VARIANTS=value)
    assert done.returncode != 0
    assert f"STEAM_KERNELS_CPU_VARIANTS is {value!r}; allowed are all, native" in done.stderr


def objects(tree: Path) -> dict[str, int]:
    """When each object of the CPU kernels was compiled."""
    folder = tree / "build" / "cmake" / "CMakeFiles"
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("steam_cpu_*.dir/**/*ward*.o")
    }


def test_nothing_is_compiled_twice_on_the_way_to_the_library_for_all_processors(tree: Path) -> None:
    empty_sources(tree)
    done = setup_py(tree, "build_kernels", STEAM_KERNELS_CPU_VARIANTS="native", PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    ahead = objects(tree)
    best = best_variant()
    assert {name.split(".")[0] for name in ahead} == {f"steam_cpu_{best}", "steam_cpu_float64"}

    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require", STEAM_KERNELS_CPU_VARIANTS="native")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)[0] == f"libsteam_cpu: built: {best}; against torch 2.14.1"
    assert objects(tree) == ahead

    done = setup_py(tree, "build_ext", "--inplace", STEAM_KERNELS_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)[0].startswith(f"libsteam_cpu: built: {'avx512, avx2, ' if X86_64 else ''}generic; ")
    assert objects(tree).items() >= ahead.items()
    assert len(objects(tree)) == (8 if X86_64 else 4)


def test_kernels_that_do_not_compile_ahead_stop_nothing(tree: Path) -> None:
    tool("cmake")
    done = setup_py(tree, "build_kernels", STEAM_KERNELS_BUILD="require", CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "steam_kernels: the CPU kernels were not compiled ahead: cmake failed: " in done.stdout


STUBS = """
#include "csrc/cpu/kernels.h"
namespace steam::cpu {
std::size_t forward_float64(const ForwardArgs&, char*) { return 0; }
std::size_t backward_float64(const BackwardArgs&, char*) { return 0; }
std::size_t forward_avx512(const ForwardArgs&, char*) { return 0; }
std::size_t backward_avx512(const BackwardArgs&, char*) { return 0; }
}
"""


def test_a_library_for_another_processor_refuses_each_call(tree: Path) -> None:
    compiler = tool("c++", "g++", "clang++")
    (tree / "csrc" / "cpu" / "processor.h").write_text(
        "namespace steam::cpu { inline bool has_avx512() { return false; } inline bool has_avx2() { return false; }\n"
        "inline bool claims_lines() { return false; } }\n"
    )
    (tree / "stubs.cpp").write_text(STUBS)
    sources = [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "cache", "scratch", "c_api")]
    flags = ["-std=c++20", "-shared", "-fPIC", "-Iinclude", "-I.", "-DSTEAM_CPU_HAS_AVX512"]
    command = [compiler, *flags, "stubs.cpp", *sources, "-o", "lesser.so"]
    subprocess.run(command, cwd=tree, check=True)
    library = ctypes.CDLL(str(tree / "lesser.so"))
    library.steam_cpu_variant.restype = library.steam_cpu_supported.restype = ctypes.c_char_p
    assert library.steam_cpu_variant() == library.steam_cpu_supported() == b""
    assert library.steam_cpu_select(b"avx512") == 1
    for call in (library.steam_cpu_forward, library.steam_cpu_backward):
        message = ctypes.create_string_buffer(256)
        assert call(None, None, message) == 1
        assert (
            message.value == b"this library was built for another processor, and has no variant that this one can run"
        )

    # Python's loader also asks a library for its operators.
    library = tree / "steam_kernels" / "libsteam_cpu.so"
    (tree / "operators.cpp").write_text(f'extern "C" int steam_cpu_operators() {{ return {native.OPERATORS}; }}\n')
    subprocess.run([*command[:-1], str(library), "operators.cpp"], cwd=tree, check=True)
    loaded = native.load_cpu(library)
    assert loaded.reason.startswith("libsteam_cpu.so was built for another processor: ")
    assert loaded.supported == ()
