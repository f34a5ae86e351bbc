"""Handles by which fvcore, ptflops, thop and torchinfo count a unit's FLOPs; torch's FlopCounterMode needs none.

All give :func:`steam_kernels.cost`'s ``flops`` for each sample. These counters call a multiply-add one operation, not
two; a unit's pooling adds and its gate multiplies are not paired, so its number is handed over as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops, tracing
from ..config import Arguments
from ..flops import forward_flops
from ..module import FusedSTEAM


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """For ``FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles())``, evaluated under :func:`as_operators`."""
    return {f"steam_kernels::{prefix}{name}": _traced for prefix in ops.PREFIXES for name in ("forward", "forward_")}


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """For ptflops' ``get_model_complexity_info(custom_modules_hooks=...)``, with either of its engines.

    With ``backend="pytorch"``, which knows layers by their exact class, units that follow a convolution or norm (sites
    "blocks") hide that layer's own count, and a residual must be given by position: take ``backend="aten"`` for those.
    """
    counts = {"forward": _dispatched, "forward_": _dispatched_in_place}
    packets = {
        getattr(torch.ops.steam_kernels, prefix + name): count
        for prefix in ops.PREFIXES
        for name, count in counts.items()
    }
    return {FusedSTEAM: _hooked, **packets}


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
    """Makes ``torch.jit`` traces hold each unit as one operator, which a counter sees; else they hold plain operators.

    Gradients are off in it. Such a trace is for counting, and runs in this process only.
    """
    with tracing.as_operators(), torch.no_grad():
        yield


def _traced(inputs: list[Any], outputs: list[Any]) -> int:
    # forward has save before the grid and forward_ has not, so both are counted from the end.
    options = len(Arguments._fields)
    grid = [size.toIValue() for size in inputs[-options - 1].node().inputs()]
    residual = None if isinstance(inputs[3].type(), torch.NoneType) else ()
    arguments = (value.toIValue() for value in inputs[-options:])
    return ops.forward_flop(inputs[0].type().sizes(), None, None, residual, False, grid, *arguments)


def _dispatched(args: tuple[Any, ...], outputs: tuple[Any, ...]) -> int:
    return ops.forward_flop(*args)


def _dispatched_in_place(args: tuple[Any, ...], outputs: tuple[Any, ...]) -> int:
    return ops.forward_in_place_flop(*args)


def _hooked(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    module.__flops__ += _of(module, output.shape, len(args) > 1 and args[1] is not None)


def _added(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    module.total_ops += _of(module, output.shape, len(args) > 1 and args[1] is not None)


def _of(module: Any, shape: Any, residual: bool) -> int:
    samples, channels, height, width = shape
    options = module.options
    grid = options.grid(height, width)
    return samples * forward_flops(channels, height, width, grid, options.arguments, residual)
