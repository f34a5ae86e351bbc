"""Bytes that the Triton kernels move at each stage of a ResNet, counted in the interpreter: what is recorded."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import triton_interpreted
import triton_record

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("traffic")]  # one process interprets, for all of these tests

STAGES = [f"{stage} {layout}" for stage in triton_interpreted.STAGES for layout in ("nchw", "nhwc")]
#: Reads and writes of each map, in maps, that no stage exceeds.
LIMITS = {
    "forward": {"x": (2, 0), "y": (0, 1)},
    "backward": {"x": (1, 0), "dy": (2, 0), "dx": (0, 1)},
}
#: Where a cell is a pixel, x stands for P too: the channel gates' gradient wants it after the spatial graph's backward.
PIXEL_CELLS = {"x": (2, 0)}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return triton_interpreted.start("traffic")


@pytest.mark.parametrize("stage", STAGES)
def test_traffic_of_a_stage(stage: str, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[stage]
    assert "error" not in row, row["error"]
    assert row["plans"][0] == row["plans"][1], "one sample was not counted by a batch's plan"
    channels = triton_interpreted.STAGES[stage.split()[0]][0]
    for direction, limits in LIMITS.items():
        seen = row[direction]
        if direction == "backward" and stage.startswith("7 "):
            limits = limits | PIXEL_CELLS
        for name, (read, written) in limits.items():
            assert seen[name][0] <= read and seen[name][1] == written, f"{direction}: {name} {seen[name]}"
            assert seen[f"{name} sectors"] == 1.0, f"{direction}: {name} uses parts of sectors"
        large = {name: size for name, (size, *_) in seen["others"].items() if size > 2 * (channels + 49)}
        expected = {"forward": {"sums"}, "backward": {"sums", "products"}}[direction]
        assert set(large) == (set() if stage.startswith("7 ") else expected)
        assert set(large.values()) <= {channels * 49}
    found = triton_record.moved({stage: row})
    recorded = triton_record.load()["moved"]
    assert found == {name: recorded[name] for name in found}, "python tests/triton_record.py --write records anew"
