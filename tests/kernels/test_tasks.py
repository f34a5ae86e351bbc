"""Classification, detection and instance segmentation, the paper's three tasks: units on kernels and on the reference.

Two models with the same weights differ only in the backend of their units. The tests compare, at two odd sizes:

- A fixed scalar loss of the maps of the backbone and, in a detector, of the FPN, within 1e-4.
- The gradients of this loss at every unit's weights, within 1e-3 of each weight's gradient in the Euclidean norm. In
  float64 the network is unchanged. In float32 the network has SiLU instead of ReLU, and small branches. A rounding that
  moves a value across the kink of a ReLU makes the gradient jump. With random weights and ReLU, moving the reference's
  input by half a rounding changed its own gradients by 8e-4 to 4.7 times their norm, and with SiLU by 1e-5 to 7e-4 of
  the norm (ResNet-50 and RetinaNet, three seeds, a projection of the maps as the loss).
- The losses of a training step of the whole network, within 1e-3. A detector chooses proposals and samples by scores.
  The choice is discontinuous: a rounding may exchange two neighbours in the order. Both models use one seed. With four
  other seeds, at both sizes, no choice changed, and the relative difference of a loss was at most 8e-6.
- An inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steam_kernels import insert_steam, steam_sites

torchvision = pytest.importorskip("torchvision")
models, detection = torchvision.models, torchvision.models.detection

SIZES = [(97, 129), (113, 83)]
# These options also give odd maps inside, and few proposals and samples.
SMALL: dict[str, Any] = {
    "weights": None,
    "weights_backbone": None,
    "min_size": 83,
    "max_size": 161,
    "size_divisible": 1,
}
CHOSEN = {
    "rpn_pre_nms_top_n_train": 60,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "rpn_batch_size_per_image": 32,
    "box_batch_size_per_image": 8,
    "box_detections_per_img": 10,
}

DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "faster_rcnn": lambda: detection.fasterrcnn_resnet50_fpn(num_classes=3, **SMALL, **CHOSEN),
    "retinanet": lambda: detection.retinanet_resnet50_fpn(
        num_classes=3, topk_candidates=50, score_thresh=0.005, **SMALL
    ),
    "mask_rcnn": lambda: detection.maskrcnn_resnet50_fpn(num_classes=3, **SMALL, **CHOSEN),
}


def pair(model: nn.Module, **unit: Any) -> list[nn.Module]:
    """The model with units on the kernels for its device, and a copy with units on the reference."""
    insert_steam(model, **unit)
    twin = copy.deepcopy(model)
    for placed in steam_sites(twin).values():
        placed.backend = "reference"
    return [model, twin]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def fixed_loss(maps: list[Tensor]) -> Tensor:
    """The mean squared distance of each map from fixed numbers."""
    fixed = (torch.randn(m.shape, generator=torch.Generator().manual_seed(3)).to(m.dtype) for m in maps)
    return torch.stack([(m - f).square().mean() for m, f in zip(maps, fixed, strict=True)]).sum()


def stage_maps(model: Any, x: Tensor) -> list[Tensor]:
    maps = [model.maxpool(model.relu(model.bn1(model.conv1(x))))]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        maps.append(stage(maps[-1]))
    return maps[1:]


def fpn_maps(model: Any, x: Tensor) -> list[Tensor]:
    return list(model.backbone(x).values())


def check_maps_and_gradients(make: Callable[[], nn.Module], maps: Any, size: tuple[int, int], **unit: Any) -> None:
    x = torch.randn(2, 3, *size)
    network = make()
    both = pair(copy.deepcopy(network), **unit)
    with torch.no_grad():
        assert relative(*(fixed_loss(maps(model, x)) for model in both)) < 1e-4
    check_gradients(pair(copy.deepcopy(network).double(), **unit), maps, x[:1].double())
    for name, module in network.named_modules():
        if hasattr(module, "relu"):
            module.relu = nn.SiLU(inplace=True)
        if name.endswith(".bn3"):
            nn.init.constant_(module.weight, 0.25)
    check_gradients(pair(network, **unit), maps, x)


def check_gradients(both: list[nn.Module], maps: Any, x: Tensor) -> None:
    losses = [fixed_loss(maps(model, x)) for model in both]
    assert relative(*losses) < 1e-4
    weights = [
        {f"{name}.{k}": p for name, unit in steam_sites(model).items() for k, p in unit.named_parameters()}
        for model in both
    ]
    got, expected = (torch.autograd.grad(loss, list(w.values())) for loss, w in zip(losses, weights, strict=True))
    assert len(expected) == 10
    for name, a, b in zip(weights[0], got, expected, strict=True):
        assert b.norm() > 0, name
        assert relative(a, b) < 1e-3, (name, x.dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_classification(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    check_maps_and_gradients(lambda: models.resnet50(weights=None, num_classes=5), stage_maps, size)

    both = pair(models.resnet50(weights=None, num_classes=5))
    x, target = torch.randn(2, 3, *size), torch.tensor([1, 3])
    losses: list[Tensor] = []
    for model in both:

        def loss(model: nn.Module = model) -> Tensor:
            losses.append(nn.functional.cross_entropy(model(x), target))
            return losses[-1]

        step(model, loss)
    assert relative(*losses) < 1e-3
    # The inference uses the trained weights of the first model in both, because the gradients of their steps may jump.
    both[1].load_state_dict(both[0].state_dict())
    with torch.no_grad():
        a, b = (model.eval()(x) for model in both)
    assert relative(a, b) < 1e-3


def step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """One step of SGD, which must change every unit."""
    before = [p.detach().clone() for unit in steam_sites(model).values() for p in unit.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss().backward()
    optimizer.step()
    after = [p for unit in steam_sites(model).values() for p in unit.parameters()]
    assert all((a != b).any() for a, b in zip(after, before, strict=True))


def images_and_targets(size: tuple[int, int], masks: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """An image of the size and one with exchanged sides, with two boxes each."""
    images, targets = [], []
    for height, width in (size, size[::-1]):
        images.append(torch.rand(3, height, width))
        boxes = torch.tensor([[5.0, 7.0, 50.0, 60.0], [20.0, 15.0, 75.0, 70.0]])
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2])})
        if masks:
            mask = torch.zeros(2, height, width, dtype=torch.uint8)
            for m, (left, top, right, bottom) in zip(mask, boxes.int().tolist(), strict=True):
                m[top:bottom, left:right] = 1
            targets[-1]["masks"] = mask
    return images, targets


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", list(DETECTORS))
def test_detection_and_instance_segmentation(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    check_maps_and_gradients(DETECTORS[name], fpn_maps, size, window=4)

    both = pair(DETECTORS[name](), window=4)
    assert all(place.startswith("backbone.body.layer") for place in steam_sites(both[0]))
    images, targets = images_and_targets(size, masks=name == "mask_rcnn")
    whole: list[dict[str, Tensor]] = []
    for model in both:
        torch.manual_seed(1)

        def loss(model: nn.Module = model) -> Tensor:
            whole.append(model(images, copy.deepcopy(targets)))
            return torch.stack(list(whole[-1].values())).sum()

        step(model, loss)
    assert len(whole[0]) == {"faster_rcnn": 4, "retinanet": 2, "mask_rcnn": 5}[name]
    for key, expected in whole[1].items():
        assert relative(whole[0][key], expected) < 1e-3, key

    both[1].load_state_dict(both[0].state_dict())
    with torch.no_grad():
        found, expected_found = (model.eval()(images) for model in both)
    for a, b in zip(found, expected_found, strict=True):
        assert set(a) == {"boxes", "labels", "scores"} | ({"masks"} if name == "mask_rcnn" else set())
        assert len(a["scores"]) and all(value.isfinite().all() for value in a.values())
        assert len(a["scores"]) == len(b["scores"]) and relative(a["scores"], b["scores"]) < 1e-3
