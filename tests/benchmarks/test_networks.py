"""Whole networks: the places of the gates, equal convolutions, and the judgement before the price."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import end_to_end, gates

pytestmark = pytest.mark.xdist_group("benchmarks")


@pytest.mark.parametrize(("network", "blocks"), [("resnet18", 8), ("resnet50", 16), ("mobilenet_v2", 17)])
def test_gates_go_into_every_block(network: str, blocks: int) -> None:
    import torchvision.models

    with torch.device("meta"):
        model = getattr(torchvision.models, network)(weights=None)
        assert gates.insert_gate(model, "eca") == blocks == end_to_end.attention_layers(model)


def test_gates_come_before_the_addition() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    gates.insert_gate(model, "gct")
    block = model.layer1[0]
    block.bn2.attention.forward = torch.zeros_like  # type: ignore[assignment]
    x = torch.randn(1, 64, 5, 5)
    assert torch.equal(block(x), x.relu())
    with pytest.raises(TypeError, match="Linear"):
        gates.insert_gate(nn.Linear(2, 2), "se")


def test_networks_of_all_contenders_have_the_same_convolutions() -> None:
    plain, gated, steam = (end_to_end.make("resnet18", c).state_dict() for c in ("plain", "se", "steam"))
    convolutions = {k: v for k, v in plain.items() if v.ndim == 4}
    assert len(convolutions) == 20  # 16 in the blocks, the first, and three on the shortcuts
    assert all(torch.equal(v, gated[k]) and torch.equal(v, steam[k]) for k, v in convolutions.items())


def test_a_wrong_network_has_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    judge = end_to_end.Judge("resnet18", images)
    judge.check("steam")
    right = end_to_end.make

    def wrong(network: str, contender: str, seed: int = 0) -> nn.Module:
        model = right(network, contender, seed)
        for unit in (m for m in model.modules() if contender == "steam" and isinstance(m, end_to_end.FusedSTEAM)):
            unit.scale = 1.001
        return model

    monkeypatch.setattr(end_to_end, "make", wrong)
    with pytest.raises(AssertionError, match=r"resnet18 steam, nchw: .* is off by"):
        judge.check("steam")


def test_compiled_contenders_are_not_each_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchDynamo must not reuse the graph of one network for another network. The check finds such a graph."""
    from torchvision.models.resnet import BasicBlock, ResNet

    def make(network: str, contender: str, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
            return model if contender == "plain" else end_to_end.insert_steam(model)

    compile_ = torch.compile
    monkeypatch.setattr(end_to_end, "make", make)
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager", **options))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    judge = end_to_end.Judge("resnet", images)
    judge.bounds = {c: {"inference": 1e-5} for c in ("plain", "steam")}
    rows = end_to_end.measure(judge, "inference", "compiled", ["plain", "steam"], images, 0.0)
    assert [r["layers"] for r in rows] == [0, 4]
    assert [r["rounds"] for r in rows] == [9, 9], "no time to measure for is no reason for fewer"
    torch._dynamo.reset()
    with pytest.raises(AssertionError, match="steam, nchw, compiled: inference is off by"):
        judge.check_compiled("steam", "inference", make("", "plain"), images)
