"""The share of the last-level cache that the CPU kernels count on: the rule, the variable, and equal bits."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import steam_kernels
from steam_kernels.backends import native
from tests.support import cases
from tests.support.cases import Case
from tests.support.processes import SMOKE, output

LIBRARY = Path(steam_kernels.__file__).parent / "libsteam_cpu.so"
MIB = 1 << 20
NEVER = (1 << 63) - 1  # a cache that holds any map


@pytest.fixture
def cpu(backend: str) -> ctypes.CDLL:
    if backend != "cpu":
        pytest.skip("the share is the CPU kernels'")
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("probe_cache_share", "probe_limit", "cache_bytes", "reported_cache_bytes", "processors"):
        getattr(library, f"steam_cpu_{name}").restype = ctypes.c_int64
    library.steam_cpu_probe_cache_share.argtypes = [ctypes.c_int64] * 2
    library.steam_cpu_probe_limit.argtypes = [ctypes.c_char_p]
    library.steam_cpu_set_cache_bytes.argtypes = [ctypes.c_int64]
    library.steam_cpu_probe_streams_above.restype = ctypes.c_int64
    library.steam_cpu_probe_streams_above.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3]
    return library


@pytest.mark.parametrize(
    "reported, processors, share",
    [
        (300 * MIB, 2, 16 * MIB),  # a virtual machine that reports its host's cache
        (300 * MIB, 1, 8 * MIB),
        (32 * MIB, 2, 16 * MIB),
        (32 * MIB, 4, 32 * MIB),
        (32 * MIB, 16, 32 * MIB),  # Zen 3: one of its two caches
        (12 * MIB, 2, 12 * MIB),
        (2 * MIB, 4, 2 * MIB),
        (300 * MIB, 128, 300 * MIB),
        (0, 1, 8 * MIB),  # the system reports no cache
        (0, 2, 16 * MIB),
        (0, 64, 24 * MIB),
        (300 * MIB, 1 << 62, 300 * MIB),
    ],
)
def test_rule(cpu: ctypes.CDLL, reported: int, processors: int, share: int) -> None:
    """The share is 8 MiB for each processor, but at most the reported size."""
    assert cpu.steam_cpu_probe_cache_share(reported, processors) == share


UNSET = -1


@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize("threads", [1, 4, 5, 64])
@pytest.mark.parametrize("set_to", [UNSET, 0, 12 * MIB, NEVER])
def test_outputs_that_are_streamed(cpu: ctypes.CDLL, claims: bool, threads: int, set_to: int) -> None:
    """Outputs of more than half of the bytes are streamed. A processor that claims lines streams only on more than four
    threads, or if the bytes were set."""
    found = cpu.steam_cpu_probe_streams_above(claims, threads, set_to, 16 * MIB)
    if set_to == UNSET:
        assert found == (NEVER if claims and threads <= 4 else 8 * MIB)
    else:
        assert found == set_to // 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux reports")
def test_the_processors_that_claim_lines(cpu: ctypes.CDLL) -> None:
    """They are Intel's with AVX-512, and no others."""
    text = Path("/proc/cpuinfo").read_text()
    claims = "GenuineIntel" in text and re.search(r"\bavx512vl\b", text) is not None
    assert cpu.steam_cpu_probe_claims() == int(claims)


@pytest.mark.parametrize(
    "text, processors",
    [
        ("max 100000\n", 0),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("12800000 100000", 128),
        ("-1 100000\n", 0),
        ("0 0\n", 0),
        ("100000\n", 0),
        ("", 0),
        ("9223372036854775807 1\n", NEVER),
    ],
)
def test_limits_of_processor_time(cpu: ctypes.CDLL, text: str, processors: int) -> None:
    assert cpu.steam_cpu_probe_limit(text.encode()) == processors


def test_share_of_this_machine(cpu: ctypes.CDLL) -> None:
    reported, processors = cpu.steam_cpu_reported_cache_bytes(), cpu.steam_cpu_processors()
    assert reported >= 0 and processors >= 1
    if hasattr(os, "sched_getaffinity"):
        assert processors <= len(os.sched_getaffinity(0))
    cache = native.CPU.cache
    assert cache is not None and (cache.reported, cache.processors) == (reported, processors)
    if not cache.set:
        assert cache.used == cpu.steam_cpu_probe_cache_share(reported, processors)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to processors")
def test_a_bound_process_has_its_own_processors_share(cpu: ctypes.CDLL) -> None:
    text = output(
        "import os\nos.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        "from steam_kernels.backends import native\nprint(native.CPU.cache.processors, native.CPU.cache.used)\n"
    )
    processors, used = map(int, text.split())
    assert processors == 1 and used <= 8 * MIB


# ---- the variable


@pytest.mark.parametrize("value", [0, 1, 12 * MIB, NEVER])
def test_variable_overrules_it(cpu: ctypes.CDLL, value: int) -> None:
    text = output(
        SMOKE + "from steam_kernels.backends import native\nfrom steam_kernels.env_report import report\n"
        "assert not native.CPU.reason, native.CPU.reason\nprint(native.CPU.cache.used)\nprint(report())\n",
        STEAM_KERNELS_CACHE=str(value),
    )
    used, *lines = text.splitlines()
    assert used == str(value)
    line = next(line for line in lines if line.split()[:1] == ["cache"])
    assert f"{value} bytes (STEAM_KERNELS_CACHE; the system reports " in line
    assert f"STEAM_KERNELS_CACHE = {value}" in lines


def test_report_says_where_the_share_comes_from(cpu: ctypes.CDLL) -> None:
    lines = output("from steam_kernels.env_report import report\nprint(report())\n").splitlines()
    line = next(line for line in lines if line.split()[:1] == ["cache"])
    assert f"(for {cpu.steam_cpu_processors()} processors; the system reports " in line
    assert "STEAM_KERNELS_CACHE = (not set)" in lines


@pytest.mark.parametrize("value", ["16M", "-1", "1e6", "1_000", " 8", "0x10", "٣", "8.0", str(1 << 63), "9" * 400])
def test_bad_value_is_a_reason(cpu: ctypes.CDLL, value: str) -> None:
    reason = output(
        SMOKE + "print(steam_kernels.available_backends()['cpu'])", STEAM_KERNELS_CACHE=value, PYTHONIOENCODING="utf-8"
    )
    assert f"STEAM_KERNELS_CACHE={value!r}" in reason and "from 0 to 2^63 - 1" in reason
    assert len(reason.splitlines()) == 1


def test_empty_value_is_none(cpu: ctypes.CDLL) -> None:
    code = "from steam_kernels.backends import native\nprint(repr(native.CPU.reason), native.CPU.cache.set)\n"
    assert output(code, STEAM_KERNELS_CACHE="").split() == ["''", "False"]


def test_negative_bytes_are_refused(cpu: ctypes.CDLL) -> None:
    before = cpu.steam_cpu_cache_bytes()
    assert cpu.steam_cpu_set_cache_bytes(-1) == 1 and cpu.steam_cpu_cache_bytes() == before


# ---- bits


@pytest.fixture
def ways_to_store(cpu: ctypes.CDLL) -> Iterator[list[tuple[int, int]]]:
    """The bytes that a call counts on, and whether it claims lines: past the caches, ordinary, and claimed."""
    native_bytes = native.CPU.cache
    assert native_bytes is not None
    yield [(0, 0), (NEVER, 0), (NEVER, 1)]
    cpu.steam_cpu_probe_set_claims(-1)
    if native_bytes.set:
        cpu.steam_cpu_set_cache_bytes(native_bytes.used)
    else:
        cpu.steam_cpu_unset_cache_bytes()


ODD = [
    Case(space=(57, 61), channels=35, batch=3, layout="offset_nhwc", tail="residual_relu"),
    Case(space=(57, 61), channels=35, batch=3, layout="offset_nchw"),
    Case(space=(7, 7), channels=515, batch=3, layout="offset_nchw", dtype=torch.bfloat16),
    Case(space=(100, 167), channels=5, batch=1, layout="nhwc", dtype=torch.float16, tail="relu"),
]


@pytest.mark.kernels
@pytest.mark.parametrize("case", [*cases.all_pairs()[::3], *ODD], ids=lambda c: c.id)
def test_no_bit_depends_on_it(cpu: ctypes.CDLL, backend: str, ways_to_store: list[tuple[int, int]], case: Case) -> None:
    """Outputs and gradients have the same bits in each way of storing them."""
    inputs, dy = cases.make(case)
    results = []
    for bytes_, claims in ways_to_store:
        assert cpu.steam_cpu_set_cache_bytes(bytes_) == 0 and cpu.steam_cpu_cache_bytes() == bytes_
        cpu.steam_cpu_probe_set_claims(claims)
        assert cpu.steam_cpu_probe_claims() == claims
        results.append(cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_the_default_comes_back(cpu: ctypes.CDLL) -> None:
    """In a process of its own, because the share of this process may be set."""
    text = output(
        "import ctypes\nfrom steam_kernels.backends import native\nlibrary = ctypes.CDLL(str(native.CPU.path))\n"
        "bytes_ = library.steam_cpu_cache_bytes\nbytes_.restype = ctypes.c_int64\nbefore = bytes_()\n"
        "library.steam_cpu_set_cache_bytes.argtypes = [ctypes.c_int64]\nlibrary.steam_cpu_set_cache_bytes(5)\n"
        "print(bytes_(), end=' ')\nlibrary.steam_cpu_unset_cache_bytes()\nprint(bytes_() == before)\n",
        STEAM_KERNELS_CACHE="",
    )
    assert text.split() == ["5", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux reports")
def test_reported_is_the_deepest_cache(cpu: ctypes.CDLL) -> None:
    folder = Path(f"/sys/devices/system/cpu/cpu{min(os.sched_getaffinity(0))}/cache")
    levels = {}
    for index in folder.glob("index*"):
        if not (index / "size").is_file():
            continue  # some virtual machines report only the level of a cache
        size = (index / "size").read_text().strip()
        levels[int((index / "level").read_text())] = int(size[:-1]) * {"K": 1 << 10, "M": MIB}[size[-1]]
    deepest = max(levels, default=0)
    assert cpu.steam_cpu_reported_cache_bytes() == (levels[deepest] if deepest > 1 else 0)
