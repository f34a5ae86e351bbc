"""examples/evaluation/datasets.py: exact boxes and masks, disjoint splits, and equal files for equal seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlxtend")
from PIL import Image

from examples.evaluation import datasets


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    datasets.write_scenes(out, train=6, val=3, side=96, seed=4)
    return out


def test_boxes_and_masks_are_exact(scenes: Path) -> None:
    """By the reader of the COCO tools: a box is the extent of its mask, and masks do not overlap."""
    coco = pytest.importorskip("pycocotools.coco")
    found = coco.COCO(str(scenes / "annotations" / "instances_train.json"))
    assert len(found.imgs) == 6 and len(found.anns) > 6 and len(found.cats) == 10
    for image in found.imgs:
        total = np.zeros((96, 96), int)
        for annotation in found.imgToAnns[image]:
            mask = found.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() > 0
            total += mask
        assert total.max() == 1
        picture = Image.open(scenes / "train" / found.imgs[image]["file_name"])
        assert picture.size == (96, 96)


def test_a_scene_shows_its_digits_where_their_masks_are() -> None:
    """Without noise the mask would be the bright pixels; with noise the mean inside is far above the ground."""
    canvas, masks = datasets.scene(datasets.digits("val"), 96, np.random.default_rng(0))
    assert len(masks) > 1
    ground = ~np.any([mask for _, mask in masks], axis=0)
    assert all(canvas[mask].mean() > canvas[ground].mean() + 60 for _, mask in masks)


def test_splits_share_no_digit() -> None:
    (train, _), (val, val_labels) = (datasets.digits(split) for split in ("train", "val"))
    assert len(train) == 4000 and len(val) == 1000 and set(np.bincount(val_labels)) == {100}
    assert not {d.tobytes() for d in train} & {d.tobytes() for d in val}


def test_a_seed_gives_the_same_files(scenes: Path, tmp_path: Path) -> None:
    files = {p.relative_to(scenes): p.read_bytes() for p in scenes.rglob("*") if p.is_file()}
    datasets.write_scenes(tmp_path / "same", train=6, val=3, side=96, seed=4)
    assert files == {p: (tmp_path / "same" / p).read_bytes() for p in files} and len(files) == 11
    datasets.write_scenes(tmp_path / "other", train=6, val=3, side=96, seed=5)
    name = Path("train/000000.png")
    assert files[name] != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("first", [0, 1])
def test_run_lengths(first: int) -> None:
    mask = np.array([[first, 1], [0, 1], [1, 0]], bool)
    code = datasets.run_lengths(mask)
    flat = np.concatenate([np.full(n, i % 2) for i, n in enumerate(code["counts"])])
    assert code["size"] == [3, 2] and (mask == flat.reshape(2, 3).T).all()


def test_cells_are_split_by_their_names(tmp_path: Path) -> None:
    """On a stand-in for the package's folder; the split does not depend on the other photographs."""
    source = tmp_path / "data"
    (source / "images").mkdir(parents=True)
    lines = []
    for i in range(40):
        name = f"images/cell{i:04}.png"
        (source / name).write_bytes(b"%d" % i)
        lines.append(f"{name}  {(0.0, 0.3333333333333333, 0.6666666666666666, 1.0)[i % 4]}  mono")
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    sizes = datasets.write_cells(tmp_path / "cells", source)
    files = {p.name: p for p in (tmp_path / "cells").rglob("*.png")}
    assert len(files) == 40 == sum(sizes.values()) and sizes["val"] == len(
        list((tmp_path / "cells/val").rglob("*.png"))
    )
    assert 2 <= sizes["val"] <= 16
    for i in range(40):
        path = files[f"cell{i:04}.png"]
        assert path.parent.name == datasets.CELL_CLASSES[i % 4] and path.read_bytes() == b"%d" % i
        assert (path.parents[1].name == "val") == datasets.is_validation(path.name)
    with pytest.raises(SystemExit, match="must be a new or empty folder"):
        datasets.write_cells(tmp_path / "cells", source)


def test_the_photographs_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset")
    sizes = datasets.write_cells(tmp_path)
    assert sum(sizes.values()) == 2624 and 450 <= sizes["val"] <= 600
    classes = [sorted(p.name for p in (tmp_path / split).iterdir()) for split in ("train", "val")]
    assert classes[0] == classes[1] == sorted(datasets.CELL_CLASSES)
    first = next((tmp_path / "train").rglob("*.png"))
    assert Image.open(first).size == (300, 300)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["datasets.py", "digits", str(tmp_path / "out"), "--train", "2", "--val", "1"]
    monkeypatch.setattr("sys.argv", given)
    datasets.main()
    assert "2 images for train, 1 images for val" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "annotations" / "instances_val.json").read_text())
    assert [i["file_name"] for i in content["images"]] == ["000000.png"] and content["images"][0]["width"] == 128
    monkeypatch.setattr("sys.argv", ["datasets.py", "digits", str(tmp_path / "new"), "--side", "9"])
    with pytest.raises(SystemExit):
        datasets.main()
    assert "--side 9: must be at least 28" in capsys.readouterr().err and not (tmp_path / "new").exists()
