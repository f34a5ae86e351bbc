"""The launch table of the Triton kernels, and its tuner."""

from __future__ import annotations

import pytest
import torch

from steam_kernels.backends import triton as backend
from steam_kernels.backends.triton import launch
from steam_kernels.schemas import Forward
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


def test_launch_table() -> None:
    """Blocks are powers of two, tiles fit, programs cover the map, and divisors divide. Sizes are no constants."""
    for p in passes():
        shown = [launch.pool(p), launch.graph(p, 4, 2, 3), launch.gate(p), launch.whole(p, 4, 2, 3)]
        for how in shown:
            if how is None:
                assert p.pixel_cells
                continue
            told = how.constants
            blocks = {k: v for k, v in told.items() if not isinstance(v, bool) and "STEPS" not in k and v}
            assert all(v & (v - 1) == 0 for v in blocks.values()), (p, told)
            assert p.channels % told["CHANNELS_MULTIPLE"] == 0 and p.area % told.get("AREA_MULTIPLE", 1) == 0
            assert how.num_warps * launch.FAMILIES[p.family].warp in (128, 256)
            assert set(how.options) - {"num_warps", "num_stages", "maxnreg"} == set(told)
        pooling, graphs, gating, _ = shown
        if pooling is not None and pooling.kernel == "pool_tiles":
            told = pooling.constants
            assert told["CHANNELS"] * told["ROWS"] * told["CELLS"] * told["COLUMNS"] <= 4096
        if pooling is not None and pooling.kernel == "pool_runs":
            told = pooling.constants
            assert told["CHANNELS"] * p.area <= told["RUN"] <= 4096 and told["CELLS"] >= p.cells
            assert told["CHANNELS"] * told["CELLS"] * told["PIXELS"] <= 8192
        assert graphs.constants["CHANNELS"] * graphs.constants["CELLS"] <= 8192
        assert graphs.constants["RUN"] <= 8192 and graphs.programs == p.samples
        told = gating.constants
        assert told["ROWS"] * told["RUN"] <= 4096
        for how in (pooling, graphs, gating):
            if how is not None:
                told, group = how.constants, how.constants.get("GROUP", 1)
                walked = told.get("CHANNELS", told.get("ROWS", 1)) * told.get("STEPS", 1) * group
                assert max(walked, told.get("NODES", 1)) <= backend.LARGEST_BLOCK
        told = gating.constants
        covered = gating.programs // p.samples * told["ROWS"] * told["RUN"] * told["STEPS"]
        assert covered >= p.channels * p.area


# ---- the tuner -------------------------------------------------------------------------------------------------------


def test_tuner_candidates_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate has the programs that its blocks need, and gives the same numbers as the table's launch."""
    from steam_kernels.backends.triton import tune

    monkeypatch.setattr(launch, "SMALL", 0)
    x, weight = torch.randn(1, 12, 14, 14), torch.randn(4, 8)
    p = launch.Pass(1, 12, 14, 14, 7, 7, 4)
    given = Forward.of(x, weight, weight, None, False, (7, 7), 4, 1, 4, True, True, 1.0, False)
    kernels = backend.triton_kernels().module
    expected, _ = kernels.forward(given)
    for stage, how in (("pool", launch.pool(p)), ("graph", launch.graph(p, 4, 2, 3)), ("gate", launch.gate(p))):
        found = list(tune.candidates(how, p))
        assert (
            how in found and len(found) > 1 and len({(*c.constants.values(), c.num_warps) for c in found}) == len(found)
        )
        for other in found[:: max(1, len(found) // 4)]:
            with monkeypatch.context() as patch:
                patch.setattr(launch, stage, lambda *_, other=other: other)
                y, _ = kernels.forward(given)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_tuner_finds_and_prints_the_fastest() -> None:
    from steam_kernels.backends.triton import tune

    p = next(p for p, _ in tune.passes(32, "sm90") if not p.pixel_cells)
    results = tune.search(p, lambda how: 100.0 / how.num_warps)
    assert [r.table.kernel for r in results] == [launch.pool(p).kernel, "graph", "gate"]
    for r in results:
        assert r.table == launch.pool(p) or r.table.kernel in ("graph", "gate")
        assert r.best.num_warps == 2 * r.table.num_warps and r.gain == pytest.approx(1.0)
    lines = tune.table(results).splitlines()
    assert len(lines) == 2 + len(results) and all(line.endswith("| 100% |") for line in lines[2:])


def test_tuner_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from steam_kernels.backends.triton import tune

    assert tune.main([]) == 1
    assert capsys.readouterr().out == "tuning needs a GPU, and TRITON_INTERPRET is set\n"
