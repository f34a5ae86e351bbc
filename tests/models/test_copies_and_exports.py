"""Tools that take a whole model with units: copies, pickles, compilers, exporters, tracers, DDP."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from steam_kernels import insert_steam, remove_steam, steam_sites
from tests.support.networks import units

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


@pytest.fixture(scope="module")
def in_blocks() -> nn.Module:
    torch.manual_seed(0)
    return insert_steam(models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).eval(), "blocks")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 65, 97)


def test_copies_and_pickles(in_blocks: nn.Module, x: torch.Tensor) -> None:
    expected = in_blocks(x)
    buffer = io.BytesIO()
    torch.save(in_blocks, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(in_blocks), pickle.loads(pickle.dumps(in_blocks)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert torch.equal(twin(x), expected) and list(steam_sites(twin)) == list(steam_sites(in_blocks))
        with torch.no_grad():
            for unit in steam_sites(twin).values():
                unit.channel_weight.fill_(2)
        assert not torch.equal(twin(x), expected)
        remove_steam(twin)
        assert not units(twin)
    assert torch.equal(in_blocks(x), expected)


def test_compile(in_blocks: nn.Module, x: torch.Tensor) -> None:
    compiled = torch.compile(in_blocks, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), in_blocks(x), rtol=1e-4, atol=1e-5)


def test_export(in_blocks: nn.Module, x: torch.Tensor) -> None:
    program = torch.export.export(in_blocks, (x,))
    assert torch.allclose(program.module()(x), in_blocks(x), rtol=1e-4, atol=1e-5)


def test_features_by_symbolic_tracing(x: torch.Tensor) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = insert_steam(models.resnet18(num_classes=3).eval())
    seen: list[torch.Tensor] = []
    extractor = create_feature_extractor(model, ["layer2", "layer4"])
    model.layer3.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    assert torch.allclose(extractor(x)["layer2"], seen[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group(tmp_path: pathlib.Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(in_blocks: nn.Module, x: torch.Tensor, process_group: None) -> None:
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(in_blocks))
    for _ in range(2):  # the second step raises if a parameter was unused in the first
        parallel(x).square().sum().backward()
    assert all(p.grad is not None for p in parallel.parameters())
