"""Trains and evaluates a detector with or without attention on a folder in COCO's format.

    python examples/evaluation/detection.py --data DATA --model maskrcnn --gate steam --variant window=16 --seed 0

DATA has annotations/instances_train*.json and annotations/instances_val*.json, and beside annotations the folders of
images with the names train* and val*, as COCO has (train2017). The detectors are torchvision's Faster R-CNN, RetinaNet
and Mask R-CNN with a ResNet and FPN, with random weights, or with the backbone of a run of classification.py
(--weights). The recipe is detection.yaml beside this file; --config FILE and options replace its numbers.

A run that was stopped goes on when the same command is given again, to the same result. Its folder has the checkpoint,
the logs (CSV and TensorBoard), and at the end results.json and results.csv, which report.py reads.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lightning  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from torchmetrics.detection import MeanAveragePrecision  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.datasets import CocoDetection  # noqa: E402
from torchvision.models import detection  # noqa: E402
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from benchmarks.tables import say  # noqa: E402
from examples.evaluation import common, cost  # noqa: E402
from examples.evaluation import settings as base  # noqa: E402
from examples.evaluation.settings import Wrong, at_least, one_of  # noqa: E402

RECIPE = Path(__file__).with_suffix(".yaml")
MODELS = {"fasterrcnn": detection.FasterRCNN, "retinanet": detection.RetinaNet, "maskrcnn": detection.MaskRCNN}
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
NORMS = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


@dataclass(kw_only=True)
class Settings(base.Settings):
    """The settings of a run.

    Args:
        backbone: ResNet of the detector, as resnet50
        weights: last.ckpt of a run of classification.py with the same ResNet, gate and variant
        norm: batch, or frozen for constant statistics and factors, which only weights make useful
        min_size: shorter side of an image in the network, in pixels
        max_size: longest allowed side
        flip: probability that a training image is mirrored
        rois: regions of an image on which a step trains the heads of Faster and Mask R-CNN
        detections: most detections in an image
    """

    backbone: str
    weights: str = ""
    norm: str = "batch"
    min_size: int
    max_size: int
    flip: float = 0.5
    rois: int = 512
    detections: int = 100

    def check(self) -> None:
        super().check()
        one_of("model", self.model, MODELS)
        one_of("backbone", self.backbone, BACKBONES)
        one_of("norm", self.norm, NORMS)
        for name in ("min_size", "rois", "detections"):
            at_least(name, getattr(self, name), 1)
        at_least("max_size", self.max_size, self.min_size)
        if self.norm == "frozen" and not self.weights:
            raise Wrong("--norm 'frozen': needs --weights, because frozen layers of random networks do nothing")


# ---- data ------------------------------------------------------------------------------------------------------------


class Coco(Dataset):
    """Images of a split, and their targets as torchvision's detectors take them. Classes are numbered from 1."""

    def __init__(self, found: CocoDetection, ids: list[int], masks: bool, transform: Any) -> None:
        self.found, self.masks, self.transform = found, masks, transform
        self.number = {category: i for i, category in enumerate(ids, 1)}

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, annotations = self.found[index]
        size = (image.height, image.width)
        kept = [a for a in annotations if not a["iscrowd"] and min(a["bbox"][2:]) > 0]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.tensor([self.number[a["category_id"]] for a in kept], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(self.found.coco.annToMask(a)) for a in kept]
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        return self.transform(image, target)


def split(data: str, name: str) -> CocoDetection:
    """The images and annotations of a split.

    Raises:
        Wrong: the folder is not in COCO's format, or an image is missing.
    """
    files = sorted((Path(data) / "annotations").glob(f"instances_{name}*.json"))
    if len(files) != 1:
        raise Wrong(f"--data {data}: must have one file annotations/instances_{name}*.json, but has {len(files)}")
    images = Path(data) / files[0].stem.removeprefix("instances_")
    try:
        content = json.loads(files[0].read_text())
        listed = [image["file_name"] for image in content["images"]]
        known = {"image_id", "category_id", "bbox", "iscrowd"}
        if lacking := [a for a in content["annotations"] if not known <= a.keys()]:
            raise KeyError(min(known - lacking[0].keys()))
        unused = {c["id"]: c["name"] for c in content["categories"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Wrong(f"--data {data}: {files[0].name} is not in COCO's format ({error})") from None
    if missing := next((f for f in listed if not (images / f).is_file()), None):
        raise Wrong(f"--data {data}: {files[0].name} names the image {missing}, which is not in {images.name}")
    for annotation in content["annotations"]:
        unused.pop(annotation["category_id"], None)
    if name == "train" and unused:
        raise Wrong(f"--data {data}: the class {min(unused.values())!r} has no image in {files[0].name}")
    return CocoDetection(str(images), str(files[0]))


def datasets(settings: Settings) -> tuple[Coco, Coco, dict[str, Any]]:
    """Training and validation images, and what identifies them.

    Raises:
        Wrong: as :func:`split`; or the splits have other classes.
    """
    train, val = (split(settings.data, name) for name in ("train", "val"))
    ids = sorted(train.coco.cats)
    if ids != sorted(val.coco.cats):
        raise Wrong(f"--data {settings.data}: train and val must have the same classes")
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    masks = settings.model == "maskrcnn"
    used = Coco(train, ids, masks, v2.Compose([v2.RandomHorizontalFlip(settings.flip), *end]))
    names = [f"{i['file_name']} {len(c.imgToAnns[k])}" for c in (train.coco, val.coco) for k, i in c.imgs.items()]
    about = {"train": len(train), "val": len(val), "classes": len(ids), "names": common.digest(names)}
    return used, Coco(val, ids, masks, v2.Compose(end)), about


def collate(samples: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


# ---- network ---------------------------------------------------------------------------------------------------------


def network(settings: Settings, classes: int, gated: bool = True) -> nn.Module:
    """The detector of the settings. Detectors of one seed have the same weights, whatever their gate."""
    lightning.seed_everything(settings.seed, verbose=False)
    options: dict[str, Any] = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(
        backbone_name=settings.backbone,
        weights=None,
        norm_layer=NORMS[settings.norm],
        trainable_layers=3 if settings.norm == "frozen" else 5,
        **(options if settings.model == "retinanet" else {}),
    )
    limits = {"min_size": settings.min_size, "max_size": settings.max_size}
    if settings.model == "retinanet":
        limits["detections_per_img"] = settings.detections
    else:
        limits |= {"box_batch_size_per_image": settings.rois, "box_detections_per_img": settings.detections}
    made = MODELS[settings.model](body, classes + 1, **limits)
    if gated:
        base.insert(made, settings)
    return made


def load_backbone(made: nn.Module, settings: Settings) -> None:
    """Loads the ResNet of a classifier, with its gates.

    Raises:
        Wrong: the file is not a checkpoint of a run of the same ResNet, gate and variant.
    """
    path = Path(settings.weights)
    try:
        other = json.loads((path.parent / common.KEPT).read_text())
        state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    except (OSError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise Wrong(f"--weights {path}: must be {common.CHECKPOINT} of a run of classification.py ({error})") from None
    for key, mine in (("model", settings.backbone), ("gate", settings.gate), ("variant", settings.variant)):
        if other.get(key) != mine:
            raise Wrong(f"--weights {path}: has {key} {other.get(key)!r}, but the detector has {mine!r}")
    body: Any = made.backbone.body  # type: ignore[union-attr]
    own = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    lost = body.load_state_dict({k: v for k, v in own.items() if not k.startswith("fc.")}, strict=False)
    if lost.missing_keys:
        raise Wrong(f"--weights {path}: lacks {lost.missing_keys[0]!r} of the detector's backbone")


# ---- training --------------------------------------------------------------------------------------------------------


class Detector(common.Training):
    settings: Settings

    def __init__(self, settings: Settings, classes: int, steps_in_epoch: int) -> None:
        super().__init__(settings, network(settings, classes), steps_in_epoch)
        if settings.weights:
            load_backbone(self.network, settings)
        kinds = ("bbox", "segm") if settings.model == "maskrcnn" else ("bbox",)
        self.precision_of = MeanAveragePrecision(iou_type=kinds, backend="pycocotools")
        self.precision_of.warn_on_many_detections = False

    def loss(self, batch: Any) -> Tensor:
        return sum(self.network(*batch).values())  # type: ignore[return-value]

    def validation_step(self, batch: Any, index: int) -> None:
        images, targets = batch
        found = self.network(images)
        for one in found:
            if "masks" in one:
                one["masks"] = one["masks"][:, 0] >= 0.5
        self.precision_of.update(found, targets)

    def measured(self) -> dict[str, float]:
        found = self.precision_of.compute()
        self.precision_of.reset()
        kinds = {"bbox_": "box", "segm_": "mask"} if self.settings.model == "maskrcnn" else {"": "box"}
        points = {"map": "ap", "map_50": "ap50", "map_75": "ap75"}
        return {f"{k}_{p}": 100 * float(found[prefix + m]) for prefix, k in kinds.items() for m, p in points.items()}


def every_proposal(net: Any) -> None:
    """Keeps all proposals and detections up to their limits, so that the FLOPs do not depend on the weights."""
    if hasattr(net, "rpn"):
        net.rpn.nms_thresh, net.rpn.score_thresh = 1.0, -1.0
        net.roi_heads.nms_thresh, net.roi_heads.score_thresh = 1.0, -1.0


def costs(settings: Settings, classes: int, trainer: lightning.Trainer, batch: Any) -> dict[str, Any]:
    """Parameters, GFLOPs of an image of the settings' size, and the time and memory of a training step on ``batch``.

    The GFLOPs are those of an image of min_size x max_size with as many proposals and detections as the limits allow.
    """
    plain, gated = (network(settings, classes, gated=g) for g in (False, True))
    for net in (plain, gated):
        every_proposal(net)
    image = torch.rand(3, settings.min_size, settings.max_size)
    counted = cost.counts(plain, gated, settings, lambda net: net([image]))
    plain, gated = (network(settings, classes, gated=g) for g in (False, True))
    device = trainer.strategy.root_device
    images = [x.to(device) for x in batch[0]]
    targets = [{k: v.to(device) for k, v in target.items()} for target in batch[1]]

    def loss(net: nn.Module) -> Tensor:
        return sum(net(images, targets).values())  # type: ignore[return-value]

    return counted | cost.of_training(plain, gated, settings, trainer, loss)


def run(settings: Settings) -> Path:
    """Trains, measures and writes the results; returns the folder of the run.

    Raises:
        Wrong: bad input, before anything is written.
    """
    train, val, about = datasets(settings)
    data = common.Data(settings, train, val, collate)
    module = Detector(settings, about["classes"], len(train) // settings.batch)
    out = common.open_run(settings, "detection", about)
    if (out / common.RESULTS).exists():
        say(f"{out}: the run is finished")
        return out
    trainer = common.train(module, data, out, [])
    if trainer.global_rank == 0:
        final = {k: v for k, v in module.history[-1].items() if k != "epoch"}
        best = {"best_box_ap": max(row["box_ap"] for row in module.history)}
        batch = collate([train[i] for i in range(settings.batch // settings.devices)])
        common.write_results(out, final | best | costs(settings, about["classes"], trainer, batch), module.history)
    return out


def main() -> None:
    run(base.parse(Settings, RECIPE, __doc__ or ""))


if __name__ == "__main__":
    base.exit_with_a_sentence(main)
