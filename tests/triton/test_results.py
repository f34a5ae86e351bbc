"""The Triton kernels in the interpreter against the reference and the loop oracle, and equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import steam_kernels
from steam_kernels.backends.triton import launch
from tests.support import cases
from tests.support.cases import Case
from tests.support.triton_cases import MAPS, OTHERS, PAIRS, RANDOM, SMALL, run
from tests.support.triton_cases import launches as launches
from tests.support.triton_cases import rounds_to_bfloat16 as rounds_to_bfloat16


@triton.jit
def to_bfloat16(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_the_interpreter_rounds_as_pytorch_does() -> None:
    x = torch.cat((torch.randn(1018), torch.tensor([0.0, -0.0, 1e-40, 3.4e38, float("inf"), float("nan")])))
    y = torch.empty(1024, dtype=torch.bfloat16)
    to_bfloat16[(1,)](x, y, 1024)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=lambda i: PAIRS[i].id)
def test_pairs(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second case runs by one launch per stage."""
    if index % 2:
        monkeypatch.setattr(launch, "SMALL", 0)
    cases.check(PAIRS[index], "triton", *cases.make(PAIRS[index]))


@pytest.mark.parametrize("case", MAPS, ids=lambda c: c.id)
def test_maps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    cases.check(case, "triton", *cases.make(case))


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.id)
def test_other_levels(case: Case, launches: str) -> None:
    cases.check(case, "triton", *cases.make(case))


def test_every_level_of_the_cpu_kernels_is_met() -> None:
    """Some case has each level of each factor, except the sizes and the scale. Random units have radii beyond 2."""
    for name, levels in cases.FACTORS.items():
        if name not in ("where", "channels", "scale", "batch"):
            assert {getattr(case, name) for case in [*PAIRS, *MAPS, *OTHERS]} >= set(levels), name
    assert max(case.radius for case in RANDOM) > 2


def test_maps_reach_every_kernel_and_loop() -> None:
    """The cases of ``test_maps`` have more than one tile of each kind."""
    seen: dict[str, set[str]] = {}
    for case in MAPS:
        for backward in (False, True):
            nchw = "nhwc" not in case.layout
            p = launch.Pass(1, case.channels, *case.space, *case.resolved_grid, case.dtype.itemsize, not nchw, backward)
            pooling, graphs, gating = launch.pool(p), launch.graph(p, 4, 2), launch.gate(p)
            own = seen.setdefault(f"{'nchw' if nchw else 'nhwc'} {'backward' if backward else 'forward'}", set())
            if pooling is not None:
                own.add(pooling.kernel)
                if pooling.programs > 1:
                    own.add(f"{pooling.kernel} x n")
            blocks = -(-p.channels // graphs.constants["CHANNELS"])
            own.add(f"graph x {min(blocks, 3)}")
            if graphs.constants["ROWS"]:
                own.add(f"graph pools {graphs.constants['ROWS']} x {graphs.constants['COLUMNS']}")
            if p.cells > graphs.constants["CELLS"]:
                own.add("cells x n")
            if p.pixel_cells:
                own.add("pixel cells")
            if gating.programs > 1:
                own.add("gate x n")
    both = {"pool_tiles", "pool_tiles x n", "graph x 1", "cells x n", "pixel cells", "gate x n"}
    pools = {"graph pools 2 x 2", "graph pools 1 x 4", "graph pools 2 x 1"}
    assert pools <= seen["nchw forward"] and pools <= seen["nhwc forward"]
    for direction in ("forward", "backward"):
        assert seen[f"nchw {direction}"] >= both | {"pool_runs", "pool_runs x n", "graph x 3"}, direction
        assert seen[f"nhwc {direction}"] >= both | {"graph x 3"}, direction


@pytest.mark.parametrize("case", RANDOM, ids=lambda c: c.id)
def test_random_unit_against_the_oracle(case: Case) -> None:
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy, cases.exact_by_oracle(case, inputs, dy))
    bounds.check(run(case), case.id)


def test_runs_in_the_number_of_launches_promised(launches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forward and four backward. One less if each cell is a pixel, or forward if the graph stage pools. The
    lattice of many cells is one more launch of each pass. For a small sample it is one forward, and two backward,
    because a launch of its own adds up the gradients of the weights."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    original = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    run(SMALL)
    run(SMALL.but(space=(7, 7), grid=None))
    run(SMALL.but(space=(13, 11), grid=(13, 11)))
    run(SMALL.but(space=(14, 14), grid=None))
    if launches == "whole":
        assert names == ["whole", "whole_backward", "weights_backward"] * 4
    else:
        forward, backward = ["graph", "gate"], ["graph_backward_cells", "graph_backward_ring", "gate_backward"]
        many = [["graph", "lattice", "gate"], [backward[0], "lattice_backward", *backward[1:]]]
        few = ["pool_runs", *forward, "pool_runs", *backward, *forward, *backward]
        assert names == [*few, *many[0], *many[1], *forward, "pool_runs", *backward]


def test_same_bits_again(launches: str) -> None:
    first, second = run(SMALL), run(SMALL)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sample_does_not_depend_on_its_batch(launches: str) -> None:
    case = SMALL.but(batch=3, tail="residual_relu")
    inputs, dy = cases.make(case)
    whole = cases.forward_backward(steam_kernels.steam, inputs, dy, backend="triton", **case.options)
    alone = {k: v[1:2].contiguous() if v.dim() == 4 else v for k, v in inputs.items()}
    one = cases.forward_backward(steam_kernels.steam, alone, dy[1:2], backend="triton", **case.options)
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(one[name], whole[name][1:2]), name


def test_empty_batch(launches: str) -> None:
    got = run(SMALL.but(batch=0, tail="residual_relu"))
    assert got["y"].shape == got["dx"].shape == got["dresidual"].shape == (0, 6, 9, 8)
    assert not got["dchannel_weight"].any() and not got["dspatial_weight"].any()
