"""The gates that people use today: timm's SE, ECA and CBAM, and the Gaussian context transformer; and where they go in
a residual network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GaussianGCT(nn.Module):
    """``(N, C, H, W)`` to the same shape: x times exp(-(c^2 / 2) v^2), v the channel means of x, normalised over the
    channels to mean 0 and variance 1, and c = 2; no parameters [second-hand: Gaussian Context Transformer, CVPR 2021].
    """

    def __init__(self, channels: int, c: float = 2.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.exponent, self.eps = channels, -(c**2) / 2, eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        centred = mean - mean.mean(1, keepdim=True)
        square = centred.square()
        return x * torch.exp(self.exponent * square / (square.mean(1, keepdim=True) + self.eps))


def _se(channels: int) -> nn.Module:
    from timm.layers import SEModule

    return SEModule(channels)


def _eca(channels: int) -> nn.Module:
    from timm.layers import EcaModule

    return EcaModule(channels)


def _cbam(channels: int) -> nn.Module:
    from timm.layers.cbam import CbamModule

    return CbamModule(channels)


#: By name: channels -> the layer, as its authors (timm's defaults) have it.
GATES: dict[str, Callable[[int], nn.Module]] = {"se": _se, "eca": _eca, "cbam": _cbam, "gct": GaussianGCT}


def insert_gate(model: nn.Module, gate: str) -> int:
    """Puts a gate into every residual block of a torchvision ResNet or MobileNetV2, before the addition: behind the
    block's last norm, in a Sequential of ``norm`` and ``attention`` that takes its place. How many were put in."""
    last_norms: list[tuple[nn.Module, str]] = []
    for block in model.modules():
        kind = type(block).__name__
        if kind in ("BasicBlock", "Bottleneck"):
            last_norms.append((block, "bn2" if kind == "BasicBlock" else "bn3"))
        elif kind == "InvertedResidual" and block.use_res_connect:
            last_norms.append((block.conv, str(len(block.conv) - 1)))
    if not last_norms:
        raise TypeError(f"model must be a torchvision ResNet or MobileNetV2, got {type(model).__name__}")
    for parent, name in last_norms:
        norm: Any = getattr(parent, name)
        setattr(parent, name, nn.Sequential(OrderedDict(norm=norm, attention=GATES[gate](norm.num_features))))
    return len(last_norms)
