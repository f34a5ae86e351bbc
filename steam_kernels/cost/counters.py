"""Handles by which fvcore, ptflops, thop and torchinfo count a unit's FLOPs; torch's FlopCounterMode needs none.

All give :func:`steam_kernels.cost`'s ``flops`` for each sample. These counters call a multiply-add one operation, not
two; a unit's pooling adds and its gate multiplies are not paired, so its number is handed over as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..config import Unit
from ..module import FusedSTEAM
from . import cost, forward_flops

# steam_kernels.cost is the function, in which "import steam_kernels.cost.counters as x" looks for this module.
cost.counters = sys.modules[__name__]  # type: ignore[attr-defined]


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """For ``FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles())``, evaluated under :func:`as_operators`."""
    return {f"steam_kernels::{prefix}{name}": _traced for prefix in ops.PREFIXES for name in ("forward", "forward_")}


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """For ptflops' ``get_model_complexity_info(custom_modules_hooks=...)``, with either of its engines.

    With ``backend="pytorch"``, which knows layers by their exact class, units that follow a convolution or norm (sites
    "blocks") hide that layer's own count, and a residual must be given by position: take ``backend="aten"`` for those.
    """
    packets = [
        getattr(torch.ops.steam_kernels, prefix + name) for prefix in ops.PREFIXES for name in ("forward", "forward_")
    ]
    return {FusedSTEAM: _hooked, **dict.fromkeys(packets, _dispatched)}


def thop_ops() -> dict[type, Callable[..., None]]:
    """For thop's ``profile(model, inputs=(x,), custom_ops=thop_ops())``, which counts no unit without it.

    The ``thop`` of PyPI knows layers by their exact class, so it leaves out the own count of a convolution or norm that
    a unit follows (sites "blocks"); ``ultralytics-thop``, which has the same name, does not. A residual must be given
    by position.
    """
    return {FusedSTEAM: _added}


def count_in_torchinfo(statistics: Any) -> Any:
    """Puts the units' counts into what torchinfo's ``summary(model, ...)`` returns, in place, and returns that.

    torchinfo takes no handles. It guesses ``N * C`` mult-adds for each number of a unit's weights, and leaves out those
    of a layer that a unit follows, which has a child then. Both are corrected, in the layers and in
    ``total_mult_adds``; additions of residuals are left out, since it does not say whether there were any.

    Example:
        >>> statistics = count_in_torchinfo(torchinfo.summary(model, (1, 3, 224, 224), verbose=0))
    """
    for layer in statistics.summary_list:
        if isinstance(layer.module, FusedSTEAM):
            flops = _of(layer.module, layer.output_size, False)
            statistics.total_mult_adds += flops - layer.macs
            layer.macs = flops
        elif hasattr(type(layer.module), "without_unit") and len(layer.module._modules) == 1:
            samples, channels = layer.output_size[:2]
            guessed = samples * channels * sum(p.numel() for p in layer.module.steam.parameters())
            layer.macs -= guessed
            statistics.total_mult_adds += layer.macs
    return statistics


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Has ``torch.jit`` traces hold a unit as one operator, for a counter to see; without it they hold plain ones.

    Gradients are off meanwhile. A trace that is made here is for counting: it runs in this process alone.
    """
    before = reference.traced_as_operators
    reference.traced_as_operators = True
    try:
        with torch.no_grad():
            yield
    finally:
        reference.traced_as_operators = before


def _traced(inputs: list[Any], outputs: list[Any]) -> int:
    grid = [size.toIValue() for size in inputs[4].node().inputs()]
    residual = None if isinstance(inputs[3].type(), torch.NoneType) else ()
    options = (value.toIValue() for value in inputs[5:9])
    return ops.forward_flop(inputs[0].type().sizes(), None, None, residual, grid, *options)


def _dispatched(args: tuple[Any, ...], outputs: tuple[Any, ...]) -> int:
    return ops.forward_flop(*args)


def _hooked(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    module.__flops__ += _of(module, output.shape, len(args) > 1 and args[1] is not None)


def _added(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    module.total_ops += _of(module, output.shape, len(args) > 1 and args[1] is not None)


def _of(module: Any, shape: Any, residual: bool) -> int:
    unit = Unit(
        num_heads=module.num_heads,
        grid_size=module.grid_size,
        window=module.window,
        channel_radius=module.channel_radius,
        spatial_neighbors=module.spatial_neighbors,
        self_loops=module.self_loops,
    )
    samples, channels, height, width = shape
    return samples * forward_flops(channels, height, width, unit.grid(height, width), unit, residual)
