"""The host's part of the units of a ResNet-50 on a GPU: the first calls, which compile, and the time per later call.

    python -m benchmarks.gpu_host [--quick] [--json PATH]

* *compile*: the first calls of all units, forward and backward, with an empty cache of Triton: the kernels that Triton
  compiled, the seconds, and the time of the processors, which other work on the machine changes less. The import of
  Triton is not included.
* *host*: microseconds per call of a unit in which the host prepares and enqueues the launches, at batch 1.

Without a GPU, a stand-in for Triton's driver (:mod:`benchmarks.stub_driver`) takes the launches of the triton backend.
Its figures are times of this machine's processor. They lack the driver's part of a launch, and every row and table says
so.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import malloc

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # with this variable Triton has no compiler
    malloc.restart()

import torch
from torch import Tensor, nn

from benchmarks import host, runs, stub_driver
from benchmarks.commandline import run_options
from benchmarks.shapes import LAYOUTS
from benchmarks.tables import markdown_table, number, say, table
from benchmarks.timing import Block, Effort, Sample, interleaved
from steam_kernels import FusedSTEAM, available_backends, insert_steam
from steam_kernels.models import steam_sites

Rows = list[dict[str, Any]]
NETWORK, BATCH, IMAGE = "ResNet-50", 32, 224
#: The dtypes and memory formats whose kernels are compiled.
KINDS = (("float32", "nchw"), ("bfloat16", "channels_last"))
#: The most seconds that the first calls of a network's units should take.
TARGET = 10.0
#: By the driver of a row: what its figures mean.
DRIVERS = {
    "stub": (
        "No GPU ran anything for these figures: a stand-in for Triton's driver took the launches, for the target "
        f"sm_{stub_driver.CAPABILITY}. They are times of this machine's processor, and they lack the driver's part: "
        "loading machine code, and the launches themselves."
    ),
    "real": "These figures are of this machine's GPU and its real driver.",
}
COMPILE_HEAD = (
    "units",
    "kernels",
    "first calls",
    "processor time",
    "compilation",
    "of it ptxas or LLVM",
    "slowest kernel",
)


def unit_shapes() -> dict[str, tuple[int, ...]]:
    """By the place of each unit in the network: the shape of its map."""
    import torchvision.models

    found: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"), torch.no_grad():
        model = insert_steam(torchvision.models.resnet50())
        for name, unit in steam_sites(model).items():

            def note(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = tuple(arguments[0].shape)

            unit.register_forward_pre_hook(note)
        model(torch.empty(BATCH, 3, IMAGE, IMAGE))
    return found


class Unit:
    """A unit on one backend, which raises if it cannot run, with a map and the gradient of its output."""

    def __init__(self, shape: Sequence[int], dtype: str, layout: str, backend: str, device: str) -> None:
        def feature_map() -> Tensor:
            empty = torch.empty(*shape, dtype=getattr(torch, dtype), device=device, memory_format=LAYOUTS[layout])
            return empty.fill_(0.5) if device == "cuda" else empty  # on the CPU no kernel reads it

        self.module = FusedSTEAM(shape[1], backend=backend, device=device)
        self.x, self.dy, self.leaf = feature_map(), feature_map(), feature_map().requires_grad_()

    def call(self) -> Tensor:
        return self.module(self.x)

    def recorded(self) -> Tensor:
        return self.module(self.leaf)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.recorded(), [self.leaf, *self.module.parameters()], self.dy)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processor_seconds() -> float:
    """The seconds that processors ran this process and its finished children, ptxas among them."""
    return sum(os.times()[:4])


def compilations() -> list[dict[str, Any]]:
    """A list to which each later compilation of Triton adds its kernel, seconds, and seconds of the last stage."""
    from triton import knobs

    found: list[dict[str, Any]] = []

    def note(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            last = times.lowering_stages[-1][1]
            found.append({"kernel": src.name, "seconds": times.total * 1e-6, "last_stage": last * 1e-6})

    knobs.compilation.listener = note
    return found


def first_calls(shapes: Mapping[str, Sequence[int]], dtype: str, layout: str, device: str) -> dict[str, Any]:
    """The first forward and backward call of each unit of a network on the triton backend.

    Raises:
        RuntimeError: Triton compiled nothing, so that the calls were no first calls, or the interpreter ran.
    """
    units = [Unit(shape, dtype, layout, "triton", device) for shape in shapes.values()]
    compiled = compilations()
    synchronize()
    start, processor = time.perf_counter(), processor_seconds()
    for unit in units:
        unit.both()
    synchronize()
    seconds, processor = time.perf_counter() - start, processor_seconds() - processor
    if not compiled:
        raise RuntimeError("Triton compiled no kernel in the first calls")
    slowest = max(compiled, key=lambda kernel: kernel["seconds"])
    return {
        "section": "compile",
        "dtype": dtype,
        "layout": layout,
        "units": len(units),
        "kernels": len(compiled),
        "first_calls_seconds": seconds,
        "processor_seconds": processor,
        "compile_seconds": sum(kernel["seconds"] for kernel in compiled),
        "last_stage_seconds": sum(kernel["last_stage"] for kernel in compiled),
        "slowest": f"{slowest['kernel']}, {slowest['seconds']:.2f} s",
    }


def host_times(shapes: Mapping[str, Sequence[int]], backend: str, device: str, effort: Effort) -> Rows:
    """Microseconds per call of a unit at each shape with one sample, without a wait for the GPU."""

    def block(column: str, call: Callable[[], object]) -> Block:
        timed = host.block(column, call)

        def run(calls: int) -> Sample:
            synchronize()  # a full queue would let the host wait for the GPU
            return timed(calls)

        return run

    rows: Rows = []
    for shape in dict.fromkeys((1, *shape[1:]) for shape in shapes.values()):
        unit = Unit(shape, *KINDS[0], backend, device)
        calls = dict(zip(host.COLUMNS, (unit.call, unit.recorded, unit.both), strict=True))
        found = interleaved({column: block(column, call) for column, call in calls.items()}, effort)
        row = {"section": "host", "backend": backend, "shape": "x".join(map(str, shape))}
        rows.append(row | {column: found.median(column, "forward") * 1e6 for column in calls})
    return rows


def measure(quick: bool) -> Rows:
    """All rows. Triton's cache must be empty."""
    if torch.cuda.is_available():
        reasons, device, driver = available_backends(), "cuda", "real"
        backends = [name for name in ("triton", "cuda") if not reasons[name]]
        torch.zeros(1, device=device)  # CUDA starts here, and not in the first call
    else:
        stub, backends, device, driver = stub_driver.install(), ["triton"], "cpu", "stub"
    shapes = unit_shapes()
    if quick:
        shapes = dict(list(shapes.items())[-1:])
    rows: Rows = []
    if "triton" in backends:
        rows += [first_calls(shapes, *kind, device) for kind in KINDS[: 1 if quick else None]]
    for backend in backends:
        rows += host_times(shapes, backend, device, Effort.quick() if quick else Effort(seconds=0.3))
    if driver == "stub" and not stub.launches:
        raise RuntimeError("the stand-in for Triton's driver was asked for no launch")
    return [row | {"driver": driver} for row in rows]


def compile_cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    keys = "first_calls_seconds", "processor_seconds", "compile_seconds", "last_stage_seconds"
    seconds = (f"{row[key]:.1f} s" for key in keys)
    return f"{row['units']}, {row['dtype']} {row['layout']}", row["kernels"], *seconds, row["slowest"]


def host_cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    return f"{row['shape']}, {row['backend']}", *(number(row[column]) for column in host.COLUMNS)


def sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...], list[tuple[object, ...]]]]:
    """The tables: a title, the head and the cells of each."""
    first = f"First calls of the units of a {NETWORK}, batch {BATCH}, forward and backward (target: {TARGET:g} s)"
    later = "The host's time in microseconds per call of a unit, float32, NCHW"
    parts = (
        ("compile", first, COMPILE_HEAD, compile_cells),
        ("host", later, ("shape, backend", *host.COLUMNS), host_cells),
    )
    found = [(t, h, [cells(r) for r in rows if r["section"] == name]) for name, t, h, cells in parts]
    return [part for part in found if part[2]]


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the report on a GPU."""
    out = [DRIVERS[driver] for driver in dict.fromkeys(row["driver"] for row in rows)]
    for title, head, cells in sections(rows):
        out += ["", f"{title}:", "", *markdown_table(head, cells)]
    return out


def main() -> None:
    args = run_options("gpu_host", __doc__, "one unit, few rounds")
    facts = runs.begin()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = measure(args.quick)
    for title, head, cells in sections(rows):
        say("\n" + table(f"== {title} ==", head, cells))
    say("\n" + "\n".join(DRIVERS[driver] for driver in dict.fromkeys(row["driver"] for row in rows)))
    runs.write(args.json, "gpu_host", rows, facts, args.quick)


if __name__ == "__main__":
    main()
