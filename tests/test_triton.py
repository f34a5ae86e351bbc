"""The Triton kernels in the interpreter: against the reference, against the loop oracle, and what the backend promises.

Bounds, races, traffic and the compiled code have tests of their own; here it is numbers, operators and choice.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import test_nonfinite
import test_numerics
import torch
from cases import Case

import steam_kernels
from steam_kernels import FusedSTEAM, backends, ops
from steam_kernels.backends import gpu

pytest.importorskip("triton")
if not gpu.triton_kernels().module.INTERPRETED:
    pytest.skip("Triton was imported to run on a GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

from steam_kernels.backends.triton import launch

OPS = torch.ops.steam_kernels
#: Every feasible pair of two factors' values; costs in the interpreter follow the number of tiles and neighbours.
FACTORS: dict[str, tuple[Any, ...]] = {
    "where": (
        ((7, 7), None),
        ((14, 14), None),
        ((14, 14), (3, 5)),
        ((28, 28), None),
        ((9, 8), "w2"),
        ((13, 2), (5, 7)),
        ((1, 1), None),
    ),
    "channels": (1, 5, 24),
    "layout": ("nchw", "nhwc", "offset_nchw", "offset_nhwc", "column_slice"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "attention": ((8, 4), (8, 1), (16, 8), (3, 1), (12, 6)),
    "radius": (1, 0, 2),
    "neighbors": (4, 8),
    "self_loops": (True, False),
    "order": ("sequential", "parallel"),
    "scale": (1.0, 1.1),
    "weights": ("float32", "x"),
    "tail": ("none", "relu", "residual", "residual_relu", "x_relu"),
    "dy_layout": ("same", "other"),
}
#: The stages of a ResNet at 224, wide enough for several tiles, and maps of other kinds.
MAPS = [
    Case(space=(56, 56), channels=9, batch=1),
    Case(space=(56, 56), channels=9, batch=1, layout="nhwc", dtype=torch.bfloat16),
    Case(space=(28, 28), channels=6, batch=1, dtype=torch.bfloat16, tail="residual_relu"),
    Case(space=(28, 28), channels=70, batch=1, layout="nhwc"),
    Case(space=(14, 14), channels=40, batch=1, dtype=torch.float16, tail="relu"),
    Case(space=(14, 14), channels=130, batch=1, layout="nhwc", dtype=torch.bfloat16),
    Case(space=(7, 7), channels=300, batch=1, radius=2),
    Case(space=(7, 7), channels=300, batch=1, order="parallel", dtype=torch.bfloat16, tail="residual_relu"),
    Case(space=(7, 7), channels=300, batch=1, layout="nhwc", self_loops=False),
    Case(space=(112, 112), channels=3, batch=1),
    Case(space=(60, 92), channels=2, batch=1, grid="w8", self_loops=False, tail="relu"),
    Case(space=(61, 300), channels=2, batch=1, grid=(3, 1)),
    Case(space=(2, 700), channels=3, batch=1, grid=(2, 1), layout="nhwc"),
    Case(space=(24, 31), channels=5, batch=1, grid="w2"),
    Case(space=(24, 31), channels=5, batch=1, grid="w2", layout="nhwc"),
    Case(space=(12, 12), channels=10, batch=1, grid=(12, 12)),
    # the ring reaches around
    Case(space=(5, 4), channels=21, batch=1, radius=10, attention=(2, 1)),
    Case(space=(3, 3), channels=4, radius=9, self_loops=False),
]
#: Levels that the CPU's grid of cases has and the one above lacks, each at least once.
OTHERS = [
    Case((6, 5), 7, 3, 3, "channel_slice", attention=(8, 2), radius=3, tail="other_relu", dy_layout="expanded"),
    Case((5, 4), 5, 1, 2, "channel_slice_nhwc", torch.bfloat16, attention=(8, 8), tail="other_relu", dy_layout="other"),
    Case((4, 6), 6, 2, (3, 2), "transposed", torch.float16, attention=(16, 4), radius=3, dy_layout="expanded"),
    Case((3, 4), 130, 1, (2, 2), "nhwc", torch.float64, attention=(8, 2), tail="other_relu", dy_layout="expanded"),
    Case((3, 5), 130, 1, (3, 5), "offset_nchw", attention=(16, 4), order="parallel", scale=4.0, tail="residual_relu"),
]
SMALL = Case(space=(9, 8), channels=6, grid=(3, 5), batch=2)
PAIRS = cases.all_pairs(FACTORS)
#: Radii beyond 2 where there are few channels: the cost of interpreting grows with the square of the neighbours.
RANDOM = [c for c in cases.random_cases(40, seed=77) if c.radius < 3 or c.channels < 8][:14]


@pytest.fixture(autouse=True)
def _rounds_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearest, ties to even, as GPUs do and PyTorch does: the interpreter cuts float32 off, twice as far away."""
    cut_off = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@triton.jit
def to_bfloat16(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_the_interpreter_rounds_as_pytorch_does() -> None:
    x = torch.cat((torch.randn(1018), torch.tensor([0.0, -0.0, 1e-40, 3.4e38, float("inf"), float("nan")])))
    y = torch.empty(1024, dtype=torch.bfloat16)
    to_bfloat16[(1,)](x, y, 1024)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@pytest.fixture(params=["whole", "stages"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One launch for a small sample, or one a stage."""
    if request.param == "stages":
        monkeypatch.setattr(launch, "SMALL", 0)
    return request.param


def run(case: Case) -> dict[str, torch.Tensor]:
    inputs, dy = cases.make(case)
    return cases.forward_backward(steam_kernels.steam, inputs, dy, backend="triton", **case.options)


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=lambda i: PAIRS[i].id)
def test_pairs(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other case by one launch a stage."""
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
    """Of each factor but the sizes and scale, on some case; and random units have radii beyond 2."""
    for name, levels in cases.FACTORS.items():
        if name not in ("where", "channels", "scale", "batch"):
            assert {getattr(case, name) for case in [*PAIRS, *MAPS, *OTHERS]} >= set(levels), name
    assert max(case.radius for case in RANDOM) > 2


def test_maps_reach_every_kernel_and_loop() -> None:
    """The cases above are wide enough for more than one tile of each kind, or they would prove less than they say."""
    seen: dict[str, set[str]] = {}
    for case in MAPS:
        for backward in (False, True):
            nchw = "nhwc" not in case.layout
            p = launch.Pass(1, case.channels, *case.space, *case.resolved_grid, case.dtype.itemsize, not nchw, backward)
            pooling, graphs, gating = launch.pool(p), launch.graph(p, 4, 2, 2 * case.radius + 1), launch.gate(p)
            own = seen.setdefault(f"{'nchw' if nchw else 'nhwc'} {'backward' if backward else 'forward'}", set())
            if pooling is not None:
                own.add(pooling.kernel)
                if pooling.programs > 1:
                    own.add(f"{pooling.kernel} x n")
            blocks = -(-p.channels // graphs.constants["CHANNELS"])
            own.add(f"graph x {min(blocks, 3)}")
            if p.cells > graphs.constants["CELLS"]:
                own.add("cells x n")
            if p.pixel_cells:
                own.add("pixel cells")
            if gating.programs > 1:
                own.add("gate x n")
    both = {"pool_tiles", "pool_tiles x n", "graph x 1", "cells x n", "pixel cells", "gate x n"}
    for direction in ("forward", "backward"):
        assert seen[f"nchw {direction}"] >= both | {"pool_runs", "pool_runs x n", "graph x 3"}, direction
        assert seen[f"nhwc {direction}"] >= both | {"graph x 3"}, direction


@pytest.mark.parametrize("case", RANDOM, ids=lambda c: c.id)
def test_random_unit_against_the_oracle(case: Case) -> None:
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy, cases.exact_by_oracle(case, inputs, dy))
    bounds.check(run(case), case.id)


def test_runs_in_the_number_of_launches_promised(launches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forwards and four backwards; for a small sample one, and one more for the weights' gradients."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    original = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    run(SMALL)
    run(SMALL.but(space=(7, 7), grid=None))
    if launches == "whole":
        assert names == ["whole", "whole_backward", "weights_backward"] * 2
    else:
        both = ["graph", "gate"], ["graph_backward", "gate_backward", "weights_backward"]
        assert names == ["pool_runs", *both[0], "pool_runs", *both[1], *both[0], *both[1]]


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


@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
def test_non_finite_stays_in_its_sample(launches: str, layout: str) -> None:
    """A NaN or an Inf is its own sample's matter, and where a pixel is NaN, so is y."""
    for bad in (float("nan"), float("inf")):
        case = SMALL.but(batch=3, layout=layout, tail="residual_relu")
        inputs, _ = cases.make(case)
        with torch.no_grad():
            clean = steam_kernels.steam(**inputs, backend="triton", **case.options)
            inputs["x"][1, 2, 3, 4] = bad
            y = steam_kernels.steam(**inputs, backend="triton", **case.options)
            expected = steam_kernels.reference.steam(**inputs, **case.options)
        assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
        assert torch.equal(y.isnan(), expected.isnan()) and y[1].isnan().any()


# ---- numerics and what is not finite, as promised of every backend with kernels --------------------------------------

STRAIGHT = pytest.mark.parametrize("launches,layout", [("whole", "nchw"), ("stages", "nhwc")], indirect=["launches"])
CROSSED = pytest.mark.parametrize("launches,layout", [("whole", "nhwc"), ("stages", "nchw")], indirect=["launches"])
CENTRED = {"whole": {}, "stages": {"order": "parallel", "neighbors": 8, "self_loops": False, "attention": (8, 1)}}
BAD = Case(space=(5, 6), channels=5, grid=(3, 4), batch=3, attention=(2, 1))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_variances_are_centred(launches: str, layout: str) -> None:
    """Tokens of 50 that differ by 0.01; equal ones, whose variance is 0."""
    options = CENTRED[launches]
    test_numerics.test_far_from_zero("triton", 50.0, 0.01, (9, 8), 11, layout, options, torch.float32)
    test_numerics.test_constant_maps_are_not_noisy("triton", (5, 3), 7, layout, -50.0, 0.0)


@STRAIGHT
def test_saturated_gates(launches: str, layout: str) -> None:
    sign = -1.0 if layout == "nchw" else 1.0
    test_numerics.test_saturated_gates("triton", torch.float32, layout, "both", sign, 40.0)


@CROSSED
def test_sharp_attention(launches: str, layout: str) -> None:
    test_numerics.test_sharp_attention("triton", layout, 1.0 if layout == "nchw" else -1.0)


@CROSSED
def test_one_bad_value(launches: str, layout: str) -> None:
    """In x, then in dy: every result is finite where the reference's is, and the other samples keep their bits."""
    sequential = launches == "stages"
    order, tail = ("sequential", "residual_relu") if sequential else ("parallel", "none")
    case = BAD.but(layout=layout, order=order, tail=tail)
    test_nonfinite.test_one_bad_value_in_x(case, "triton", float("nan" if sequential else "-inf"))
    test_nonfinite.test_one_bad_value_in_dy(case, "triton", float("inf" if sequential else "nan"))


@CROSSED
def test_nan_spreads_only_along_the_graphs(launches: str, layout: str) -> None:
    test_nonfinite.test_nan_spreads_only_along_the_graphs("triton", (14, 14), (7, 7), layout)


@pytest.mark.parametrize("index", range(len(test_nonfinite.LARGE_MAPS)))
def test_finite_maps_of_any_size(launches: str, index: int) -> None:
    case, dtype = test_nonfinite.LARGE_MAPS[index], torch.float32
    test_nonfinite.test_finite_maps_of_any_size(case, dtype, 1e36, "triton")
    test_nonfinite.test_finite_maps_of_any_size_through_open_gates(case, dtype, 1e30, "triton")


@STRAIGHT
def test_relu_keeps_nan(launches: str, layout: str) -> None:
    test_nonfinite.test_relu_keeps_nan("triton", layout)


def test_float16_overflow_is_inf(launches: str) -> None:
    test_nonfinite.test_float16_overflow_in_y_is_inf("triton")


@pytest.mark.parametrize("wanted", [("x",), ("channel_weight",), ("spatial_weight",), ("residual",), ("x", "residual")])
def test_what_is_not_asked_for(launches: str, wanted: tuple[str, ...]) -> None:
    case = SMALL.but(tail="residual_relu")
    inputs, dy = cases.make(case)
    everything = cases.forward_backward(steam_kernels.steam, inputs, dy, backend="triton", **case.options)
    given = {k: v.detach().requires_grad_(k in wanted) for k, v in inputs.items()}
    steam_kernels.steam(**given, backend="triton", **case.options).backward(dy)
    for name, value in given.items():
        if name in wanted:
            torch.testing.assert_close(value.grad, everything["d" + name], rtol=1e-6, atol=1e-7)
        else:
            assert value.grad is None, name


def test_only_the_masked_residual(launches: str) -> None:
    """The operator itself, asked for the residual's gradient alone."""
    arguments = backward_arguments(SMALL.but(tail="residual_relu"), (False, False, False, True))
    dy, _, y = arguments[:3]
    *others, dresidual = OPS.triton_backward(*arguments)
    assert all(t.numel() == 0 for t in others)
    assert torch.equal(dresidual, dy.masked_fill(y <= 0, 0))


def test_weights_of_any_strides(launches: str) -> None:
    inputs, dy = cases.make(SMALL)
    expected = run(SMALL)
    for name in ("channel_weight", "spatial_weight"):
        inputs[name] = inputs[name].t().contiguous().t()
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend="triton", **SMALL.options)
    assert got["dchannel_weight"].stride() == (1, 4)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "column_slice"])
def test_in_place(launches: str, layout: str) -> None:
    case = SMALL.but(layout=layout, tail="residual_relu")
    inputs, _ = cases.make(case)
    with torch.no_grad():
        expected = steam_kernels.steam(**inputs, backend="triton", **case.options)
        y = steam_kernels.steam(**inputs, backend="triton", inplace=True, **case.options)
    assert y is inputs["x"] and torch.equal(y, expected)


def test_twice_differentiable() -> None:
    case = TINY.but(dtype=torch.float64, weights="x")
    inputs, _ = cases.make(case)
    leaves = tuple(v.requires_grad_() for v in inputs.values())

    def unit(x: torch.Tensor, channel: torch.Tensor, spatial: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(x, channel, spatial, backend="triton", **case.options)

    assert torch.autograd.gradgradcheck(unit, leaves, fast_mode=True)


# ---- operators -------------------------------------------------------------------------------------------------------


def forward_arguments(case: Case) -> tuple[Any, ...]:
    inputs, _ = cases.make(case)
    weights = inputs["channel_weight"], inputs["spatial_weight"]
    return inputs["x"], *weights, inputs.get("residual"), *case.operator_options, case.tail.endswith("relu"), True


def backward_arguments(case: Case, need: tuple[bool, ...]) -> tuple[Any, ...]:
    arguments = forward_arguments(case)
    y, saved = OPS.triton_forward(*arguments)
    x, channel_weight, spatial_weight, _, *options, relu, _ = arguments
    dy = torch.empty_like(x).normal_()
    return dy, x, y if relu else None, channel_weight, spatial_weight, saved, *options, *need


UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TINY = Case(space=(3, 4), channels=2, grid=2, batch=1, attention=(2, 1))


@pytest.mark.parametrize("case", [TINY, TINY.but(layout="nhwc", tail="residual_relu")], ids=lambda c: c.id)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(OPS.triton_forward.default, forward_arguments(case), test_utils=UTILITIES)
    torch.library.opcheck(OPS.triton_forward_.default, forward_arguments(case)[:-1], test_utils=UTILITIES)
    relu = case.tail.endswith("relu")
    torch.library.opcheck(
        OPS.triton_backward.default, backward_arguments(case, (True, True, True, relu)), test_utils=UTILITIES
    )


def test_compiles_without_a_break() -> None:
    """One graph, one opaque operator each way, no pause to look for a backend."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    unit = FusedSTEAM(backend="triton")
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    recorded = AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    y = torch.compile(unit, fullgraph=True, backend=recorded)(x)
    y.sum().backward()
    assert len(recorded.graphs) == 1
    called = [str(n.target) for g in (*recorded.fw_graphs, *recorded.bw_graphs) for n in g.graph.nodes]
    assert [t for t in called if "steam_kernels" in t] == [
        "steam_kernels.triton_forward.default",
        "steam_kernels.triton_backward.default",
    ]
    assert torch.equal(y, unit(x))


def test_flops_are_the_cpu_operators() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def count(backend: str) -> int:
        inputs, dy = cases.make(SMALL)
        with FlopCounterMode(display=False) as counter:
            cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **SMALL.options)
        return counter.get_total_flops()

    if steam_kernels.available_backends()["cpu"]:
        pytest.skip("no CPU kernels here")
    assert count("triton") == count("cpu") > 0


# ---- the module's own functions, called directly ---------------------------------------------------------------------

DIRECT = Case(space=(3, 4), channels=3, grid=2, batch=2, attention=(2, 1), tail="residual_relu")
NEITHER = [layout for layout in cases.LAYOUTS if layout not in cases.DENSE_LAYOUTS]


def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: pytest.fail("a kernel was launched"))


@pytest.mark.parametrize("layout", NEITHER)
def test_direct_calls_refuse_x_of_other_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels know two layouts: any other x must not be read as one of them."""
    kernels = gpu.triton_kernels().module
    given = forward_arguments(DIRECT)
    x, channel_weight, spatial_weight, _, *options, _, _ = given
    y, saved = kernels.forward(*given)
    bad = cases.lay_out(x, layout)
    nothing_runs(monkeypatch)
    allowed = r"x must be dense in NCHW or channels_last.*strides"
    with pytest.raises(ValueError, match=allowed):
        kernels.forward(bad, *given[1:])
    with pytest.raises(ValueError, match=allowed):
        kernels.forward_(bad, *given[1:-1])
    with pytest.raises(ValueError, match=allowed):
        kernels.backward(y, bad, y, channel_weight, spatial_weight, saved, *options, *[True] * 4)


def test_direct_calls_refuse_maps_unlike_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual, dy or y of other strides, shape or dtype, what forward did not save, a residual's gradient that is
    dy."""
    kernels = gpu.triton_kernels().module
    given = forward_arguments(DIRECT)
    x, channel_weight, spatial_weight, _, *options, relu, _ = given
    y, saved = kernels.forward(*given)
    arguments = {"dy": y, "x": x, "y": y, "channel_weight": channel_weight, "spatial_weight": spatial_weight}
    arguments["saved"] = saved
    nothing_runs(monkeypatch)
    others = [cases.lay_out(y, layout) for layout in ("nhwc", *NEITHER)] + [y[:1], y[..., :2], y.expand(2, 2, 3, 3, 4)]
    for error, found in [(ValueError, other) for other in others] + [(TypeError, y.half())]:
        with pytest.raises(error, match="residual must"):
            kernels.forward(x, channel_weight, spatial_weight, found, *options, relu, True)
        with pytest.raises(error, match="residual must"):
            kernels.forward_(x, channel_weight, spatial_weight, found, *options, relu)
        for name in ("dy", "y"):
            with pytest.raises(error, match=f"{name} must"):
                kernels.backward(*(arguments | {name: found}).values(), *options, *[True] * 4)
    for wrong in (saved[:1], saved.new_empty(0), saved.double(), saved.t().contiguous().t()):
        with pytest.raises(ValueError, match="saved must be what forward returned"):
            kernels.backward(*(arguments | {"saved": wrong}).values(), *options, *[True] * 4)
    with pytest.raises(ValueError, match="need_residual must be False"):
        kernels.backward(*(arguments | {"y": None}).values(), *options, *[True] * 4)


@pytest.mark.parametrize(
    "shape,strides,others",
    [
        ((1, 1, 3, 4), (99, 77, 4, 1), (5, 1, 4, 1)),
        ((2, 3, 1, 1), (3, 1, 55, 7), (3, 1, 3, 3)),
        ((1, 3, 1, 4), (2, 1, 9, 3), (12, 1, 12, 3)),
        ((0, 3, 4, 5), (7, 1, 99, 2), (60, 20, 5, 1)),
    ],
)
def test_strides_of_axes_of_length_1_mean_nothing(
    launches: str, shape: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]
) -> None:
    """Nor does any stride of an empty batch: the same numbers as of plain maps."""
    kernels = gpu.triton_kernels().module
    case = DIRECT.but(batch=shape[0], channels=shape[1], space=shape[2:])
    plain = forward_arguments(case)
    y, saved = kernels.forward(*plain)
    options = plain[4:-2]
    needs = [True] * 4
    expected = kernels.backward(y, plain[0], y, *plain[1:3], saved, *options, *needs)

    def strided(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        return t.new_empty(200).as_strided(shape, strides).copy_(t)

    x, residual = strided(plain[0], strides), strided(plain[3], others)
    found, again = kernels.forward(x, *plain[1:3], residual, *plain[4:])
    got = kernels.backward(strided(y, others), x, strided(y, strides), *plain[1:3], again, *options, *needs)
    for a, b in zip((found, again, *got), (y, saved, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- choice ----------------------------------------------------------------------------------------------------------


def test_the_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is usable, by argument or environment, and slow: nobody gets it who did not name it."""
    from torch.profiler import profile

    assert steam_kernels.available_backends()["triton"] == ""
    unit, x = FusedSTEAM(), torch.randn(1, 3, 4, 5)

    def operators() -> set[str]:
        with profile() as record:
            unit(x)
        return {e.key for e in record.key_averages() if e.key.startswith("steam_kernels::")}

    assert "steam_kernels::triton_forward" not in operators()
    monkeypatch.setenv("STEAM_KERNELS_BACKEND", "triton")
    assert operators() == {"steam_kernels::triton_forward"}


def call_of(x: torch.Tensor, embed_dim: int = 8, **options: Any) -> backends.Call:
    weight = torch.empty(4, embed_dim)
    unit = steam_kernels.config.Unit(**options)
    return backends.Call(x, weight, weight, None, unit, unit.grid(*x.shape[2:]))


def test_why_not_sizes() -> None:
    one = torch.zeros(1)
    assert gpu.why_not_triton(call_of(one.expand(1, 1, 10_000, 10_000))) == ""
    assert "16 H W below 2^31" in gpu.why_not_triton(call_of(one.expand(1, 1, 20_000, 20_000)))
    # C + 1 + 1 + 2^15: a block beyond the last channel, the ring, one cell's number
    assert gpu.why_not_triton(call_of(one.expand(1, 2**31 - 2**15 - 3, 1, 1))) == ""
    for size in (2**31 - 2**15 - 2, 2**31):
        assert "C + gh gw + channel_radius + 2^15 below 2^31" in gpu.why_not_triton(call_of(one.expand(1, size, 1, 1)))
    wide = one.expand(1, 2**30, 1, 1)
    assert gpu.why_not_triton(call_of(wide, channel_radius=2**28)) == ""
    assert gpu.why_not_triton(call_of(one.expand(1, 3 * 2**29, 1, 1), channel_radius=2**31)) != ""
    for space, name in (((2**25, 1), "gh (H + 1)"), ((1, 2**25), "gw (W + 1)")):
        # 63 cells of 2^25 pixels fit; with 64, one pixel less leaves the product below 2^31 and not what ends a cell
        assert gpu.why_not_triton(call_of(one.expand(1, 1, *space), grid_size=63)) == ""
        assert f"{name} below 2^31" in gpu.why_not_triton(call_of(one.expand(1, 1, *space), grid_size=64))
        under = tuple(max(1, size - 1) for size in space)
        assert f"{name} below 2^31" in gpu.why_not_triton(call_of(one.expand(1, 1, *under), grid_size=64))
    assert "embed_dim of 16384" in gpu.why_not_triton(call_of(one.expand(1, 1, 1, 1), embed_dim=16385))


def test_why_not_another_device() -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: .*meta"):
        FusedSTEAM(backend="triton", device="meta")(torch.empty(1, 3, 4, 4, device="meta"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if Triton had been imported to compile; the answers that are kept are forgotten before and after."""
    monkeypatch.setattr(gpu.triton_kernels().module, "INTERPRETED", False)
    gpu._why_not_device.cache_clear()
    gpu.family.cache_clear()
    yield monkeypatch
    gpu._why_not_device.cache_clear()
    gpu.family.cache_clear()


def test_why_not_the_cpu(compiled: pytest.MonkeyPatch) -> None:
    assert "on the CPU" in gpu.why_not_triton(call_of(torch.zeros(1, 1, 2, 2)))


def test_why_not_without_a_gpu(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not_triton(None) == "the triton backend needs a GPU, and PyTorch sees none"


def test_why_not_an_old_gpu(compiled: pytest.MonkeyPatch) -> None:
    capabilities = {0: (6, 1), 1: (9, 0)}
    compiled.setattr(torch.cuda, "is_available", lambda: True)
    compiled.setattr(torch.cuda, "device_count", lambda: 2)
    compiled.setattr(torch.cuda, "get_device_capability", capabilities.get)
    compiled.setattr(torch.version, "hip", None)
    assert gpu.why_not_device("cuda", 0) == "the triton backend needs compute capability 7.0, and cuda:0 has 6.1"
    assert gpu.why_not_device("cuda", 1) == gpu.why_not_triton(None) == ""
    assert gpu.family(1) == "sm90"


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    gpu.triton_kernels.cache_clear()
    gpu._why_not_device.cache_clear()
    monkeypatch.setitem(sys.modules, "steam_kernels.backends.triton", None)
    monkeypatch.delattr(backends, "triton")
    try:
        reason = gpu.why_not_triton(None)
    finally:
        monkeypatch.undo()
        gpu.triton_kernels.cache_clear()
        gpu._why_not_device.cache_clear()
    assert "Triton cannot be imported: ModuleNotFoundError" in reason


@pytest.mark.parametrize("name", ops.Operators._fields)
def test_the_gpu_key_runs_the_first_backend_that_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python function behind the main operators' CUDA key, on CPU tensors as if they were on a GPU."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"steam_kernels::{name}", "CUDA")
    case = SMALL.but(tail="residual_relu")

    def arguments() -> tuple[Any, ...]:
        if name == "backward":
            torch.manual_seed(0)
            return backward_arguments(case, (True, True, True, True))
        return forward_arguments(case)[: None if name == "forward" else -1]

    run = ops._first_on_gpu(name, lambda *args: "plain")
    seen: list[backends.Call] = []
    monkeypatch.setattr(backends, "first", lambda call: seen.append(call) or "triton")
    given, same = arguments(), arguments()
    got, expected = run(*given), getattr(OPS, f"triton_{name}")(*same)
    if name == "forward_":
        got, expected = given[:1], same[:1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    x = given[1] if name == "backward" else given[0]
    assert seen[0].x is x and seen[0].grid == case.resolved_grid and seen[0].channel_weight.shape == (4, 8)
    assert seen[0].unit.options == (4, 1, 4, True, True, 1.0)
    monkeypatch.setattr(backends, "first", lambda call: "reference")
    assert run(*given) == "plain"


@pytest.mark.parametrize("name", ops.Operators._fields)
def test_the_launch_is_on_the_device_of_x(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator makes the device of its first argument the current one around the kernels, told of its family."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    current = [0]
    seen: list[tuple[Any, ...]] = []

    @contextmanager
    def device(wanted: torch.device) -> Any:
        current.append(wanted.index)
        yield
        current.pop()

    def kernel(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs, current[-1]))
        return "result"

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(gpu, "triton_kernels", lambda: gpu.Kernels(SimpleNamespace(**{name: kernel})))
    monkeypatch.setattr(gpu, "family", {0: "sm70", 3: "sm90"}.get)
    x = SimpleNamespace(device=torch.device("cuda", 3))
    assert ops._triton(name)(x, 1, 2) == "result"
    assert seen == [((x, 1, 2), {"family": "sm90"}, 3)] and current == [0]


# ---- the launch table ------------------------------------------------------------------------------------------------


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
    """Powers of two, tiles that fit, programs that cover, divisors that divide; what shapes no tile is no constant."""
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
                assert max(walked, told.get("NODES", 1)) <= gpu.LARGEST_BLOCK
        told = gating.constants
        covered = gating.programs // p.samples * told["ROWS"] * told["RUN"] * told["STEPS"]
        assert covered >= p.channels * p.area


# ---- the tuner -------------------------------------------------------------------------------------------------------


def test_tuner_candidates_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate covers the map as the table's launch does: the programs of its blocks, and the same numbers."""
    from steam_kernels.backends.triton import tune

    monkeypatch.setattr(launch, "SMALL", 0)
    x, weight = torch.randn(1, 12, 14, 14), torch.randn(4, 8)
    p = launch.Pass(1, 12, 14, 14, 7, 7, 4)
    arguments = x, weight, weight, None, (7, 7), 4, 1, 4, True, True, 1.0, False, False
    kernels = gpu.triton_kernels().module
    expected, _ = kernels.forward(*arguments)
    for stage, how in (("pool", launch.pool(p)), ("graph", launch.graph(p, 4, 2, 3)), ("gate", launch.gate(p))):
        found = list(tune.candidates(how, p))
        assert (
            how in found and len(found) > 1 and len({(*c.constants.values(), c.num_warps) for c in found}) == len(found)
        )
        for other in found[:: max(1, len(found) // 4)]:
            with monkeypatch.context() as patch:
                patch.setattr(launch, stage, lambda *_, other=other: other)
                y, _ = kernels.forward(*arguments)
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


# ---- barriers --------------------------------------------------------------------------------------------------------

BARRIERS = """
import inspect, json, re, sys, torch, triton_aot
import steam_kernels.backends.triton

class Texts(triton_aot.Compiler):
    def _read(self, compiled, *_):
        return compiled.asm

text = inspect.getsource(sys.modules["steam_kernels.backends.triton.graph"]).splitlines()
found = []
for target in ("sm_80", "gfx942"):
    compiler = Texts(target)
    case = triton_aot.Compiled("", (2, 400, 7, 7), torch.float32, "nhwc")
    for _, launch, _ in triton_aot.launches(case, triton_aot.TARGETS[target][3]):
        if "graph" not in launch.kernel.__name__:
            continue
        asm = compiler(launch)
        full = [l for l in asm["ttgir"].splitlines() if "ttg.barrier" in l and "local" not in l]
        if target == "gfx942":
            fences = [l for l in asm["llir"].splitlines() if "fence syncscope" in l and "mmra" not in l]
            kept = [sum(kind in l for l in fences) for kind in ("release", "acquire")]
        else:
            # a barrier's position in the source, to tell those of the kernel from those that the compiler adds
            at, kept = 0, set()
            for l in asm["ptx"].splitlines():
                if m := re.match(r"\\s*\\.loc\\s+\\d+ (\\d+)", l):
                    at = int(m[1])
                elif "bar.sync" in l and "debug_barrier" in text[min(at, len(text)) - 1]:
                    kept.add(at)
            kept = [len(kept)] * 2
        found.append([target, launch.kernel.__name__, len(full), kept])
print(json.dumps(found))
"""


def test_barriers_order_global_memory() -> None:
    """Every barrier of the graph stage is one of all memory in Triton's IR, and is there in what it becomes.

    On AMD: as fences of the workgroup that no annotation narrows to local memory. Triton's own barriers have one.
    """
    import json
    import os
    import subprocess
    import sys
    from pathlib import Path

    tests = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{tests}{os.pathsep}{tests.parent}"
    done = subprocess.run(
        [sys.executable, "-c", BARRIERS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [(target, kernel) for target, kernel, *_ in found] == [
        (target, kernel) for target in ("sm_80", "gfx942") for kernel in ("graph", "graph_backward")
    ]
    for target, kernel, full, kept in found:
        # forwards: in the walk, after it, before the lattice; backwards: around both transforms
        assert full == 3 and min(kept) >= full, (target, kernel, full, kept)


#: What the kernels and their callers do without: a device is the operators' business, and these are not portable.
FORBIDDEN = (
    "torch.cuda",
    "is_cuda",
    "device.type",
    "synchronize",
    "libdevice",
    "inline_asm",
    "tl.dot",
    "atomic_",
    "autotune(",
)


def forbidden(source: str) -> set[str]:
    """What of it a module's code names, docstrings and comments aside."""
    code = ast.unparse(ast.fix_missing_locations(_WithoutDocstrings().visit(ast.parse(source))))
    return {name for name in FORBIDDEN if name in code}


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Expr(ast.Constant(None)) if isinstance(node.value, ast.Constant) else node


@pytest.mark.parametrize(
    "name",
    [
        "__init__", "arguments", "gate", "graph", "graph_backward", "launch", "pool", "transform", "weights", "whole",
    ],
)  # fmt: skip
def test_knows_no_device_and_uses_nothing_special(name: str) -> None:
    package = Path(steam_kernels.__file__).parent / "backends" / "triton"
    assert forbidden((package / f"{name}.py").read_text()) == set()


def test_what_is_forbidden_is_found() -> None:
    assert forbidden("def f(x):\n    'no tl.dot'\n    return tl.dot(x, x) if x.is_cuda else tl.atomic_add(x, 1)\n") == {
        "tl.dot",
        "is_cuda",
        "atomic_",
    }
