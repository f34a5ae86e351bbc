"""Handles with which fvcore, ptflops, thop and torchinfo count a unit's FLOPs. torch's FlopCounterMode needs none.

Each handle gives the ``flops`` of :func:`steam_kernels.cost` for each sample. These counters count a multiply-add as
one operation, not two. The adds of a unit's pooling and the multiplies of its gate do not form multiply-adds, so the
number is not halved.
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

    ``backend="pytorch"`` knows layers by their exact class. It therefore misses the own count of a convolution or norm
    with a unit (sites "blocks"), and a residual must be given by position. ``backend="aten"`` has neither limit.
    """
    counts = {"forward": _dispatched, "forward_": _dispatched_in_place}
    packets = {
        getattr(torch.ops.steam_kernels, prefix + name): count
        for prefix in ops.PREFIXES
        for name, count in counts.items()
    }
    return {FusedSTEAM: _hooked, **packets}


def thop_ops() -> dict[type, Callable[..., None]]:
    """For thop's ``profile(model, inputs=(x,), custom_ops=thop_ops())``. Without it thop counts no unit.

    The package ``thop`` on PyPI knows layers by their exact class, so it misses the own count of a convolution or norm
    with a unit (sites "blocks"). The package ``ultralytics-thop``, which has the same module name, counts it. A
    residual must be given by position.
    """
    return {FusedSTEAM: _added}


def count_in_torchinfo(statistics: Any) -> Any:
    """Corrects the counts in the result of torchinfo's ``summary(model, ...)``, in place, and returns the result.

    torchinfo takes no handles. It assumes ``N * C`` mult-adds for each number of a unit's weights. It also leaves out
    the mult-adds of a layer with a unit, because that layer has a child. This function corrects both, in the layers and
    in ``total_mult_adds``. It does not count additions of residuals, because torchinfo does not record them. A second
    call for the same result changes nothing.

    Example:
        >>> statistics = count_in_torchinfo(torchinfo.summary(model, (1, 3, 224, 224), verbose=0))
    """
    if getattr(statistics, "has_steam_counts", False):
        return statistics
    statistics.has_steam_counts = True
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
    """Makes ``torch.jit`` traces contain each unit as one operator, which a counter sees, and not as plain operators.

    Gradients are off in this context. Such a trace is only for counting, and runs only in this process.
    """
    with tracing.as_operators(), torch.no_grad():
        yield


def _traced(inputs: list[Any], outputs: list[Any]) -> int:
    # forward has ``save`` before the grid, and forward_ does not, so the inputs are indexed from the end.
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
