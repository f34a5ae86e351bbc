"""The unit and other gates at shapes of ResNet-50, MobileNetV2 and a detector: forward without gradients, backward, and
forward + backward by autograd.

The first test of a shape measures all its contenders and floors together, in interleaved rounds. pytest-benchmark gets
the recorded rounds of each contender. If a contender's output or gradients are out of bounds, its tests fail, and it
has no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks import contenders, cuda, judging, passes
from benchmarks.gates import GATES
from benchmarks.grid import COMPILED, contenders_at
from benchmarks.progress import Progress
from benchmarks.shapes import DEFAULT, DIRECTIONS, Shape
from benchmarks.timing import Effort, Measured, interleaved


class Clock:
    """The clock that pytest-benchmark reads. It advances by the recorded time of the round that is being reported, and
    by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, rounds: list[float]) -> Any:
        """A function for pytest-benchmark; each call takes the recorded time of the next round."""
        left = iter(rounds)

        def take() -> None:
            self.now += next(left)

        return take


CLOCK = Clock()


@dataclass
class Row:
    """The measurement of a shape. A contender without times has a reason in ``wrong``."""

    shape: Shape
    measured: Measured = field(default_factory=Measured)
    wrong: dict[str, str] = field(default_factory=dict)
    #: The result of :func:`benchmarks.passes.memory_of`, by contender.
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    #: The backend that ran, for those contenders that have one.
    backends: dict[str, str] = field(default_factory=dict)
    #: On a GPU, by block: "graph" or "events", and the reason why a block cannot be captured as a graph, or "".
    timed_by: dict[str, tuple[str, str]] = field(default_factory=dict)

    def median(self, contender: str, direction: str) -> float | None:
        block = contender if contender.startswith("floor") else _block(contender, direction)
        return self.measured.median(block, direction) if block in self.measured.samples else None

    def share_of_copy(self, direction: str, seconds: float) -> float | None:
        """The rate of the ideal traffic over the GPU's own copy bandwidth, measured in this run."""
        if self.shape.device != "cuda":
            return None
        return self.shape.ideal_bytes(direction) / seconds * 1e-9 / cuda.copy_gbytes()

    def lines(self) -> list[dict[str, Any]]:
        """Rows of the closing table."""
        out = []
        for contender in contenders.CONTENDERS:
            for direction, parts in DIRECTIONS.items():
                seconds = self.median(contender, direction)
                if seconds is None:
                    continue
                floor = sum(self.measured.median(f"floor-{d}", d) for d in parts)
                others = {name: self.median(name, direction) for name in contenders.BASELINES}
                timed_by, why_not_graph = self.timed_by.get(_block(contender, direction), (None, ""))
                memory = self.memory.get(contender, {})
                steam = contender.removesuffix("-compiled") not in GATES
                out.append(
                    {
                        "problem": self.shape.label,
                        "contender": contender,
                        "direction": direction,
                        "backend": self.backends.get(contender),
                        "shape": self.shape.name,
                        "batch": self.shape.n,
                        "dtype": self.shape.dtype,
                        "layout": self.shape.layout,
                        "default_options": self.shape.options == DEFAULT,
                        "map_bytes": self.shape.map_bytes,
                        "parameters": memory.get("parameters"),
                        "extra_bytes": memory.get(direction),
                        "kept_bytes": memory.get("kept_bytes"),
                        "seconds": seconds,
                        "spread": self.measured.spread(_block(contender, direction), direction),
                        "floor_seconds": floor,
                        # All forms of STEAM have the same count of operations. The other gates have none.
                        "gflops": self.shape.flops(direction) / seconds * 1e-9 if steam else None,
                        "gbytes": self.shape.ideal_bytes(direction) / seconds * 1e-9,
                        "over_floor": seconds / floor,
                        "of_copy": self.share_of_copy(direction, seconds),
                        "timed_by": timed_by,
                        "why_not_graph": why_not_graph,
                    }
                    | {f"speedup_{k.replace('-', '_')}": v and v / seconds for k, v in others.items()}
                )
        return out


def _block(contender: str, direction: str) -> str:
    return f"{contender} {'forward' if direction == 'forward' else 'training'}"


def kind_of(names: list[str]) -> str:
    """The kind of a row for the estimate of the time left. A compilation takes longer than all other work."""
    return "compiled" if any(name in COMPILED for name in names) else "eager"


def measure(
    shape: Shape, names: list[str], effort: Effort, backend: str | None = None, progress: Progress | None = None
) -> Row:
    """Judges and measures the contenders of one shape. ``backend`` is the backend of the contender "fused".

    An error that spoils the whole measurement, for example a compilation during it, becomes the reason of each
    contender. The measurement is not repeated.
    """
    row = Row(shape)
    try:
        _measure(row, names, effort, backend, progress or Progress(()))
    except Exception as error:
        row.measured = Measured()
        row.wrong = dict.fromkeys(names, f"{type(error).__name__}: {error}") | row.wrong
    return row


def _measure(row: Row, names: list[str], effort: Effort, backend: str | None, progress: Progress) -> None:
    shape = row.shape
    tensors = shape.tensors()
    progress.step("computes the float64 results")
    judge = judging.judge(shape, tensors)
    peers = judging.peers(judge)
    gates: dict[str, Any] = {}
    blocks = passes.floor_blocks(shape, tensors)
    contenders.forget_compiled()
    for name in names:
        if name in COMPILED:
            progress.step(f"compiles {name} and checks it", long=True)
        else:
            progress.step(f"checks {name}")
        contender = contenders.Fused(backend) if name == "fused" else contenders.CONTENDERS[name](shape)
        gate = name.removesuffix("-compiled")
        try:
            if gate in GATES:
                if gate not in gates:
                    gates[gate] = judging.judge_gate(gate, shape, tensors)
                found = gates[gate]
            else:
                found = judge if name in contenders.OURS else peers
            found.check(judging.outputs(contender, shape, tensors), label=name)
            pair = {
                f"{name} forward": passes.forward_block(contender, shape, tensors),
                f"{name} training": passes.training_block(contender, shape, tensors),
            }
            for block in pair.values():
                block(1)
            if isinstance(contender, contenders.Compiled):
                contender.warmed()
            if isinstance(contender, contenders.Fused):
                row.backends[name] = contender.ran
            row.memory[name] = passes.memory_of(contender, shape, tensors)
        except Exception as error:  # only this contender's tests fail
            row.wrong[name] = f"{type(error).__name__}: {error}"
            continue
        blocks |= pair
    del judge, peers, gates
    steady = contenders.Steady()
    progress.step("measures all contenders in turn")
    row.measured = interleaved(blocks, effort)
    row.timed_by = {k: (b.timed_by, b.why_not_graph) for k, b in blocks.items() if isinstance(b, cuda.GpuBlock)}
    steady.check()


@pytest.mark.benchmark(timer=CLOCK)
def test_unit(
    benchmark: Any,
    shape: Shape,
    contender: str,
    direction: str,
    rows: dict[Shape, Row],
    progress: Progress,
    pytestconfig: pytest.Config,
) -> None:
    if shape not in rows:
        names = contenders_at(pytestconfig, shape)
        effort = Effort.quick() if pytestconfig.getoption("--quick") else Effort(seconds=0.25)
        with progress.row(f"{shape.label}, {len(names)} contenders", kind_of(names)):
            rows[shape] = measure(shape, names, effort, pytestconfig.getoption("--backend") or None, progress)
    row = rows[shape]
    assert contender not in row.wrong, row.wrong[contender]
    samples = row.measured.rounds(_block(contender, direction), direction)
    benchmark.group = f"{shape.label} {direction}"
    benchmark.extra_info.update(floor=sum(row.measured.median(f"floor-{d}", d) for d in DIRECTIONS[direction]))
    benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples), iterations=1)
