"""Autocast, checkpointing, function transforms, FX and tracing work, or raise a clear error."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import steam_kernels
from steam_kernels import FusedSTEAM, reference
from tests.support import cases
from tests.support.cases import Case

# ---- autocast


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(any_backend: str, cast: torch.dtype, x_dtype: torch.dtype) -> None:
    """Bits and dtypes are the same inside and outside autocast, also backward. Nothing runs in the autocast dtype."""
    case = Case(space=(9, 8), channels=6, dtype=x_dtype, tail="residual_relu")
    inputs, dy = cases.make(case)
    plain = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    with torch.autocast("cpu", dtype=cast):
        mixed = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    for name, value in plain.items():
        assert mixed[name].dtype == value.dtype and torch.equal(mixed[name], value), name


def test_autocast_network(any_backend: str) -> None:
    """The usual case: a convolution gives the unit a bfloat16 map, and the parameters are float32."""
    conv, unit = torch.nn.Conv2d(3, 8, 3), FusedSTEAM(8, backend=any_backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = unit(conv(torch.randn(2, 3, 12, 12)))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert unit.channel_weight.grad is not None and unit.channel_weight.grad.dtype == torch.float32
    assert unit.channel_weight.grad.abs().max() > 0


@pytest.mark.parametrize("cast", [torch.bfloat16])
def test_export_form_under_autocast(cast: torch.dtype) -> None:
    """The matrix products of the export form do not run in the autocast dtype."""
    unit = FusedSTEAM(6).eval()
    x = 100 + torch.randn(2, 6, 9, 8)

    class Cast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = unit

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=cast):
                return self.unit(x)

    program = torch.export.export(Cast(), (x,))
    assert torch.allclose(program.module()(x), unit(x), rtol=1e-5, atol=1e-4)


# ---- checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tail", ["none", "residual_relu"])
def test_checkpoint(any_backend: str, tail: str, reentrant: bool) -> None:
    case = Case(space=(9, 8), channels=6, tail=tail)
    inputs, dy = cases.make(case)
    expected = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=any_backend, **case.options)
    names = list(inputs)

    def call(*values: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(**dict(zip(names, values, strict=True)), backend=any_backend, **case.options)

    values = [v.detach().requires_grad_() for v in inputs.values()]
    y = checkpoint(call, *values, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(y.detach(), expected["y"])
    for name, value in zip(names, values, strict=True):
        assert torch.equal(value.grad, expected["d" + name]), name


# ---- function transforms


def test_functorch_grad(any_backend: str) -> None:
    inputs, _ = cases.make(Case(space=(5, 4), channels=3, dtype=torch.float64, weights="x"))
    x, cw, sw = inputs.values()

    def loss(cw: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(x, cw, sw, backend=any_backend).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(cw, x)
    leaves = (cw.clone().requires_grad_(), x.clone().requires_grad_())
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients(any_backend: str) -> None:
    """Per-sample gradients by vmap(grad) equal the gradients of single samples."""
    inputs, _ = cases.make(Case(space=(5, 4), channels=3, batch=3, dtype=torch.float64, weights="x"))
    x, cw, sw = inputs.values()

    def loss(cw: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(sample[None], cw, sw, backend=any_backend).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(cw, x)
    for n in range(3):
        leaf = cw.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, x[n]), leaf)
        assert torch.allclose(got[n], expected, rtol=1e-10, atol=1e-12)


def test_vmap_over_parameters(any_backend: str) -> None:
    inputs, _ = cases.make(Case(space=(5, 4), channels=3))
    x, cw, sw = inputs.values()
    stacked = torch.stack([cw, 2 * cw])
    got = torch.func.vmap(lambda w: steam_kernels.steam(x, w, sw, backend=any_backend))(stacked)
    for k in range(2):
        assert torch.allclose(got[k], steam_kernels.steam(x, stacked[k], sw, backend=any_backend), rtol=1e-5, atol=1e-6)


def test_functorch_grad_compiled(backend: str) -> None:
    """torch.compile around torch.func.grad gives the gradient, not zeros."""
    inputs, _ = cases.make(Case(space=(5, 4), channels=3))
    x, cw, sw = inputs.values()
    gradient = torch.func.grad(lambda w: steam_kernels.steam(x, w, sw, backend=backend).square().sum())
    got = torch.compile(gradient, backend="aot_eager")(cw)
    assert got.abs().max() > 0
    assert torch.allclose(got, gradient(cw), rtol=1e-4, atol=1e-5)


def test_forward_mode(any_backend: str) -> None:
    """Jacobian-vector products by functorch and by dual numbers agree with reverse mode."""
    inputs, dy = cases.make(Case(space=(5, 4), channels=3, dtype=torch.float64, weights="x"))
    x, cw, sw = inputs.values()
    direction = torch.randn_like(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(x, cw, sw, backend=any_backend)

    leaf = x.clone().requires_grad_()
    expected = (torch.autograd.grad(call(leaf), leaf, dy)[0] * direction).sum()
    _, tangent = torch.func.jvp(call, (x,), (direction,))
    assert torch.allclose((tangent * dy).sum(), expected, rtol=1e-9)
    with torch.autograd.forward_ad.dual_level():
        y = call(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert torch.allclose((tangent * dy).sum(), expected, rtol=1e-9)


# ---- FX and tracing


def test_fx_symbolic_trace_has_a_leaf(backend: str) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), FusedSTEAM(backend=backend))
    traced = torch.fx.symbolic_trace(net)
    targets = [node.target for node in traced.graph.nodes if node.op in ("call_function", "call_module")]
    assert targets == ["0", steam_kernels.steam]
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(traced(x), net(x))

    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = FusedSTEAM()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return steam_kernels.steam(x, self.unit.channel_weight, self.unit.spatial_weight) + 1

    module = Functional()
    traced = torch.fx.symbolic_trace(module)
    assert sum(node.target is steam_kernels.steam for node in traced.graph.nodes) == 1
    x = torch.randn(2, 6, 12, 12)
    assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize("options", [{}, {"window": 4, "self_loops": False}, {"grid_size": (2, 9)}], ids=str)
@pytest.mark.parametrize("example", [(12, 12), (1, 3)])
def test_jit_trace(backend: str, example: tuple[int, int], options: dict[str, Any]) -> None:
    """A trace contains plain operators and serves every size and batch, smaller and larger than at tracing."""
    unit = FusedSTEAM(6, backend=backend, **options).eval().requires_grad_(False)
    torch.nn.init.normal_(unit.spatial_weight)
    x = torch.randn(2, 6, *example)
    with warnings.catch_warnings():
        # jit.trace warns that it is deprecated, and for every size that it makes a constant.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(unit, (x,), check_trace=False)
    assert "steam_kernels::" not in str(traced.inlined_graph) and "aten::mul" in str(traced.inlined_graph)
    for size in ((2, 6, *example), (1, 6, 13, 13), (3, 6, 17, 5), (1, 6, 2, 3), (2, 6, 1, 1)):
        x = torch.randn(size).to(memory_format=torch.channels_last)
        assert torch.allclose(traced(x), unit(x), rtol=1e-5, atol=1e-6)
        assert traced(x).is_contiguous(memory_format=torch.channels_last)


def test_deepcopy_of_a_traced_network(backend: str) -> None:
    net = torch.nn.Sequential(FusedSTEAM(3, backend=backend))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(copy.deepcopy(torch.fx.symbolic_trace(net))(x), net(x))


def test_reference_steam_is_twice_a_module() -> None:
    """reference.STEAM and FusedSTEAM have the same state_dict, and their float64 results differ only by rounding."""
    fused, plain = FusedSTEAM(dtype=torch.float64), reference.STEAM(dtype=torch.float64)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    assert torch.allclose(fused(x), plain(x), rtol=1e-12, atol=1e-13)
