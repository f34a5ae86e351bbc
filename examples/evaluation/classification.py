"""Trains and evaluates a classifier with or without attention on a folder of images in ImageFolder's format.

    python examples/evaluation/classification.py --data DATA --gate steam --variant order=parallel,radius=2 --seed 0

DATA has the folders train/<class>/ and val/<class>/ of images. The network is one of torchvision's or of timm's, with
random weights. The recipe is classification.yaml beside this file; --config FILE and options replace its numbers.

A run that was stopped goes on when the same command is given again, to the same result. Its folder has the checkpoint,
the logs (CSV and TensorBoard), and at the end results.json and results.csv, which report.py reads.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lightning  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from benchmarks.tables import say  # noqa: E402
from examples.evaluation import common, cost  # noqa: E402
from examples.evaluation import settings as base  # noqa: E402
from examples.evaluation.settings import Wrong, at_least, one_of  # noqa: E402

RECIPE = Path(__file__).with_suffix(".yaml")
AUGMENTATIONS = {"none": None, "trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "auto": v2.AutoAugment}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: These two return a tuple in training.
LEFT_OUT = ("googlenet", "inception_v3")


@dataclass(kw_only=True)
class Settings(base.Settings):
    """The settings of a run.

    Args:
        label_smoothing: share of the uniform distribution in the labels
        mixup: alpha of mixup (0: without)
        cutmix: alpha of cutmix (0: without)
        augment: none, trivial, rand or auto
        random_erase: probability that a part of an image is erased
        repeats: times that an image comes in an epoch, differently augmented; the epoch is not longer
        train_size: side of the random crops, in pixels
        val_resize: shorter side of a validation image before the crop
        val_size: side of the central crop of a validation image
        ema: validate the moving average of the weights
        ema_decay: decay of the average for one epoch of batch 1, as in torchvision's reference
        ema_steps: steps between two updates of the average
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "none"
    random_erase: float = 0.0
    repeats: int = 1
    train_size: int
    val_resize: int
    val_size: int
    ema: bool = False
    ema_decay: float = 0.99998
    ema_steps: int = 32

    def check(self) -> None:
        super().check()
        one_of("augment", self.augment, AUGMENTATIONS)
        for name in ("repeats", "train_size", "val_resize", "val_size", "ema_steps"):
            at_least(name, getattr(self, name), 1)
        for name in ("label_smoothing", "mixup", "cutmix", "random_erase"):
            at_least(name, getattr(self, name), 0)


# ---- data and network ------------------------------------------------------------------------------------------------


def folder(data: str, split: str, transform: Any) -> ImageFolder:
    """The images of a split.

    Raises:
        Wrong: the folder is not in ImageFolder's format, or a class has no image.
    """
    path = Path(data) / split
    if not path.is_dir():
        raise Wrong(f"--data {data}: must have the folders train and val of ImageFolder's format, but has no {split}")
    try:
        return ImageFolder(str(path), transform)
    except FileNotFoundError as error:
        empty = [p.name for p in sorted(path.iterdir()) if p.is_dir()] if path.is_dir() else []
        empty = [name for name in empty if f"{name}" in str(error).partition("Supported")[0].split("classes")[-1]]
        what = f"the class {empty[0]!r} has no image" if empty else "it has no folder of a class"
        raise Wrong(f"--data {data}: in {split}, {what}") from None


def datasets(settings: Settings) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation images.

    Raises:
        Wrong: as :func:`folder`; or the two splits have other classes.
    """
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = [v2.RandomResizedCrop(settings.train_size), v2.RandomHorizontalFlip()]
    augment = AUGMENTATIONS[settings.augment]
    erase = [v2.RandomErasing(settings.random_erase)] if settings.random_erase else []
    centre = [v2.Resize(settings.val_resize), v2.CenterCrop(settings.val_size)]
    train = folder(settings.data, "train", v2.Compose([*crop, *([augment()] if augment else []), *end, *erase]))
    val = folder(settings.data, "val", v2.Compose([*centre, *end]))
    if other := set(train.classes) ^ set(val.classes):
        raise Wrong(f"--data {settings.data}: the class {min(other)!r} is in one of train and val only")
    return train, val


def plain_network(name: str, classes: int) -> nn.Module:
    """A classifier with random weights. A name of torchvision's means torchvision's network, others are of timm.

    Raises:
        Wrong: neither library has the model.
    """
    if name in torchvision.models.list_models(torchvision.models) and name not in LEFT_OUT:
        return torchvision.models.get_model(name, weights=None, num_classes=classes)
    import timm

    own = name.removeprefix("timm/")
    if not timm.is_model(own):
        raise Wrong(f"--model {name!r}: must be a classifier of torchvision (resnet50, mobilenet_v2, ...) or of timm")
    return timm.create_model(own, pretrained=False, num_classes=classes)


def network(settings: Settings, classes: int, gated: bool = True) -> nn.Module:
    """The network of the settings. Networks of one seed have the same convolutions, whatever their gate."""
    lightning.seed_everything(settings.seed, verbose=False)
    made = plain_network(settings.model, classes)
    return base.insert(made, settings) if gated else made


# ---- training --------------------------------------------------------------------------------------------------------


class Classifier(common.Training):
    settings: Settings

    def __init__(self, settings: Settings, classes: int, steps_in_epoch: int) -> None:
        super().__init__(settings, network(settings, classes), steps_in_epoch)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        ks = (1, 5) if classes > 5 else (1,)
        self.top = nn.ModuleDict({f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in ks})
        mixes = ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
        chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in mixes if alpha]
        self.mix = v2.RandomChoice(chosen) if chosen else None

    def loss(self, batch: Any) -> Tensor:
        images, labels = self.mix(*batch) if self.mix else batch
        return self.criterion(self.network(images), labels)

    def validation_step(self, batch: Any, index: int) -> None:
        scores = self.network(batch[0])
        for metric in self.top.values():
            metric.update(scores, batch[1])

    def measured(self) -> dict[str, float]:
        found = {name: 100 * float(metric.compute()) for name, metric in self.top.items()}
        for metric in self.top.values():
            metric.reset()
        return found


def average(settings: Settings) -> list[lightning.Callback]:
    """The moving average of torchvision's reference, whose decay depends on batch and epochs."""
    if not settings.ema:
        return []
    alpha = (1 - settings.ema_decay) * settings.batch * settings.ema_steps / settings.epochs
    return [EMAWeightAveraging(decay=1 - min(1.0, alpha), update_every_n_steps=settings.ema_steps)]


def costs(settings: Settings, classes: int, trainer: lightning.Trainer) -> dict[str, Any]:
    """Parameters, GFLOPs of a validation image, and the time and memory of a training step on random images."""
    plain, gated = (network(settings, classes, gated=g) for g in (False, True))
    image = torch.randn(1, 3, settings.val_size, settings.val_size)
    counted = cost.counts(plain, gated, settings, lambda net: net(image))
    device, side = trainer.strategy.root_device, settings.train_size
    images = torch.randn(settings.batch // settings.devices, 3, side, side, device=device)
    labels = torch.arange(len(images), device=device) % classes

    def loss(net: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(net(images), labels)

    return counted | cost.of_training(plain, gated, settings, trainer, loss)


def run(settings: Settings) -> Path:
    """Trains, measures and writes the results; returns the folder of the run.

    Raises:
        Wrong: bad input, before anything is written.
    """
    train, val = datasets(settings)
    classes = len(train.classes)
    data = common.Data(settings, train, val, repeats=settings.repeats)
    module = Classifier(settings, classes, len(train) // settings.batch)
    digest = common.digest(os.path.relpath(path, settings.data) for each in (train, val) for path, _ in each.samples)
    out = common.open_run(settings, "classification", {"train": len(train), "val": len(val), "names": digest})
    if (out / common.RESULTS).exists():
        say(f"{out}: the run is finished")
        return out
    trainer = common.train(module, data, out, average(settings))
    if trainer.global_rank == 0:
        best = max(row["top1"] for row in module.history)
        final = {k: v for k, v in module.history[-1].items() if k != "epoch"}
        common.write_results(out, final | {"best_top1": best} | costs(settings, classes, trainer), module.history)
    return out


def main() -> None:
    run(base.parse(Settings, RECIPE, __doc__ or ""))


if __name__ == "__main__":
    base.exit_with_a_sentence(main)
