"""Tests of 64-bit offsets by the kernels' own address arithmetic, without a huge tensor."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest

import steam_kernels

pytestmark = pytest.mark.kernels
LIBRARY = Path(steam_kernels.__file__).parent / "libsteam_cpu.so"

PLACES = [
    # n, c, h, w, channels, height, width: elements inside maps, and the last element of maps with more than 2^31 and
    # 2^32 elements.
    (0, 0, 0, 0, 1, 1, 1),
    (1, 2, 3, 4, 5, 6, 7),
    (3, 255, 1023, 1023, 256, 1024, 1024),
    (31, 255, 1023, 1023, 256, 1024, 1024),
    (700_000, 63, 6, 6, 64, 7, 7),
    (3_000_000_000, 0, 0, 0, 1, 1, 1),
    (2, 2047, 46340, 46341, 2048, 46341, 46342),
    (0, 65535, 255, 255, 65536, 256, 256),
    (0, 70_000, 0, 40_000, 70_001, 1, 70_000),
    (5, 1, 2**31 - 2, 3, 2, 2**31 - 1, 4),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_element_offset(backend: str, place: tuple[int, ...], channels_last: bool) -> None:
    if backend != "cpu":
        pytest.skip(f"{backend} has no probe of its address arithmetic")
    probe = ctypes.CDLL(str(LIBRARY)).steam_cpu_probe_offset
    probe.restype = ctypes.c_int64
    probe.argtypes = [ctypes.c_int64] * 7 + [ctypes.c_int]
    n, c, h, w, channels, height, width = place
    if channels_last:
        expected = ((n * height + h) * width + w) * channels + c
    else:
        expected = ((n * channels + c) * height + h) * width + w
    assert probe(*place, int(channels_last)) == expected


def test_places_pass_both_limits() -> None:
    offsets = [((n * cs + c) * hs + h) * ws + w for n, c, h, w, cs, hs, ws in PLACES]
    assert sum(o > 2**31 for o in offsets) >= 5 and sum(o > 2**32 for o in offsets) >= 3
    assert any(a < 2**31 < b for a, b in itertools.pairwise(sorted(offsets)))
