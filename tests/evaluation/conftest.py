"""Tiny data sets, and runs on them that can be stopped at a step."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

#: The packages of the scripts. Files of tests skip without them, before they import a script: this file cannot skip.
NEEDED = ("lightning", "torchmetrics", "jsonargparse", "tensorboard", "timm", "torchvision", "pycocotools", "mlxtend")


class Killed(BaseException):
    """The machine is lost. No handler of exceptions may save anything."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """``kill(method, calls)``: the method of Training raises after so many calls, once."""

    from examples.evaluation import common

    def at(method: str, calls: int) -> None:
        whole, left = getattr(common.Training, method), [calls]

        def counted(self: Any, *args: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            return whole(self, *args)

        monkeypatch.setattr(common.Training, method, counted)

    return at


@pytest.fixture
def parsed() -> Callable[..., Any]:
    """The settings of a script for a command line."""

    from examples.evaluation import settings

    def parse(script: str, *arguments: object) -> Any:
        module = importlib.import_module(f"examples.evaluation.{script}")
        return settings.parse(module.Settings, module.RECIPE, "", [str(a) for a in arguments])

    return parse


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """ImageFolder's format: three classes, six training and two validation images of each."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("a", "b", "c"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def state(out: Path) -> dict[str, Any]:
    """Everything that a run's last checkpoint and results say of its training."""
    from examples.evaluation import common

    kept = torch.load(out / common.CHECKPOINT, weights_only=False)
    tensors = {
        k: v for k in ("state_dict", "current_model_state", "averaging_state") for k, v in kept.get(k, {}).items()
    }
    moments = kept["optimizer_states"][0]["state"]
    tensors |= {f"momentum {k}": v["momentum_buffer"] for k, v in moments.items()}
    return {"tensors": tensors, "history": json.loads((out / common.RESULTS).read_text())["history"]}


@pytest.fixture
def same_training() -> Callable[[Path, Path], None]:
    """Asserts that two runs have equal bits."""

    def compare(one: Path, other: Path) -> None:
        a, b = state(one), state(other)
        assert a["history"] == b["history"] and len(a["history"]) > 1
        assert a["tensors"].keys() == b["tensors"].keys() and len(a["tensors"]) > 100
        assert [k for k, v in a["tensors"].items() if not torch.equal(v, b["tensors"][k])] == []

    return compare
