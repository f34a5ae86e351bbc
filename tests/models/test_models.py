"""insert_steam in a ResNet puts units at the right places and changes nothing else; and the ready models."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import steam_kernels.models
from steam_kernels import insert_steam, steam_sites
from tests.support.networks import units

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


def test_resnet50_gets_five_units_and_320_parameters() -> None:
    plain = models.resnet50(weights=None)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    count = sum(p.numel() for p in plain.parameters())
    model = insert_steam(plain)
    assert model is plain
    assert list(units(model)) == [
        "layer1.2.steam",
        "layer2.2.steam",
        "layer3.2.steam",
        "layer3.5.steam",
        "layer4.2.steam",
    ]
    assert [u.channels for u in units(model).values()] == [256, 512, 1024, 1024, 2048]
    assert sum(p.numel() for p in model.parameters()) - count == 320
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    added = {k for k in after if k not in before}
    assert added == {f"{u}.{p}" for u in units(model) for p in ("channel_weight", "spatial_weight", "scale")}
    assert [k for k in after if k in before] == list(before)


@pytest.mark.parametrize(
    "name,where",
    [
        ("resnet18", ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("resnet34", ["layer1.2", "layer2.2", "layer3.2", "layer3.5", "layer4.2"]),
        ("resnet101", ["layer1.2", "layer2.2", *(f"layer3.{i}" for i in (2, 5, 8, 11, 14, 17, 20)), "layer4.2"]),
        ("resnext50_32x4d", ["layer1.2", "layer2.2", "layer3.2", "layer3.5", "layer4.2"]),
    ],
)
def test_other_resnets(name: str, where: list[str]) -> None:
    with torch.device("meta"):
        model = insert_steam(getattr(models, name)(weights=None))
    assert list(units(model)) == [f"{block}.steam" for block in where]


def test_units_act_on_their_blocks_outputs(any_backend: str) -> None:
    """At each site the model computes the block and then the unit, as computed by hand."""
    torch.manual_seed(0)
    plain = models.resnet18(weights=None).eval()
    model = insert_steam(copy.deepcopy(plain), backend=any_backend).eval()
    placed = units(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        h = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
        for k in range(1, 5):
            for i, block in enumerate(getattr(plain, f"layer{k}")):
                h = block(h)
                if f"layer{k}.{i}.steam" in placed:
                    h = placed[f"layer{k}.{i}.steam"](h)
        h = plain.fc(plain.avgpool(h).flatten(1))
        assert torch.allclose(model(x), h, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), plain(x), rtol=1e-2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_identity_init_leaves_the_output(any_backend: str, memory_format: torch.memory_format) -> None:
    plain = models.resnet18(weights=None).eval().to(memory_format=memory_format)
    model = insert_steam(copy.deepcopy(plain), identity_init=True, backend=any_backend)
    x = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_old_checkpoint_loads_and_new_one_round_trips() -> None:
    plain = models.resnet18(weights=None)
    model = insert_steam(models.resnet18(weights=None), identity_init=True)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".steam." in name for name in missing)
    other = insert_steam(models.resnet18(weights=None))
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(u.scale == 4.0 for u in units(other).values())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_every_parameter_learns(any_backend: str) -> None:
    model = insert_steam(models.resnet18(weights=None), backend=any_backend)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    for name, unit in units(model).items():
        assert unit.channel_weight.grad.abs().max() > 0, name
        assert unit.spatial_weight.grad.abs().max() > 0, name


def test_copy_and_device_and_mode() -> None:
    model = insert_steam(models.resnet18(weights=None).eval().to(torch.float64))
    assert all(u.channel_weight.dtype == torch.float64 and not u.training for u in units(model).values())
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    with torch.no_grad():
        for unit in units(twin).values():
            unit.channel_weight.mul_(3)
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)
    kept = insert_steam(models.resnet18(weights=None), embed_dim=16, num_heads=2, window=4)
    assert all(u.embed_dim == 16 and u.window == 4 for u in units(kept).values())


def test_errors_change_nothing() -> None:
    model = models.resnet18(weights=None)
    before = list(model.state_dict())
    for arguments, options, error, match in (
        ((model, "everywhere"), {}, ValueError, r"sites .*'adaptive'.*'everywhere'"),
        ((model,), {"channels": 3}, TypeError, "channels"),
        ((model,), {"num_heads": 3}, ValueError, "num_heads"),
        ((model,), {"wrong": 1}, TypeError, "wrong"),
        ((torch.nn.Linear(2, 2),), {}, TypeError, "model .*Linear"),
        (("resnet50",), {}, TypeError, "model .*str"),
    ):
        with pytest.raises(error, match=match):
            insert_steam(*arguments, **options)
        assert list(model.state_dict()) == before and not units(model)
    insert_steam(model)
    with pytest.raises(ValueError, match="layer1"):
        insert_steam(model)


@pytest.mark.parametrize(
    "name,count",
    [
        ("resnet18", 4),
        ("resnet34", 5),
        ("resnet50", 5),
        ("resnet101", 10),
        ("mobilenet_v2", 7),
        ("shufflenet_v2_x1_0", 4),
    ],
)
def test_ready_models(name: str, count: int) -> None:
    make = getattr(steam_kernels.models, f"steam_{name}")
    with torch.device("meta"):
        model = make(num_classes=7, window=16)
    assert type(model) is type(getattr(models, name)())
    assert len(steam_sites(model)) == count and all(u.window == 16 for u in units(model).values())
    assert f"{64 * count} parameters" in make.__doc__
    model = make("stages", num_classes=7)
    assert len(steam_sites(model)) < count or name in ("resnet18", "mobilenet_v2")
    assert model(torch.randn(2, 3, 33, 47)).shape == (2, 7)


def test_ready_model_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="steam_resnet18 is built on torchvision"):
        steam_kernels.models.steam_resnet18()
