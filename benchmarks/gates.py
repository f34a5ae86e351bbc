"""Other gates: timm's SE, ECA and CBAM, and the Gaussian context transformer; and their places in a residual
network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from steam_kernels.models import families


class GaussianGCT(nn.Module):
    """``(N, C, H, W)`` to the same shape: x times exp(-(c^2 / 2) v^2). v is the channel means of x, normalised over the
    channels to mean 0 and variance 1, and c = 2. It has no parameters [second-hand: Gaussian Context Transformer, CVPR
    2021]."""

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


#: By name: a function from the number of channels to the layer, with timm's defaults.
GATES: dict[str, Callable[[int], nn.Module]] = {"se": _se, "eca": _eca, "cbam": _cbam, "gct": GaussianGCT}


def insert_gate(model: nn.Module, gate: str) -> int:
    """Inserts a gate into every block that ``insert_steam`` knows, at the end of its branch: a Sequential of ``norm``
    and ``attention`` replaces the last norm.

    Returns:
        The number of gates.

    Raises:
        TypeError: the model has no such block.
    """
    blocks = families.find_blocks(model)
    if not blocks:
        raise TypeError(f"model must have blocks that insert_steam knows, got {type(model).__name__}")
    for block in blocks:
        name, norm, channels = block.end()
        while isinstance(norm, nn.Sequential):
            name, norm = f"{name}.{len(norm) - 1}", norm[-1]
        parent, _, last = name.rpartition(".")
        gated = nn.Sequential(OrderedDict(norm=norm, attention=GATES[gate](channels)))
        setattr(model.get_submodule(parent), last, gated)
    return len(blocks)
