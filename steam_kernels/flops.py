"""Parameters, FLOPs and bytes of one unit for one sample. The operators' FLOP formulas use the same convention.

An arithmetic operation on one number counts as one FLOP. A pooled element is one add, a gated element one multiply, and
a residual element one add. An exponential, a division and a square root are one FLOP each. Comparisons (ReLU) and data
movement cost nothing. Graphs count in their collapsed form (two numbers per head), which is the form that the kernels
compute. Bytes are the least that any implementation must move. Forward, x is read and y is written. Backward, x and dy
are read and dx is written. The tail adds its own maps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .config import Arguments, check_embed_dim, check_integer, options_of, ring_offsets

#: Options of a layer that do not change the counts.
_WITHOUT_INFLUENCE = ("scale", "inplace", "backend", "identity_init", "device")


class Cost(NamedTuple):
    """One unit for one sample: ``parameters`` (a count), and the FLOPs and bytes of forward and of backward."""

    parameters: int
    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int


def cost(
    channels: int,
    height: int,
    width: int,
    *,
    embed_dim: int = 8,
    residual: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Cost:
    """The cost of a unit on one ``(channels, height, width)`` map [derived]. The module's docstring has the convention.

    Args:
        channels, height, width: C, H and W, each at least 1.
        residual: whether a residual is added.
        dtype: the dtype of the map; the bytes depend on it.
        options: those of :class:`steam_kernels.FusedSTEAM`. Some of them do not change the cost.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.

    Example:
        >>> cost(256, 56, 56).parameters
        64
    """
    for name, size in (("channels", channels), ("height", height), ("width", width)):
        check_integer(name, size)
    known = {k: v for k, v in options.items() if k not in _WITHOUT_INFLUENCE}
    given = options_of("cost", known)
    check_embed_dim(embed_dim, given.num_heads)
    grid = given.grid(height, width)
    map_bytes = channels * height * width * dtype.itemsize
    relu = given.relu
    return Cost(
        parameters=8 * embed_dim,
        flops=forward_flops(channels, height, width, grid, given.arguments, residual),
        bytes=map_bytes * (2 + residual),
        backward_flops=backward_flops(channels, height, width, grid, given.arguments),
        # The backward of a ReLU also reads y. Without a ReLU the residual's gradient is dy itself and costs no bytes.
        backward_bytes=map_bytes * (3 + relu + (relu and residual)),
    )


def edges(channels: int, grid: tuple[int, int], options: Arguments) -> tuple[int, int]:
    """The numbers of directed edges of the ring and of the lattice, with self loops."""
    gh, gw = grid
    lattice = 2 * (gh * (gw - 1) + gw * (gh - 1))
    if options.spatial_neighbors == 8:
        lattice += 4 * (gh - 1) * (gw - 1)
    if options.self_loops or gh * gw == 1:
        lattice += gh * gw
    return channels * len(ring_offsets(channels, options.channel_radius, options.self_loops)), lattice


def forward_flops(
    channels: int, height: int, width: int, grid: tuple[int, int], options: Arguments, residual: bool
) -> int:
    """Forward FLOPs for one sample."""
    pixels, cells = channels * height * width, grid[0] * grid[1]
    # The adds and means of the pooling, then z and u from the means. The combined gate needs one multiply for each
    # channel and cell, and one for each element of x.
    around = pixels + channels * cells + 4 * channels * cells + pixels + channels * cells
    # Each edge and head: a difference, a product, an exponential, an add to the sum of exponentials, a multiply-add.
    # Each node and head: a * t, the division and the origin of the mean, and the multiply-add with b.
    # Each node: the exponential, the add and the division of the sigmoid.
    heads, every_edge = options.num_heads, sum(edges(channels, grid, options))
    graph = every_edge * heads * 6 + (channels + cells) * (heads * 5 + 3)
    return around + graph + (pixels if residual else 0)


def backward_flops(channels: int, height: int, width: int, grid: tuple[int, int], options: Arguments) -> int:
    """Backward FLOPs for one sample, with all gradients."""
    pixels, cells = channels * height * width, grid[0] * grid[1]
    # Each element: the pooling is done again (an add), R takes a multiply-add, and dx takes a multiply and an add of
    # one number per channel and cell.
    around = 5 * pixels
    # Four multiply-adds per channel and cell: d_g_s and d_g_c from R, d_g_c from P, and the numbers added to dx.
    around += 8 * channels * cells
    # Each edge and head: four for alpha as in the forward, one centred difference, three for the variance, and four to
    # gather the gradients of the neighbours.
    # Each node and head: d_m, two products for the node's own token and four for a and b.
    # Each node: the derivative of the sigmoid.
    heads, every_edge = options.num_heads, sum(edges(channels, grid, options))
    graph = every_edge * heads * 12 + (channels + cells) * (heads * 9 + 5)
    return around + graph
