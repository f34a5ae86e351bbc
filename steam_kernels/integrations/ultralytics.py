"""Ultralytics: its training keeps the units of a network, and its YAML files know the name ``FusedSTEAM``.

``YOLO.train()`` builds a new network from the YAML file, in which no unit is. After an import of this module its
trainer puts copies of the units of ``YOLO.model`` into the network that it builds, so that training, EMA, checkpoints,
validation and exports have them, also where a training is resumed or runs on several GPUs. ``BaseModel.load`` refuses
weights whose units the network does not have, instead of leaving them out. :func:`steam_kernels.insert_steam` does the
import where Ultralytics is loaded, and so does unpickling a network with units: who forgets it would train without
them, untold.

In a YAML file a row of ``backbone`` or ``head`` is, after an import of this module::

    - [-1, 1, FusedSTEAM, []]

The row's arguments are positional, and the first is the number of channels: leave them out, and the unit takes any.
Ultralytics looks the names of layers up among the globals of ``ultralytics.nn.tasks`` and offers no other place to
register one. Each process that reads the YAML file needs this import, those that a training on several GPUs starts too.
Checkpoints hold the layer by its class and load without it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn import tasks

from ..models.insert import copy_steam, remove_steam, steam_sites
from ..module import FusedSTEAM

tasks.FusedSTEAM = FusedSTEAM


def keep_units(trainer: Any, units: Mapping[str, FusedSTEAM]) -> Any:
    """A class derived from an Ultralytics trainer, in whose networks ``units`` are.

    ``YOLO.train()`` does this by itself; for a trainer that is used without a ``YOLO``::

        trainer = keep_units(DetectionTrainer, steam_sites(network))(overrides=dict(model="yolo11n.yaml", data=...))

    Args:
        trainer: a class with Ultralytics' ``get_model(cfg, weights, verbose)``.
        units: ``steam_sites`` of a network of the same YAML file. They are copied when the trainer builds its network;
            where its weights are those of a network with a unit at the same place, the copy starts from that one's.
    """

    class KeepsUnits(trainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            trained = steam_sites(weights) if isinstance(weights, nn.Module) else {}
            _check_kept(trained, units)
            if trained:
                weights = remove_steam(copy.deepcopy(weights))
            model = copy_steam(units, super().get_model(cfg=cfg, weights=weights, verbose=verbose))
            for name, unit in steam_sites(model).items():
                unit.requires_grad_(True)  # those of a finished checkpoint do not
                if name in trained:
                    unit.load_state_dict(trained[name].state_dict())
            return model

    KeepsUnits.__name__ = KeepsUnits.__qualname__ = trainer.__name__
    return KeepsUnits


#: What a unit's weights mean something else under.
_OPTIONS = (
    "embed_dim",
    "num_heads",
    "grid_size",
    "window",
    "channel_radius",
    "spatial_neighbors",
    "self_loops",
    "order",
)


def _check_kept(given: Mapping[str, FusedSTEAM], there: Mapping[str, FusedSTEAM]) -> None:
    """Raises ValueError where weights come from a network with units that the one which takes them does not have."""
    if lost := given.keys() - there.keys():
        raise ValueError(
            f"weights must be of a network whose units this one has, got units at {sorted(lost)}: use the network that "
            "the checkpoint holds (YOLO(path)), or take its units out with steam_kernels.remove_steam"
        )
    for name, unit in given.items():
        for option in _OPTIONS:
            own, other = getattr(there[name], option), getattr(unit, option)
            if own != other:
                raise ValueError(
                    f"weights must be of units with the options of this network's, got {option}={other!r} at {name!r}, "
                    f"where it has {own!r}"
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
