"""The host's overhead: microseconds per call of each layer, and the modules at small maps.

    python -m benchmarks.host [--quick] [--json PATH]

* *layers*, at (1, 64, 7, 7): operators, autograd function, ``steam()``, module. The kernels' own time is the operator's
  time less the time of the same call at batch 0, which only dispatches and allocates. The first rows are PyTorch's own
  overhead: ``x * 0.5``, and a custom autograd function of the unit's inputs that computes nothing.
* *small*: ``FusedSTEAM`` and ``reference.STEAM`` from (1, 1, 1, 1) up. The rows show whether plain PyTorch is faster
  below some size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("host: loads PyTorch")

import torch

from benchmarks import judging, runs
from benchmarks.commandline import run_options
from benchmarks.contenders import Fused
from benchmarks.progress import Progress
from benchmarks.shapes import Shape
from benchmarks.tables import table
from benchmarks.timing import Block, Effort, Sample, interleaved
from steam_kernels import FusedSTEAM, ops, reference, steam
from steam_kernels.config import Inputs, Options

COLUMNS = ("no grad", "forward with grad", "forward + backward")
SMALL = ((1, 1, 1, 1), (1, 8, 2, 2), (1, 16, 7, 7), (1, 64, 7, 7), (1, 64, 14, 14), (1, 256, 14, 14), (1, 256, 28, 28))
Rows = list[dict[str, Any]]


class Nothing(torch.autograd.Function):
    """An autograd function of x and two weights that computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Any, channel_weight: Any, spatial_weight: Any) -> Any:
        ctx.save_for_backward(x, channel_weight, spatial_weight)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, Any, Any]:
        _, channel_weight, spatial_weight = ctx.saved_tensors
        return dy, channel_weight, spatial_weight


def block(column: str, call: Callable[[], object]) -> Block:
    def run(calls: int) -> Sample:
        with torch.set_grad_enabled(column != "no grad"):
            call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return {"forward": (time.perf_counter() - start) / calls}

    return run


def layers(effort: Effort) -> Rows:
    """Microseconds per call of each layer at (1, 64, 7, 7), from the operators up to the module."""
    shape = Shape(1, 64, 7, 7)
    tensors = shape.tensors()
    judging.judge(shape, tensors).check(judging.outputs(Fused(), shape, tensors), shape.label)
    x, dy, cw, sw = (tensors[k] for k in ("x", "dy", "channel_weight", "spatial_weight"))
    module = FusedSTEAM(64)
    with torch.no_grad():
        module.channel_weight.copy_(cw)
        module.spatial_weight.copy_(sw)
    forward, backward = torch.ops.steam_kernels.forward.default, torch.ops.steam_kernels.backward.default
    arguments = shape.op_arguments
    needs = (True, True, True, False)

    def operator(batch: Any, upstream: Any) -> dict[str, Callable[[], object]]:
        def pair() -> object:
            saved = forward(batch, cw, sw, None, True, *arguments)[1]
            return backward(upstream, batch, None, cw, sw, saved, needs, *arguments)

        return {
            "no grad": lambda: forward(batch, cw, sw, None, False, *arguments),
            "forward with grad": lambda: forward(batch, cw, sw, None, True, *arguments),
            "forward + backward": pair,
        }

    def call_operators(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.call(Inputs(*tensors), Options(), shape.grid, "cpu")

    def layer(call: Callable[..., Any], leaves: list[Any], *rest: Any) -> dict[str, Callable[[], object]]:
        live = [v.detach().requires_grad_() if not isinstance(v, torch.nn.Parameter) else v for v in leaves]
        inputs = live if len(live) > 1 or call is not module else [*live, *module.parameters()]
        return {
            "no grad": lambda: call(*leaves, *rest),
            "forward with grad": lambda: call(*live, *rest),
            "forward + backward": lambda: torch.autograd.grad(call(*live, *rest), inputs, dy),
        }

    stack = {
        "x * 0.5 (built in)": layer(lambda v: v * 0.5, [x]),
        "an autograd function of nothing": layer(Nothing.apply, [x, cw, sw]),
        "operator, batch 0": operator(x[:0], dy[:0]),
        "operator": operator(x, dy),
        "autograd (ops.call)": layer(call_operators, [x, cw, sw]),
        "steam()": layer(steam, [x, cw, sw]),
        "FusedSTEAM": layer(module, [x]),
    }
    blocks = {f"{name}|{c}": block(c, calls[c]) for name, calls in stack.items() for c in COLUMNS}
    m = interleaved(blocks, effort)
    us = {name: {c: m.median(f"{name}|{c}", "forward") * 1e6 for c in COLUMNS} for name in stack}
    kernels = {c: us["operator"][c] - us["operator, batch 0"][c] for c in COLUMNS}
    us["kernels alone: operator less batch 0"] = kernels
    us["FusedSTEAM over the kernels"] = {c: us["FusedSTEAM"][c] - kernels[c] for c in COLUMNS}
    return [{"section": "layers", "layer": name} | columns for name, columns in us.items()]


def say_layers(rows: Rows) -> None:
    """Prints the table of the layers."""
    title = "== host overhead at (1, 64, 7, 7), float32, microseconds per call =="
    say("\n" + table(title, ("layer", *COLUMNS), [[r["layer"], *(r[c] for c in COLUMNS)] for r in rows]))


def small(effort: Effort, shape: Shape) -> dict[str, Any]:
    """Microseconds per call of both modules at a small map."""
    tensors = shape.tensors()
    judging.judge(shape, tensors).check(judging.outputs(Fused(), shape, tensors), shape.label)
    modules = {"fused": FusedSTEAM(shape.c), "eager": reference.STEAM(shape.c)}
    modules["eager"].load_state_dict(modules["fused"].state_dict())
    x, leaf, dy = tensors["x"], tensors["x"].detach().requires_grad_(), tensors["dy"]
    blocks = {}
    for name, module in modules.items():
        inputs = [leaf, *module.parameters()]

        def pair(module: Any = module, inputs: Any = inputs, leaf: Any = leaf, dy: Any = dy) -> object:
            return torch.autograd.grad(module(leaf), inputs, dy)

        blocks[f"{name}|no grad"] = block("no grad", lambda module=module, x=x: module(x))  # type: ignore[misc]
        blocks[f"{name}|forward + backward"] = block("forward + backward", pair)
    m = interleaved(blocks, effort)
    row: dict[str, Any] = {"section": "small", "problem": shape.label, "elements": shape.numel}
    for column in ("no grad", "forward + backward"):
        for name in modules:
            row[f"{name} {column}"] = m.median(f"{name}|{column}", "forward") * 1e6
        row[f"speedup {column}"] = row[f"eager {column}"] / row[f"fused {column}"]
    return row


def say_small(rows: Rows) -> None:
    """Prints the table of the small maps."""
    columns = ("no grad", "forward + backward")
    keys = [f"{k} {c}" for c in columns for k in ("fused", "eager", "speedup")]
    head = [f"{k}{c}" for c in ("", " f+b") for k in ("fused", "eager", "speed-up")]
    title = "== small maps, float32: microseconds per call without gradients, and forward + backward (f+b) =="
    say("\n" + table(title, ("shape", *head), [[r["problem"], *(r[k] for k in keys)] for r in rows]))
    slower = [r["problem"] for r in rows if min(r[f"speedup {c}"] for c in columns) < 1]
    say(f"plain PyTorch is faster at: {', '.join(slower) or 'none of these'}\n")


def main() -> None:
    args = run_options("host", __doc__, "few rounds and shapes")
    facts = runs.begin()
    effort = Effort.quick() if args.quick else Effort(seconds=0.3)
    shapes = [Shape(*size) for size in (SMALL[:3] if args.quick else SMALL)]
    progress = Progress(["layers", *("small" for _ in shapes)])
    with progress.row("each layer of a call", "layers"):
        rows = layers(effort)
    found = []
    for shape in shapes:
        with progress.row(f"the modules at {shape.label}", "small"):
            found.append(small(effort, shape))
    say_layers(rows)
    say_small(found)
    rows += found
    runs.write(args.json, "host", rows, facts, args.quick)


if __name__ == "__main__":
    main()
