"""A stub of detectron2.modeling.backbone.resnet: the blocks' names, arguments, children and order of operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Conv2d(nn.Conv2d):
    """A convolution with its norm inside, as detectron2 has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut = Conv2d(in_channels, out_channels, 1, stride=stride) if in_channels != out_channels else None

    def end(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y += x if self.shortcut is None else self.shortcut(x)
        return torch.relu_(y)


class BasicBlock(_Block):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.conv2(torch.relu_(self.conv1(x))), x)


class BottleneckBlock(_Block):
    def __init__(self, in_channels: int, out_channels: int, *, bottleneck_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.conv1 = Conv2d(in_channels, bottleneck_channels, 1)
        self.conv2 = Conv2d(bottleneck_channels, bottleneck_channels, 3, stride=stride, padding=1)
        self.conv3 = Conv2d(bottleneck_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu_(self.conv2(torch.relu_(self.conv1(x))))
        return self.end(self.conv3(y), x)
