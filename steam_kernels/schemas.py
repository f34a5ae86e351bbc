"""The schemas of the operators, and their arguments by name.

Every schema ends with the grid and :class:`~steam_kernels.config.Arguments`. This module and ``csrc/common/bindings.h``
know the order of the other arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .config import Arguments, Inputs

_OPTIONS = (
    "SymInt[2] grid, int num_heads, int channel_radius, int spatial_neighbors, bool self_loops, bool sequential, "
    "float scale, bool relu"
)
#: By the operator's name without a prefix.
SCHEMAS = {
    "forward": "(Tensor x, Tensor channel_weight, Tensor spatial_weight, Tensor? residual, bool save, "
    f"{_OPTIONS}) -> (Tensor y, Tensor saved)",
    "backward": "(Tensor dy, Tensor x, Tensor? y, Tensor channel_weight, Tensor spatial_weight, Tensor saved, "
    f"bool[4] needs, {_OPTIONS}) -> (Tensor dx, Tensor dchannel_weight, Tensor dspatial_weight, Tensor dresidual)",
    "forward_": f"(Tensor(a!) x, Tensor channel_weight, Tensor spatial_weight, Tensor? residual, {_OPTIONS}) -> ()",
}


class Forward(NamedTuple):
    """The arguments of ``forward`` and ``forward_``."""

    inputs: Inputs
    save: bool
    grid: tuple[int, int]
    arguments: Arguments

    @staticmethod
    def of(*args: Any) -> Forward:
        """From the arguments of ``forward`` in the order of its schema."""
        *inputs, save, grid = args[:6]
        return Forward(Inputs(*inputs), save, (grid[0], grid[1]), Arguments(*args[6:]))

    @staticmethod
    def of_in_place(*args: Any) -> Forward:
        """From the arguments of ``forward_`` in the order of its schema."""
        *inputs, grid = args[:5]
        return Forward(Inputs(*inputs), False, (grid[0], grid[1]), Arguments(*args[5:]))


class Backward(NamedTuple):
    """The arguments of ``backward``. The inputs have no residual, since no gradient depends on it."""

    dy: Tensor
    inputs: Inputs
    y: Tensor | None
    saved: Tensor
    needs: Sequence[bool]
    grid: tuple[int, int]
    arguments: Arguments

    @staticmethod
    def of(*args: Any) -> Backward:
        """From the arguments of ``backward`` in the order of its schema."""
        dy, x, y, channel_weight, spatial_weight, saved, needs, grid = args[:8]
        inputs = Inputs(x, channel_weight, spatial_weight)
        return Backward(dy, inputs, y, saved, needs, (grid[0], grid[1]), Arguments(*args[8:]))
