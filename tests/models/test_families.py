"""insert_steam in networks of known blocks: every family in every placement."""

from __future__ import annotations

import copy
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import FusedSTEAM, insert_steam, remove_steam, steam_sites
from steam_kernels.models import families
from tests.support.networks import outputs, timm_model, units

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


def small_convnext() -> nn.Module:
    setting = [models.convnext.CNBlockConfig(8, 16, 3), models.convnext.CNBlockConfig(16, None, 2)]
    model = models.ConvNeXt(setting, layer_scale=0.5, num_classes=5)
    for p in model.parameters():
        if p.dim() > 1:  # with the usual initial weights the gates hardly depend on the map
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


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_in_every_placement(name: str) -> None:
    """Each unit acts once on its channels, no name changes, the identity is exact, and remove_steam undoes all."""
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
    """A stage ends if the next block halves the map, even with the same width, as in MobileNetV2 x0.25."""
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
    """The output of a timm block that ends with its addition. The branch is the term that the block adds."""
    skip = block.shortcut(x) if hasattr(block, "shortcut") else x if block.has_skip else torch.zeros(())
    return unit(block(x) - skip) + skip


#: Functions that compute a block with a unit by hand from the parts of the block, for "blocks".
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
    """Tests one attention block of MobileNetV4's hybrids, because the whole networks are large."""
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
    """The table of docs/models.md has the counts of insert_steam."""
    documented = [row[1:] for row in DOCUMENTED if row[0] == library]
    assert len(documented) == rows
    for name, stages, *counts in documented:
        # RegNet computes its widths with tensors, which does not work on the meta device.
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
    """A GhostNet has one known block. A unit in this block only would not be the placement that was asked for."""
    with torch.device("meta"):
        model = timm_model("ghostnet_050")
    for sites in ("adaptive", "stages"):
        insert_steam(model, sites)
        assert [u.channels for u in steam_sites(model).values()] == [i["num_chs"] for i in model.feature_info]
        remove_steam(model)
    with pytest.raises(TypeError, match=r"'blocks'.*timm\.models\.ghostnet\.GhostNet.*'adaptive' or 'stages'"):
        insert_steam(model, "blocks")


def test_timm_features_that_cannot_have_a_unit() -> None:
    """The stages of a DenseNet are ModuleDicts, so the norm that takes their output has the unit."""
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
