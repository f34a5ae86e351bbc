"""torch.compile of whole networks: one graph without breaks, few recompilations, the eager results.

Dynamo and AOTAutograd (backend "aot_eager") compile whole ResNets. Inductor's C++ for a ResNet takes minutes, so
Inductor compiles a network of the same parts with a depth of two convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from steam_kernels import FusedSTEAM
from tests.support import networks

pytest.importorskip("torchvision")
#: No batch is 1, because the compiler makes a separate graph for it, with units and without.
SIZES = [(2, 64, 96), (3, 97, 65), (6, 128, 72), (4, 48, 81), (5, 40, 64)]


class Ran:
    """A backend that records which of its graphs are run. The compiler discards some graphs without running them."""

    def __init__(self, name: str) -> None:
        self.compile = lookup_backend(name)
        self.graphs: list[torch.fx.GraphModule] = []
        self.ran: set[int] = set()

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        index, function = len(self.graphs), self.compile(graph, example)

        def run(*args: Any) -> Any:
            self.ran.add(index)
            return function(*args)

        return run


@torch.no_grad()
def test_one_graph_for_inference_at_five_sizes(backend: str) -> None:
    model = networks.settle(networks.resnet("resnet50", backend=backend))
    counter = Ran("aot_eager")
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        assert torch.equal(fast(x), model(x))
    assert len(counter.ran) == 1
    graph = counter.graphs[max(counter.ran) - 1].graph
    assert sum("steam_kernels.forward" in str(node.target) for node in graph.nodes) == 5


def training_graphs(model: nn.Module, compiler: str, sizes: list[tuple[int, int, int]]) -> int:
    """The number of graphs that a compiled training step needs at these sizes. Checks the gradients too."""
    torch._dynamo.reset()
    counter = Ran(compiler)
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    parameters = list(model.parameters())
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        expected = torch.autograd.grad(model(x).square().mean(), parameters)
        got = torch.autograd.grad(fast(x).square().mean(), parameters)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    return len(counter.ran)


def test_training_takes_no_more_graphs_than_without_units(backend: str) -> None:
    with_units = training_graphs(networks.resnet("resnet18", backend=backend), "aot_eager", SIZES)
    without = training_graphs(networks.resnet("resnet18", units=False), "aot_eager", SIZES)
    assert with_units <= without == 1


def test_inductor_training_takes_no_more_graphs_than_without_units(backend: str) -> None:
    """Inductor specialises convolutions by size on the CPU. Units add no further graphs."""

    def net(units: bool) -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        if units:
            layers[1:1], layers[4:] = [FusedSTEAM(8, backend=backend)], [FusedSTEAM(8, backend=backend)]
        return networks.strengthen(nn.Sequential(*layers))

    with_units = training_graphs(net(True), "inductor", SIZES[:2])
    without = training_graphs(net(False), "inductor", SIZES[:2])
    assert with_units <= without
