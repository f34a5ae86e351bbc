"""Interleaved measurement: rounds of everything that is compared alternate, and medians are taken, so that a drift of
the machine reaches all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

Sample = dict[str, float]  # direction -> seconds per call
Block = Callable[[int], Sample]  # number of calls -> the mean of each direction


def timed(direction: str, call: Callable[[], object], warm: bool = True) -> Block:
    """A block of calls that are timed together. With ``warm`` one untimed call comes first, because the other blocks
    have evicted its data from the caches."""

    def block(calls: int) -> Sample:
        if warm:
            call()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return {direction: (time.perf_counter() - start) / calls}

    return block


def within(context: Callable[[], AbstractContextManager[None]], block: Block) -> Block:
    """``block`` in that context."""

    def run(calls: int) -> Sample:
        with context():
            return block(calls)

    return run


@dataclass(frozen=True)
class Effort:
    """The length of a measurement: ``seconds`` for each block of a comparison, in ``least`` to ``most`` rounds, each of
    at least ``block`` seconds."""

    seconds: float = 0.5
    least: int = 7
    most: int = 60
    block: float = 1e-3

    @staticmethod
    def quick() -> Effort:
        return Effort(seconds=0.05, least=3, most=5, block=2e-4)


@dataclass
class Measured:
    """Samples of every block, round by round."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def median(self, block: str, direction: str) -> float:
        return statistics.median(s[direction] for s in self.samples[block])

    def rounds(self, block: str, direction: str) -> list[float]:
        return [s[direction] for s in self.samples[block]]

    def spread(self, block: str, direction: str) -> float:
        """The distance of the quartiles over the median."""
        values = self.rounds(block, direction)
        if len(values) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / middle


def interleaved(blocks: Mapping[str, Block], effort: Effort) -> Measured:
    """Rounds of all blocks in turn. A slow block runs in fewer rounds than a quick one, evenly spread over the whole
    measurement."""
    calls, rounds = {}, {}
    for name, block in blocks.items():
        block(1)
        once = max(block(1).values())
        calls[name] = max(1, min(1000, math.ceil(effort.block / once)))
        rounds[name] = max(effort.least, min(effort.most, int(effort.seconds / (once * (calls[name] + 1)))))
    measured = Measured({name: [] for name in blocks})
    longest = max(rounds.values(), default=0)
    for i in range(longest):
        for name, block in blocks.items():
            if (i * rounds[name]) // longest != ((i + 1) * rounds[name]) // longest:
                measured.samples[name].append(block(calls[name]))
    return measured
