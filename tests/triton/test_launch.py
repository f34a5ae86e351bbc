"""The launch table of the Triton kernels, and its tuner."""

from __future__ import annotations

import itertools

import pytest
import torch

from steam_kernels.backends import triton as backend
from steam_kernels.backends.triton import launch
from steam_kernels.schemas import Forward
from tests.support.stand_in_gpu import Gpu
from tests.support.triton_cases import rounds_to_bfloat16 as rounds_to_bfloat16


def passes() -> list[launch.Pass]:
    shapes = [(32, 256, 56, 56), (32, 2048, 7, 7), (1, 1, 1, 1), (2, 3, 500, 333), (1, 30, 1, 4000), (9, 96, 13, 14)]
    return [
        launch.Pass(*shape, min(g, shape[2]), min(g, shape[3]), itemsize, last, backward, family)
        for shape in shapes
        for g in (7, 1, 40)
        for itemsize in (2, 4, 8)
        for last in (False, True)
        for backward in (False, True)
        for family in launch.FAMILIES
    ]


def test_equal_constants_are_one_object() -> None:
    """Triton looks up a compiled kernel by the constants, and compares equal ones member by member."""
    first, again = (launch.graph(launch.Pass(n, 64, 14, 14, 7, 7, 4, False, False, "sm90"), 4, 2) for n in (4, 5))
    assert first != again
    for group in launch.GROUPS["graph"]:
        assert first.keywords[group] is again.keywords[group]


def test_launch_table() -> None:
    """Blocks are powers of two, tiles fit, programs cover the map, and divisors divide. Sizes are no constants."""
    for p in passes():
        shown = [launch.pool(p), launch.graph(p, 4, 2), launch.gate(p), launch.whole(p, 4, 2), launch.lattice(p, 4, 2)]
        for how in shown:
            if how is None:
                assert p.pixel_cells or launch.is_pooled_by_graph(p)
                continue
            told = how.constants
            blocks = {k: v for k, v in told.items() if not isinstance(v, bool) and v}
            assert all(v & (v - 1) == 0 for v in blocks.values()), (p, told)
            assert p.channels % told["CHANNELS_MULTIPLE"] == 0 and p.area % told.get("AREA_MULTIPLE", 1) == 0
            threads = how.num_warps * launch.FAMILIES[p.family].warp
            assert threads in (128, 256) or (how.kernel == "pool_tiles" and how.num_warps == 8)
            assert set(how.options) - {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"} == set(told)
            # A kernel that adds up products across lanes is compiled without contraction.
            assert how.options.get("enable_fp_fusion", True) == (how.kernel == "gate_backward")
        pooling, graphs, gating, _, lattices = shown
        if pooling is not None and pooling.kernel == "pool_tiles":
            told = pooling.constants
            tile = told["CHANNELS"] * told["ROWS"] * told["CELLS"] * told["COLUMNS"]
            assert tile <= 1024 * pooling.num_warps
        if pooling is not None and pooling.kernel == "pool_runs":
            told = pooling.constants
            assert told["CHANNELS"] * p.area <= told["RUN"] <= 4096 and told["CELLS"] >= p.cells
            assert told["CHANNELS"] * told["CELLS"] * told["PIXELS"] <= 8192
        told = graphs.constants
        most = 8192 if launch.is_pooled_by_graph(p) else 4096
        assert told["CHANNELS"] * told["CELLS"] <= 4096 and told["RUN"] <= most
        assert (pooling is None) == (p.pixel_cells or told["ROWS"] * told["COLUMNS"] > 1)
        assert graphs.programs == p.samples * -(-p.channels // told["CHANNELS"]) and lattices.programs == p.samples
        assert lattices.constants | {"BLOCKS": 1} == told | {"BLOCKS": 1}
        told = gating.constants
        # An element has no copy in another thread, which could read x after y has been stored in its place.
        assert launch.WHOLE_THREADS <= launch.GATE_THREADS <= told["ROWS"] * told["RUN"] <= 4096
        for how in (pooling, graphs, gating):
            if how is not None:
                told, group = how.constants, how.constants.get("GROUP", 1)
                walked = told.get("CHANNELS", told.get("ROWS", 1)) * how.steps * group
                assert max(walked, told.get("NODES", 1)) <= backend.LARGEST_BLOCK
        told = gating.constants
        covered = gating.programs // p.samples * told["ROWS"] * told["RUN"] * gating.steps
        assert covered >= p.channels * p.area


# ---- nothing large is serial -----------------------------------------------------------------------------------------

#: Maps of 2 MB and more: the stages of a ResNet, and two stages of a detector with one large image.
LARGE = [
    *((batch, *stage) for batch in (1, 32, 256) for stage in ((256, 56, 56), (512, 28, 28), (1024, 14, 14))),
    *((batch, 2048, 7, 7) for batch in (32, 256)),
    (1, 256, 200, 334),
    (1, 512, 100, 167),
]


def tiles_of(how: launch.Launch, p: launch.Pass) -> int:
    """The tiles of a program, one after the other."""
    told = how.constants
    if how.kernel == "pool_tiles":
        cell = -(-p.height // p.grid_h), -(-p.width // p.grid_w)
        return -(-cell[0] // told["ROWS"]) * -(-cell[1] // told["COLUMNS"])
    if how.kernel.startswith("graph"):
        return -(-p.cells // told["CELLS"]) * (1 if told["ONCE"] or p.backward else 2)
    if how.kernel.startswith("lattice"):
        blocks = -(-p.channels // told["CHANNELS"])
        return max(-(-blocks // told["BLOCKS"]) * -(-p.cells // told["CELLS"]), -(-p.cells // told["NODES"]))
    return how.steps


@pytest.mark.parametrize("family", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_nothing_large_is_serial(shape: tuple[int, ...], channels_last: bool, family: str) -> None:
    """A program has at most 8 tiles one after the other. The pool and gate stages have at least 16 warps, four programs
    of 4 warps, for each multiprocessor, or at most two tiles in each program. The graph stage has a program for at most
    64 channels."""
    for itemsize in (2, 4):
        if itemsize * shape[0] * shape[1] * shape[2] * shape[3] < 2 << 20:
            continue
        for backward in (False, True):
            p = launch.Pass(*shape, 7, 7, itemsize, channels_last, backward, family)
            assert not launch.is_small(p)
            for how in (launch.pool(p), launch.graph(p, 4, 2), launch.lattice(p, 4, 2), launch.gate(p)):
                if how is None:
                    continue
                assert tiles_of(how, p) <= 8, how
                if how.kernel.startswith(("pool", "gate")):
                    assert how.programs * how.num_warps >= 16 * p.processors or tiles_of(how, p) <= 2, how
                if how.kernel.startswith("graph"):
                    assert how.programs >= p.samples * p.channels // 64


def test_programs_compute_a_lattice_of_few_cells() -> None:
    """Of at most four pairs of a cell and a head for each of their 128 threads, with one load of all partials."""
    for shape, grid, heads, merged in (
        ((2048, 7, 7), 7, 4, True),
        ((2048, 7, 7), 7, 8, True),
        ((2048, 7, 7), 7, 16, False),
        ((256, 56, 56), 12, 4, False),
        ((256, 56, 56), 11, 4, True),
        ((4096, 7, 7), 7, 4, False),
    ):
        for last in (False, True):
            p = launch.Pass(32, *shape, grid, grid, 4, last, False, "sm90")
            assert launch.merges_lattice(p, heads, 2) == merged, (shape, grid, heads)


def test_kernels_without_partials_compile_once() -> None:
    """The stages of a ResNet have the same constants, whatever the channels: forward those with a pool stage, backward
    those with cells of several pixels."""
    for last in (False, True):
        forward, backward = (
            [launch.Pass(32, *stage, 7, 7, 4, last, back, "sm90") for stage in ((256, 56, 56), other)]
            for back, other in ((False, (512, 28, 28)), (True, (1024, 14, 14)))
        )
        first, second = (launch.graph(p, 4, 2) for p in forward)
        assert first.options == second.options
        first, second = (launch.cells(p, 4, 2, True) for p in backward)
        assert first.options == second.options
        assert first.programs == 32 * (256 // 64 + 1) and second.programs == 32 * (1024 // 64 + 1)


def test_the_graph_stage_pools_equal_cells_of_two_or_four_pixels() -> None:
    """Forward, if one tile has all cells. Another grid, cells of different sizes or more pixels have a pool stage."""
    for space, grid, pooled in (
        ((14, 14), (7, 7), True),
        ((7, 14), (7, 7), True),
        ((14, 7), (7, 7), True),
        ((7, 28), (7, 7), True),
        ((28, 7), (7, 7), False),
        ((7, 7), (7, 7), False),
        ((13, 14), (7, 7), False),
        ((28, 14), (7, 7), False),
        ((16, 32), (8, 16), True),
        ((24, 24), (12, 12), False),
    ):
        for last in (False, True):
            forward, backward = (launch.Pass(32, 1024, *space, *grid, 4, last, b, "sm90") for b in (False, True))
            assert launch.is_pooled_by_graph(forward) == pooled and not launch.is_pooled_by_graph(backward)
            told = launch.graph(forward, 4, 2).constants
            assert (told["ROWS"] * grid[0], told["COLUMNS"] * grid[1]) == (space if pooled else (0, 0))
            # A small sample has a pool stage in its program.
            assert launch.whole(forward, 4, 2).constants["GRAPH_ROWS"] == 0


def test_the_batch_changes_no_constant() -> None:
    """A new batch size compiles no kernel, and a sample has the same sums in any batch."""
    for family in launch.FAMILIES:
        for last in (False, True):
            for backward in (False, True):
                plans = []
                for batch in (1, 2, 32, 256, 4096):
                    p = launch.Pass(batch, 256, 14, 14, 7, 7, 4, last, backward, family)
                    shown = launch.pool(p), launch.graph(p, 4, 2), launch.lattice(p, 4, 2), launch.gate(p)
                    plans.append([how and how.options for how in shown])
                assert all(plan == plans[0] for plan in plans)


# ---- the tuner -------------------------------------------------------------------------------------------------------


def test_tuner_candidates_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate has the programs that its blocks need, and gives the same numbers as the table's launch."""
    from steam_kernels.backends.triton import tune

    monkeypatch.setattr(launch, "SMALL", 0)
    x, weight = torch.randn(1, 12, 10, 9), torch.randn(4, 8)
    p = launch.Pass(1, 12, 10, 9, 7, 7, 4)
    given = Forward.of(x, weight, weight, None, False, (7, 7), 4, 1, 4, True, True, 1.0, False)
    kernels = backend.triton_kernels().module
    expected, _ = kernels.forward(given)
    for stage, how in (
        ("pool", launch.pool(p)),
        ("graph", launch.graph(p, 4, 2)),
        ("lattice", launch.lattice(p, 4, 2)),
        ("gate", launch.gate(p)),
    ):
        found = list(tune.candidates(how, p))
        assert how in found and len(found) > 1
        assert len({(*c.constants.values(), c.steps, c.num_warps) for c in found}) == len(found)
        for other in found[:: max(1, len(found) // 4)]:
            with monkeypatch.context() as patch:
                patch.setattr(launch, stage, lambda *_, other=other: other)
                y, _ = kernels.forward(given)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_tuner_finds_and_prints_the_fastest() -> None:
    from steam_kernels.backends.triton import tune

    p = next(p for p, _ in tune.passes(32, "sm90") if not p.pixel_cells)
    results = tune.search(p, lambda how: 100.0 / how.num_warps)
    assert [r.table.kernel for r in results] == [launch.pool(p).kernel, "graph", "lattice", "gate"]
    for r in results:
        assert r.table == launch.pool(p) or r.table.kernel in ("graph", "lattice", "gate")
        assert r.best.num_warps == 2 * r.table.num_warps and r.gain == pytest.approx(1.0)
    lines = tune.table(results).splitlines()
    assert len(lines) == 2 + len(results) and all(line.endswith("| 100% |") for line in lines[2:])


def test_tuner_times_in_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays run until the GPU is warm, and the timed replays follow without a wait. A call compiles before it is
    captured."""
    from steam_kernels.backends.triton import tune

    gpu = Gpu(monkeypatch)
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "perf_counter", lambda: tune.WARM_UP / 10 * next(clock))
    # An event is at the end of its entry: the mark after a replay is two entries behind the mark before it.
    assert tune.time_call(lambda: gpu.enqueue("call")) == 2e6
    warm, timed = 9, ["mark", "replayed call", "mark"]
    assert gpu.log == ["call", "capture", *["replayed call"] * warm, *timed * tune.REPEATS, "wait"]


def test_tuner_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from steam_kernels.backends.triton import tune

    assert tune.main([]) == 1
    assert capsys.readouterr().out == "tuning needs a GPU, and TRITON_INTERPRET is set\n"
