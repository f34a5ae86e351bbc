"""Settings of a run: a recipe, a command line, and gates with their variants."""

from __future__ import annotations

import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from torch import nn

from benchmarks.gates import GATES as OTHER_GATES
from benchmarks.gates import insert_gate
from steam_kernels import FusedSTEAM, insert_steam
from steam_kernels.models.families import PLACEMENTS

GATES = ("none", *OTHER_GATES, "steam")
SCHEDULES = ("step", "exponential", "cosine")


class Wrong(ValueError):
    """Bad input: one sentence that names it."""


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Settings:
    """The settings of a run.

    Args:
        data: folder of the images
        model: name of the network
        gate: none, se, eca, cbam, gct or steam
        variant: options of STEAM, as in order=parallel,radius=2; the page docs/reproduce.md lists them
        seed: seed of weights, order and augmentation
        out: folder of the run (build/evaluation/<names of the settings>)
        epochs: passes over the training images
        batch: images in a step, over all processes
        lr: learning rate after the warm-up
        momentum: momentum of SGD
        weight_decay: weight decay
        norm_weight_decay: weight decay of the normalisation layers (weight_decay)
        schedule: step, exponential or cosine; the rate changes after whole epochs
        lr_steps: epochs after which `step` multiplies the rate by lr_gamma
        lr_gamma: factor of `step`, and of each epoch of `exponential`
        warmup_epochs: epochs, or a part of one, in which the rate grows linearly
        warmup_factor: first rate of the warm-up over lr
        precision: Lightning's precision, as 32-true, 16-mixed or bf16-mixed
        deterministic: only deterministic algorithms, which GPUs need for equal bits
        accelerator: Lightning's accelerator, as auto, cpu or gpu
        devices: processes, one for each device
        workers: processes that load images
        checkpoint_minutes: minutes from one checkpoint inside an epoch to the next
        cost_rounds: rounds of the measurement of a step's time
    """

    data: str
    model: str
    gate: str = "none"
    variant: str = ""
    seed: int = 0
    out: str = ""
    epochs: int
    batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float
    norm_weight_decay: float | None = None
    schedule: str = "step"
    lr_steps: list[int]
    lr_gamma: float = 0.1
    warmup_epochs: float = 0.0
    warmup_factor: float = 0.01
    precision: str = "32-true"
    deterministic: bool = False
    accelerator: str = "auto"
    devices: int = 1
    workers: int = 0
    checkpoint_minutes: float = 10.0
    cost_rounds: int = 20

    def check(self) -> None:
        """Raises Wrong for the first setting that is out of its range."""
        one_of("gate", self.gate, GATES)
        one_of("schedule", self.schedule, SCHEDULES)
        for name in ("epochs", "batch", "devices", "cost_rounds"):
            at_least(name, getattr(self, name), 1)
        for name in ("seed", "workers", "warmup_epochs", "weight_decay", "lr", "checkpoint_minutes"):
            at_least(name, getattr(self, name), 0)
        if self.batch % self.devices:
            raise Wrong(f"--batch {self.batch}: must be a multiple of --devices, which is {self.devices}")
        if self.warmup_epochs >= self.epochs:
            raise Wrong(f"--warmup_epochs {self.warmup_epochs:g}: must be less than --epochs, which is {self.epochs}")
        variant_of(self)


S = TypeVar("S", bound=Settings)


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises Wrong unless ``value`` is one of ``allowed``."""
    if value not in (names := list(allowed)):
        raise Wrong(f"--{name} {value!r}: must be one of {', '.join(names)}")


def at_least(name: str, value: float, least: float) -> None:
    """Raises Wrong if ``value`` is below ``least``."""
    if not value >= least:
        raise Wrong(f"--{name} {value}: must be at least {least}")


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description."""


def parse(kind: type[S], recipe: Path, about: str, arguments: list[str] | None = None) -> S:
    """The settings: those of the recipe, then of another file (``--config``), then of the command line.

    Raises:
        Wrong: an argument is unknown, lacks its value, or has a value of another type.
    """
    parser = ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=about,
        default_config_files=[str(recipe)],
        exit_on_error=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", action="config", help="a YAML file of settings, which replace the recipe's")
    parser.add_class_arguments(kind)
    try:
        given = parser.parse_args(arguments)
    except (ArgumentError, TypeError, KeyError) as error:
        raise Wrong(re.sub(r"\s+", " ", str(error)).strip()) from None
    settings = kind(**{k: v for k, v in vars(given).items() if k in kind.__dataclass_fields__})
    settings.check()
    return settings


def exit_with_a_sentence(main: Callable[[], None]) -> None:
    """Runs ``main``; bad input ends the program with one line and the status 2."""
    try:
        main()
    except Wrong as error:
        sys.exit(_refuse(str(error)))


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


# ---- gates -----------------------------------------------------------------------------------------------------------


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


#: The keys of a variant: the option of FusedSTEAM (``sites`` of insert_steam), its type, and the allowed values.
VARIANTS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "placement": ("sites", str, ", ".join(PLACEMENTS)),
    "order": ("order", str, "sequential, parallel"),
    "radius": ("channel_radius", int, "an integer from 0"),
    "neighbors": ("spatial_neighbors", int, "4, 8"),
    "grid": ("grid_size", int, "an integer from 1"),
    "window": ("window", int, "an integer from 1"),
    "heads": ("num_heads", int, "a divisor of 8"),
    "self_loops": ("self_loops", _flag, "true, false"),
    "identity_init": ("identity_init", _flag, "true, false"),
}


def variant_of(settings: Settings) -> dict[str, Any]:
    """The options of a variant by their names in insert_steam, which are checked.

    Raises:
        Wrong: the gate is not STEAM, or a key or value is not allowed.
    """
    text, options = settings.variant, {}
    if text and settings.gate != "steam":
        raise Wrong(f"--variant {text!r}: only --gate steam has variants, but the gate is {settings.gate!r}")
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in VARIANTS:
            raise Wrong(f"--variant {item!r}: must be key=value with a key of {', '.join(VARIANTS)}")
        name, kind, allowed = VARIANTS[key]
        try:
            options[name] = kind(value)
            if name == "sites":
                one_of("variant placement", value, PLACEMENTS)
            else:
                FusedSTEAM(8, **{name: options[name]})
        except (KeyError, ValueError, TypeError):
            raise Wrong(f"--variant {item!r}: {key} must be one of {allowed}") from None
    try:
        FusedSTEAM(8, **{k: v for k, v in options.items() if k != "sites"})
    except ValueError as error:
        raise Wrong(f"--variant {text!r}: {error}") from None
    return options


def insert(network: nn.Module, settings: Settings) -> nn.Module:
    """Puts the gates of the settings into ``network``, in place, and returns it.

    Raises:
        Wrong: the network has no place for them.
    """
    try:
        if settings.gate == "steam":
            insert_steam(network, **variant_of(settings))
        elif settings.gate != "none":
            insert_gate(network, settings.gate)
    except (TypeError, ValueError) as error:
        raise Wrong(f"--model {settings.model!r} cannot have the gate {settings.gate!r}: {error}") from None
    return network
