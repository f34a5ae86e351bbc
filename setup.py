"""Builds the package. CMakeLists.txt alone describes the native libraries; this file finds torch and calls CMake.

The environment variable STEAM_KERNELS_BUILD chooses the behaviour if a native library cannot be built:

    auto (default)  continue without the library, and print in one line its name and the reason
    require         fail
    skip            build no library

The CUDA library also needs nvcc and a torch with CUDA. STEAM_KERNELS_CUDA chooses the behaviour without them:

    auto (default)  continue without the library, also under `require`, and print the reason in that line
    on              fail
    off             do not build the library

STEAM_KERNELS_CPU_VARIANTS chooses the instruction sets that the CPU kernels are compiled for:

    all (default)   every one that the compiler knows; the library chooses when it is loaded
    native          the best that this processor has, in a third of the time; the library runs on no lesser processor

CMAKE_CUDA_ARCHITECTURES, in CMake's form, lists the architectures of the CUDA library; without it, all major ones from
7.5. Its value `native`, which `make` takes by default, is the GPUs that torch sees, or 80-real if it sees none.
CUDACXX is the path of nvcc. steam_kernels/_build.txt keeps one line for each library, built or not, because pip hides
the output of a build. MAX_JOBS (or CMAKE_BUILD_PARALLEL_LEVEL) limits the number of compilers that run at a time.
CMake reads CXX and CXXFLAGS.

STEAM_KERNELS_TORCH is the folder of the torch package to build against. Without it the build takes the torch that
Python imports. A build for another processor needs the variable, because this Python cannot import that torch.
CMAKE_TOOLCHAIN_FILE names the cross compiler, and such a build has a folder of its own. `make wheel-aarch64` sets both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NamedTuple

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # pip's --no-build-isolation takes the environment's setuptools, whatever pyproject.toml asks for
    sys.exit(
        f"steam_kernels: setuptools is {setuptools.__version__}; 77 or newer is needed (pip install 'setuptools>=77')"
    )

ROOT = Path(__file__).resolve().parent
TOOLCHAIN = os.environ.get("CMAKE_TOOLCHAIN_FILE", "")
BUILD_DIR = ROOT / "build" / (f"cmake-{Path(TOOLCHAIN).stem}" if TOOLCHAIN else "cmake")
TORCH_LIBRARY = Path("lib", "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
PACKAGE = "steam_kernels"
LIBRARIES = ("steam_cpu", "steam_cuda")  # names of CMake targets, each built into lib<name>.so inside the package
OLDEST_TORCH = (2, 10)
OLDEST_GPU = 75  # the least compute capability of the CUDA kernels, times ten
WITHOUT_GPU = "80-real"  # the architecture that `native` stands for where torch sees no GPU


def environment(name: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment variable, one of `allowed`, of which the first is the default."""
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        sys.exit(f"steam_kernels: {name} is {value!r}; allowed are {', '.join(allowed)}")
    return value


def named_torch() -> Path | None:
    """The folder of STEAM_KERNELS_TORCH, None if the variable is not set."""
    value = os.environ.get("STEAM_KERNELS_TORCH")
    if value is None:
        return None
    folder = Path(value).absolute()
    for part in (Path("version.py"), Path("include"), TORCH_LIBRARY):
        if not value or not (folder / part).exists():
            sys.exit(
                f"steam_kernels: STEAM_KERNELS_TORCH is {value!r}; "
                f"it must be the folder of a torch package, with {part}"
            )
    return folder


NAMED_TORCH = named_torch()
MODE = environment("STEAM_KERNELS_BUILD", ("auto", "require", "skip"))
CUDA = environment("STEAM_KERNELS_CUDA", ("auto", "on", "off"))
CPU_VARIANTS = environment("STEAM_KERNELS_CPU_VARIANTS", ("all", "native"))


class BuildError(Exception):
    """Why a native library cannot be built, as one sentence."""


class LeftOut(BuildError):
    """Why the build does not try the CUDA library."""


class Torch(NamedTuple):
    version: str
    include: Path
    library: Path
    cuda_library: Path


class Configured(NamedTuple):
    cmake: str
    printed: str  # by CMake

    def says(self, what: str) -> str:
        """The rest of CMake's status line that begins with `what`, "" where there is none."""
        found = re.search(rf"steam_kernels: {what}: (.*)", self.printed)
        return found.group(1).replace(";", ", ") if found else ""


def find_tool(name: str) -> str | None:
    """The path of a program in this Python's environment, or else on the PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_torch() -> Torch:
    """The torch to build against; its `cuda_library` is there only where it was built with CUDA."""
    if NAMED_TORCH is not None:
        folder = NAMED_TORCH
        version = str(runpy.run_path(str(folder / "version.py"))["__version__"])
    else:
        try:
            import torch
        except Exception as error:  # a broken torch raises anything, OSError from its libraries among others
            missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
            raise BuildError(
                f"torch cannot be imported while building ({'it is not there' if missing else repr(error)}); "
                "install torch first, and then this package with pip's options --no-build-isolation --no-cache-dir "
                "--force-reinstall --no-deps (its cache has the package without the library)"
            ) from None
        folder, version = Path(torch.__file__).parent, torch.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TORCH:
        raise BuildError(f"torch is {version}; {'.'.join(map(str, OLDEST_TORCH))} or newer is needed")
    library = folder / TORCH_LIBRARY
    if not library.is_file():
        raise BuildError(f"torch {version} has no {library}")
    return Torch(version, folder / "include", library, folder / "lib" / "libtorch_cuda.so")


def find_nvcc() -> str | None:
    """CUDACXX, or nvcc of the PATH or of the usual places."""
    if "CUDACXX" in os.environ:
        return os.environ["CUDACXX"]
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


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


def say(text: str) -> None:
    """Prints a line. Under pip, which hides what a build prints, the line also goes to the terminal if there is one."""
    line = f"steam_kernels: {text}"
    print(line, flush=True)
    if "_PYPROJECT_HOOKS_BUILD_BACKEND" in os.environ:
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\r{line}\n")  # pip's progress mark stands at the beginning of the line


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


def why_not_cuda(torch: Torch) -> str:
    """ "" if the build can try the CUDA library, else the reason why not."""
    if CUDA == "off":
        return "STEAM_KERNELS_CUDA=off"
    if not torch.cuda_library.is_file():
        return f"torch {torch.version} is built without CUDA"
    if find_nvcc() is None:
        return "nvcc was not found on the PATH, by CUDACXX or CUDA_HOME, or in /usr/local/cuda"
    return ""


def native_architectures(nvcc: str) -> str:
    """The architectures of the GPUs that torch sees, in CMake's form; :data:`WITHOUT_GPU` if the kernels run on none.

    If nvcc is older than a GPU, the GPU's driver compiles the PTX of the newest architecture that nvcc knows.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))}
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    except OSError:  # CMake gives the reason
        listed = ""
    known = {int(number) for number in re.findall(r"compute_(\d+)", listed)}
    found = []
    for gpu in sorted(gpus):
        newest = max((number for number in known if OLDEST_GPU <= number <= gpu), default=0)
        if newest:
            found.append(f"{newest}-{'real' if newest == gpu else 'virtual'}")
    return ";".join(dict.fromkeys(found)) or WITHOUT_GPU


def configure(build_dir: Path, torch: Torch | None) -> Configured:
    """Runs CMake, for all libraries; without torch, for the CPU kernels alone."""
    if os.name == "nt":
        raise BuildError("the native kernels are built on Linux and macOS only")
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None:
        raise BuildError("cmake was not found (pip install cmake)")
    if ninja is None and find_tool("make") is None:
        raise BuildError("neither ninja nor make was found (pip install ninja)")

    # CMake never changes the compilers and generator of a build folder, so other ones need a new folder.
    nvcc = find_nvcc()
    flags = map(os.environ.get, ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS"))
    signature = json.dumps([cmake, ninja, nvcc, *flags, TOOLCHAIN, str(NAMED_TORCH or "")])
    signature_file = build_dir / "signature.json"
    if build_dir.exists() and not (signature_file.is_file() and signature_file.read_text() == signature):
        shutil.rmtree(build_dir)
    with_cuda = torch is not None and not why_not_cuda(torch)
    architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
    if architectures == "native":
        architectures = native_architectures(nvcc) if nvcc is not None and with_cuda else WITHOUT_GPU
    command = [
        *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DSTEAM_TORCH_INCLUDE_DIR={torch.include if torch else ''}",
        f"-DSTEAM_TORCH_LIBRARY={torch.library if torch else ''}",
        f"-DSTEAM_TORCH_CUDA_LIBRARY={torch.cuda_library if torch and with_cuda else ''}",
        f"-DSTEAM_CPU_FOR={CPU_VARIANTS}",
        *([f"-DCMAKE_TOOLCHAIN_FILE={Path(TOOLCHAIN).absolute()}"] if TOOLCHAIN else []),
        f"-DSTEAM_CUDA={CUDA.upper() if with_cuda else 'OFF'}",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}" if architectures else "-UCMAKE_CUDA_ARCHITECTURES",
    ]
    if ninja is not None:
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if nvcc is not None:
        os.environ["CUDACXX"] = nvcc
    try:
        printed = run("cmake", command)
    except BuildError:
        shutil.rmtree(build_dir, ignore_errors=True)  # the next build would read an incomplete cache
        raise
    signature_file.write_text(signature)
    return Configured(cmake, printed)


def build_target(name: str, build_dir: Path, configured: Configured) -> None:
    """Builds one CMake target."""
    jobs = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    say(f"compiling {name} with {jobs} compiler{'s' * (jobs != '1')} at a time (MAX_JOBS)")
    run("the compiler", [configured.cmake, "--build", str(build_dir), "--target", name, "--parallel", jobs])


def build_library(name: str, build_dir: Path, configured: Configured, torch: Torch) -> tuple[Path, str]:
    """Builds the module of one backend; returns the library and a sentence on what it was built from."""
    note = configured.says("CPU variants")
    if name == "steam_cuda":
        reason = why_not_cuda(torch) or configured.says("the CUDA kernels are left out")
        if reason:
            raise LeftOut(reason)
        note = configured.says("CUDA architectures")
    build_target(name, build_dir, configured)
    return build_dir / f"lib{name}.so", f"{note}; against torch {torch.version}"


class BuildNative(build_ext):
    """Places the native libraries in the package, or records why one is missing."""

    def run(self) -> None:
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        ready: tuple[Configured, Torch] | BuildError
        try:
            if MODE == "skip":
                raise BuildError("STEAM_KERNELS_BUILD=skip")
            torch = find_torch()
            ready = configure(BUILD_DIR, torch), torch
        except BuildError as error:
            ready = error
        lines = []
        for name in LIBRARIES:
            target = folder / f"lib{name}.so"
            try:
                if isinstance(ready, BuildError):
                    raise ready
                built, note = build_library(name, BUILD_DIR, *ready)
            except BuildError as error:
                target.unlink(missing_ok=True)  # otherwise Python would load an older library
                lines.append(f"lib{name}: not built: {error}")
                demands = ["STEAM_KERNELS_BUILD=require"] * (MODE == "require" and not isinstance(error, LeftOut))
                demands += ["STEAM_KERNELS_CUDA=on"] * (CUDA == "on" and name == "steam_cuda")
                if demands:
                    (folder / "_build.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
                    sys.exit(f"steam_kernels: {lines[-1]} ({demands[0]})")
            else:
                # The replacement leaves the old file intact for a process that has it open.
                beside = target.with_suffix(f".{os.getpid()}.tmp")
                shutil.copyfile(built, beside)
                os.replace(beside, target)
                lines.append(f"lib{name}: built: {note}")
            say(lines[-1])
        (folder / "_build.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in the name: no Python ABI in the library


class BuildKernels(Command):
    """`python setup.py build_kernels` compiles the CPU kernels, which need no torch, for a later build_ext.

    So make compiles them while pip installs torch. A failure is a warning here, and a failure of build_ext later.
    """

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if MODE == "skip":
            return
        try:
            build_target("steam_cpu_kernels", BUILD_DIR, configure(BUILD_DIR, None))
        except BuildError as error:
            say(f"the CPU kernels were not compiled ahead: {error}")


class Wheel(bdist_wheel):
    """A wheel for any Python: the libraries use torch's stable ABI, and no ABI of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if MODE == "skip" else super().get_tag()[2])


setup(
    ext_modules=[Extension(f"{PACKAGE}.lib{name}", sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative, "build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
