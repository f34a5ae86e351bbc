"""Networks for the tests of models and tools. Their weights are random, and their gates change the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import FusedSTEAM, insert_steam


def resnet(name: str = "resnet18", *, units: bool = True, norm: Any = None, **options: Any) -> nn.Module:
    """A torchvision ResNet in training mode. The weights of its units are large enough to change the outputs."""
    from torchvision import models

    model = getattr(models, name)(weights=None, norm_layer=norm, num_classes=10)
    if units:
        insert_steam(model, **options)
        strengthen(model)
    return model


def strengthen(model: nn.Module) -> nn.Module:
    """Draws the weights of the units from the standard normal distribution."""
    for unit in model.modules():
        if isinstance(unit, FusedSTEAM):
            nn.init.normal_(unit.channel_weight)
            nn.init.normal_(unit.spatial_weight)
    return model


@torch.no_grad()
def settle(model: nn.Module, side: int = 64) -> nn.Module:
    """Sets batch normalisations' statistics from random images, so that activations keep their size; sets eval()."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(torch.randn(4, 3, side, side))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def timm_model(name: str, **options: Any) -> nn.Module:
    """A timm model with random weights. Skips the test without timm."""
    return pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def units(model: torch.nn.Module) -> dict[str, FusedSTEAM]:
    """The units of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedSTEAM)}


def outputs(y: Any) -> list[torch.Tensor]:
    """The output of a network as a list of tensors."""
    return [y] if isinstance(y, torch.Tensor) else list(y.values() if isinstance(y, dict) else y)
