"""insert_steam: where the units go, and that nothing else changes; remove_steam; the ready models."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import steam_kernels.models
from steam_kernels import FusedSTEAM, insert_steam, remove_steam, steam_sites
from steam_kernels.models import families
from tests.support import networks

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


def timm_model(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def units(model: torch.nn.Module) -> dict[str, FusedSTEAM]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedSTEAM)}


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
    """The model computes block, then unit, at each site: taken apart by hand."""
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


# ---- families --------------------------------------------------------------------------------------------------------


def small_convnext() -> nn.Module:
    setting = [models.convnext.CNBlockConfig(8, 16, 3), models.convnext.CNBlockConfig(16, None, 2)]
    model = models.ConvNeXt(setting, layer_scale=0.5, num_classes=5)
    for p in model.parameters():
        if p.dim() > 1:  # its own start is so small that gates do not depend on the map
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: models.ResNet(models.resnet.Bottleneck, [1, 3, 1, 1], num_classes=5),
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "mobilenet_v3": lambda: models.mobilenet_v3_small(num_classes=5, width_mult=0.5),
    "shufflenet_v2": lambda: models.shufflenet_v2_x0_5(num_classes=5),
    "efficientnet": lambda: models.efficientnet_b0(num_classes=5),
    "efficientnet_v2": lambda: models.efficientnet_v2_s(num_classes=5),
    "convnext": small_convnext,
    "regnet": lambda: models.regnet_y_400mf(num_classes=5),
    "lraspp": lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
    "timm resnet": lambda: timm_model("resnet18", num_classes=5, zero_init_last=False),
    "timm seresnet": lambda: timm_model("seresnet18", num_classes=5, zero_init_last=False),
    "timm mobilenet_v2": lambda: timm_model("mobilenetv2_035", num_classes=5),
    "timm mobilenet_v3": lambda: timm_model("mobilenetv3_small_050", num_classes=5),
    "timm mobilenet_v4": lambda: timm_model("mobilenetv4_conv_small_035", num_classes=5),
    "timm efficientnet": lambda: timm_model("efficientnet_lite0", num_classes=5),
    "timm efficientnet_v2": lambda: timm_model("efficientnetv2_rw_t", num_classes=5),
    "timm features": lambda: timm_model("resnet18", features_only=True, zero_init_last=False),
    "timm convnext": lambda: timm_model("convnext_atto", num_classes=5, ls_init_value=0.5, drop_path_rate=0.1),
    "timm regnet": lambda: timm_model("regnetx_002", num_classes=5, zero_init_last=False),
    "timm regnetv": lambda: timm_model("regnetv_040", num_classes=5, zero_init_last=False),
}


def outputs(y: Any) -> list[torch.Tensor]:
    return [y] if isinstance(y, torch.Tensor) else list(y.values() if isinstance(y, dict) else y)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_in_every_placement(name: str) -> None:
    """Each unit acts once on its channels, nothing is renamed, the identity is exact, and all of it can be undone."""
    model = FAMILIES[name]().eval()
    x = torch.randn(2, 3, 65, 97)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    calls: list[nn.Module] = []
    with torch.no_grad():
        expected = outputs(model(x))
        for sites in ("adaptive", "stages", "blocks"):
            assert insert_steam(model, sites, identity_init=True) is model
            placed = steam_sites(model)
            assert list(placed.values()) == list(units(model).values()) and all(u.channels for u in placed.values())
            assert [k for k in model.state_dict() if k in state] == list(state)
            assert [name for name, _ in model.named_modules() if not name.endswith(".steam")] == modules
            missing, unexpected = model.load_state_dict(state, strict=False)
            keys = ("channel_weight", "spatial_weight")
            assert not unexpected and sorted(missing) == sorted(f"{u}.steam.{k}" for u in placed for k in keys)
            calls.clear()
            handles = [u.register_forward_hook(lambda u, args, y: calls.append(u)) for u in placed.values()]
            assert all(map(torch.equal, outputs(model(x)), expected))
            assert len(calls) == len(placed) and set(calls) == set(placed.values())
            for handle in handles:
                handle.remove()
            for u in placed.values():
                u.spatial_weight[3] = 3.0
            assert not any(map(torch.equal, outputs(model(x))[-1:], expected[-1:]))
            assert remove_steam(model) is model and not units(model)
            assert all(map(torch.equal, outputs(model(x)), expected))
            assert list(model.state_dict()) == list(state) and not steam_sites(model)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3", "shufflenet_v2", "efficientnet", "timm mobilenet_v4"])
def test_every_resolution_has_a_unit(name: str) -> None:
    """A stage ends where the next block halves the map, also where both have one width, as in MobileNetV2 x0.25."""
    model = FAMILIES[name]().eval()
    sizes: dict[str, tuple[int, ...]] = {}
    for block in families.find_blocks(model):
        block.module.register_forward_hook(lambda m, args, y, name=block.name: sizes.update({name: y.shape[2:]}))
    with torch.no_grad():
        model(torch.randn(1, 3, 128, 160))
    for stage in families.stages(model):
        assert len({sizes[block.name] for block in stage}) == 1
    insert_steam(model)
    assert {sizes[name] for name in steam_sites(model)} == set(sizes.values()) and len(set(sizes.values())) > 2


def before_skip(block: Any, unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """For a block of timm that ends with its addition: the branch is what the block adds."""
    skip = block.shortcut(x) if hasattr(block, "shortcut") else x if block.has_skip else torch.zeros(())
    return unit(block(x) - skip) + skip


#: From the parts of a block and its unit to the block's output, by hand, for "blocks".
BY_HAND: dict[str, Callable[[Any, nn.Module, torch.Tensor], torch.Tensor]] = {
    "resnet": lambda b, unit, x: b.relu(
        unit(b.bn3(b.conv3(b.relu(b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x)))))))))
        + (b.downsample(x) if b.downsample else x)
    ),
    "mobilenet_v2": lambda b, unit, x: unit(b.conv(x)) + (x if b.use_res_connect else 0),
    "mobilenet_v3": lambda b, unit, x: unit(b.block(x)) + (x if b.use_res_connect else 0),
    "shufflenet_v2": lambda b, unit, x: models.shufflenetv2.channel_shuffle(
        torch.cat(
            (x.chunk(2, 1)[0], unit(b.branch2(x.chunk(2, 1)[1])))
            if b.stride == 1
            else (b.branch1(x), unit(b.branch2(x))),
            1,
        ),
        2,
    ),
    "efficientnet": lambda b, unit, x: unit(b.block(x)) + (x if b.use_res_connect else 0),
    "efficientnet_v2": lambda b, unit, x: unit(b.block(x)) + (x if b.use_res_connect else 0),
    "convnext": lambda b, unit, x: b.layer_scale * unit(b.block(x)) + x,
    "regnet": lambda b, unit, x: b.activation(unit(b.f(x)) + (b.proj(x) if b.proj else x)),
    "timm resnet": lambda b, unit, x: b.act2(
        unit(b.bn2(b.conv2(b.act1(b.bn1(b.conv1(x)))))) + (b.downsample(x) if b.downsample else x)
    ),
    "timm seresnet": lambda b, unit, x: b.act2(
        unit(b.se(b.bn2(b.conv2(b.act1(b.bn1(b.conv1(x))))))) + (b.downsample(x) if b.downsample else x)
    ),
    "timm regnet": lambda b, unit, x: b.act3(
        unit(b.conv3(b.se(b.conv2(b.conv1(x))))) + (b.downsample(x) if b.downsample else x)
    ),
    "timm regnetv": lambda b, unit, x: (
        unit(b.conv3(b.norm3(b.se(b.conv2(b.norm2(b.conv1(b.norm1(x))))))))
        + (b.downsample(b.norm1(x)) if b.downsample else 0)
    ),
    "timm mobilenet_v3": before_skip,
    "timm mobilenet_v4": before_skip,
    "timm efficientnet": before_skip,
    "timm efficientnet_v2": before_skip,
    "timm convnext": before_skip,
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_blocks_act_before_the_addition(name: str) -> None:
    plain = FAMILIES[name]().eval()
    model = insert_steam(copy.deepcopy(plain), "blocks")
    found = families.find_blocks(plain)
    assert len(found) == len(units(model)) > 1
    x = torch.randn(2, 3, 65, 97)
    inputs: dict[str, torch.Tensor] = {}
    for block in found:
        block.module.register_forward_pre_hook(
            functools.partial(lambda n, m, args: inputs.update({n: args[0]}), block.name)
        )
    with torch.no_grad():
        plain(x)
        for block, unit in zip(found, units(model).values(), strict=True):
            given = torch.randn_like(inputs[block.name])
            got = model.get_submodule(block.name)(given.clone())
            expected = BY_HAND[name](block.module, unit, given.clone())
            changed = (expected - block.module(given.clone())).norm()
            assert changed > 0 and (got - expected).norm() < 1e-3 * changed, block.name


def test_mobile_attention_acts_before_the_addition() -> None:
    """The attention of MobileNetV4's hybrids, which are large; one block of one."""
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    plain = blocks.MobileAttention(16, 16, num_heads=2, use_multi_query=True, layer_scale_init_value=0.5).eval()
    block = insert_steam(copy.deepcopy(plain), "blocks")
    x = torch.randn(2, 16, 12, 9)
    expected = before_skip(plain, steam_sites(block)["layer_scale"], x)
    assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(x), expected, rtol=0.01)


def test_the_stages_of_an_hrnet() -> None:
    with torch.device("meta"):
        model = timm_model("hrnet_w18_small")
    assert "14 stages in `hrnet_w18_small`" in PAGE and len(families.stages(model)) == 14


PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
DOCUMENTED = re.findall(
    r"^\| `(\w+)\.([\w.]+)` \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$",
    PAGE,
    re.MULTILINE,
)


def build(library: str, name: str) -> nn.Module:
    if library == "timm":
        return timm_model(name)
    module, _, function = name.rpartition(".")
    options: dict[str, Any] = {"weights_backbone": None} if module else {}
    options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(getattr(models, module) if module else models, function)(weights=None, **options)


@pytest.mark.parametrize("library,rows", [("torchvision", 36), ("timm", 14)])
def test_documented_counts(library: str, rows: int) -> None:
    """The table of docs/models.md is what insert_steam does."""
    documented = [row[1:] for row in DOCUMENTED if row[0] == library]
    assert len(documented) == rows
    for name, stages, *counts in documented:
        # RegNet works out its widths with tensors, which it cannot do on the meta device
        with torch.device("cpu" if "regnet" in name else "meta"):
            model = build(library, name)
        assert "+".join(str(len(stage)) for stage in families.stages(model)) == stages.strip("–"), name
        for sites, count in zip(("adaptive", "stages", "blocks"), counts, strict=True):
            if count == "–":
                with pytest.raises(
                    TypeError, match=r"model must have blocks .* none is known: give sites as 'adaptive'"
                ):
                    insert_steam(model, sites)
            else:
                assert len(steam_sites(insert_steam(model, sites))) == int(count), (name, sites)
                remove_steam(model)


def test_a_timm_model_of_few_known_blocks_is_not_known() -> None:
    """A GhostNet has one block that other timm models have too: a unit in it alone would pass for a placement."""
    with torch.device("meta"):
        model = timm_model("ghostnet_050")
    for sites in ("adaptive", "stages"):
        insert_steam(model, sites)
        assert [u.channels for u in steam_sites(model).values()] == [i["num_chs"] for i in model.feature_info]
        remove_steam(model)
    with pytest.raises(TypeError, match=r"'blocks'.*timm\.models\.ghostnet\.GhostNet.*'adaptive' or 'stages'"):
        insert_steam(model, "blocks")


def test_timm_features_that_cannot_have_a_unit() -> None:
    """A DenseNet's stages are ModuleDicts: the norm that takes their output has the unit."""
    model = timm_model("densenet121", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 96)
    seen: dict[str, torch.Tensor] = {}
    for i in (1, 2, 3):
        block = model.get_submodule(f"features.denseblock{i}")
        norm = model.get_submodule(f"features.transition{i}.norm")
        block.register_forward_hook(lambda m, args, y, i=i: seen.update({f"given{i}": y}))
        norm.register_forward_pre_hook(lambda m, args, i=i: seen.update({f"got{i}": args[0]}))
    expected = model(x)
    assert all(torch.equal(seen[f"given{i}"], seen[f"got{i}"]) for i in (1, 2, 3))
    insert_steam(model, identity_init=True)
    norms = [f"features.transition{i}.norm" for i in (1, 2, 3)]
    assert list(steam_sites(model)) == ["features.norm0", *norms, "features.norm5"]
    assert [u.channels for u in steam_sites(model).values()] == [i["num_chs"] for i in model.feature_info]
    assert torch.equal(model(x), expected)
    with torch.device("meta"):
        nested = insert_steam(timm_model("halonet26t"))  # its stem has a feature_info too
    assert [u.channels for u in steam_sites(nested).values()] == [i["num_chs"] for i in nested.feature_info]


def test_timm_stages_by_feature_info() -> None:
    with torch.device("meta"):
        model = timm_model("vgg11", num_classes=3)
    insert_steam(model, "stages", window=8)
    info = [(i["module"], i["num_chs"]) for i in model.feature_info]
    assert [(name, unit.channels) for name, unit in steam_sites(model).items()] == info
    with torch.device("meta"):
        nhwc = insert_steam(timm_model("swin_tiny_patch4_window7_224"), "stages").to_empty(device="cpu")
    with pytest.raises(ValueError, match="96 channels"), torch.no_grad():
        nhwc(torch.randn(1, 3, 224, 224))


def test_as_a_layer_of_timm() -> None:
    model = timm_model("resnet50", block_args={"attn_layer": FusedSTEAM}, num_classes=3)
    assert list(units(model))[:2] == ["layer1.0.se", "layer1.1.se"] and len(units(model)) == 16
    assert [u.channels for u in units(model).values()] == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    assert model(torch.randn(2, 3, 65, 97)).shape == (2, 3)
    layer = functools.partial(FusedSTEAM, identity_init=True)
    torch.manual_seed(0)
    plain = timm_model("resnet18", num_classes=3, zero_init_last=False).eval()
    other = timm_model("resnet18", block_args={"attn_layer": layer}, num_classes=3, dtype=torch.float32).eval()
    missing, _ = other.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(".se." in name for name in missing)
    x = torch.randn(1, 3, 65, 97)
    assert torch.equal(other(x), plain(x))
    with pytest.raises(ValueError, match="already"):
        insert_steam(other)
    with pytest.raises(ValueError, match="insert_steam put there"):
        remove_steam(other)


# ---- networks that are not known -------------------------------------------------------------------------------------


def small_maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 8, 2, [8, 16], [2, 1], 8, 0.0, num_classes=5)


#: Networks of unknown blocks, the side of their images, and where their stages end.
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "alexnet": (lambda: models.alexnet(num_classes=5), 96, ["features.1", "features.4", "features.11", "features.12"]),
    "densenet": (
        lambda: models.DenseNet(8, (2, 2), 16, num_classes=5),
        65,
        ["features.relu0", "features.transition1.norm", "features.norm5"],
    ),
    "googlenet": (
        lambda: models.googlenet(weights=None, num_classes=5, init_weights=False),
        64,
        ["conv1", "conv3", "inception3b", "inception4e", "inception5b"],
    ),
    "inception": (
        lambda: models.inception_v3(weights=None, num_classes=5, init_weights=False, aux_logits=False),
        128,
        ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    ),
    "maxvit": (small_maxvit, 64, ["stem.1.0", "blocks.0", "blocks.1"]),
    "mnasnet": (
        lambda: models.mnasnet0_5(num_classes=5),
        64,
        ["layers.7", "layers.8.2", "layers.9.2", "layers.11.1", "layers.16"],
    ),
    "squeezenet": (
        lambda: models.squeezenet1_1(num_classes=5),
        64,
        ["features.1", "features.4", "features.7", "features.12"],
    ),
    "vgg": (
        lambda: models.vgg11(num_classes=5, init_weights=False),
        64,
        [f"features.{i}" for i in (1, 4, 9, 14, 19, 20)],
    ),
    "timm selecsls": (
        lambda: timm_model("selecsls42b", num_classes=5),
        64,
        ["stem.2", *(f"features.{i}.conv6.2" for i in (1, 3, 5)), "head.1.2", "head.3.2"],
    ),
    "timm rdnet": (
        lambda: timm_model("rdnet_tiny", num_classes=5, ls_init_value=1.0),
        64,
        [*(f"dense_stages.{i}.0" for i in (1, 2, 6)), "norm_pre"],
    ),
    "u-net": (lambda: UNet(), 32, ["down.0.1", "down.1.1", "down.2.1"]),
    "of one size": (lambda: OfOneSize(), 32, ["first.relu", "second.relu", "third.relu"]),
    "branches": (lambda: Branches(), 48, ["stem", "mixed", "down"]),
}


def two(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Its later maps of each size depend on others too: stages are those on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([two(3, 4), two(4, 8, 2), two(8, 16, 2)])
        self.up = nn.ModuleList([two(24, 8), two(12, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for down in self.down:
            kept.append(x := down(x))
        for up, skip in zip(self.up, kept[-2::-1], strict=True):
            x = up(torch.cat((nn.functional.interpolate(x, scale_factor=2.0), skip), 1))
        return x


class OfOneSize(nn.Module):
    """Takes images of 32 x 32 alone, and its own number of channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"first": (3, 4), "second": (4, 6), "third": (6, 8)}
        for name, (channels, out) in widths.items():
            parts = {"conv": nn.Conv2d(channels, out, 3, 2), "relu": nn.ReLU()}
            setattr(self, name, nn.Sequential())
            for part, module in parts.items():
                getattr(self, name).add_module(part, module)
        self.fc = nn.Linear(8 * 3 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.third(self.second(self.first(x))).flatten(1))


class Mixed(nn.Module):
    """Two branches, the second of which ends last; and a fall inside of one module, by both."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 4, 3, stride, 1), nn.Sequential(nn.Conv2d(8, 8, 1), two(8, 4, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.left(x), self.right(x)), 1)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.down, self.fc = nn.Conv2d(3, 8, 2, 2), Mixed(2), Mixed(2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.down(self.mixed(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_stages_of_a_network_that_is_not_known(name: str) -> None:
    """They end where the resolution falls. The dry run leaves the model as it is, and each unit acts once."""
    make, side, names = UNKNOWN[name]
    model = make()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen: list[Any] = []
    hook = model.register_forward_hook(lambda m, args, y: seen.append(y))
    random = torch.get_rng_state()
    for sites in ("adaptive", "stages"):
        torch.set_rng_state(random)
        insert_steam(model, sites, identity_init=True, dtype=torch.float32, device="meta")
        assert list(steam_sites(model)) == names and torch.equal(torch.get_rng_state(), random)
        remove_steam(model)
    hook.remove()
    assert not seen and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match=r"'blocks'.*'adaptive' or 'stages' or module names"):
        insert_steam(model, "blocks")

    networks.settle(model, side)
    x = torch.randn(2, 3, side, side)
    expected = outputs(model(x))
    insert_steam(model, "stages", identity_init=True)
    calls: list[nn.Module] = []
    for unit in steam_sites(model).values():
        unit.register_forward_hook(lambda unit, args, y: calls.append(unit))
    got = outputs(model(x))
    assert all(map(torch.equal, got, expected)) and calls == list(steam_sites(model).values())
    got[0].square().sum().backward()  # each has a part in what comes out
    assert all(unit.spatial_weight.grad.abs().max() > 0 for unit in steam_sites(model).values())


#: RegNet works out its widths with tensors, which it cannot do on the meta device, and its larger ones are large.
CLASSIFIERS = [n for n in models.list_models(module=models) if not re.fullmatch(r"regnet.*_(3_2|8|16|32|128)gf", n)]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_of_torchvision(name: str) -> None:
    """Has a unit after each stage, which is called once; those that have no stages of maps are refused."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if "regnet" in name else "meta"):
        model = models.get_model(name, weights=None, **options).eval()
    model.to("meta")
    for sites in ("adaptive", "stages"):
        if name.startswith(("vit", "swin")):
            with pytest.raises(
                TypeError, match=r"none is known, and its maps show no two stages.*give sites as module"
            ):
                insert_steam(model, sites)
            continue
        placed = steam_sites(insert_steam(model, sites))
        calls: list[nn.Module] = []
        for unit in placed.values():
            unit.register_forward_hook(lambda unit, args, y, calls=calls: calls.append(unit))
        with torch.no_grad():
            assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
        assert calls == list(placed.values()) and len(placed) >= 3
        remove_steam(model)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * mask


class Uncopied(nn.Conv2d):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("it stays")


@pytest.mark.parametrize(
    "model,match",
    [
        (TwoInputs(), r"TwoInputs, of which none is known, and a dry run shows none: no image of 3 channels.*mask"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "its maps show no two stages"),
        (nn.Sequential(nn.Linear(3, 4)), "it has no convolution"),
        (nn.Sequential(Uncopied(3, 4, 1)), "it cannot be copied .RuntimeError: it stays"),
    ],
    ids=["two inputs", "one resolution", "no convolution", "no copy"],
)
def test_networks_without_stages_are_refused(model: nn.Module, match: str) -> None:
    with pytest.raises(TypeError, match=f"{match}.*: give sites as module names or a predicate"):
        insert_steam(model, "stages")
    assert not steam_sites(model)


# ---- any module ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.both = Both()
        self.walker = Walker()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        a, b = self.both(x)
        return self.walker(a + b)


class Both(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x


class SaysBoth(Both):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Walker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


def test_names_and_predicates(any_backend: str) -> None:
    plain = Net().eval().double()
    names = ["layers.1", "stem", "walker.second", "walker.first"]
    model = insert_steam(copy.deepcopy(plain), names, backend=any_backend)
    placed = steam_sites(model)
    assert {name: unit.channels for name, unit in placed.items()} == {
        "stem.1.1": None,
        "layers.1": 8,
        "walker.first": None,
        "walker.second": 4,
    }
    assert all(unit.channel_weight.dtype == torch.float64 for unit in placed.values())
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        h = placed["layers.1"](plain.layers[1](plain.layers[0](placed["stem.1.1"](plain.stem(x)))))
        h = placed["walker.second"](plain.walker.second(placed["walker.first"](2 * plain.layers[2](h))))
        assert torch.allclose(model(x), h, rtol=1e-9)
    model = insert_steam(copy.deepcopy(plain), lambda name, module: isinstance(module, nn.Conv2d) and "layers" in name)
    assert list(steam_sites(model)) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    "sites,error,match",
    [
        (None, TypeError, "sites .*'adaptive', 'stages', 'blocks', a list .*None"),
        (3, TypeError, "sites .*3"),
        ("stem", ValueError, "sites .*'adaptive'.*'stem'"),
        ("adaptive", TypeError, "model must have blocks .*Net"),
        ([], ValueError, "one module"),
        (["stem", 3], TypeError, "3"),
        (["nowhere"], ValueError, "named_modules.*'nowhere'"),
        ([""], ValueError, "named_modules.*''"),
        (["stem", "stem.1.1"], ValueError, "once.*'stem.1.1'"),
        (["stem", "stem.1"], ValueError, r"once, got 'stem' and 'stem\.1', .* 'stem\.1\.1'"),
        pytest.param(
            lambda name, module: name in ("stem", "stem.1"),
            ValueError,
            r"once, got 'stem' and 'stem\.1', .* 'stem\.1\.1'",
            id="predicate of two",
        ),
        (["layers"], ValueError, "'layers'.*ModuleList"),
        (["walker"], ValueError, "'walker'.*Walker"),
        pytest.param(lambda name, module: False, ValueError, "one module", id="predicate"),
    ],
    ids=str,
)
def test_wrong_sites_change_nothing(sites: Any, error: type[Exception], match: str) -> None:
    model = Net()
    before = list(model.state_dict())
    with pytest.raises(error, match=match):
        insert_steam(model, sites)
    assert list(model.state_dict()) == before and not steam_sites(model)


def test_modules_that_cannot_have_a_unit() -> None:
    model = insert_steam(Net(), ["both"])
    with pytest.raises(TypeError, match=r"sites .*Both.*tuple"):
        model(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"sites .*'0', a SaysBoth, returns a tuple"):
        insert_steam(nn.Sequential(SaysBoth()), ["0"])
    relu = nn.ReLU()
    shared = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), relu), nn.Sequential(nn.Conv2d(4, 4, 1), relu))
    with pytest.raises(ValueError, match=r"'0' ends in '0\.1'"):
        insert_steam(shared, ["0"])
    twice = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu))
    with pytest.raises(ValueError, match=r"'0' ends in '0\.3'"):
        insert_steam(twice, ["0"])
    own = Net()
    own.both.steam = nn.Identity()
    with pytest.raises(ValueError, match=r"'steam'.*'both'"):
        insert_steam(own, ["both"])
    for function in (remove_steam, steam_sites):
        with pytest.raises(TypeError, match=r"model .*int"):
            function(3)
    with pytest.raises(ValueError, match="Net"):
        remove_steam(Net())


@pytest.mark.parametrize("sites", ["adaptive", "blocks"])
def test_compiled_code_is_not_that_of_another_network(sites: str) -> None:
    """TorchDynamo guards on classes and not on hooks: a network with units must not run the code of one without, be it
    another one or the same before they were put in."""
    plain = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    other = insert_steam(copy.deepcopy(plain), sites)
    x = torch.randn(2, 3, 33, 33)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager")
    before = compiled(x)
    assert torch.equal(torch.compile(other, backend="eager")(x), other(x)) and not torch.equal(other(x), before)
    insert_steam(plain, sites).load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))
    remove_steam(plain)
    assert torch.equal(compiled(x), before)


def test_hooks_that_were_there_stay(caplog: pytest.LogCaptureFixture) -> None:
    """They see the output as the unit leaves it, and afterwards what they saw before."""
    model = Net().eval()
    seen: list[torch.Tensor] = []
    model.layers[1].register_forward_hook(lambda m, args, y: seen.append(y))
    model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(1, 3, 8, 8)
    model(x)
    with caplog.at_level(logging.INFO, "steam_kernels"):
        insert_steam(model, ["layers.1"])
    assert "1 units, 64 parameters, in Net, after: layers.1 (8 channels)" in caplog.text
    model(x)
    unit = steam_sites(model)["layers.1"]
    assert torch.equal(seen[2], seen[0]) and torch.equal(seen[3], unit(seen[1])) and not torch.equal(seen[3], seen[1])
    remove_steam(model)
    model(x)
    assert len(seen) == 6 and torch.equal(seen[4], seen[0]) and torch.equal(seen[5], seen[1])


def test_a_replaced_forward_is_refused() -> None:
    """It would be called in place of the class's, and the unit left out."""
    model = Net()
    model.layers[1].forward = model.layers[1].forward
    with pytest.raises(ValueError, match=r"sites .*'layers\.1'.*forward"):
        insert_steam(model, ["layers.1"])


def test_frozen_norms_of_a_detectors_backbone() -> None:
    """FrozenBatchNorm2d is no norm of torch's, and has buffers alone: the unit's dtype is that of the block around."""
    norm = torchvision.ops.FrozenBatchNorm2d
    plain = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3, norm_layer=norm).eval().double()
    model = insert_steam(copy.deepcopy(plain), "blocks", identity_init=True)
    placed = steam_sites(model)
    assert {name: u.channels for name, u in placed.items()} == {f"layer{i}.0.bn2": 32 * 2**i for i in (1, 2, 3, 4)}
    assert all(isinstance(model.get_submodule(name), norm) for name in placed)
    x = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        placed["layer1.0.bn2"].channel_weight.fill_(2)
    assert not torch.equal(model(x), plain(x))


def small_resnet() -> nn.Module:
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def test_convert_sync_batchnorm_comes_first() -> None:
    model = insert_steam(nn.SyncBatchNorm.convert_sync_batchnorm(small_resnet()), "blocks")
    assert len(steam_sites(model)) == 4 and all(u.channels for u in steam_sites(model).values())
    late = nn.SyncBatchNorm.convert_sync_batchnorm(insert_steam(small_resnet(), "blocks"))
    with pytest.warns(UserWarning, match=r"4 units .*'layer1\.0\.bn2'.*replaced.*reattach_steam"):
        assert not steam_sites(late)
    assert len(units(late)) == 4
    with pytest.raises(ValueError, match=r"4 units .*'layer1\.0\.bn2'.*replaced.*reattach_steam"):
        insert_steam(late, "blocks")
    assert not units(remove_steam(late)) and not steam_sites(late)


@pytest.mark.parametrize("tool", ["torch", "timm", "lightning"])
def test_units_of_converted_norms_are_put_back(tool: str) -> None:
    """A conversion makes new norms, and has the old ones' units as children that nothing calls."""
    if tool == "timm":
        convert = pytest.importorskip("timm.layers").convert_sync_batchnorm
        model = insert_steam(timm_model("efficientnet_lite0", num_classes=3), "blocks").eval()
    elif tool == "lightning":
        convert = pytest.importorskip("lightning").pytorch.plugins.TorchSyncBatchNorm().apply
        model = insert_steam(small_resnet(), "blocks").eval()
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        model = insert_steam(small_resnet(), "blocks").eval()
    x = torch.randn(2, 3, 65, 97)
    placed, expected = steam_sites(model), model(x)
    converted = copy.deepcopy(convert(model))
    assert not torch.allclose(converted(x), expected, rtol=1e-3)
    assert steam_kernels.models.reattach_steam(converted) is converted
    assert list(steam_sites(converted)) == list(placed)
    assert all(isinstance(converted.get_submodule(name), nn.SyncBatchNorm) for name in placed)
    # without a process group SyncBatchNorm is BatchNorm
    assert torch.equal(converted(x), expected)
    assert steam_kernels.models.reattach_steam(converted) is converted and len(steam_sites(converted)) == len(placed)
    assert not units(remove_steam(converted))


def test_a_norm_that_is_the_model_is_converted_too() -> None:
    norm = insert_steam(nn.Sequential(nn.BatchNorm2d(4)), ["0"])[0]
    converted = steam_kernels.models.reattach_steam(nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    assert list(steam_sites(converted)) == [""]


def test_layers_of_ones_own_are_not_put_back() -> None:
    """What a model was built with under the name ``steam`` is called by the model itself, anywhere."""
    own = Net()
    own.both.steam = FusedSTEAM(8)
    assert steam_kernels.models.reattach_steam(own) is own and not steam_sites(own) and type(own.both) is Both
    with pytest.raises(TypeError, match=r"model .*int"):
        steam_kernels.models.reattach_steam(3)


class Wrapped(nn.Sequential):
    """Stands for what DDP and FSDP make of a model: they are known by their names."""


Wrapped.__name__ = "DistributedDataParallel"


def test_wrapped_models_are_refused() -> None:
    """Their wrappers have taken the parameters: no gradient of a unit would be reduced."""
    with pytest.raises(ValueError, match="must not be wrapped yet, got DistributedDataParallel"):
        insert_steam(Wrapped(nn.Conv2d(3, 4, 1)), ["0"])


def test_modules_that_change_their_class_are_refused() -> None:
    """A lazy module takes another class at its first call, a parametrized one when that is undone."""
    lazy = nn.Sequential(nn.LazyConv2d(4, 1))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))
    generated = nn.Sequential(torch.fx.symbolic_trace(nn.Conv2d(3, 4, 1)))
    for model in (lazy, normed, generated):
        with pytest.raises(ValueError, match="whose class stays: '0'"):
            insert_steam(model, ["0"])
    model = insert_steam(nn.Sequential(nn.Conv2d(3, 4, 1)), ["0"])
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="'0' that has become a ParametrizedConv2d"):
        remove_steam(model)


def test_one_block_is_traced_by_itself() -> None:
    """FX takes the arguments of its root from the signature of forward, which is the class's own."""
    block = insert_steam(models.resnet.BasicBlock(4, 4).eval(), "blocks")
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))


class Counted(nn.Conv2d):
    def __reduce__(self) -> Any:
        return Counted, (3, 4, 1), self.__dict__


def test_a_pickle_of_ones_own() -> None:
    model = insert_steam(nn.Sequential(Counted(3, 4, 1)), ["0"])
    x = torch.randn(1, 3, 5, 5)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x)) and type(remove_steam(twin)[0]) is Counted


# ---- what looks at a model from outside ------------------------------------------------------------------------------


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
    for _ in range(2):  # the second raises where a parameter had no part in the first
        parallel(x).square().sum().backward()
    assert all(p.grad is not None for p in parallel.parameters())


# ---- ready models, imports -------------------------------------------------------------------------------------------


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


def test_the_package_imports_no_toolkit() -> None:
    toolkits = {
        "torchvision",
        "timm",
        "mmengine",
        "detectron2",
        "ultralytics",
        "lightning",
        "segmentation_models_pytorch",
    }
    code = "import sys, steam_kernels.models, steam_kernels.integrations; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert toolkits.isdisjoint(run.stdout.split())


def test_a_known_network_is_not_placed_otherwise() -> None:
    """Where a place between known blocks cannot have a unit, its name is the error; no dry run chooses others."""
    model = models.resnet18(weights=None)
    block = model.layer3[1]
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(ValueError, match=r"'layer3\.1', whose own forward was replaced"):
        insert_steam(model)


class Teacher(nn.Conv2d):
    """A module of which there is one, as frozen encoders are kept."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self


def test_a_module_that_is_not_copied_is_left_alone() -> None:
    model = nn.Sequential(Teacher(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)).train()
    model[0].register_forward_hook(lambda m, args, y: None)
    with pytest.raises(TypeError, match="a copy shares modules with it"):
        insert_steam(model)
    assert model[0].training and model[0]._forward_hooks
