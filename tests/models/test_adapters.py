"""Adapters of peft and modules with units: an adapter on a unit or a unit in an adapter is an error, or works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import insert_steam, remove_steam, steam_sites

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")


def network() -> nn.Module:
    """A network of convolutions that all adapters take: square, with even widths."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
    )


#: The options that a kind of adapter needs besides the modules.
OPTIONS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 4},
}


def adapted(kind: Any, model: nn.Module) -> nn.Module:
    options = {"target_modules": ["0.0", "1.0"], **OPTIONS.get(kind.name, {})}
    return peft.get_peft_model(model, mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))


def takes_convolutions(kind: Any) -> bool:
    try:
        return any(hasattr(m, "base_layer") for m in adapted(kind, network()).modules())
    except Exception:
        return False


KINDS = [kind for kind in mapping.PEFT_TYPE_TO_TUNER_MAPPING if takes_convolutions(kind)]


def test_the_kinds_of_adapters_are_found() -> None:
    assert {kind.name for kind in KINDS} >= {"LORA", "LOHA", "LOKR", "IA3", "BOFT", "OFT", "HRA"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_adapter_on_a_module_with_a_unit_is_refused(kind: Any) -> None:
    """Such an adapter would act after the unit, be merged before it, or read the weight and skip the unit."""
    model = insert_steam(network(), ["1.0"])
    with pytest.raises(TypeError, match=r"a Conv2d with a STEAM unit .*adapter.*after a norm or a block"):
        adapted(kind, model)
    adapted(kind, remove_steam(insert_steam(network(), ["1.0"])))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_unit_goes_into_an_adapter(kind: Any) -> None:
    """Merging would replace the adapter and the unit inside it."""
    model = adapted(kind, network())
    wrapper = next(name for name, m in model.named_modules() if hasattr(m, "base_layer"))
    for name in (wrapper, f"{wrapper}.base_layer"):
        with pytest.raises(ValueError, match=rf"sites must be modules that stay: '{name}'.*adapter"):
            insert_steam(model, [name])
    assert not steam_sites(model)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("first", ["units", "adapters"])
def test_units_on_norms_stand_beside_adapters(kind: Any, first: str) -> None:
    """Both act before and after merging, in either order of insertion."""
    x = torch.randn(2, 8, 9, 11)
    if first == "units":
        model = adapted(kind, insert_steam(network(), ["0.1", "1.1"])).eval()
    else:
        model = adapted(kind, network())
        insert_steam(model, lambda name, m: isinstance(m, nn.BatchNorm2d)).eval()
    assert len(steam_sites(model)) == 2
    calls: list[nn.Module] = []
    for unit in steam_sites(model).values():
        unit.register_forward_hook(lambda unit, args, y: calls.append(unit))
    with torch.no_grad():
        model(x)
        merged = model.merge_and_unload()
        merged(x)
    assert list(steam_sites(merged)) == ["0.1", "1.1"] and calls == [*steam_sites(merged).values()] * 2


class Wrapped(nn.Module):
    """A module that is not an adapter, although its layer has the name ``base_layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_a_layer_of_that_name_is_no_adapter() -> None:
    model = insert_steam(Wrapped(nn.Conv2d(8, 8, 3)), ["base_layer"])
    assert list(steam_sites(Wrapped(model.base_layer))) == ["base_layer"]


def test_a_module_with_a_unit_is_not_made_from_its_class() -> None:
    host = insert_steam(network(), ["1.0"])[1][0]
    with pytest.raises(TypeError, match=r"a Conv2d with a STEAM unit cannot be made .* Make a Conv2d"):
        type(host)(8, 8, 3)
