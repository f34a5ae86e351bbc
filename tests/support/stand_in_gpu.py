"""A stand-in for the parts of ``torch.cuda`` that time calls: events, streams and graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch


class Gpu:
    """Stands in for ``torch.cuda``: a log of what is enqueued, and a clock that each entry advances by one second.

    The graphs whose calls contain ``refused`` cannot be captured. Calls log themselves by :meth:`enqueue`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: str = "") -> None:
        self.log: list[str] = []
        self.capturing: list[str] | None = None
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = -1

            def record(self) -> None:
                gpu.enqueue("mark")
                self.at = len(gpu.log)

            def elapsed_time(self, end: Event) -> float:
                return 1000.0 * (end.at - self.at)  # ms

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls: list[str] = []

            def pool(self) -> CUDAGraph:
                return self

            def replay(self) -> None:
                gpu.log.extend(f"replayed {call}" for call in self.calls)

        @contextlib.contextmanager
        def graph(into: CUDAGraph, pool: CUDAGraph | None = None) -> Iterator[None]:
            gpu.capturing = into.calls
            gpu.log.append(f"capture{' with the memory of the first' if pool else ''}")
            yield
            gpu.capturing = None
            if refused in into.calls:
                raise RuntimeError(f"{refused} cannot be captured\nand more")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.log.append("wait"))

    def enqueue(self, what: str) -> None:
        (self.log if self.capturing is None else self.capturing).append(what)
