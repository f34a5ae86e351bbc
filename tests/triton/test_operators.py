"""The operators on the Triton kernels: gradients that are needed, strides, aliasing, and the compiler."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM
from steam_kernels.backends import triton as backend
from steam_kernels.schemas import Backward, Forward
from tests.support import cases
from tests.support.cases import Case
from tests.support.operators import OPS, forward_arguments, in_place_arguments
from tests.support.triton_cases import SMALL, backward_arguments, run
from tests.support.triton_cases import launches as launches
from tests.support.triton_cases import rounds_to_bfloat16 as rounds_to_bfloat16

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TINY = Case(space=(3, 4), channels=2, grid=2, batch=1, attention=(2, 1))


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
    """The operator gives the gradient of the residual alone if no other gradient is needed."""
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


@pytest.mark.parametrize("case", [TINY, TINY.but(layout="nhwc", tail="residual_relu")], ids=lambda c: c.id)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(OPS.triton_forward.default, forward_arguments(case), test_utils=UTILITIES)
    torch.library.opcheck(OPS.triton_forward_.default, in_place_arguments(case), test_utils=UTILITIES)
    relu = case.tail.endswith("relu")
    torch.library.opcheck(
        OPS.triton_backward.default, backward_arguments(case, (True, True, True, relu)), test_utils=UTILITIES
    )


def test_compiles_without_a_break() -> None:
    """One graph, one opaque operator per direction, and no graph break for the choice of a backend."""
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


# ---- direct calls of the module's functions -----------------------------------------------------------------------

DIRECT = Case(space=(3, 4), channels=3, grid=2, batch=2, attention=(2, 1), tail="residual_relu")
NEITHER = [layout for layout in cases.LAYOUTS if layout not in cases.DENSE_LAYOUTS]


def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: pytest.fail("a kernel was launched"))


@pytest.mark.parametrize("layout", NEITHER)
def test_direct_calls_refuse_x_of_other_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels know two memory formats, and must not read another x as one of them."""
    kernels = backend.triton_kernels().module
    given = forward_arguments(DIRECT)
    x, channel_weight, spatial_weight, residual, _, *options = given
    y, saved = kernels.forward(Forward.of(*given))
    bad = cases.lay_out(x, layout)
    nothing_runs(monkeypatch)
    allowed = r"x must be dense in NCHW or channels_last.*strides"
    with pytest.raises(ValueError, match=allowed):
        kernels.forward(Forward.of(bad, *given[1:]))
    with pytest.raises(ValueError, match=allowed):
        kernels.forward_(Forward.of_in_place(bad, channel_weight, spatial_weight, residual, *options))
    with pytest.raises(ValueError, match=allowed):
        kernels.backward(Backward.of(y, bad, y, channel_weight, spatial_weight, saved, [True] * 4, *options))


def test_direct_calls_refuse_maps_unlike_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual, dy or y of other strides, shape or dtype; a ``saved`` that is not from forward; a residual's gradient
    without a ReLU."""
    kernels = backend.triton_kernels().module
    given = forward_arguments(DIRECT)
    x, channel_weight, spatial_weight, _, _, *options = given
    y, saved = kernels.forward(Forward.of(*given))
    arguments = {"dy": y, "x": x, "y": y, "channel_weight": channel_weight, "spatial_weight": spatial_weight}
    arguments["saved"] = saved
    nothing_runs(monkeypatch)
    others = [cases.lay_out(y, layout) for layout in ("nhwc", *NEITHER)] + [y[:1], y[..., :2], y.expand(2, 2, 3, 3, 4)]
    for error, found in [(ValueError, other) for other in others] + [(TypeError, y.half())]:
        with pytest.raises(error, match="residual must"):
            kernels.forward(Forward.of(x, channel_weight, spatial_weight, found, True, *options))
        with pytest.raises(error, match="residual must"):
            kernels.forward_(Forward.of_in_place(x, channel_weight, spatial_weight, found, *options))
        for name in ("dy", "y"):
            with pytest.raises(error, match=f"{name} must"):
                kernels.backward(Backward.of(*(arguments | {name: found}).values(), [True] * 4, *options))
    for wrong in (saved[:1], saved.new_empty(0), saved.double(), saved.t().contiguous().t()):
        with pytest.raises(ValueError, match="saved must be what forward returned"):
            kernels.backward(Backward.of(*(arguments | {"saved": wrong}).values(), [True] * 4, *options))
    with pytest.raises(ValueError, match="y must be the output of forward if relu is True"):
        kernels.backward(Backward.of(*(arguments | {"y": None}).values(), [True] * 4, *options))
    *without, _ = options
    with pytest.raises(ValueError, match="y must be None if relu is False"):
        kernels.backward(Backward.of(*arguments.values(), [True] * 4, *without, False))
    with pytest.raises(ValueError, match=r"needs\[3\] must be False if relu is False"):
        kernels.backward(Backward.of(*(arguments | {"y": None}).values(), [True] * 4, *without, False))


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
    """Such strides, and strides of an empty batch, give the same numbers as those of dense maps."""
    kernels = backend.triton_kernels().module
    case = DIRECT.but(batch=shape[0], channels=shape[1], space=shape[2:])
    plain = forward_arguments(case)
    y, saved = kernels.forward(Forward.of(*plain))
    options = plain[5:]
    needs = [True] * 4
    expected = kernels.backward(Backward.of(y, plain[0], y, *plain[1:3], saved, needs, *options))

    def strided(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        return t.new_empty(200).as_strided(shape, strides).copy_(t)

    x, residual = strided(plain[0], strides), strided(plain[3], others)
    found, again = kernels.forward(Forward.of(x, *plain[1:3], residual, *plain[4:]))
    got = kernels.backward(Backward.of(strided(y, others), x, strided(y, strides), *plain[1:3], again, needs, *options))
    for a, b in zip((found, again, *got), (y, saved, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
