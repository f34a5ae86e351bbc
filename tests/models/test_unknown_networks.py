"""insert_steam in networks of unknown blocks, whose stages a dry run on the meta device finds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import insert_steam, remove_steam, steam_sites
from tests.support import networks
from tests.support.networks import outputs, timm_model

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


def small_maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 8, 2, [8, 16], [2, 1], 8, 0.0, num_classes=5)


#: Networks of unknown blocks, the side of their images, and the last modules of their stages.
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
    """A network whose later maps of each size depend on other maps too. Its stages are only on the way down."""

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
    """A network that takes only images of 32 x 32."""

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
    """Two branches, of which the second ends last. Both lower the resolution inside one module."""

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
    """Stages end where the resolution falls. The dry run does not change the model, and each unit acts once."""
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
    got[0].square().sum().backward()  # the output depends on each unit
    assert all(unit.spatial_weight.grad.abs().max() > 0 for unit in steam_sites(model).values())


#: RegNet computes its widths with tensors, which does not work on the meta device, so its large networks are left out.
CLASSIFIERS = [n for n in models.list_models(module=models) if not re.fullmatch(r"regnet.*_(3_2|8|16|32|128)gf", n)]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_of_torchvision(name: str) -> None:
    """Each classifier has a unit after each stage, which is called once. Classifiers without stages are refused."""
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
