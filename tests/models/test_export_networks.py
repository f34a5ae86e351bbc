"""Whole networks with units, exported with dynamic batch, height and width: ATen, ONNX, AOTInductor, jit.trace."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from steam_kernels import FusedSTEAM
from tests.support import networks

pytest.importorskip("torchvision")
pytestmark = pytest.mark.xdist_group("export_networks")
#: No export used these sizes. 33 is the smallest side with which torchvision's own ResNets can be exported.
SIZES = [(1, 64, 96), (3, 97, 65), (1, 128, 72), (4, 48, 81), (5, 33, 64)]


def dynamic(least: int) -> tuple[dict[int, Dim]]:
    return ({0: Dim("batch", max=64), 2: Dim("height", min=least, max=512), 3: Dim("width", min=least, max=512)},)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the error is within 1e-5 of the largest output, or of 1."""
    return bool((got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()))


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, ExportedProgram]:
    torch.manual_seed(0)
    model = networks.settle(networks.resnet("resnet50"))
    return model, torch.export.export(model, (torch.randn(2, 3, 70, 100),), dynamic_shapes=dynamic(33))


@torch.no_grad()
def test_exported_resnet50(exported: tuple[nn.Module, ExportedProgram]) -> None:
    model, program = exported
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("steam_kernels" in target for target in targets)
    module = program.module()
    outputs = []
    for size in SIZES:
        batch, height, width = size
        x = torch.randn(batch, 3, height, width)
        outputs.append(model(x))
        assert close(module(x), outputs[-1]), size
    # The outputs depend on the units and the images: they are neither constant nor tiny.
    assert max(y.abs().max().item() for y in outputs) > 0.1 and outputs[1].std(0).max() > 1e-3


@torch.no_grad()
def test_onnx_of_resnet50(exported: tuple[nn.Module, ExportedProgram], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, program = exported
    onnx = torch.onnx.export(program, (torch.randn(2, 3, 70, 100),), dynamo=True, verbose=False)
    assert onnx is not None
    assert {node.domain for node in onnx.model.graph} <= {"", "ai.onnx"} and not onnx.model.functions
    path = tmp_path / "model.onnx"
    onnx.save(str(path))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for size in SIZES:
        batch, height, width = size
        x = torch.randn(batch, 3, height, width)
        assert close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model(x)), size


@torch.no_grad()
@pytest.mark.slow
def test_aotinductor(tmp_path: Path) -> None:
    """A package made ahead of time runs at new sizes. The network has two units, because a ResNet takes minutes."""
    units = (FusedSTEAM(8), FusedSTEAM(4, window=5))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), units[0], nn.Conv2d(8, 4, 1), units[1])
    model = networks.strengthen(model).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 40, 52),), dynamic_shapes=dynamic(7))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package: Any = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        batch, height, width = size
        x = torch.randn(batch, 3, height, width)
        assert close(package(x), model(x)), size


@torch.no_grad()
def test_jit_trace_of_resnet18() -> None:
    """A trace contains plain operators and serves new sizes."""
    model = networks.settle(networks.resnet()).requires_grad_(False)
    x = torch.randn(2, 3, 64, 96)
    with warnings.catch_warnings():
        # jit.trace warns that it is deprecated, and for every size that it makes a constant.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,), check_trace=False)
    assert "steam_kernels::" not in str(traced.inlined_graph)
    for batch, height, width in ((2, 64, 96), *SIZES):
        other = torch.randn(batch, 3, height, width)
        assert close(traced(other), model(other)), (batch, height, width)


def test_jit_script_is_refused() -> None:
    """torch.jit.script raises an error that names the alternatives, for a unit at any depth. It takes a traced unit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.script and jit.trace warn that they are deprecated
        for model in (FusedSTEAM(8), nn.Sequential(nn.Conv2d(3, 8, 1), FusedSTEAM(8)), networks.resnet()):
            with pytest.raises(
                RuntimeError, match=r"torch\.jit\.script cannot compile a FusedSTEAM: use torch\.jit\.trace"
            ):
                torch.jit.script(model)
        unit = FusedSTEAM(8).requires_grad_(False)
        traced = torch.jit.trace(unit, (torch.randn(1, 8, 9, 9),), check_trace=False)
        x = torch.randn(2, 8, 12, 5)
        assert close(torch.jit.script(nn.Sequential(traced, nn.Identity()))(x), unit(x))
