"""The cost of a gate in a whole network: parameters, FLOPs, and the time and memory of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory
from benchmarks.contenders import backends_that_ran
from examples.evaluation.settings import Settings, variant_of
from steam_kernels import cost, steam_sites
from steam_kernels.costs import networks


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def gate_modules(network: nn.Module) -> list[nn.Module]:
    """The gates that :func:`examples.evaluation.settings.insert` has put into ``network``."""
    units: list[nn.Module] = list(steam_sites(network).values())
    pairs = (m for m in network.modules() if isinstance(m, nn.Sequential))
    return units + [pair.attention for pair in pairs if list(pair._modules) == ["norm", "attention"]]


def gflops(plain: nn.Module, gated: nn.Module, settings: Settings, run: Callable[[nn.Module], object]) -> float:
    """GFLOPs of ``run``, a forward pass: torch's count of the plain network, plus the gates by docs/cost.md.

    torch's counter sees no pooling and no gate. So the gates are counted by the formulas of that page, on the shapes
    that they get in the gated network.
    """
    options = {k: v for k, v in variant_of(settings).items() if k != "sites"}
    shapes: list[tuple[int, int, int]] = []
    hooks = [
        gate.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[1:])))
        for gate in gate_modules(gated)
    ]
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            run(plain.eval())
        run(gated.eval())
    for hook in hooks:
        hook.remove()
    if settings.gate == "steam":
        added = sum(cost(*shape, **options).flops for shape in shapes)
    else:
        added = sum(networks.GATES[settings.gate.upper()](*shape)[1] for shape in shapes)
    return (counter.get_total_flops() + added) / 1e9


def counts(
    plain: nn.Module, gated: nn.Module, settings: Settings, run: Callable[[nn.Module], object]
) -> dict[str, float]:
    """Parameters, gates, and the GFLOPs of ``run``, a forward pass."""
    return {
        "parameters": parameters(gated),
        "parameters_of_gates": parameters(gated) - parameters(plain),
        "gates": len(gate_modules(gated)),
        "gflops": gflops(plain, gated, settings, run),
    }


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def of_steps(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Time and memory of a step with the gate (``gate``) and without one (``none``), in interleaved rounds.

    ``step_over_none`` is the median of the ratios within the rounds. The peak is the largest amount that PyTorch had
    allocated during a step, beyond the network and its optimizer.
    """

    def seconds(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with backends_that_ran() as ran:
        for step in steps.values():
            step()
    peaks = {name: memory.traced(step)[1].peak for name, step in steps.items()}
    for step in steps.values():
        seconds(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    ratios = [gate / none for gate, none in zip(times["gate"], times["none"], strict=True)]
    return {
        "step_seconds": statistics.median(times["gate"]),
        "step_seconds_quartiles": quartiles(times["gate"]),
        "step_over_none": statistics.median(ratios),
        "step_over_none_quartiles": quartiles(ratios),
        "peak_bytes": peaks["gate"],
        "peak_bytes_none": peaks["none"],
        "backend": ", ".join(sorted(ran)),
    }


def stepping(
    network: nn.Module, settings: Settings, device: torch.device, loss: Callable[[nn.Module], Any], context: Any
) -> Callable[[], object]:
    """A training step of ``network`` in the settings' precision: forward, backward, SGD with a rate of 0."""
    network.to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.0, settings.momentum, weight_decay=settings.weight_decay)

    def step() -> None:
        with context():
            value = loss(network)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_training(
    plain: nn.Module, gated: nn.Module, settings: Settings, trainer: lightning.Trainer, loss: Callable[[nn.Module], Any]
) -> dict[str, Any]:
    """Time and memory of a training step of both networks, in the precision and on the device of ``trainer``."""
    device, context = trainer.strategy.root_device, trainer.precision_plugin.forward_context
    steps = {n: stepping(m, settings, device, loss, context) for n, m in (("none", plain), ("gate", gated))}
    return of_steps(steps, settings.cost_rounds, device)
