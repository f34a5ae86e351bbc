"""insert_steam after any module: names, predicates, modules that tools make anew, and modules that are refused."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import steam_kernels.models
from steam_kernels import FusedSTEAM, insert_steam, remove_steam, steam_sites
from tests.support.networks import timm_model, units

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


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
    """A network with units does not run code that was compiled for a network without units.

    This holds for another network and for the same network before the insertion. TorchDynamo guards on classes, but not
    on hooks.
    """
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
    """Existing hooks see the output of the unit, and after remove_steam the output of the module."""
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
    """A replaced forward would be called instead of the class's forward, so the unit would not act."""
    model = Net()
    model.layers[1].forward = model.layers[1].forward
    with pytest.raises(ValueError, match=r"sites .*'layers\.1'.*forward"):
        insert_steam(model, ["layers.1"])


def test_frozen_norms_of_a_detectors_backbone() -> None:
    """FrozenBatchNorm2d is not a norm of torch and has only buffers, so the unit takes the dtype of its block."""
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
    """A conversion makes new norms, which have the old units as children but do not call them."""
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
    # Without a process group SyncBatchNorm computes BatchNorm.
    assert torch.equal(converted(x), expected)
    assert steam_kernels.models.reattach_steam(converted) is converted and len(steam_sites(converted)) == len(placed)
    assert not units(remove_steam(converted))


def test_a_norm_that_is_the_model_is_converted_too() -> None:
    norm = insert_steam(nn.Sequential(nn.BatchNorm2d(4)), ["0"])[0]
    converted = steam_kernels.models.reattach_steam(nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    assert list(steam_sites(converted)) == [""]


def test_layers_of_ones_own_are_not_put_back() -> None:
    """The model itself calls a layer ``steam`` that it was built with, so reattach_steam does not change it."""
    own = Net()
    own.both.steam = FusedSTEAM(8)
    assert steam_kernels.models.reattach_steam(own) is own and not steam_sites(own) and type(own.both) is Both
    with pytest.raises(TypeError, match=r"model .*int"):
        steam_kernels.models.reattach_steam(3)


class Wrapped(nn.Sequential):
    """Stands in for the wrappers DDP and FSDP, which are recognised by their names."""


Wrapped.__name__ = "DistributedDataParallel"


def test_wrapped_models_are_refused() -> None:
    """The wrappers already have the parameters, so they would not reduce the gradients of a unit."""
    with pytest.raises(ValueError, match="must not be wrapped yet, got DistributedDataParallel"):
        insert_steam(Wrapped(nn.Conv2d(3, 4, 1)), ["0"])


def test_modules_that_change_their_class_are_refused() -> None:
    """A lazy module changes its class at the first call, and a parametrized one when the parametrization is removed."""
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
    """FX reads the arguments of its root from forward's signature, so it must be that of the original class."""
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


def test_a_known_network_is_not_placed_otherwise() -> None:
    """If a place between known blocks cannot have a unit, the error names it. No dry run chooses other places."""
    model = models.resnet18(weights=None)
    block = model.layer3[1]
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(ValueError, match=r"'layer3\.1', whose own forward was replaced"):
        insert_steam(model)


class Teacher(nn.Conv2d):
    """A module that copies return itself, like a frozen encoder that is shared."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self


def test_a_module_that_is_not_copied_is_left_alone() -> None:
    model = nn.Sequential(Teacher(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)).train()
    model[0].register_forward_hook(lambda m, args, y: None)
    with pytest.raises(TypeError, match="a copy shares modules with it"):
        insert_steam(model)
    assert model[0].training and model[0]._forward_hooks
