"""The stages that a dry run finds in networks with a neck, a head that fails on the meta device, or oblong maps."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import insert_steam, remove_steam, steam_sites
from tests.support import networks

# ---- Ultralytics -----------------------------------------------------------------------------------------------------

#: The modules at the ends of the backbone's stages: the stem, and the modules that return P2, P3, P4, P5 (and P6).
YOLOS: dict[str, list[int | str]] = {
    "yolov3": [0, 2, "4.1", "6.7", "8.7", 11],  # a row of several blocks is a Sequential
    "yolov5n": [0, 2, 4, 6, 9],
    "yolov5n6": [0, 2, 4, 6, 8, 11],
    "yolov8n": [0, 2, 4, 6, 9],
    "yolov8l": [0, 2, 4, 6, 9],
    "yolov8n-p2": [0, 2, 4, 6, 9],
    "yolov8n-seg": [0, 2, 4, 6, 9],
    "yolov8n-pose": [0, 2, 4, 6, 9],
    "yolov8n-obb": [0, 2, 4, 6, 9],
    "yolov8n-cls": [0, 2, 4, 6, 8],
    "yolov9t": [0, 2, 4, 6, 9],
    "yolov10n": [0, 2, 4, 6, 10],
    "yolo11n": [0, 2, 4, 6, 10],
    "yolo11n-seg": [0, 2, 4, 6, 10],
    "yolo11n-cls": [0, 2, 4, 6, 9],
    "yolo12n": [0, 2, 4, 6, 8],
    "yolo26n": [0, 2, 4, 6, 10],
    "yolo26n-pose": [0, 2, 4, 6, 10],
    "yolo26n-obb": [0, 2, 4, 6, 10],
}


def yolo(name: str) -> Any:
    return pytest.importorskip("ultralytics").YOLO(f"{name}.yaml", verbose=False)


@pytest.mark.parametrize("name", list(YOLOS))
def test_yolos_have_units_where_the_stages_of_their_backbone_end(name: str) -> None:
    """No unit is in a branch of the neck, although its maps have the same sizes. Each unit acts once."""
    model = yolo(name).model
    insert_steam(model, "stages")
    assert list(steam_sites(model)) == [f"model.{row}" for row in YOLOS[name]]
    assert all(unit.channels for unit in steam_sites(model).values())
    calls: list[nn.Module] = []
    for unit in steam_sites(model).values():
        unit.register_forward_hook(lambda unit, args, y: calls.append(unit))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 128, 128))
    assert calls == list(steam_sites(model).values())


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_yolo_with_units_by_name_trains_and_fuses(name: str) -> None:
    """A step with the network's own loss changes each unit, and fuse() does not change the results."""
    from ultralytics.cfg import get_cfg

    torch.manual_seed(0)
    model = networks.strengthen(insert_steam(yolo(name).model))
    model.args = get_cfg()
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.zeros(2, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2),
    }
    loss, _ = model.train()(batch)
    loss.sum().backward()
    assert list(steam_sites(model)) == [f"model.{row}" for row in YOLOS[name]]
    units = list(steam_sites(model).values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for u in units for p in u.parameters() if p.dim() > 1)
    with torch.no_grad():
        expected = networks.settle(model)(batch["img"])[0]
        plain = remove_steam(copy.deepcopy(model))(batch["img"])[0]
        fused = model.fuse(verbose=False)(batch["img"])[0]
    assert list(steam_sites(model).values()) == units
    assert (fused - expected).abs().max() < 1e-3 * (plain - expected).abs().max()


# ---- networks made for the tests -------------------------------------------------------------------------------------


def conv(channels: int, out: int, stride: Any = 1, side: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, side, stride, side // 2), nn.BatchNorm2d(out), nn.ReLU())


class Trunk(nn.Module):
    """Three stages of two convolutions each. It returns the map of every stage."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 12, 16]
        self.stages = nn.ModuleList(nn.Sequential(conv(a, b, 2), conv(b, b)) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps


#: The last module of each stage of the trunk, which can have a unit.
ENDS = [f"trunk.stages.{stage}.1.2" for stage in range(3)]


class Neck(nn.Module):
    """A path aggregation network: from the smallest map up in resolution, and down again."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([conv(28, 12), conv(20, 8)])
        self.down = nn.ModuleList([conv(8, 8, 2), conv(12, 12, 2)])
        self.after = nn.ModuleList([conv(20, 12), conv(28, 16)])

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        large, middle, small = maps
        twice = nn.functional.interpolate
        middle = self.up[0](torch.cat((twice(small, scale_factor=2.0), middle), 1))
        large = self.up[1](torch.cat((twice(middle, scale_factor=2.0), large), 1))
        middle = self.after[0](torch.cat((self.down[0](large), middle), 1))
        return [large, middle, self.after[1](torch.cat((self.down[1](middle), small), 1))]


class Heads(nn.Module):
    """A convolution on each map. ``then`` takes the outputs, and may need numbers, which a meta tensor lacks."""

    def __init__(self, then: Callable[[list[torch.Tensor]], Any], first: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, 5, 1) for width in (8, 12, 16))
        self.then, self.first = then, first

    def forward(self, maps: list[torch.Tensor]) -> Any:
        if self.first:
            self.then(maps)
        maps = [layer(x) for layer, x in zip(self.layers, maps, strict=True)]
        return maps if self.first else self.then(maps)


class Detector(nn.Module):
    def __init__(self, head: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.neck, self.head = Trunk(), neck or nn.Identity(), head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.neck(self.trunk(x)))


class Classes(nn.Module):
    """A head that reads a number and then has one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.fc(maps[-1].mean((2, 3)) / maps[-1].abs().max().item())


def said(maps: list[torch.Tensor]) -> Any:
    return maps[0].sum().item()


def chosen(maps: list[torch.Tensor]) -> torch.Tensor:
    scores = maps[-1].flatten(2)[0].t()
    return scores[scores[:, 0] > 0]


def in_numpy(maps: list[torch.Tensor]) -> Any:
    return [x.detach().numpy() for x in maps]


def suppressed(maps: list[torch.Tensor]) -> torch.Tensor:
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.cat([x.flatten(2) for x in maps], 2)[0].t()
    return boxes[ops.nms(boxes[:, :4], boxes[:, 4], 0.5)]


@torch.no_grad()
def without_gradients(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten(2) for x in maps], 2)


def as_they_are(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    return maps


def flattened(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten(2) for x in maps], 2)


THEN = [as_they_are, flattened, said, chosen, in_numpy, suppressed, without_gradients]
HEADS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "classes": Classes,
    **{then.__name__: lambda then=then: Heads(then) for then in THEN},
    **{f"{then.__name__} before": lambda then=then: Heads(then, True) for then in (said, chosen, in_numpy)},
}


@pytest.mark.parametrize("neck", [None, Neck], ids=["no neck", "neck"])
@pytest.mark.parametrize("head", list(HEADS))
def test_a_detectors_units_are_in_its_backbone(head: str, neck: Callable[[], nn.Module] | None) -> None:
    """The units are in the backbone for any head, also with a neck whose maps have the same sizes."""
    model = Detector(HEADS[head](), neck() if neck else None)
    assert list(steam_sites(insert_steam(model, "stages"))) == ENDS
    model(torch.rand(2, 3, 64, 64))


class Flat(nn.Module):
    """A detector as one sequence, whose last layer returns boxes. The pass fails after it, in the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.ModuleList(layer for a, b in ((3, 8), (8, 12), (12, 16)) for layer in conv(a, b, 2))
        self.boxes = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.row:
            x = layer(x)
        return suppressed([self.boxes(x)])


def test_the_layer_that_gives_boxes_has_no_unit() -> None:
    assert list(steam_sites(insert_steam(Flat(), "stages"))) == ["row.2", "row.5", "row.8"]


class Pyramid(nn.Module):
    """A residual and a pooling on the smallest map, which enters a larger map through a layer of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Sequential(conv(3, 8, 2), conv(8, 8)), nn.Sequential(conv(8, 16, 2), conv(16, 16))
        self.branch, self.pool = conv(16, 16), nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(16, 16, side=1))
        self.lateral, self.smooth, self.out = conv(16, 8, side=1), conv(8, 8), conv(16, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        large = self.large(x)
        small = self.small(large)
        small = self.smooth(self.lateral(self.pool(small + self.branch(small))))
        return [self.out(torch.cat((nn.functional.interpolate(small, scale_factor=2.0), large), 1)), small]


def test_what_keeps_the_last_map_is_of_its_stage() -> None:
    """The stage contains the pooling after the blocks, but no parallel branch and no layer that leads to the neck."""
    assert list(steam_sites(insert_steam(Pyramid(), "stages"))) == ["large.1.2", "pool.1.2"]


class Gate(nn.Module):
    """A gate from a map that is smaller than the maps of all stages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8, side=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.conv(nn.functional.avg_pool2d(x, 16))
        return x * nn.functional.interpolate(small.sigmoid(), x.shape[2:])


@pytest.mark.parametrize("neck", [None, Neck], ids=["no neck", "neck"])
def test_a_gate_of_smaller_maps_is_no_stage(neck: Callable[[], nn.Module] | None) -> None:
    """The stage with the gate ends before the gate, because the gate's map is smaller. Other stages do not change."""
    model = Detector(Heads(said), neck() if neck else None)
    model.trunk.stages[0].append(Gate())
    assert list(steam_sites(insert_steam(model, "stages"))) == ENDS


class FailsEarly(nn.Module):
    """A network that reads a number in the middle of its backbone, so the pass fails there."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.trunk, self.stage, self.fc = Trunk(), stage, nn.Linear(16, 5)
        stages = self.trunk.stages
        stages[stage][1].register_module("0", NeedsANumber(stages[stage][1][0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.trunk(x)[-1].mean((2, 3)))


class NeedsANumber(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x / x.abs().max().item())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_network_that_fails_before_its_head_is_refused(stage: int) -> None:
    """Layers that did not run may contain stages, so the stages of the part that ran are not used."""
    with pytest.raises(TypeError, match=r"no image of 3 channels passes .*meta tensors.*give sites as module names"):
        insert_steam(FailsEarly(stage), "stages")


class OfSixtyFour(nn.Module):
    """A network that runs to its head for any side, and to the end only for side 64."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.wide = Trunk(), nn.Sequential(conv(16, 16), conv(16, 16))
        self.fc = nn.Linear(16 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.trunk(x)[-1]
        if small.shape[2] != 8:
            raise ValueError("sides must be 64")
        return self.fc(self.wide(small).flatten(1))


def test_an_image_that_passes_is_preferred() -> None:
    assert list(steam_sites(insert_steam(OfSixtyFour(), "stages"))) == [*ENDS[:2], "wide.1.2"]


class Text(nn.Module):
    """A text recogniser, whose later layers halve only the height."""

    def __init__(self) -> None:
        super().__init__()
        strides = [2, (2, 1), (2, 1), 2]
        self.layers = nn.ModuleList(conv(3 if i == 0 else 8, 8, stride) for i, stride in enumerate(strides))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def test_maps_that_are_not_square() -> None:
    assert list(steam_sites(insert_steam(Text(), "stages"))) == [f"layers.{i}.2" for i in range(4)]


class Strips(nn.Module):
    """Attention on the means of rows and of columns. These maps are lines, so they are not a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.rows, self.columns = conv(3, 8, 2), conv(8, 8, side=1), conv(8, 8, side=1)
        self.last, self.fc = conv(8, 8, 2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        x = x * self.rows(x.mean(3, keepdim=True)).sigmoid() * self.columns(x.mean(2, keepdim=True)).sigmoid()
        return self.fc(self.last(x).mean((2, 3)))


def test_lines_are_no_stages() -> None:
    assert list(steam_sites(insert_steam(Strips(), "stages"))) == ["down.2", "last.2"]


class Shared(nn.Module):
    """A network that calls the last activation of a stage a second time, in the same sequence or elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = conv(3, 8, 2), conv(8, 8, 2), nn.Linear(8, 5)
        self.third = conv(8, 8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.first[-1](self.second(self.first(x)) - 1))
        return self.fc(x.mean((2, 3)))


def test_a_unit_whose_host_is_called_twice_is_not_placed() -> None:
    model = insert_steam(Shared(), "stages")
    assert list(steam_sites(model)) == ["second.2", "third.2"]


def test_inference_mode_changes_no_placement() -> None:
    for make in (Trunk, Text, lambda: Detector(Heads(said), Neck())):
        model = make()
        with torch.inference_mode():
            inside = list(steam_sites(insert_steam(model, "stages")))
        assert inside == list(steam_sites(insert_steam(remove_steam(model), "stages"))) and len(inside) >= 3


class Watcher:
    """An owner of hooks that cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.seen = threading.Lock(), 0

    def __call__(self, *args: Any) -> None:
        self.seen += 1

    def watch(self, *args: Any, **options: Any) -> None:
        self()


def test_hooks_that_cannot_be_copied_are_left_alone() -> None:
    model, watcher = Trunk(), Watcher()
    layer = model.stages[0][0]
    layer.register_forward_hook(watcher.watch)
    layer.register_forward_hook(watcher.watch, with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(watcher)
    layer.register_full_backward_hook(watcher.watch)
    layer.register_state_dict_post_hook(watcher)
    layer.register_load_state_dict_pre_hook(watcher.watch)
    names = list(steam_sites(insert_steam(model, "stages")))
    assert names == [name.removeprefix("trunk.") for name in ENDS] and watcher.seen == 0
    model(torch.rand(1, 3, 32, 32))
    assert watcher.seen == 3
