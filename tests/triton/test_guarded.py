"""The Triton kernels in the interpreter under the guard: bounds, alignment, races, unwritten elements, any order."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from steam_kernels.backends.triton import launch
from tests.support import triton_interpreted
from tests.support.cases import Case
from tests.support.triton_interpreted import GUARDED

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("guarded")]  # one process interprets for all of these tests


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return triton_interpreted.start("cases")


#: How often each map may be read and written.
LIMITS = {
    "forward": {"x": (2, 0), "residual": (1, 0), "y": (0, 1)},
    "backward": {"x": (1, 0), "dy": (2, 0), "y": (2, 0), "dx": (0, 1), "dresidual": (0, 1)},
}


def read_again(case: Case, plan: str, direction: str) -> float:
    """The share of x that the graph stage reads again if it reads x: each cell is a pixel, or it pools.

    Each block of channels reads its halo. The forward pass reads P twice, except the first tile of cells, which stays
    in registers. The backward pass needs P only in the sequential order, after R.
    """
    embed_dim, heads = case.attention
    backward, channels_last = direction == "backward", "nhwc" in case.layout
    p = launch.Pass(*case.shape, *case.resolved_grid, case.dtype.itemsize, channels_last, backward)
    how, prefix = (launch.whole, "GRAPH_") if plan == "whole" else (launch.graph, "")
    constants = how(p, heads, embed_dim // heads).constants
    blocks = launch.ceil_div(case.channels, constants[prefix + "CHANNELS"])
    halo = 2 * min(case.radius, case.channels // 2) * blocks / case.channels if blocks > 1 else 0.0
    if backward:
        return 1 + halo if case.order == "sequential" else 0.0
    return halo + max(0.0, 1 - constants[prefix + "CELLS"] / p.cells)


@pytest.mark.parametrize("case,plan", GUARDED, ids=lambda v: getattr(v, "id", v))
def test_guarded(case: Any, plan: str, rows: dict[str, dict[str, Any]]) -> None:
    """The guard raises no error, results are finite, and every output is written. The bits are the same in a random
    order of programs, and the traffic is within the limits of the design."""
    row = rows[f"{case.id} {plan}"]
    assert "error" not in row, row["error"]
    assert row["finite"] and row["equal"] and row["unwritten"] == 0
    whole = ["whole"] if plan == "whole" else []
    assert [k for k in row["forward"]["kernels"] if k == "whole"] == whole
    aliased = case.tail == "x_relu"  # the residual is x
    pixels = case.resolved_grid == case.space
    forward = launch.Pass(*case.shape, *case.resolved_grid, case.dtype.itemsize, "nhwc" in case.layout)
    pools = plan == "stages" and launch.is_pooled_by_graph(forward)
    for direction, limits in LIMITS.items():
        for name, (read, written) in limits.items():
            if name in row[direction]:
                extra = float(aliased and (direction, name) == ("forward", "x"))
                if name == "x" and (pixels or (pools and direction == "forward")):
                    extra += read_again(case, plan, direction)
                # The counts are quotients of whole numbers, which float64 rounds.
                assert row[direction][name][0] <= (read + extra) * (1 + 1e-12), f"{direction}: {name} is read too often"
                assert row[direction][name][1] == written, f"{direction}: {name} written"


def test_every_kernel_was_guarded(rows: dict[str, dict[str, Any]]) -> None:
    seen = {kernel for row in rows.values() for d in ("forward", "backward") for kernel in row[d]["kernels"]}
    assert seen == {
        "pool_runs", "pool_tiles", "graph", "lattice", "gate", "whole",
        "graph_backward_cells", "lattice_backward", "graph_backward_ring", "gate_backward", "whole_backward",
        "weights_backward",
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_offsets_beyond_32_bits(layout: str) -> None:
    """The last programs of each launch on maps of 2.3e9 elements stay in bounds, and reach the ends of the maps."""
    rows = triton_interpreted.start("offsets", layout)
    assert "error" not in rows[layout], rows[layout]["error"]
    reached = {name for _, highest in rows[layout]["launches"] for name, element in highest.items() if element > 2**31}
    assert reached >= {"x", "y", "dy", "dx", "residual", "dresidual"}
