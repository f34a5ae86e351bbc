"""insert_steam() puts STEAM units into an existing model without renaming its modules.

A unit becomes the submodule ``steam`` of the module whose output it takes. The class of that module is replaced by a
derived class that applies the unit after ``forward``. The model's own names in the state_dict stay, and copies,
pickles, compilers and exporters see ordinary modules. Forward hooks are not used, because TorchDynamo does not guard on
hooks: a network with units would run the code that was compiled without units.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..layer import Layer
from ..module import FusedSTEAM
from .dry_run import stage_ends
from .families import PLACEMENTS, Place, channels_of, find_blocks

#: The name of a unit as a submodule.
NAME = "steam"

#: Methods by which Ultralytics replaces forward in fuse() and in its exports. A unit acts after them too.
_STAND_INS = ("forward_fuse", "forward_split")

_log = logging.getLogger(__name__)
_NAMED = ", ".join(map(repr, PLACEMENTS))
_SITES = f"sites must be one of {_NAMED}, a list of module names, or a predicate of name and module"


@functools.cache
def _with_unit(base: Any) -> Any:
    """A class derived from ``base`` that applies the unit ``steam`` after forward."""
    _watch_for_adapters()

    class WithUnit(base):
        without_unit = base

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError(
                f"a {base.__qualname__} with a STEAM unit cannot be made from its class: it would have no unit. Make a "
                f"{base.__qualname__}, and give it one by insert_steam"
            )

        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return _gated(self, super().forward(*args, **kwargs))

        def __reduce_ex__(self, protocol: Any) -> Any:
            make, arguments, *state = super().__reduce_ex__(max(protocol, 2))
            if type(self) is not WithUnit:
                return make, arguments, *state
            # A pickle cannot find a class that was made here by a name, so it contains the base class.
            return _remade, (make, tuple(base if a is WithUnit else a for a in arguments)), *state

    def behind(name: str) -> Callable[..., Tensor]:
        @functools.wraps(getattr(base, name))
        def stand_in(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            return _gated(self, getattr(super(WithUnit, self), name)(*args, **kwargs))

        return stand_in

    for name in _STAND_INS:
        if hasattr(base, name):
            setattr(WithUnit, name, behind(name))
    # FX reads the class's module, and messages show the class's name. Both stay those of the base class.
    WithUnit.__module__, WithUnit.__name__, WithUnit.__qualname__ = base.__module__, base.__name__, base.__qualname__
    return WithUnit


def _is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of peft. Such a layer contains the layer that it adapts as ``base_layer``."""
    return any(c.__name__ == "BaseTunerLayer" for c in type(module).__mro__)


@functools.cache
def _watch_for_adapters() -> None:
    """Registers a hook that raises TypeError when an adapter takes a module with a unit as its child."""

    def refuse(adapter: nn.Module, name: str, module: Any) -> None:
        if name == "base_layer" and hasattr(type(module), "without_unit") and _is_adapter(adapter):
            raise TypeError(
                f"a {type(module).__qualname__} with a STEAM unit cannot have an adapter, got a "
                f"{type(adapter).__module__}.{type(adapter).__qualname__}: its share would be added after the unit, "
                "but merged before it. Put the unit after a norm or a block, which adapters leave alone "
                "(insert_steam(model, 'blocks') does)"
            )

    nn.modules.module.register_module_module_registration_hook(refuse)


def _gated(module: Any, output: Any) -> Tensor:
    if not isinstance(output, (Tensor, torch.fx.Proxy)):
        kind = type(module).without_unit.__qualname__
        raise TypeError(
            f"sites must be modules that return one tensor (N, C, H, W): a {kind} has a unit, and returns a "
            f"{type(output).__name__}; remove_steam(model) takes the units out again"
        )
    return module.steam(output)


def _remade(make: Callable[..., Any], arguments: tuple[Any, ...]) -> nn.Module:
    _have_trainers_keep_units()
    made = make(*arguments)
    kind: Any = type(made)
    made.__class__ = _with_unit(kind)
    return made


def _have_trainers_keep_units() -> None:
    """Imports the Ultralytics adapter, if Ultralytics is loaded.

    The trainer of Ultralytics builds a new network, which would have no units. With the adapter the new network has
    them. This function runs when units are inserted and when they are unpickled. Otherwise a forgotten import would
    lead to training without units, and without a warning.
    """
    if "ultralytics.nn.tasks" in sys.modules:
        try:
            importlib.import_module("steam_kernels.integrations.ultralytics")
        except (ImportError, AttributeError) as error:
            warnings.warn(
                "steam_kernels does not know the trainer of the loaded Ultralytics (it knows the one of 8.4), so "
                f"YOLO.train() would build its network without units ({type(error).__name__}: {error})",
                stacklevel=2,
            )


#: The names of classes that have already collected the parameters of their model.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def insert_steam(
    model: nn.Module, sites: str | Iterable[str] | Callable[[str, nn.Module], bool] = "adaptive", **unit: Any
) -> nn.Module:
    """Puts STEAM units into ``model``, in place, and returns it.

    The modules of the model keep their names, places and hooks. A forward hook sees the output of the unit. A unit adds
    the keys ``<module>.steam.*`` to the state_dict; nothing else changes. One line of the log at INFO names the units.
    :func:`steam_sites` lists the units, and :func:`remove_steam` takes them out.

    Args:
        model: any module. The three placements by name need known blocks: ResNet (ResNeXt, Wide ResNet), MobileNetV2
            and V3, ShuffleNetV2, EfficientNet, ConvNeXt and RegNet of torchvision and of timm. The blocks may be inside
            a detector, a segmentation model or an encoder. In any other CNN that takes one image, the stages are found
            by a dry run of a copy on the meta device. docs/models.md explains stages and blocks of each family.
        sites: where the units go.

            - "adaptive": after blocks 3, 6, 9, ... of each stage, and after the last block of a shorter stage. This
              gives the paper's five units in a ResNet-50 [second-hand: five; ours: where].
            - "stages": after each stage. If the blocks are not known, "adaptive" and "stages" both put a unit after
              each module of a timm model's ``feature_info``, or where the resolution falls in another network.
            - "blocks": in each block, at the end of its branch, before the addition (in ShuffleNetV2 before the
              concatenation).
            - A list of module names (``model.named_modules()``), or a predicate ``(name, module) -> bool`` that is
              called for each module below ``model``: after each of these modules. A module must return one tensor
              ``(N, C, H, W)``. In a Sequential the unit goes after the last module. If a module is called several
              times, its unit is applied each time.
        unit: options of :class:`steam_kernels.FusedSTEAM`, except ``channels``. The channels are those of the site, if
            they are known (blocks, convolutions, norms), else None. The device and dtype of the parameters are those of
            the site's parameters, or else those of the modules around it, unless ``device`` and ``dtype`` are given.
            With ``identity_init=True`` a trained model's output keeps every bit.

    Raises:
        TypeError: ``model`` is not a module; ``sites`` is "blocks" and the model has no known block; ``sites`` is
            another placement by name and no stages are known or found; ``sites`` has another type; or an option does
            not belong to FusedSTEAM.
        ValueError: ``sites`` is an unknown placement, is empty, names a module that does not exist, names one place
            twice, or names a module that cannot have a unit; ``model`` already has units; or ``model`` is wrapped by
            DDP or FSDP, which would not know the new parameters. The model is not changed then.

    Note:
        Insert units before the optimiser is made. Some functions replace modules, as
        ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` replaces norms ("blocks"). They move the units to the new
        modules, which do not call them. Call such a function before, or :func:`steam_kernels.models.reattach_steam`
        after it. A module that iterates over its children is refused only if its class's ``forward`` does so directly,
        not if a function that ``forward`` calls does so.

    Example:
        >>> model = insert_steam(torchvision.models.resnet50(), identity_init=True)
        >>> list(steam_sites(model))
        ['layer1.2', 'layer2.2', 'layer3.2', 'layer3.5', 'layer4.2']
    """
    _check_module(model)
    if "channels" in unit:
        raise TypeError(f"channels is set by each site, got channels={unit['channels']!r}")
    if orphans := _orphans(model):
        raise ValueError(_lost(orphans))
    present = next((name for name, module in model.named_modules() if isinstance(module, Layer)), None)
    if present is not None:
        raise ValueError(f"model must be without STEAM units, got one that has them already, at {present!r}")

    for name, module in model.named_modules():
        if wrapper := _WRAPPERS & {c.__name__ for c in type(module).__mro__}:
            raise ValueError(f"model must not be wrapped yet, got {wrapper.pop()} at {name!r}: insert units before")

    named = _places(model, sites)
    places = [_host(place, model) for place in named]
    seen: dict[nn.Module, str] = {}
    for (given, _, _), (name, module, _) in zip(named, places, strict=True):
        if module in seen:
            raise ValueError(
                f"sites must name each place once, got {seen[module]!r} and {given!r}, whose output is that of {name!r}"
            )
        seen[module] = given
    units: list[Any] = [FusedSTEAM(channels, **{**_factory(model, name), **unit}) for name, _, channels in places]
    _attach([module for _, module, _ in places], units)
    _log.info(
        "insert_steam: %d units, %d parameters, in %s, after: %s",
        len(units),
        sum(p.numel() for made in units for p in made.parameters()),
        type(model).__qualname__,
        ", ".join(f"{name} ({channels or 'any'} channels)" for name, _, channels in places),
    )
    return model


def copy_steam(units: Mapping[str, FusedSTEAM], model: nn.Module) -> nn.Module:
    """Puts copies of ``units`` into ``model``, in place, after the modules of the same names, and returns ``model``.

    ``units`` is the result of :func:`steam_sites` for another network. The copies take ``model``'s device and dtype
    there.

    Raises:
        ValueError: as :func:`insert_steam`. The model is not changed then.
    """
    places = [_host(place, model) for place in _places(model, list(units))]
    copies = [copy.deepcopy(unit).to(**_factory(model, name)) for name, unit in units.items()]
    _attach([module for _, module, _ in places], copies)
    return model


def _attach(modules: list[nn.Module], units: Sequence[Any]) -> None:
    _have_trainers_keep_units()
    kinds: list[Any] = [type(module) for module in modules]
    for module, unit, kind in zip(modules, units, [_with_unit(kind) for kind in kinds], strict=True):
        unit.train(module.training)
        unit.inserted = True  # tells it from the model's own layers, even if a tool moves it
        module.add_module(NAME, unit)
        module.__class__ = kind


def steam_sites(model: nn.Module) -> dict[str, FusedSTEAM]:
    """The units that :func:`insert_steam` put into ``model``, by the name of the module that they follow.

    A unit acts whenever its module is called. This function does not know whether the model calls a module: a
    ``TransformerEncoderLayer`` reads the weights of ``self_attn.out_proj`` and never calls it. The units are read from
    the model itself, so copies and unpickled models work too. If a tool has replaced a module with a unit, the unit
    does nothing, and a warning says so; :func:`steam_kernels.models.reattach_steam` puts the unit back.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    if orphans := _orphans(model):
        warnings.warn(_lost(orphans), stacklevel=2)
    return _sites(model)


def reattach_steam(model: nn.Module) -> nn.Module:
    """Makes units act again after a tool has replaced their modules, in place, and returns ``model``.

    Conversions of norms (torch's ``SyncBatchNorm.convert_sync_batchnorm``, timm's, Lightning's ``sync_batchnorm=True``)
    make new modules. The new modules have the units of the old ones as children, but do not call them. A model without
    such units is not changed.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a new module cannot have a unit. The model is not changed then.

    Example:
        >>> model = reattach_steam(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model))
    """
    _check_module(model)
    orphans: dict[str, Any] = _orphans(model)
    for name, module in orphans.items():
        _check_host(name, module, model)
    for module in orphans.values():
        kind: Any = type(module)
        module.__class__ = _with_unit(kind)
    return model


def _sites(model: nn.Module) -> dict[str, FusedSTEAM]:
    return {name: module.steam for name, module in model.named_modules() if hasattr(type(module), "without_unit")}


def remove_steam(model: nn.Module) -> nn.Module:
    """Takes the units of :func:`insert_steam` out of ``model``, in place, and returns ``model``.

    The modules, the keys of the state_dict and the outputs are as before the insertion. STEAM layers that the model was
    built with stay.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no units from :func:`insert_steam`, or a module with a unit has got another class
            since the insertion, as by ``fully_shard`` and parametrizations. The model is not changed then.
    """
    _check_module(model)
    sites = _sites(model)
    for name in sites:
        kind = type(model.get_submodule(name))
        if "without_unit" not in vars(kind):
            raise ValueError(f"model must be as insert_steam left it, got {name!r} that has become a {kind.__name__}")
    orphans = _orphans(model)
    if not sites and not orphans:
        raise ValueError(f"model must have units that insert_steam put there, got a {type(model).__qualname__} without")
    for name in sites:
        module: Any = model.get_submodule(name)
        module.__class__ = type(module).without_unit
        del module._modules[NAME]
    for orphan in orphans.values():
        del orphan._modules[NAME]
    return model


def _orphans(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have an inserted unit as a child but not its class, because a tool made these modules anew."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module._modules.get(NAME), "inserted") and not hasattr(type(module), "without_unit")
    }


def _lost(orphans: dict[str, nn.Module]) -> str:
    return (
        f"model has {len(orphans)} units that nothing calls, the first at {next(iter(orphans))!r}, since their modules "
        "were replaced after insert_steam: steam_kernels.models.reattach_steam(model) puts them back"
    )


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _places(model: nn.Module, sites: Any) -> list[Place]:
    if isinstance(sites, str):
        if sites not in PLACEMENTS:
            raise ValueError(f"{_SITES}, got {sites!r}")
        places = list(PLACEMENTS[sites](model))
        why = "none is known"
        # In a network of known blocks a place that cannot have a unit is an error, which the caller raises. A dry run
        # would choose other places without a message.
        if sites != "blocks" and not find_blocks(model) and not all(_host_if_fit(place, model) for place in places):
            places = []
        if sites != "blocks" and not places:
            try:
                places = stage_ends(model, lambda place: _host_if_fit(place, model))
                why += ", and its maps show no two stages, which end where the resolution falls"
            except ValueError as error:
                why += f", and a dry run shows none: {error}"
        if not places:
            others = [repr(name) for name in PLACEMENTS if name != "blocks"] if sites == "blocks" else []
            raise TypeError(
                f"model must have blocks that are known where sites is {sites!r} (see help(insert_steam)); got "
                f"{type(model).__module__}.{type(model).__qualname__}, of which {why}: give sites as "
                f"{''.join(f'{name} or ' for name in others)}module names or a predicate"
            )
        return places
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(sites):
        names = [name for name, module in model.named_modules() if name and sites(name, module)]
        if not names:
            raise ValueError(f"sites must choose one module at least, got a predicate that is true for none: {sites!r}")
    else:
        if not isinstance(sites, Iterable):
            raise TypeError(f"{_SITES}, got {sites!r}")
        names = list(sites)
        if not names:
            raise ValueError(f"sites must name one module at least, got {sites!r}")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{_SITES}, got {name!r} in a list")
            if not name or name not in modules:
                raise ValueError(f"sites must name modules of the model (see named_modules()), got {name!r}")
    return [Place(name, modules[name], None) for name in names]


def _host(place: Place, model: nn.Module) -> Place:
    """The module that has the unit. For a Sequential, which would run a new child itself, it is the last module."""
    name, module, channels = place
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        last, module = list(module._modules.items())[-1]
        name = f"{name}.{last}"
    _check_host(name, module, model)
    if hasattr(module, NAME):
        raise ValueError(f"sites must be modules without a {NAME!r} of their own, got {name!r} that has one")
    if several := _returns_several(module):
        raise ValueError(
            f"sites must be modules that return one tensor (N, C, H, W): {name!r}, a {type(module).__qualname__}, "
            f"returns a {several}"
        )
    if place.module is not module and _parents(model, module) > 1:
        raise ValueError(
            f"sites: {place.name!r} ends in {name!r}, which the model uses elsewhere too: name another module"
        )
    return Place(name, module, channels_of(module) if channels is None else channels)


def _host_if_fit(place: Place, model: nn.Module) -> Place | None:
    try:
        return _host(place, model)
    except ValueError:
        return None


def _check_host(name: str, module: nn.Module, model: nn.Module) -> None:
    if isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule, LazyModuleMixin)) or is_parametrized(module):
        raise ValueError(
            f"sites must be modules whose class stays: {name!r}, a {type(module).__qualname__}, is generated, lazy or "
            "parametrized; insert units before, or run a lazy module first"
        )
    forward = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    walks = {"children", "named_children", "modules", "named_modules", "_modules"} & set(
        forward.co_names if forward else ()
    )
    if walks or hasattr(type(module), "__iter__"):
        raise ValueError(
            f"sites must be modules that call their children by name: {name!r}, a {type(module).__qualname__}, would "
            "run a new child by itself, or is never called; name a module inside it"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"sites must be modules with the forward of their class, got {name!r}, whose own forward was replaced"
        )
    for owner in model.modules():
        if _is_adapter(owner) and module in owner.modules():
            raise ValueError(
                f"sites must be modules that stay: {name!r}, a {type(module).__qualname__}, is an adapter or stands in "
                "one, which merging replaces; name a norm or a block instead"
            )
    # Ultralytics' fuse() replaces or removes the children of a module with a forward_fuse; the module itself stays.
    for owner in model.modules():
        if hasattr(owner, "forward_fuse") and module is not owner and module in owner.modules():
            raise ValueError(
                f"sites must be modules that stay: {name!r}, a {type(module).__qualname__}, stands in a "
                f"{type(owner).__qualname__} with a forward_fuse, which drops it; name that module instead"
            )


def _returns_several(module: nn.Module) -> str:
    """The name of the container type that forward returns by its annotation; else empty."""
    try:
        returned = get_origin(get_type_hints(inspect.unwrap(type(module).forward)).get("return"))
    except Exception:  # the annotation may use names that only type checkers see
        return ""
    return returned.__name__ if returned in (tuple, list, dict) else ""


def _parents(model: nn.Module, module: nn.Module) -> int:
    return sum(module is child for parent in model.modules() for child in parent._modules.values())


def _factory(model: nn.Module, name: str) -> dict[str, Any]:
    while True:
        for parameter in model.get_submodule(name).parameters():
            if parameter.is_floating_point():
                return {"device": parameter.device, "dtype": parameter.dtype}
        if not name:
            return {}
        name = name.rpartition(".")[0]
