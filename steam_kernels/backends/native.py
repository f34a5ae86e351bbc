"""Loads the compiled libraries. Only this module uses ctypes and loads operators.

The environment variable ``STEAM_KERNELS_CPU`` (avx512, avx2 or generic) forces a variant of the CPU kernels.
``STEAM_KERNELS_CACHE`` is the number of bytes of the last-level cache that the CPU kernels may count on. The import of
this module raises no error if a library is missing or a variable is wrong. The library's ``reason`` explains it.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..tracing import called_while_compiling

PACKAGE = Path(__file__).resolve().parent.parent
#: The build's report, one line for each library. The file is absent if no build has run.
BUILD_REPORT = PACKAGE / "_build.txt"
CPU_LIBRARY = PACKAGE / "libsteam_cpu.so"
CUDA_LIBRARY = PACKAGE / "libsteam_cuda.so"
ENVIRONMENT = "STEAM_KERNELS_CPU"
CACHE_ENVIRONMENT = "STEAM_KERNELS_CACHE"
CPU_VARIANTS = ("avx512", "avx2", "generic")
MESSAGE_BYTES = 256  # STEAM_MESSAGE_BYTES of include/steam/steam.h
OPERATORS = 2  # kOperators of csrc/common/bindings.h, the version of the operators' schemas


def shadowed() -> Path | None:
    """The folder of another installed copy of this package that this copy hides, or None.

    The source tree of a clone hides an installed package from programs that run in the clone's folder.
    """
    try:
        installed = Path(str(metadata.distribution("steam_kernels").locate_file("steam_kernels")))
    except metadata.PackageNotFoundError:
        return None
    return installed if (installed / "__init__.py").is_file() and installed.resolve() != PACKAGE else None


def how_to_mend() -> str:
    """The command or advice that makes the CPU kernels available."""
    if CPU.supported:  # the library is loaded, but an environment variable is wrong
        return f"unset {CPU.reason.partition('=')[0]}"
    if (other := shadowed()) is not None:
        return f"run from another folder than {PACKAGE.parent}, which hides the package installed in {other.parent}"
    if (PACKAGE.parent / "setup.py").is_file():
        return f"cd {PACKAGE.parent} && python setup.py build_ext --inplace"
    return "python -m pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps PATH_OF_THE_SOURCES"


@dataclass(frozen=True)
class Cache:
    """The last-level cache that the CPU kernels assume, in bytes."""

    #: The bytes that a call counts on. If x and y are larger, outputs are written past the caches; with few threads on
    #: Intel's processors with AVX-512 only if the bytes were set.
    used: int
    #: The bytes that the system reports, or 0 if it reports none.
    reported: int
    #: The number of processors that this process may run on, by affinity and control group.
    processors: int
    #: Whether ``used`` comes from STEAM_KERNELS_CACHE.
    set: bool

    def __str__(self) -> str:
        system = f"the system reports {self.reported}" if self.reported else "the system reports none"
        source = CACHE_ENVIRONMENT if self.set else f"for {self.processors} processors"
        return f"{self.used} bytes ({source}; {system})"


@dataclass(frozen=True)
class Library:
    """The state of one compiled library. ``reason`` is "" if the library is loaded and usable."""

    path: Path
    reason: str = ""
    #: The CPU variants that this processor can run, the best first; or the GPU architectures with compiled code.
    supported: tuple[str, ...] = ()
    #: The CPU variant in use.
    variant: str = ""
    #: The last-level cache that the CPU kernels assume; None if they are not loaded.
    cache: Cache | None = None


def build_of(library: str) -> str:
    """The build's sentence on a library: what it was built from, or the reason why it was not built."""
    lines = BUILD_REPORT.read_text().splitlines() if BUILD_REPORT.is_file() else []
    reasons = [line.partition(": ")[2] for line in lines if line.startswith(f"{library}: ")]
    return (
        reasons[0]
        if reasons
        else "it was never built (`python setup.py build_ext --inplace`, which needs a C++20 compiler)"
    )


def _open(path: Path) -> ctypes.CDLL | str:
    """Loads a library and registers its operators. Returns the library, or the reason why it cannot be loaded."""
    if not path.is_file():
        return f"{path.name} is not in {path.parent}: {build_of(path.stem)}"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"{path} cannot be loaded: {lines[0]}"
    # Kernels that were built for another schema would read wrong arguments and crash the process.
    own = getattr(library, f"{path.stem.removeprefix('lib')}_operators", None)
    if own is None or own() != OPERATORS:
        return f"{path} is not of this version: build the package again"
    return library


def _text(function: Any) -> tuple[str, ...]:
    """The text that a function of a library returns, split at commas."""
    function.restype = ctypes.c_char_p
    return tuple(filter(None, function().decode().split(",")))


def _cache(library: ctypes.CDLL, asked: str) -> Cache | str:
    """The cache in use, which is ``asked`` unless that is empty; or the reason why ``asked`` is wrong."""
    library.steam_cpu_set_cache_bytes.argtypes = [ctypes.c_int64]
    used, reported = library.steam_cpu_cache_bytes, library.steam_cpu_reported_cache_bytes
    processors = library.steam_cpu_processors
    for function in (used, reported, processors):
        function.restype = ctypes.c_int64
    if asked:
        digits = asked.isascii() and asked.isdigit() and len(asked) <= 19
        if not digits or int(asked) >= 1 << 63:
            return (
                f"{CACHE_ENVIRONMENT}={asked!r} is not a number of bytes; allowed are whole numbers from 0 to 2^63 - 1"
            )
        library.steam_cpu_set_cache_bytes(int(asked))
    return Cache(used(), reported(), processors(), bool(asked))


def load_cpu(path: Path = CPU_LIBRARY, forced: str = "", cache: str = "") -> Library:
    """Loads the CPU kernels, which register under the operators' CPU key.

    ``forced`` is the variant to select, and ``cache`` the bytes of the last-level cache to count on, unless empty.
    """
    library = _open(path)
    if isinstance(library, str):
        return Library(path, library)
    try:
        library.steam_cpu_select.argtypes = [ctypes.c_char_p]
        supported = _text(library.steam_cpu_supported)
        if not supported:
            return Library(path, f"{path.name} was built for another processor: {build_of(path.stem)}")
        reason = ""
        if forced and not (forced in CPU_VARIANTS and library.steam_cpu_select(forced.encode()) == 0):
            known = forced in CPU_VARIANTS
            cause = "a variant that this processor or build lacks" if known else "not a variant of the CPU kernels"
            reason = f"{ENVIRONMENT}={forced!r} is {cause}; there is {', '.join(supported)}"
        found = _cache(library, cache)
        variant = _text(library.steam_cpu_variant)[0]
        if isinstance(found, str):
            return Library(path, reason or found, supported, variant)
        return Library(path, reason, supported, variant, found)
    except AttributeError as error:
        return Library(path, f"{path} is not of this version: {error}")


def load_cuda(path: Path = CUDA_LIBRARY) -> Library:
    """Loads the CUDA kernels, which register operators of their own. Loading needs a torch with CUDA, but no GPU."""
    if torch.version.cuda is None:
        return Library(path, f"torch {torch.__version__} is built without CUDA")
    library = _open(path)
    if isinstance(library, str):
        return Library(path, library)
    try:
        library.steam_cuda_usable.argtypes = [ctypes.c_char_p]
        return Library(path, "", _text(library.steam_cuda_architectures))
    except AttributeError as error:
        return Library(path, f"{path} is not of this version: {error}")


CPU = load_cpu(forced=os.environ.get(ENVIRONMENT, ""), cache=os.environ.get(CACHE_ENVIRONMENT, ""))
CUDA = load_cuda()

_gpus: dict[int, str] = {}


@called_while_compiling  # the compiler cannot look into ctypes
def why_not_gpu(index: int) -> str:
    """ "" if the loaded CUDA kernels run on the GPU of this index, else the reason. Each GPU is asked once."""
    if index not in _gpus:
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        with torch.cuda.device(index):
            usable = ctypes.CDLL(str(CUDA.path)).steam_cuda_usable(message) == 0
        _gpus[index] = "" if usable else message.value.decode()
    return _gpus[index]
