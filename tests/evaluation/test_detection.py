"""examples/evaluation/detection.py: runs on scenes of digits in COCO's format, stopped and continued, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.conftest import NEEDED, Killed

for package in NEEDED:
    pytest.importorskip(package)

from examples.evaluation import classification, common, datasets, detection, report, settings  # noqa: E402

TINY = (
    "--model", "maskrcnn", "--backbone", "resnet18", "--epochs", 2, "--batch", 8, "--min_size", 32, "--max_size", 32,
    "--rois", 4, "--detections", 2,
    "--lr", 0.005, "--warmup_epochs", 0.5, "--cost_rounds", 2, "--accelerator", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    datasets.write_scenes(out, train=24, val=3, side=96, seed=0)
    return out


@pytest.fixture
def run(scenes: Path, tmp_path: Path, parsed: Callable[..., Any]) -> Callable[..., Path]:
    def call(name: str, *arguments: object, data: Path = scenes) -> Path:
        return detection.run(parsed("detection", "--data", data, "--out", tmp_path / name, *TINY, *arguments))

    return call


def test_a_lost_run_goes_on_to_the_same_bits_and_is_reported(
    run: Callable[..., Path], kill: Any, same_training: Any, tmp_path: Path
) -> None:
    given = ("--gate", "steam", "--variant", "window=16", "--checkpoint_minutes", 0)
    whole = run("whole", *given)
    kill("training_step", 4)
    with pytest.raises(Killed):
        run("parts", *given)
    same_training(run("parts", *given), whole)
    figures = json.loads((whole / "results.json").read_text())["figures"]
    assert figures["gates"] == 4 and figures["parameters_of_gates"] == 4 * 64 and figures["gflops"] > 1
    assert all(-100 <= figures[f"{kind}_{p}"] <= 100 for kind in ("box", "mask") for p in ("ap", "ap50", "ap75"))
    text = report.report([whole], tmp_path / "report")
    assert "| STEAM (window=16) |" in text and "mask AP50" in text and "24 training and 3 validation images" in text


@pytest.mark.parametrize("model", ["fasterrcnn", "retinanet"])
def test_other_detectors(model: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "costs", lambda *args: {})
    out = run("run", "--model", model, "--epochs", 1, "--gate", "eca")
    assert {"box_ap", "box_ap50", "box_ap75"} <= json.loads((out / "results.json").read_text())["figures"].keys()


def test_targets_are_those_of_the_annotations(scenes: Path, parsed: Callable[..., Any]) -> None:
    train, _, about = detection.datasets(parsed("detection", "--data", scenes, *TINY, "--flip", 1))
    assert about["train"] == 24 and about["val"] == 3 and about["classes"] == 10
    content = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    first = [a for a in content["annotations"] if a["image_id"] == 1]
    image, target = train[0]
    assert image.shape == (3, 96, 96) and 0 <= image.min() < image.max() <= 1
    assert target["labels"].tolist() == [a["category_id"] for a in first]
    for box, mask, (left, top, width, height) in zip(
        target["boxes"], target["masks"], (a["bbox"] for a in first), strict=True
    ):
        assert box.tolist() == [96 - left - width, top, 96 - left, top + height], "the image is mirrored"
        rows, columns = mask.nonzero(as_tuple=True)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist()


def test_the_backbone_of_a_classifier(tmp_path: Path, images: Path, scenes: Path, parsed: Callable[..., Any]) -> None:
    gate = ("--gate", "steam", "--out", tmp_path / "a", "--batch", 6)
    given = parsed("classification", "--data", images, "--model", "resnet18", *gate)
    out = common.open_run(given, "classification", {})
    trained = classification.network(given, 3)
    with torch.no_grad():
        trained.layer1[0].conv1.weight.fill_(0.5)
    torch.save({"state_dict": {f"network.{k}": v for k, v in trained.state_dict().items()}}, out / "last.ckpt")
    weights = ("--weights", out / "last.ckpt", "--norm", "frozen")
    mine = parsed("detection", "--data", scenes, *TINY, "--gate", "steam", *weights)
    made = detection.Detector(mine, 10, 3).network
    assert (made.backbone.body.layer1[0].conv1.weight == 0.5).all()
    other = parsed("detection", "--data", scenes, *TINY, "--gate", "eca", *weights)
    with pytest.raises(settings.Wrong, match="has gate 'steam', but the detector has 'eca'"):
        detection.Detector(other, 10, 3)
    none = parsed("detection", "--data", scenes, *TINY, "--weights", tmp_path / "none.ckpt")
    with pytest.raises(settings.Wrong, match=r"none\.ckpt: must be last\.ckpt of a run of classification\.py"):
        detection.Detector(none, 10, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "yolo"), "--model 'yolo': must be one of fasterrcnn, retinanet, maskrcnn"),
        (("--backbone", "vgg"), "--backbone 'vgg': must be one of resnet18"),
        (("--max_size", "16"), "--max_size 16: must be at least 32"),
        (("--norm", "frozen"), "--norm 'frozen': needs --weights"),
        (("--data", "/nowhere"), r"must have one file annotations/instances_train\*\.json, but has 0"),
    ],
)
def test_bad_settings(arguments: tuple[str, ...], sentence: str, run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(settings.Wrong, match=sentence):
        run("run", *arguments)
    assert not (tmp_path / "run").exists()


def change(folder: Path, split: str, edit: Callable[[Any], object]) -> None:
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda c: c.pop("images"), "is not in COCO's format"),
        (lambda c: c["annotations"][0].pop("bbox"), "is not in COCO's format .*bbox"),
        (lambda c: c["images"][0].update(file_name="no.png"), r"names the image no\.png, which is not in train"),
        (lambda c: c["categories"].append({"id": 99, "name": "cat"}), "the class 'cat' has no image"),
    ],
)
def test_bad_folders(edit: Any, sentence: str, run: Callable[..., Path], scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "copy")
    change(tmp_path / "copy", "train", edit)
    with pytest.raises(settings.Wrong, match=sentence):
        run("run", data=tmp_path / "copy")
    assert not (tmp_path / "run").exists()
