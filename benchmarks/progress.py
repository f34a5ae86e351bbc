"""Progress lines: what a program is at, and about how long is left.

A line is printed when its work starts, and it is not written over, so that it reads the same in a terminal and in a log
file. This module does not import torch: the first line of a program comes before that import, which takes seconds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.tables import say

Row = dict[str, Any]
#: The least seconds between the last line and the line of a short step.
PAUSE = 5.0


def about(seconds: float) -> str:
    """A duration in words: tens of seconds, minutes, or hours and tens of minutes."""
    if seconds < 55:
        return f"about {max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {max(1, minutes)} min"
    hours, minutes = divmod(10 * round(minutes / 10), 60)
    return f"about {hours} h {minutes} min" if minutes else f"about {hours} h"


class Progress:
    """Counts the rows of a run and estimates the time that is left.

    ``kinds`` has the kind of each row, in any order. Rows of one kind should take about the same time. The estimate is
    the median of the durations of a kind times the number of its rows that are left. A kind without a measured row
    counts with the median of all measured rows. There is no estimate before the first row is measured.
    """

    def __init__(
        self,
        kinds: Iterable[Hashable],
        write: Callable[[str], None] = say,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.left = Counter(kinds)
        self.total = sum(self.left.values())
        self.begun = 0
        self.durations: dict[Hashable, list[float]] = {}
        self.write, self.clock = write, clock
        self.said = clock()

    def seconds_left(self) -> float | None:
        """The estimate for the rows that are not finished, or None before a row is measured."""
        measured = [seconds for of_kind in self.durations.values() for seconds in of_kind]
        if not measured:
            return None
        return sum(n * statistics.median(self.durations.get(kind, measured)) for kind, n in self.left.items() if n)

    @contextmanager
    def row(self, name: str, kind: Hashable) -> Iterator[None]:
        """The block is one row. The row is measured if the block ends without an exception."""
        self.begun += 1
        seconds = self.seconds_left()
        self._say(f"[{self.begun}/{self.total}] {name}" + (f"; {about(seconds)} left" if seconds is not None else ""))
        start = self.clock()
        try:
            yield
            self.durations.setdefault(kind, []).append(self.clock() - start)
        finally:
            self.left[kind] -= 1

    def skip(self, kind: Hashable, rows: int) -> None:
        """Rows that need no work, for example because an earlier run finished them. They have no duration."""
        self.begun += rows
        self.left[kind] -= rows

    def step(self, text: str, long: bool = False) -> None:
        """A step of the present row. The line of a step that is not ``long`` is left out soon after another line."""
        if long or self.clock() - self.said >= PAUSE:
            self._say(f"  {text}")

    def _say(self, line: str) -> None:
        self.write(line)
        self.said = self.clock()


def measured(points: Sequence[tuple[str, Hashable, Callable[[], list[Row]]]]) -> tuple[list[Row], list[str]]:
    """The rows of all points, each with its name, its kind and its measurement; and the errors of those points whose
    measurement raised AssertionError, because a result was wrong."""
    progress = Progress(kind for _, kind, _ in points)
    rows: list[Row] = []
    wrong: list[str] = []
    for name, kind, measure in points:
        try:
            with progress.row(name, kind):
                rows += measure()
        except AssertionError as error:
            wrong.append(str(error))
            say(f"  WRONG {error}")
    return rows, wrong
