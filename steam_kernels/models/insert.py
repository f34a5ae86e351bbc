"""insert_steam(): STEAM units put into a model that is already there, without renaming anything in it.

A family of models is one entry of :data:`FAMILIES`: how to recognise it, and its named placements. A unit becomes the
submodule ``steam`` of the block that it follows, and a forward hook, a plain function, applies it to the block's
output: the block's own names in the state_dict stay, and copies, pickles, compilers and exporters see ordinary modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..module import FusedSTEAM
from ..reference import STEAM

#: The name under which a unit hangs below its block.
NAME = "steam"


class Site(NamedTuple):
    """A place for a unit: after ``block``, whose output has ``channels`` channels."""

    block: nn.Module
    channels: int


class Family(NamedTuple):
    """One family of models: its class's name and module, and its placements by name."""

    name: str
    module: str
    class_name: str
    placements: dict[str, Callable[[nn.Module], Iterator[Site]]]

    def holds(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family; judged by name, so that nothing is imported for it."""
        return any(c.__module__ == self.module and c.__name__ == self.class_name for c in type(model).__mro__)


def _resnet_adaptive(model: Any) -> Iterator[Site]:
    """After blocks 3, 6, 9, ... of each stage and the last of a shorter one: 1 + 1 + 2 + 1 in ResNet-50 [ours]."""
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        blocks = list(stage)
        for block in blocks[2::3] or blocks[-1:]:
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            yield Site(block, last.out_channels)


FAMILIES = (Family("torchvision ResNet", "torchvision.models.resnet", "ResNet", {"adaptive": _resnet_adaptive}),)


def _apply(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return block.steam(output)  # type: ignore[operator]


def insert_steam(model: nn.Module, sites: str = "adaptive", **unit: Any) -> nn.Module:
    """Puts STEAM units into ``model``, in place, and returns it.

    Args:
        model: a torchvision ResNet (ResNeXt and Wide ResNet are).
        sites: "adaptive": a unit after blocks 3, 6, 9, ... of each stage, and after the last block of a shorter stage,
            which gives the paper's five units in a ResNet-50 [second-hand: five; ours: where].
        unit: options of :class:`steam_kernels.FusedSTEAM` but ``channels``, which each site sets. Parameters are made
            on the device and in the dtype of their block's unless ``device`` and ``dtype`` are given.
            ``identity_init=True`` leaves a trained model's output as it was.

    Raises:
        TypeError: ``model`` is no module, or of a family without placements; or an option is not one of FusedSTEAM's.
        ValueError: ``sites`` is not a placement of the family, or ``model`` has units already; nothing is changed then.

    Example:
        >>> model = insert_steam(torchvision.models.resnet50(), identity_init=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    family = next((family for family in FAMILIES if family.holds(model)), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise TypeError(f"model must be one of: {known}; got {type(model).__module__}.{type(model).__qualname__}")
    if not isinstance(sites, str) or sites not in family.placements:
        allowed = ", ".join(map(repr, family.placements))
        raise ValueError(f"sites must be one of {allowed} for a {family.name}, got {sites!r}")
    if "channels" in unit:
        raise TypeError(f"channels is set by each site, got channels={unit['channels']!r}")
    present = next((name for name, module in model.named_modules() if isinstance(module, STEAM)), None)
    if present is not None:
        raise ValueError(f"model must be without STEAM units, got one that has them already, at {present!r}")

    places = list(family.placements[sites](model))
    units = []
    for block, channels in places:
        parameter = next(block.parameters())
        units.append(FusedSTEAM(channels, **{"device": parameter.device, "dtype": parameter.dtype, **unit}))
    for (block, _), made in zip(places, units, strict=True):
        made.train(block.training)
        block.add_module(NAME, made)
        block.register_forward_hook(_apply)
    return model
