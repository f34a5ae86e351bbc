"""Handles by which fvcore and ptflops count a unit's FLOPs; torch's FlopCounterMode needs none.

All give :func:`steam_kernels.cost`'s ``flops`` for each sample. Both counters call a multiply-add one operation, not
two; a unit's pooling adds and its gate multiplies are not paired, so its number is handed over as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional, ops
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


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Has ``torch.jit`` traces hold a unit as one operator, for a counter to see; without it they hold plain ones.

    Gradients are off meanwhile. A trace that is made here is for counting: it runs in this process alone.
    """
    before = functional.traced_as_operators
    functional.traced_as_operators = True
    try:
        with torch.no_grad():
            yield
    finally:
        functional.traced_as_operators = before


def _traced(inputs: list[Any], outputs: list[Any]) -> int:
    grid = [size.toIValue() for size in inputs[4].node().inputs()]
    residual = None if isinstance(inputs[3].type(), torch.NoneType) else ()
    options = (value.toIValue() for value in inputs[5:9])
    return ops.forward_flop(inputs[0].type().sizes(), None, None, residual, grid, *options)


def _dispatched(args: tuple[Any, ...], outputs: tuple[Any, ...]) -> int:
    return ops.forward_flop(*args)


def _hooked(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    unit = Unit(
        num_heads=module.num_heads,
        grid_size=module.grid_size,
        window=module.window,
        channel_radius=module.channel_radius,
        spatial_neighbors=module.spatial_neighbors,
        self_loops=module.self_loops,
    )
    samples, channels, height, width = output.shape
    residual = len(args) > 1 and args[1] is not None
    module.__flops__ += samples * forward_flops(channels, height, width, unit.grid(height, width), unit, residual)
