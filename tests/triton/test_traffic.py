"""The bytes that the Triton kernels move, at each stage of a ResNet and for cells of one pixel, are the record's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from tests.support import triton_interpreted, triton_record
from tests.support.slow import parameters

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("traffic")]  # one process interprets for all of these tests

STAGES = [f"{stage} {layout}" for stage in triton_interpreted.STAGES for layout in ("nchw", "nhwc")]
#: Reads and writes of each map, in maps, that no stage exceeds.
LIMITS = {
    "forward": {"x": (2, 0), "y": (0, 1)},
    "backward": {"x": (1, 0), "dy": (2, 0), "dx": (0, 1)},
}
#: The most cells of a tile of the graph stage, and the most channels and elements.
CELLS, CHANNELS, TILE = 128, 64, 4096


def pools(stage: triton_interpreted.Stage) -> bool:
    """Whether the graph stage pools in the forward pass."""
    return stage.size == 2 * stage.grid


def halo(stage: triton_interpreted.Stage) -> float:
    """The share of the sums that is read again as the halo: one channel on either side of each block of channels.

    A program that pools has half of the channels.
    """
    cells = 1 << (min(stage.grid**2, CELLS) - 1).bit_length()
    return 2 / min(CHANNELS, TILE // cells // (2 if pools(stage) else 1))


def limits_of(stage: triton_interpreted.Stage, direction: str) -> dict[str, tuple[float, float]]:
    """How often each map may be read and written.

    If each cell is a pixel, the kernels read x for P, and x and dy for R. In the sequential order the gradient of the
    channel gates needs P after the backward pass of the lattice. Both kernels that need P by blocks of channels read
    the halo too. The forward pass reads P twice except the first tile of cells, which stays in registers. If the graph
    stage pools in the forward pass, it reads x with the halo.
    """
    limits: dict[str, tuple[float, float]] = dict(LIMITS[direction])
    if stage.size == stage.grid:
        if direction == "forward":
            limits |= {"x": (2 + max(0, 1 - CELLS / stage.grid**2) + halo(stage), 0)}
        elif stage.order == "sequential":
            limits |= {"x": (2 + halo(stage), 0)}
    elif pools(stage) and direction == "forward":
        limits |= {"x": (2 + halo(stage), 0)}
    return limits


def sectors_of(stage: triton_interpreted.Stage, direction: str, tensor: str) -> float:
    """The least use of sectors. Each number of a halo may have a sector of eight numbers to itself."""
    read, _ = limits_of(stage, direction)[tensor]
    has_halo = tensor == "x" and read > LIMITS[direction]["x"][0]
    return read / (read + 7 * halo(stage)) if has_halo else 1.0


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return triton_interpreted.start("traffic", *parameters(request, "name"))


@pytest.mark.parametrize("name", STAGES)
def test_traffic_of_a_stage(name: str, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[name]
    assert "error" not in row, row["error"]
    assert row["plans"][0] == row["plans"][1], "one sample was not counted by a batch's plan"
    stage = triton_interpreted.STAGES[name.rpartition(" ")[0]]
    cells = stage.grid**2
    for direction in LIMITS:
        seen = row[direction]
        for tensor, (read, written) in limits_of(stage, direction).items():
            assert seen[tensor][0] <= read and seen[tensor][1] == written, f"{direction}: {tensor} {seen[tensor]}"
            used = sectors_of(stage, direction, tensor)
            assert used <= seen[f"{tensor} sectors"] <= 1.0, f"{direction}: {tensor} uses parts of sectors"
        large = {tensor: size for tensor, (size, *_) in seen["others"].items() if size > 4 * (stage.channels + cells)}
        # The derivatives of the transforms: by 3 neighbours on the ring or 5 places on the lattice, by the slope, and
        # by a and b of 4 heads. Those of the lattice are `jacobians` to the launch that many cells have to themselves.
        assert large.pop("jacobian_c", None) == (None if direction == "forward" else (3 + 1 + 8) * stage.channels)
        assert large.pop("jacobians", None) == ((5 + 1 + 8) * cells if "lattice_backward" in seen["kernels"] else None)
        # Two rows of cells for each program of the gate stage, or of the graph stage, that computes the lattice.
        assert large.pop("vectors", 0) <= 0.04 * stage.channels * stage.size**2
        expected = {"forward": set() if pools(stage) else {"sums"}, "backward": {"sums", "products"}}[direction]
        assert set(large) == (set() if stage.size == stage.grid else expected)
        assert set(large.values()) <= {stage.channels * cells}
    found = triton_record.moved({name: row})
    recorded = triton_record.load()["moved"]
    assert found == {key: recorded[key] for key in found}, "python -m tests.support.triton_record --write records anew"
