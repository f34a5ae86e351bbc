"""torch.compile: one graph, changing sizes, gradients, both layouts, the tail and in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing

import steam_kernels
from steam_kernels import FusedSTEAM
from tests.support import cases
from tests.support.cases import Case

# All sizes of a call differ, because the compiler would assume that equal sizes are always equal.
SIZES = [(2, 9, 12), (3, 14, 10), (5, 21, 33), (7, 6, 50)]


def compiled(function: object, **options: object) -> object:
    # "aot_eager" does the same graph capture, functionalisation and joint graph as Inductor, without a C++ compiler.
    return torch.compile(function, fullgraph=True, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "compiler,tail,layout",
    [
        ("inductor", "residual_relu", "nhwc"),
        ("inductor", "none", "nchw"),
        ("aot_eager", "residual_relu", "nchw"),
        ("aot_eager", "none", "nhwc"),
    ],
)
def test_compiled_gradients_at_changing_sizes(backend: str, compiler: str, tail: str, layout: str) -> None:
    """With fullgraph and dynamic sizes, y and every gradient have the bits of the eager call, also at new sizes."""

    def call(x: torch.Tensor, cw: torch.Tensor, sw: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        activation = "relu" if tail.endswith("relu") else None
        return steam_kernels.steam(x * 1.0, cw, sw, residual, activation=activation, backend=backend)

    fast = compiled(call, backend=compiler, dynamic=True)
    for batch, height, width in SIZES:
        case = Case(space=(height, width), channels=11, batch=batch, layout=layout, tail=tail, seed=height)
        inputs, dy = cases.make(case)
        given = {k: v.requires_grad_() for k, v in inputs.items()}
        arguments = (given["x"], given["channel_weight"], given["spatial_weight"], given.get("residual"))
        expected = call(*arguments)
        expected_gradients = torch.autograd.grad(expected, list(given.values()), dy)
        y = fast(*arguments)  # type: ignore[operator]
        gradients = torch.autograd.grad(y, list(given.values()), dy)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for name, a, b in zip(given, gradients, expected_gradients, strict=True):
            assert torch.equal(a, b), f"{name} at {(batch, height, width)}"


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_graphs_are_few(backend: str, dynamic: bool | None) -> None:
    """Changing sizes recompile only a few times. With dynamic=True one graph serves all sizes."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(x: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(x, cw, sw, backend=backend)

    inputs, _ = cases.make(Case())
    cw, sw = inputs["channel_weight"], inputs["spatial_weight"]
    fast = compiled(call, backend=counter, dynamic=dynamic)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 11, height, width)
        assert torch.equal(fast(x), call(x))  # type: ignore[operator]
    allowed = {True: 1, None: 2, False: len(SIZES)}[dynamic]
    holding = [g for g in counter.graphs if any("steam_kernels.forward" in str(node.target) for node in g.graph.nodes)]
    assert 1 <= len(holding) <= allowed


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_module_in_a_network(backend: str, mode: str) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1),
        FusedSTEAM(12, backend=backend),
        torch.nn.ReLU(),
        FusedSTEAM(window=3, backend=backend),
    ).eval()
    fast = compiled(net, dynamic=True, backend="inductor" if mode == "no_grad" else "aot_eager")
    with getattr(torch, mode)():
        for batch, height, width in SIZES[:3]:
            x = torch.randn(batch, 3, height, width)
            assert torch.allclose(fast(x), net(x), rtol=1e-5, atol=1e-6)  # type: ignore[operator]


def test_training_step_of_a_network(backend: str) -> None:
    """With frozen parameters, a dy in another layout and an optimiser, the compiled step equals the eager step."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), FusedSTEAM(8, backend=backend), torch.nn.Conv2d(8, 4, 1))
    net[1].channel_weight.requires_grad_(False)
    x = torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)
    expected = [
        g.clone() for g in torch.autograd.grad(net(x).square().sum(), [p for p in net.parameters() if p.requires_grad])
    ]
    fast = compiled(net)
    got = torch.autograd.grad(fast(x).square().sum(), [p for p in net.parameters() if p.requires_grad])  # type: ignore[operator]
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_steam_operators_are_in_the_graph(backend: str) -> None:
    """The compiled graph contains the fused operators, not the many operators of the reference."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    from torch._dynamo.backends.common import aot_autograd

    inputs, dy = cases.make(Case(channels=6))
    given = {k: v.requires_grad_() for k, v in inputs.items()}
    fast = compiled(
        lambda **kw: steam_kernels.steam(**kw, backend=backend),
        backend=aot_autograd(fw_compiler=look, bw_compiler=look),
    )
    fast(**given).backward(dy)  # type: ignore[operator]
    assert sum("steam_kernels.forward" in name for name in seen) == 1
    assert sum("steam_kernels.backward" in name for name in seen) == 1
    assert len(seen) <= 12


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "channel_slice"])
def test_in_place_compiled(backend: str, layout: str) -> None:
    def call(x: torch.Tensor, cw: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
        return steam_kernels.steam(x, cw, sw, inplace=True, backend=backend) + 1

    case = Case(space=(9, 8), channels=6, layout=layout)
    inputs, _ = cases.make(case)
    weights = (inputs["channel_weight"], inputs["spatial_weight"])
    expected = steam_kernels.steam(inputs["x"], *weights, backend=backend)
    fast = compiled(call)
    with torch.no_grad():
        y = fast(inputs["x"], *weights)  # type: ignore[operator]
    assert torch.equal(inputs["x"], expected)
    assert torch.equal(y, expected + 1)


def reference_calls() -> dict[str, Callable[[], object]]:
    """A call of each public name of ``reference``, and of ``cost``."""
    reference, x = steam_kernels.reference, torch.randn(2, 12, 9, 10, generator=torch.Generator().manual_seed(0))
    weight, module = torch.linspace(-1, 1, 32).reshape(4, 8), reference.STEAM(12, num_heads=2, channel_radius=2)
    tokens, on = x.mean((2, 3)), torch.device("cpu")
    options = {"num_heads": 2, "grid_size": (3, 4), "order": "parallel", "activation": "relu"}
    return {
        "steam": lambda: reference.steam(x, weight, weight, x, **options),  # type: ignore[arg-type]
        "STEAM": lambda: module(x),
        "gate": lambda: reference.gate(x, tokens, tokens[:, :1, None].expand(2, 3, 4)),
        "pool": lambda: reference.pool(x, (3, 4)),
        "ring": lambda: reference.ring(12, 2, True, on),
        "lattice": lambda: reference.lattice((3, 4), 8, True, on),
        "graph_transform": lambda: reference.graph_transform(tokens, weight, 2, reference.ring(12, 1, True, on)),
        "cost": lambda: steam_kernels.cost(12, 9, 10, grid_size=(3, 4)).flops,
    }


def test_every_public_name_of_the_reference_is_here() -> None:
    assert set(reference_calls()) == {*steam_kernels.reference.__all__, "cost"}


@pytest.mark.parametrize("name", [*steam_kernels.reference.__all__, "cost"])
def test_the_reference_is_one_graph(name: str) -> None:
    call = reference_calls()[name]
    for expected, found in zip(_tensors(call()), _tensors(compiled(call, backend="eager")()), strict=True):
        assert torch.equal(expected, found)


def _tensors(value: object) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [torch.as_tensor(v) for v in values]
