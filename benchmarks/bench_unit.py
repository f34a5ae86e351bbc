"""The unit and the gates that people use today, at shapes of ResNet-50, MobileNetV2 and a detector: forward (no grad),
backward and forward + backward (autograd).

All contenders and floors of a problem are measured together, in interleaved rounds, when its first test asks;
pytest-benchmark gets each one's own rounds. A contender whose output or gradients are out of bounds has a failing
test, and no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks import core


class Clock:
    """The clock that pytest-benchmark reads: it advances by the recorded time of the round that is being reported, and
    only by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, rounds: list[float]) -> Any:
        """A function to be benchmarked, which takes the recorded time of the next round."""
        left = iter(rounds)

        def take() -> None:
            self.now += next(left)

        return take


CLOCK = Clock()


@dataclass
class Row:
    """A problem's measurement, or for each contender the reason why it has none."""

    problem: core.Problem
    measured: core.Measured = field(default_factory=core.Measured)
    wrong: dict[str, str] = field(default_factory=dict)
    #: By contender, as :func:`benchmarks.core.memory_of`.
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    #: The backend that ran, of those contenders that have one.
    backends: dict[str, str] = field(default_factory=dict)

    def median(self, contender: str, direction: str) -> float | None:
        block = contender if contender.startswith("floor") else _block(contender, direction)
        return self.measured.median(block, direction) if block in self.measured.samples else None

    def share_of_copy(self, direction: str, seconds: float) -> float | None:
        """The ideal traffic's rate over the GPU's own copy bandwidth, measured in this run."""
        if self.problem.device != "cuda":
            return None
        return self.problem.ideal_bytes(direction) / seconds * 1e-9 / core.cuda.copy_gbytes()

    def lines(self) -> list[dict[str, Any]]:
        """Rows of the closing table."""
        out = []
        for contender in core.CONTENDERS:
            for direction, parts in core.DIRECTIONS.items():
                seconds = self.median(contender, direction)
                if seconds is None:
                    continue
                floor = sum(self.measured.median(f"floor-{d}", d) for d in parts)
                others = {name: self.median(name, direction) for name in ("eager", "compiled", "plain-compiled")}
                memory = self.memory.get(contender, {})
                steam = contender.removesuffix("-compiled") not in core.GATES
                out.append(
                    {
                        "problem": self.problem.label,
                        "contender": contender,
                        "direction": direction,
                        "backend": self.backends.get(contender),
                        "shape": self.problem.name,
                        "batch": self.problem.n,
                        "dtype": self.problem.dtype,
                        "layout": self.problem.layout,
                        "map_bytes": self.problem.map_bytes,
                        "parameters": memory.get("parameters"),
                        "extra_bytes": memory.get(direction),
                        "kept_bytes": memory.get("kept_bytes"),
                        "seconds": seconds,
                        "spread": self.measured.spread(_block(contender, direction), direction),
                        "floor_seconds": floor,
                        # The operations of a gate are not counted, those of STEAM are, whoever computes it.
                        "gflops": self.problem.flops(direction) / seconds * 1e-9 if steam else None,
                        "gbytes": self.problem.ideal_bytes(direction) / seconds * 1e-9,
                        "over_floor": seconds / floor,
                        "of_copy": self.share_of_copy(direction, seconds),
                    }
                    | {f"speedup_{k.replace('-', '_')}": v and v / seconds for k, v in others.items()}
                )
        return out


def _block(contender: str, direction: str) -> str:
    return f"{contender} {'forward' if direction == 'forward' else 'training'}"


def measure(problem: core.Problem, names: list[str], effort: core.Effort, backend: str | None = None) -> Row:
    """Judge and measure the contenders of one problem; ``backend`` is the one that "fused" runs on. What spoils all of
    them, a compilation in the measurement among it, is each one's reason: nothing is measured a second time."""
    row = Row(problem)
    try:
        _measure(row, names, effort, backend)
    except Exception as error:
        row.measured = core.Measured()
        row.wrong = dict.fromkeys(names, f"{type(error).__name__}: {error}") | row.wrong
    return row


def _measure(row: Row, names: list[str], effort: core.Effort, backend: str | None) -> None:
    problem = row.problem
    tensors = problem.tensors()
    judge = core.judge(problem, tensors)
    peers = core.peers(judge)
    gates: dict[str, Any] = {}
    blocks = core.floor_blocks(problem, tensors)
    core.forget_compiled()
    for name in names:
        unit = core.fused(backend) if name == "fused" else core.CONTENDERS[name](problem)
        gate = name.removesuffix("-compiled")
        try:
            if gate in core.GATES:
                if gate not in gates:
                    gates[gate] = core.judge_gate(gate, problem, tensors)
                found = gates[gate]
            else:
                found = judge if name in core.OURS else peers
            found.check(core.outputs(unit, problem, tensors), label=name)
            pair = {
                f"{name} forward": core.forward_block(unit, problem, tensors),
                f"{name} training": core.training_block(unit, problem, tensors),
            }
            for block in pair.values():
                block(1)
            if isinstance(unit, core.Compiled):
                unit.warmed()
            if isinstance(unit, core.Fused):
                row.backends[name] = unit.ran
            row.memory[name] = core.memory_of(unit, problem, tensors)
        except Exception as error:  # the contender's own tests fail with it; the others go on
            row.wrong[name] = f"{type(error).__name__}: {error}"
            continue
        blocks |= pair
    del judge, peers, gates
    steady = core.Steady()
    row.measured = core.interleaved(blocks, effort)
    steady.check()


@pytest.mark.benchmark(timer=CLOCK)
def test_unit(
    benchmark: Any,
    problem: core.Problem,
    contender: str,
    direction: str,
    rows: dict[core.Problem, Row],
    request: pytest.FixtureRequest,
) -> None:
    if problem not in rows:
        from benchmarks.conftest import contenders_at

        config = request.config
        effort = core.Effort.quick() if config.getoption("--quick") else core.Effort(seconds=0.25)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            core.say(f"\n  measuring {problem.label}")
        rows[problem] = measure(problem, contenders_at(config, problem), effort, config.getoption("--backend") or None)
    row = rows[problem]
    assert contender not in row.wrong, row.wrong[contender]
    samples = row.measured.rounds(_block(contender, direction), direction)
    benchmark.group = f"{problem.label} {direction}"
    benchmark.extra_info.update(floor=sum(row.measured.median(f"floor-{d}", d) for d in core.DIRECTIONS[direction]))
    benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples), iterations=1)
