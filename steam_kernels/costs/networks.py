"""The parameters, FLOPs and bytes that SE, CBAM, ECA, Gaussian GCT and STEAM add to a network, by one convention.

The convention is the one of :mod:`steam_kernels.flops`, with these additions. A multiply-add of a convolution or a
product is two FLOPs, also on padding, as in every counter. The division of a mean is one. A normalisation that
inference folds into factors is a multiply and an add. Maxima and ReLU are comparisons, which cost nothing. Bytes are
the least that any implementation must move: each gated map is read once and written once, in float32. Parameters have a
separate column.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import Options, check_integer
from ..flops import forward_flops

#: The networks that :func:`table` knows, by their torchvision names.
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
_EMBED_DIM = 8

#: C, H and W of a map.
Shape = tuple[int, int, int]


class Row(NamedTuple):
    """The cost that one kind of gate adds to a network for one image, or (``plain``) the cost of the network alone.

    ``on_maps`` is the part of ``flops`` on the elements of the maps: the adds of the pooling and the multiplies of the
    gate. It is None for ``plain``. ``counted`` are the FLOPs that torch's FlopCounterMode counts, or None if no
    implementation is available.
    """

    gate: str
    sites: int
    parameters: int
    flops: int
    on_maps: int | None
    bytes: int
    counted: int | None


class Network(NamedTuple):
    """A network without gates: its row, and the output shapes of its blocks and of the adaptive sites."""

    plain: Row
    blocks: list[Shape]
    adaptive: list[Shape]


# ---- one gate on one map ---------------------------------------------------------------------------------------------

_SIGMOID = 3  # exp, add, division


def se(channels: int, height: int, width: int) -> tuple[int, int]:
    """Parameters and FLOPs of Squeeze-and-Excitation (CVPR 2018) as in timm: reduction 16, to a multiple of 8."""
    pixels, reduced = channels * height * width, max(8, _multiple(channels / 16, 8))
    pool, layers, gate = pixels + channels, 2 * 2 * channels * reduced, _SIGMOID * channels + pixels
    return 2 * channels * reduced + reduced + channels, pool + layers + reduced + channels + gate


def eca(channels: int, height: int, width: int) -> tuple[int, int]:
    """Parameters and FLOPs of Efficient Channel Attention (CVPR 2020): one kernel, sized by the channels."""
    pixels, size = channels * height * width, int(abs(math.log2(channels) + 1) / 2)
    size = max(size if size % 2 else size + 1, 3)
    return size, pixels + channels + 2 * size * channels + _SIGMOID * channels + pixels


def cbam(channels: int, height: int, width: int) -> tuple[int, int]:
    """Parameters and FLOPs of CBAM (ECCV 2018) as in timm: reduction 16, a 7 x 7 convolution, a normalisation."""
    area, reduced = height * width, max(1, int(channels / 16 + 0.5))
    pixels, kernel = channels * area, 2 * 7 * 7
    # Both pooled vectors go through the two layers, and the outputs are added.
    by_channel = pixels + channels + 2 * (2 * 2 * channels * reduced) + channels + _SIGMOID * channels + pixels
    by_space = pixels + area + 2 * kernel * area + 2 * area + _SIGMOID * area + pixels
    return 2 * channels * reduced + kernel + 2, by_channel + by_space


def gct(channels: int, height: int, width: int) -> tuple[int, int]:
    """Parameters and FLOPs of the Gaussian Context Transformer, c fixed [second-hand: CVPR 2021].

    The gate is exp(-c^2/2 t^2), where t are the channel means, normalised over the channels.
    """
    pixels = channels * height * width
    mean, variance, normalised = channels + 1, 3 * channels + 1, channels + 2
    return 0, pixels + channels + mean + variance + normalised + 3 * channels + pixels


def steam(channels: int, height: int, width: int) -> tuple[int, int]:
    """Parameters and FLOPs of one STEAM unit with default options, as in :func:`steam_kernels.cost`."""
    options = Options()
    flops = forward_flops(channels, height, width, options.grid(height, width), options.arguments, False)
    return 8 * _EMBED_DIM, flops


def _multiple(value: float, divisor: int) -> int:
    return int(value + divisor / 2) // divisor * divisor


#: For each gate: the function that gives its parameters and FLOPs on one map.
GATES: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "SE": se,
    "CBAM": cbam,
    "ECA": eca,
    "GCT": gct,
    "STEAM": steam,
}


# ---- a network -------------------------------------------------------------------------------------------------------


def network(name: str, size: int) -> Network:
    """Counts a torchvision network on one ``size`` x ``size`` image, on the meta device, without computing numbers.

    Raises:
        ValueError: ``name`` is not one of :data:`NETWORKS`, or ``size`` is below 1.
        ImportError: torchvision is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"model must be one of {', '.join(map(repr, NETWORKS))}, got {name!r}")
    check_integer("size", size)
    from torchvision import models

    from ..models import families

    with torch.device("meta"):
        model, image = getattr(models, name)(weights=None).eval(), torch.empty(1, 3, size, size)
    shapes: dict[nn.Module, Shape] = {}
    moved = 0

    def block(module: nn.Module, args: Any, output: Tensor) -> None:
        channels, height, width = output.shape[1:]
        shapes[module] = channels, height, width

    def layer(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += sum(t.numel() * t.itemsize for t in (*args, output))

    for found in families.find_blocks(model):
        found.module.register_forward_hook(block)
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(layer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    flops = counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters())
    plain = Row("plain", 0, parameters, flops, None, moved, flops)
    return Network(plain, list(shapes.values()), [shapes[place.module] for place in families.adaptive(model)])


def table(name: str, size: int) -> list[Row]:
    """The rows of one network: plain, then each gate of :data:`GATES`. SE, CBAM, ECA and GCT are in every block.

    Raises:
        ValueError, ImportError: as :func:`network`.
    """
    plain, blocks, adaptive = network(name, size)
    rows = [plain]
    for gate, at in GATES.items():
        sites = adaptive if gate == "STEAM" else blocks
        costs = [at(*shape) for shape in sites]
        counts = [counted(gate, shape) for shape in sites]
        elements = sum(math.prod(shape) for shape in sites)
        rows.append(
            Row(
                gate,
                len(sites),
                sum(parameters for parameters, _ in costs),
                sum(flops for _, flops in costs),
                (4 if gate == "CBAM" else 2) * elements,  # CBAM pools and gates twice
                2 * torch.float32.itemsize * elements,
                None if None in counts else sum(count or 0 for count in counts),
            )
        )
    return rows


def counted(gate: str, shape: Shape) -> int | None:
    """FlopCounterMode's count of one gate on one map. It is None for GCT, and without timm for SE, CBAM and ECA."""
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, *shape)
        if gate == "STEAM":
            weight, options = torch.empty(4, _EMBED_DIM), Options()
            with FlopCounterMode(display=False) as counter:
                grid = options.grid(*shape[1:])
                torch.ops.steam_kernels.forward(x, weight, weight, None, False, grid, *options.arguments)
            return counter.get_total_flops()
        module = timm_gate(gate, shape[0])
        if module is None:
            return None
        with FlopCounterMode(display=False) as counter:
            module.eval()(x)
        return counter.get_total_flops()


def timm_gate(gate: str, channels: int) -> nn.Module | None:
    """timm's module of a gate on ``channels`` channels, or None without timm or if timm does not have the gate."""
    try:
        from timm.layers import EcaModule, SEModule
        from timm.layers.cbam import CbamModule
    except ImportError:
        return None
    kinds = {"SE": SEModule, "CBAM": CbamModule, "ECA": EcaModule}
    return kinds[gate](channels) if gate in kinds else None


def markdown(name: str, size: int) -> str:
    """The Markdown table of one network, as ``python -m steam_kernels.costs`` prints it."""
    lines = [
        f"**{name}, {size} × {size}**",
        "",
        "| gate | sites | parameters | GFLOPs | of these on the maps | MB moved | GFLOPs by FlopCounterMode |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table(name, size):
        flops, on_maps, seen = (
            "–" if count is None else f"{count / 1e9:.5f}" for count in (row.flops, row.on_maps, row.counted)
        )
        cells = (row.gate, row.sites or "–", f"{row.parameters:,}", flops, on_maps, f"{row.bytes / 1e6:.1f}", seen)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
