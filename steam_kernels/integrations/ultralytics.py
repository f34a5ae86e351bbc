"""Ultralytics: training keeps the units of a network, and YAML files know the name ``FusedSTEAM``.

``YOLO.train()`` builds a new network from the YAML file, which has no units. After an import of this module the trainer
puts copies of the units of ``YOLO.model`` into the new network. Training, EMA, checkpoints, validation and exports then
have the units, also in a resumed training and on several GPUs. ``BaseModel.load`` refuses weights with units that the
network does not have; without this module it would silently leave them out.

:func:`steam_kernels.insert_steam` imports this module if Ultralytics is loaded, and so does unpickling a network with
units. Without this import, training would lose the units without a warning.

After an import of this module, a row of ``backbone`` or ``head`` in a YAML file can be::

    - [-1, 1, FusedSTEAM, []]

The row's arguments are positional, and the first is the number of channels. Without arguments, the unit takes any
number. Ultralytics looks up the names of layers in the globals of ``ultralytics.nn.tasks``; a layer cannot be
registered in another place. Each process that reads the YAML file needs this import, also the processes of a training
on several GPUs. Checkpoints contain the layer by its class and load without this import.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn import tasks

from ..config import Options
from ..models.insert import copy_steam, remove_steam, steam_sites
from ..module import FusedSTEAM

tasks.FusedSTEAM = FusedSTEAM


def keep_units(trainer: Any, units: Mapping[str, FusedSTEAM]) -> Any:
    """Derives a class from an Ultralytics trainer that puts ``units`` into the networks that it builds.

    ``YOLO.train()`` uses it automatically. A trainer that is used without a ``YOLO`` needs it::

        trainer = keep_units(DetectionTrainer, steam_sites(network))(overrides=dict(model="yolo11n.yaml", data=...))

    Args:
        trainer: a class with Ultralytics' ``get_model(cfg, weights, verbose)``.
        units: ``steam_sites`` of a network of the same YAML file. They are copied when the trainer builds its network.
            If the trainer's weights come from a network with a unit at the same place, the copy takes that unit's
            weights.
    """

    class KeepsUnits(trainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            trained = steam_sites(weights) if isinstance(weights, nn.Module) else {}
            _check_kept(trained, units)
            if trained:
                weights = remove_steam(copy.deepcopy(weights))
            model = copy_steam(units, super().get_model(cfg=cfg, weights=weights, verbose=verbose))
            for name, unit in steam_sites(model).items():
                unit.requires_grad_(True)  # parameters from a finished checkpoint require no gradient
                if name in trained:
                    unit.load_state_dict(trained[name].state_dict())
            return model

    KeepsUnits.__name__ = KeepsUnits.__qualname__ = trainer.__name__
    return KeepsUnits


#: The options that change the meaning of a unit's weights: all but these.
_OPTIONS = ("embed_dim", *sorted(Options().given().keys() - {"scale", "activation", "inplace", "backend"}))


def _check_kept(given: Mapping[str, FusedSTEAM], there: Mapping[str, FusedSTEAM]) -> None:
    """Raises ValueError if weights were trained with units that the network does not have, or with other options."""
    if lost := given.keys() - there.keys():
        raise ValueError(
            f"weights must be of units that the network has, got units at {sorted(lost)}: use the network of the "
            "checkpoint (YOLO(path)), or take its units out with steam_kernels.remove_steam"
        )
    for name, unit in given.items():
        for option in _OPTIONS:
            own, other = getattr(there[name], option), getattr(unit, option)
            if own != other:
                raise ValueError(
                    f"weights must be of units with the network's options, got {option}={other!r} at {name!r}, "
                    f"but the network has {own!r}"
                )


_train = Model.train
_load = tasks.BaseModel.load


@functools.wraps(_train)
def _train_with_units(self: Any, trainer: Any = None, **options: Any) -> Any:
    units = steam_sites(self.model) if isinstance(self.model, nn.Module) else {}
    if units:
        trainer = keep_units(trainer or self._smart_load("trainer"), copy.deepcopy(units))
    if trainer is not None:
        options["trainer"] = trainer
    return _train(self, **options)


@functools.wraps(_load)
def _load_with_units(self: Any, weights: Any, *args: Any, **options: Any) -> Any:
    source = (weights.get("ema") or weights.get("model")) if isinstance(weights, dict) else weights
    if isinstance(source, nn.Module):
        _check_kept(steam_sites(source), steam_sites(self))
    return _load(self, weights, *args, **options)


Model.train = _train_with_units
tasks.BaseModel.load = _load_with_units
