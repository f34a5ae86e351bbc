"""Ready models: torchvision's networks with STEAM units and random weights.

Each function takes ``num_classes``, and ``sites`` and the options of a unit like :func:`steam_kernels.insert_steam`.
torchvision is imported only when a function is called.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .insert import insert_steam


def _build(name: str, sites: Any, num_classes: int, unit: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"steam_{name} is built on torchvision, which cannot be imported here: {error}") from error
    return insert_steam(getattr(models, name)(weights=None, num_classes=num_classes), sites, **unit)


def steam_resnet18(sites: Any = "adaptive", *, num_classes: int = 1000, **unit: Any) -> nn.Module:
    """ResNet-18 with STEAM units: four in the default placement, 256 parameters."""
    return _build("resnet18", sites, num_classes, unit)


def steam_resnet34(sites: Any = "adaptive", *, num_classes: int = 1000, **unit: Any) -> nn.Module:
    """ResNet-34 with STEAM units: five in the default placement, 320 parameters."""
    return _build("resnet34", sites, num_classes, unit)


def steam_resnet50(sites: Any = "adaptive", *, num_classes: int = 1000, **unit: Any) -> nn.Module:
    """ResNet-50 with STEAM units: the paper's five in the default placement, 320 parameters [second-hand]."""
    return _build("resnet50", sites, num_classes, unit)


def steam_resnet101(sites: Any = "adaptive", *, num_classes: int = 1000, **unit: Any) -> nn.Module:
    """ResNet-101 with STEAM units: ten in the default placement, 640 parameters."""
    return _build("resnet101", sites, num_classes, unit)


def steam_mobilenet_v2(sites: Any = "adaptive", *, num_classes: int = 1000, **unit: Any) -> nn.Module:
    """MobileNetV2 with STEAM units: seven in the default placement, 448 parameters."""
    return _build("mobilenet_v2", sites, num_classes, unit)


def steam_shufflenet_v2_x1_0(sites: Any = "adaptive", *, num_classes: int = 1000, **unit: Any) -> nn.Module:
    """ShuffleNetV2 (x1.0) with STEAM units: four in the default placement, 256 parameters."""
    return _build("shufflenet_v2_x1_0", sites, num_classes, unit)
