"""Runs the Triton kernels in Triton's interpreter under the guard, in its own process, and prints figures.

    export TRITON_INTERPRET=1
    python -m tests.support.triton_interpreted cases [PART OF AN ID ...]  # guarded cases
    python -m tests.support.triton_interpreted traffic ["56 nchw" ...]  # stages of a ResNet and more
    python -m tests.support.triton_interpreted offsets [nchw | nhwc]  # maps beyond 2**31 elements

Triton chooses the interpreter when it is first imported. A process of its own sets the variable, so the process of the
tests does not need it.
The output is one JSON object per line, each with an "id". A case that fails has "error" instead of figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steam_kernels import memory
from steam_kernels.config import Inputs, Options
from steam_kernels.schemas import Backward, Forward
from tests.support import cases
from tests.support.cases import Case

if TYPE_CHECKING:
    from tests.support.triton_guard import Guard

ROOT = Path(__file__).resolve().parents[2]


class Stage(NamedTuple):
    """One sample's map and grid, both square."""

    channels: int
    size: int
    grid: int = 7
    order: str = "sequential"


#: The stages of a ResNet at 224, and two more with cells of one pixel: the other order, and more cells than a tile has.
STAGES = {
    "56": Stage(256, 56),
    "28": Stage(512, 28),
    "14": Stage(1024, 14),
    "7": Stage(2048, 7),
    "7 parallel": Stage(512, 7, order="parallel"),
    "12 by pixels": Stage(128, 12, grid=12),
}
ORDERS = None, 1  # the interpreter's own order of programs, and a random order

#: Both memory formats, every dtype, odd sizes, slices and offsets, tails, orders and graphs. The plan is one launch for
#: all stages of a sample ("whole") or one launch per stage ("stages"); the launch table does not choose it.
GUARDED: list[tuple[Case, str]] = []
for _i, _case in enumerate(
    (
        Case(space=(14, 14), channels=16),
        Case(space=(7, 7), channels=17, dtype=torch.bfloat16, tail="residual_relu"),
        Case(space=(30, 17), channels=9, tail="other_relu", dy_layout="other", neighbors=8),
        Case(space=(19, 23), channels=5, grid=(5, 9), dtype=torch.float64, self_loops=False, order="parallel"),
        Case(space=(1, 90), channels=17, grid=(3, 5), dtype=torch.float16, attention=(6, 3), scale=4.0),
        Case(space=(28, 28), channels=12, batch=1, dtype=torch.bfloat16, weights="x", tail="relu"),
    )
):
    _plans = ("whole", "stages") if _i % 2 else ("stages", "whole")
    for _layout, _plan in zip(("nchw", "nhwc"), _plans, strict=True):
        GUARDED.append((_case.but(layout=_layout, seed=_i), _plan))
GUARDED += [
    (Case(space=(3, 2), channels=1, batch=3, tail="x_relu", seed=7), "stages"),
    (Case(space=(20, 12), channels=10, layout="offset_nchw", dtype=torch.float16, radius=4, seed=8), "stages"),
    (Case(space=(20, 12), channels=10, layout="offset_nhwc", tail="residual", radius=2, seed=9), "whole"),
    (Case(space=(9, 10), channels=7, layout="channel_slice", grid=1, seed=10), "stages"),
    (Case(space=(9, 10), channels=7, layout="column_slice", dy_layout="expanded", grid=(9, 10), seed=11), "stages"),
    # several blocks of channels
    (Case(space=(14, 14), channels=150, radius=2, tail="relu", seed=12), "stages"),
    (Case(space=(7, 7), channels=70, layout="nhwc", radius=9, attention=(2, 1), batch=3, seed=13), "stages"),
    (Case(space=(7, 7), channels=300, layout="nhwc", dtype=torch.bfloat16, seed=14), "whole"),
    (Case(space=(12, 12), channels=70, grid=12, order="parallel", attention=(2, 1), seed=15), "whole"),
    # the graph stage pools
    (
        Case(space=(14, 14), channels=70, layout="nhwc", dtype=torch.bfloat16, radius=3, tail="residual", seed=17),
        "stages",
    ),
    (Case(space=(7, 28), channels=37, dtype=torch.float16, order="parallel", seed=18), "stages"),
    (Case(space=(14, 7), channels=70, batch=1, dtype=torch.float64, seed=19), "stages"),
    # a lattice with launches of its own
    (Case(space=(13, 11), channels=5, layout="nhwc", grid=(13, 11), batch=1, seed=16), "stages"),
]


class Call:
    """One call on dense inputs, as the operators receive it."""

    def __init__(self, case: Case) -> None:
        inputs, dy = cases.make(case)
        self.case = case
        self.x = memory.dense(inputs["x"])
        self.dy = memory.match_strides(dy, self.x)
        residual = inputs.get("residual")
        self.residual = None if residual is None else memory.match_strides(residual, self.x)
        self.weights = inputs["channel_weight"], inputs["spatial_weight"]
        options = Options(**case.options)
        self.relu = options.relu
        self.options = options.grid(*case.space), options.arguments

    def forward(self, family: str) -> tuple[Tensor, Tensor]:
        from steam_kernels.backends.triton import operators

        return operators.forward(Forward(Inputs(self.x, *self.weights, self.residual), True, *self.options), family)

    def backward(self, y: Tensor, saved: Tensor, family: str) -> tuple[Tensor, ...]:
        from steam_kernels.backends.triton import operators

        masked = y if self.relu else None
        needs = True, True, True, self.relu and self.residual is not None
        return operators.backward(
            Backward(self.dy, Inputs(self.x, *self.weights), masked, saved, needs, *self.options), family
        )


def figures(guard: Guard, maps: dict[str, Tensor]) -> dict[str, Any]:
    """The kernels; the reads and writes of each map, in maps, and its use of sectors; the elements moved of others."""
    out: dict[str, Any] = {"kernels": [launch.kernel for launch in guard.launches]}
    for name, t in maps.items():
        moved = guard.traffic(t)
        out[name] = [moved.loaded.bytes / t.nbytes, moved.stored.bytes / t.nbytes]
        used = [side.bytes / (32 * side.sectors) for side in moved if side.bytes]
        out[f"{name} sectors"] = min(used, default=None)
    known = [(t.data_ptr(), t.nbytes) for t in maps.values()]
    others: dict[str, list[int]] = {}
    for launch in guard.launches:
        for name, t in launch.tensors.items():
            if (t.data_ptr(), t.nbytes) not in known:
                found = others.setdefault(name, [t.numel(), 0, 0])
                for i, side in enumerate((launch.loads, launch.stores)):
                    found[1 + i] += side[name].bytes // t.element_size() if name in side else 0
    return out | {"others": others}


def run(call: Call, seed: int | None, family: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Both passes under the guard: the results, and the figures of each pass."""
    from tests.support.triton_guard import Guard

    maps = {"x": call.x} | ({} if call.residual is None or call.residual is call.x else {"residual": call.residual})
    with Guard(seed) as guard:
        y, saved = call.forward(family)
    results = {"y": y, "saved": saved}
    seen = {"forward": figures(guard, maps | {"y": y})}
    unwritten = {name: guard.unwritten(t) for name, t in results.items()}
    with Guard(seed) as guard:
        dx, dchannel, dspatial, dresidual = call.backward(y, saved, family)
    outputs = {"dx": dx, "dchannel_weight": dchannel, "dspatial_weight": dspatial, "dresidual": dresidual}
    outputs = {name: t for name, t in outputs.items() if t.numel()}
    maps = {"x": call.x, "dy": call.dy, "dx": dx} | ({"y": y} if call.relu else {})
    maps |= {"dresidual": dresidual} if dresidual.numel() else {}
    seen["backward"] = figures(guard, maps)
    unwritten |= {name: guard.unwritten(t) for name, t in outputs.items()}
    return results | outputs, seen | {"unwritten": sum(unwritten.values())}


def guarded(wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The row of each guarded case, which runs in every order of programs."""
    from steam_kernels.backends.triton import launch

    small = launch.SMALL
    for case, plan in GUARDED:
        row: dict[str, Any] = {"id": f"{case.id} {plan}"}
        if wanted and not any(part in row["id"] for part in wanted):
            continue
        launch.SMALL = small if plan == "whole" else 0
        try:
            runs = [run(Call(case), seed, "generic") for seed in ORDERS]
            (first, seen), *others = runs
            row |= seen
            row["finite"] = all(bool(t.isfinite().all()) for t in first.values())
            row["equal"] = all(torch.equal(first[k], other[k]) for other, _ in others for k in first)
        except Exception:
            row["error"] = traceback.format_exc()
        yield row


def traffic(wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The row of one sample of each stage.

    The launch table gets a sixteenth of the processors, and so gives the plan of a batch of sixteen.
    """
    from steam_kernels.backends.triton import launch

    generic = launch.FAMILIES["generic"]
    launch.FAMILIES["sixteenth"] = replace(generic, processors=generic.processors // 16)
    for name, stage in STAGES.items():
        for layout in ("nchw", "nhwc"):
            row: dict[str, Any] = {"id": f"{name} {layout}"}
            if wanted and row["id"] not in wanted:
                continue
            space = stage.size, stage.size
            case = Case(space, stage.channels, 1, stage.grid, layout, order=stage.order)
            try:
                row |= run(Call(case), 1, "sixteenth")[1]
                row["plans"] = [
                    [_plan(launch, stage, layout, backward, *batch) for backward in (False, True)]
                    for batch in ((1, "sixteenth"), (16, "generic"))
                ]
            except Exception:
                row["error"] = traceback.format_exc()
            yield row


def _plan(launch: Any, stage: Stage, layout: str, backward: bool, batch: int, family: str) -> list[Any]:
    channels, size, grid, _ = stage
    p = launch.Pass(batch, channels, size, size, grid, grid, 4, layout == "nhwc", backward, family)
    pooling, gating = launch.pool(p), launch.gate(p)
    plan = [launch.is_small(p)]
    for how in (pooling, gating):
        plan += [how and how.options, how and how.steps]
    return plan


def offsets(wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The last programs of each launch on maps of more than 2**31 elements, whose memory is not accessed otherwise."""
    from tests.support.triton_guard import Guard

    for layout in ("nchw", "nhwc"):
        case = Case(space=(300, 400), channels=9, batch=2100, dtype=torch.float16, layout=layout, tail="residual_relu")
        row: dict[str, Any] = {"id": layout}
        if wanted and layout not in wanted:
            continue
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        try:
            call = Call(case.but(space=(9, 8), batch=1))
            call.x, call.dy, call.residual = (
                torch.empty(case.shape, dtype=case.dtype, memory_format=memory_format) for _ in range(3)
            )
            with Guard(last=2) as guard:
                y, saved = call.forward("generic")
                call.backward(y, saved, "generic")
            row["launches"] = [[launch.kernel, launch.highest] for launch in guard.launches]
        except Exception:
            row["error"] = traceback.format_exc()
        yield row


def start(*what: str) -> dict[str, dict[str, Any]]:
    """The output of this file in its own process, by id."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.triton_interpreted", *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the interpreter's process failed:\n{done.stderr[-4000:]}")
    return {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in {"cases": guarded, "traffic": traffic, "offsets": offsets}[sys.argv[1]](sys.argv[2:]):
        print(json.dumps(row), flush=True)
