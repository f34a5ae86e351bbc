"""Mistakes planted in emitted PTX, which the executor or the reference must show."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


def _offset(found: re.Match[str]) -> str:
    return f"{found[1]}+{int(found[2] or 0) + 16}]"


#: Kind -> the instruction, and what stands in its place.
KINDS: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "barrier": (r"\bbar(?:rier)?\.sync\s+\d+\s*;", ""),
    "mask": (r"(\bshfl\.sync\.[^;]+),[^,;]+;", r"\1, 65535;"),
    "distance": (r"(\bshfl\.sync\.bfly\.b32[^,]+,[^,]+),[^,]+,", r"\1, 3,"),
    "load": (r"(\bld\.global[^;\[]*\[\s*%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", _offset),
    "store": (r"(\bst\.global[^;\[]*\[\s*%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", _offset),
}


@dataclass(frozen=True)
class Planted:
    """An edit: the instruction with this number, of those of this kind, in one kernel.

    A barrier is removed, a shuffle names half of the warp or takes another lane's number, an address is 16 bytes off.
    """

    kernel: str
    kind: str
    index: int = 0

    def __call__(self, kernel: str, ptx: str) -> str:
        if kernel != self.kernel:
            return ptx
        pattern, replacement = KINDS[self.kind]
        found = list(re.finditer(pattern, ptx))[self.index]
        text = replacement(found) if callable(replacement) else found.expand(replacement)
        return ptx[: found.start()] + text + ptx[found.end() :]
