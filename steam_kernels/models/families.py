"""The blocks of known networks, and the places for units that follow from the blocks.

A network is known by its *blocks*. The blocks may be in a classifier, in the backbone of a detector or in an encoder.
Each kind of block has one line in :data:`BLOCKS`, by the name of its class, so no library is imported for it. A *stage*
is a sequence of blocks in one container with the same number of output channels, of which only the first may have a
stride. In a timm model a stage is the part between two modules of ``feature_info``. docs/models.md has a table of the
families.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """The place of a unit, which acts on the output of ``module``. ``channels`` is None if not known."""

    name: str
    module: nn.Module
    channels: int | None


class Kind(NamedTuple):
    """A kind of block.

    ``end`` names the module whose output is the end of the block's branch, before the addition or concatenation. If
    ``end`` has several names, the first module that exists counts. ``width`` names a module that shows the number of
    channels of the branch, if ``end`` does not show it. The block's output has ``parts`` times as many channels.
    """

    end: tuple[str, ...]
    width: str | None = None
    parts: int = 1


#: The kinds of blocks by the name of the class.
BLOCKS: dict[str, Kind] = {
    "torchvision.models.resnet.BasicBlock": Kind(("bn2",)),
    "torchvision.models.resnet.Bottleneck": Kind(("bn3",)),
    "torchvision.models.mobilenetv2.InvertedResidual": Kind(("conv",)),
    "torchvision.models.mobilenetv3.InvertedResidual": Kind(("block",)),
    "torchvision.models.shufflenetv2.InvertedResidual": Kind(("branch2",), parts=2),
    "torchvision.models.efficientnet.MBConv": Kind(("block",)),
    "torchvision.models.efficientnet.FusedMBConv": Kind(("block",)),
    "torchvision.models.convnext.CNBlock": Kind(("block",)),
    "torchvision.models.regnet.ResBottleneckBlock": Kind(("f",)),
    "timm.models.resnet.BasicBlock": Kind(("se", "bn2"), "bn2"),
    "timm.models.resnet.Bottleneck": Kind(("se", "bn3"), "bn3"),
    "timm.models._efficientnet_blocks.ConvBnAct": Kind(("aa",), "bn1"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": Kind(("bn2",)),
    "timm.models._efficientnet_blocks.InvertedResidual": Kind(("bn3",)),
    "timm.models._efficientnet_blocks.EdgeResidual": Kind(("bn2",)),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": Kind(("layer_scale",), "pw_proj"),
    "timm.models._efficientnet_blocks.MobileAttention": Kind(("layer_scale",), "norm"),
    # Inside timm's ConvNeXt block the map is NHWC until the layer scale, which is not a module.
    "timm.models.convnext.ConvNeXtBlock": Kind(("drop_path",), "conv_dw"),
    "timm.models.regnet.Bottleneck": Kind(("conv3",)),
    "timm.models.regnet.PreBottleneck": Kind(("conv3",)),
    "detectron2.modeling.backbone.resnet.BasicBlock": Kind(("conv2",)),
    "detectron2.modeling.backbone.resnet.BottleneckBlock": Kind(("conv3",)),
}


class Block(NamedTuple):
    """A block found in a model."""

    name: str
    module: nn.Module
    kind: Kind

    def end(self) -> Place:
        """The end of the branch."""
        name = next((name for name in self.kind.end if getattr(self.module, name, None) is not None), self.kind.end[-1])
        return Place(f"{self.name}.{name}".lstrip("."), getattr(self.module, name), self._width())

    def output(self) -> Place:
        """The block's output."""
        return Place(self.name, self.module, self._width() * self.kind.parts)

    def strides(self) -> bool:
        """Whether a convolution of the block has a stride, so that the output is smaller than the input."""
        convolutions = (m for m in self.module.modules() if isinstance(m, nn.modules.conv._ConvNd))
        return any(max(convolution.stride) > 1 for convolution in convolutions)

    def _width(self) -> int:
        width = _width(getattr(self.module, self.kind.width or self.kind.end[-1]))
        if width is None:
            raise ValueError(
                f"model must have blocks as their library makes them, got one of unknown width, {self.name!r}"
            )
        return width


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Sequential):
        return next((width for child in reversed(module) if (width := _width(child)) is not None), None)
    for attribute in ("out_channels", "num_features", "num_channels", "out_features"):
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 1 else None


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of the block ``module``, by its class or a base class; None if it is not a known block."""
    classes = (f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__)
    return next((BLOCKS[c] for c in classes if c in BLOCKS), None)


def channels_of(module: nn.Module) -> int | None:
    """The channels of the output of a block, a convolution or a norm; None for any other module."""
    kind = kind_of(module)
    if kind is not None:
        return Block("", module, kind).output().channels
    return _width(module) if isinstance(module, (nn.modules.conv._ConvNd, *_NORMS)) else None


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of ``model`` in the order of its modules, without timm models that have a feature without blocks."""
    found = ((name, module, kind_of(module)) for name, module in model.named_modules())
    blocks = [Block(name, module, kind) for name, module, kind in found if kind is not None]
    strangers = tuple(
        features[0].prefix for features in _timm_features(model) if not _all_hold(features, blocks, model)
    )
    return [block for block in blocks if not block.name.startswith(strangers)]


def stages(model: nn.Module) -> list[list[Block]]:
    """The blocks of ``model``, grouped by stage."""
    feature_of = {}
    blocks = find_blocks(model)
    for features in _timm_features(model):
        feature_of.update(_by_feature(features, blocks, model))

    runs: list[list[Block]] = []
    last: tuple[Any, ...] | None = None
    for block in blocks:
        feature = feature_of.get(block.name)
        key = feature or (block.name.rpartition(".")[0], block.output().channels)
        if key != last or (feature is None and block.strides()):
            runs.append([])
        runs[-1].append(block)
        last = key
    return runs


class Feature(NamedTuple):
    """An entry of a timm model's ``feature_info``: the module's name, the model's name and a dot, and the channels."""

    name: str
    prefix: str
    channels: int


def _timm_features(model: nn.Module) -> list[list[Feature]]:
    """The features of each timm model in ``model`` whose ``feature_info`` names modules that exist."""
    modules = dict(model.named_modules())
    found: list[list[Feature]] = []
    for name, module in modules.items():
        info = getattr(module, "feature_info", None)
        info = getattr(info, "info", info)
        if not isinstance(info, (list, tuple)) or not all(isinstance(i, dict) and i.get("module") for i in info):
            continue
        prefix = f"{name}." if name else ""
        if any(prefix.startswith(features[0].prefix) for features in found):
            continue  # a stem of byobnet repeats features of the model
        if info and all(prefix + i["module"] in modules for i in info):
            found.append([Feature(prefix + i["module"], prefix, i["num_chs"]) for i in info])
    return found


def _by_feature(features: list[Feature], blocks: list[Block], model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """The feature of each block of one timm model: the first that ends after it. Blocks after the last have none."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ends = [(max(i for name, i in order.items() if f"{name}.".startswith(f"{f.name}.")), f) for f in features]
    inside = (block.name for block in blocks if block.name.startswith(features[0].prefix))
    return {name: (f,) for name in inside for f in [next((f for end, f in ends if order[name] <= end), None)] if f}


def _all_hold(features: list[Feature], blocks: list[Block], model: nn.Module) -> bool:
    # The first feature may be the stem, which has no blocks.
    return {(f,) for f in features[1:]} <= set(_by_feature(features, blocks, model).values())


def adaptive(model: nn.Module) -> Iterator[Place]:
    """After blocks 3, 6, 9, ... of each stage, and after the last block of a shorter stage [ours].

    This gives 1 + 1 + 2 + 1 units in ResNet-50. A timm model of unknown blocks has one unit after each feature.
    """
    found = stages(model)
    for stage in found:
        yield from (block.output() for block in stage[2::3] or stage[-1:])
    if not found:
        yield from after_features(model)


def after_stages(model: nn.Module) -> Iterator[Place]:
    """After the last block of each stage, or after each feature of a timm model of unknown blocks."""
    found = stages(model)
    yield from (stage[-1].output() for stage in found)
    if not found:
        yield from after_features(model)


def after_features(model: nn.Module) -> Iterator[Place]:
    """After each feature of the timm models in ``model``."""
    modules = dict(model.named_modules())
    for feature in (f for features in _timm_features(model) for f in features):
        name, module = feature.name, modules[feature.name]
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)):
            # This module runs its children itself, as in a DenseNet. The unit goes after the norm that follows it, if
            # any.
            after = list(modules)[list(modules).index(list(dict(module.named_modules(prefix=name)))[-1]) + 1 :]
            following = next((n for n in after if channels_of(modules[n]) is not None), name)
            if isinstance(modules[following], _NORMS) and channels_of(modules[following]) == feature.channels:
                name = following
        yield Place(name, modules[name], feature.channels)


def in_blocks(model: nn.Module) -> Iterator[Place]:
    """At the end of the branch of each block, before the addition, as SE in SE-ResNet."""
    yield from (block.end() for block in find_blocks(model))


#: The placements by name.
PLACEMENTS = {"adaptive": adaptive, "stages": after_stages, "blocks": in_blocks}
