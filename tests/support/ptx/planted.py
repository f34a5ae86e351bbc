"""Mistakes planted in emitted PTX, which the executor or the reference must show."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tests.support.ptx.executor import Result


def _offset(found: re.Match[str]) -> str:
    return f"{found[1]}+{int(found[2] or 0) + 16}]"


class Kind(NamedTuple):
    operation: str  # as in Result.executed
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]


KINDS = {
    "barrier": Kind("bar", r"\bbar(?:rier)?\.sync\s+\d+\s*;", ""),
    "mask": Kind("shfl", r"(\bshfl\.sync\.[^;]+),[^,;]+;", r"\1, 65535;"),
    "load": Kind("ld.global", r"(\bld\.global[^;\[]*\[\s*%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", _offset),
    "store": Kind("st.global", r"(\bst\.global[^;\[]*\[\s*%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", _offset),
}


@dataclass(frozen=True)
class Planted:
    """An edit: the instruction with this number, of those of this kind, in one kernel.

    A barrier is removed, a shuffle names half of the warp, and an address is 16 bytes off.
    """

    kernel: str
    kind: str
    index: int = 0

    def __call__(self, kernel: str, ptx: str) -> str:
        if kernel != self.kernel:
            return ptx
        _, pattern, replacement = KINDS[self.kind]
        every = list(re.finditer(pattern, ptx))
        if self.index >= len(every):  # another variant of the kernel, of which this call has several
            return ptx
        found = every[self.index]
        text = replacement(found) if callable(replacement) else found.expand(replacement)
        return ptx[: found.start()] + text + ptx[found.end() :]


def in_executed(results: list[Result], kernel: str) -> dict[str, list[Planted]]:
    """By kind, a mistake in each instruction that a lane has executed in the first launch of a kernel."""
    executed = next(result.executed for result in results if result.kernel == kernel)
    return {
        kind: [Planted(kernel, kind, index) for index, count in enumerate(executed.get(operation, [])) if count]
        for kind, (operation, *_) in KINDS.items()
    }
