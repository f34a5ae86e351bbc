"""torch.export gives plain ATen operators, dynamic batch and sizes, and the module's results at new sizes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.export import Dim

from steam_kernels import FusedSTEAM, reference

SIZES = [(1, 7, 7), (2, 14, 15), (3, 33, 20), (5, 8, 61), (2, 100, 31)]


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    "cls,options",
    [
        (FusedSTEAM, {}),
        (FusedSTEAM, {"window": 4, "order": "parallel"}),
        (
            reference.STEAM,
            {
                "grid_size": (3, 5),
                "spatial_neighbors": 8,
                "channel_radius": 2,
                "self_loops": False,
                "activation": "relu",
            },
        ),
    ],
    ids=str,
)
def test_dynamic_sizes(cls: Any, options: dict[str, Any]) -> None:
    unit = cls(6, **options).eval()
    torch.nn.init.normal_(unit.channel_weight)
    torch.nn.init.normal_(unit.spatial_weight)
    tail = options.get("activation") == "relu"
    dims = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=7, max=512), 3: Dim("width", min=7, max=512)}
    example = tuple(torch.randn(2, 6, 16, 18) for _ in range(1 + tail))
    program = torch.export.export(unit, example, dynamic_shapes=(dims,) * len(example))
    assert not any("steam_kernels" in name for name in operators(program))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch, height, width in SIZES:
        given = tuple(torch.randn(batch, 6, height, width) for _ in range(1 + tail))
        with torch.no_grad():
            assert torch.allclose(loaded(*given), unit(*given), rtol=1e-4, atol=1e-5), (batch, height, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    unit = FusedSTEAM(6, dtype=dtype).eval()
    x = torch.randn(2, 6, 16, 18).to(dtype)
    y = torch.export.export(unit, (x,)).module()(x)
    expected = unit(x)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert torch.allclose(y, expected, rtol=8 * eps, atol=8 * eps)


def test_small_maps_keep_their_own_grid() -> None:
    """A static export with a map that is smaller than the grid."""
    unit = FusedSTEAM(3).eval()
    x = torch.randn(2, 3, 4, 5)
    assert torch.allclose(torch.export.export(unit, (x,)).module()(x), unit(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 4, "self_loops": False}], ids=str)
def test_decompositions(options: dict[str, Any]) -> None:
    """The exported graph keeps its results after the core decompositions of ONNX and ahead-of-time compilers."""
    unit = FusedSTEAM(6, **options).eval()
    dims = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=7, max=512), 3: Dim("width", min=7, max=512)}
    program = torch.export.export(unit, (torch.randn(2, 6, 16, 18),), dynamic_shapes=(dims,)).run_decompositions()
    assert not any("steam_kernels" in name or "adaptive" in name for name in operators(program))
    module = program.module()
    for batch, height, width in SIZES:
        x = torch.randn(batch, 6, height, width)
        assert torch.allclose(module(x), unit(x), rtol=1e-4, atol=1e-5)


def test_network() -> None:
    """With units between convolutions, the sizes of a unit's map are expressions of the input's sizes."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), FusedSTEAM(8), torch.nn.Conv2d(8, 4, 1), FusedSTEAM(window=5)
    ).eval()
    dims = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=16, max=512), 3: Dim("width", min=16, max=512)}
    program = torch.export.export(net, (torch.randn(2, 3, 32, 40),), dynamic_shapes=(dims,))
    assert not any("steam_kernels" in name for name in operators(program))
    for batch, height, width in ((1, 16, 16), (3, 33, 71)):
        x = torch.randn(batch, 3, height, width)
        assert torch.allclose(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
