"""Parameters, FLOPs and bytes of one unit at a shape, by the one convention that the operators' FLOP formulas share.

Counted per sample, one per arithmetic operation on one number: each pooled element one add, each gated element one
multiply, each residual element one add; comparisons (ReLU) and data movement none; an exponential, a division and a
square root one each. Graphs count by their collapsed form (two numbers a head), the one that the kernels compute. Bytes
are the least that any implementation must move: x in and y out forwards, x and dy in and dx out backwards, and the
tail's share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .config import Arguments, Options, check_embed_dim, check_integer, ring_offsets


class Cost(NamedTuple):
    """One unit for one sample: ``parameters`` (a count), ``flops`` and ``bytes`` forwards, and the same backwards."""

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
    num_heads: int = 4,
    grid_size: int | tuple[int, int] | None = None,
    window: int | None = None,
    channel_radius: int = 1,
    spatial_neighbors: int = 4,
    self_loops: bool = True,
    order: str = "sequential",
    activation: str | None = None,
    residual: bool = False,
    dtype: torch.dtype = torch.float32,
    **unit: Any,
) -> Cost:
    """The cost of a unit on one ``(channels, height, width)`` map [derived]; the convention is the module's.

    Args:
        channels, height, width: C, H and W, at least 1 each.
        residual: whether a residual is added.
        dtype: of the map, for the bytes.
        unit: the options of :class:`steam_kernels.FusedSTEAM`, those without influence included.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> cost(256, 56, 56).parameters
        64
    """
    for name, size in (("channels", channels), ("height", height), ("width", width)):
        check_integer(name, size)
    unknown = unit.keys() - {"scale", "inplace", "backend", "identity_init", "device"}
    if unknown:
        raise TypeError(f"cost() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    given = Options(
        num_heads=num_heads,
        grid_size=grid_size,
        window=window,
        channel_radius=channel_radius,
        spatial_neighbors=spatial_neighbors,
        self_loops=self_loops,
        order=order,
        activation=activation,
    )
    check_embed_dim(embed_dim, num_heads)
    grid = given.grid(height, width)
    map_bytes = channels * height * width * dtype.itemsize
    relu = given.relu
    return Cost(
        parameters=8 * embed_dim,
        flops=forward_flops(channels, height, width, grid, given.arguments, residual),
        bytes=map_bytes * (2 + residual),
        backward_flops=backward_flops(channels, height, width, grid, given.arguments),
        # A ReLU's backward reads y; the residual's gradient is dy itself unless the ReLU masked it.
        backward_bytes=map_bytes * (3 + relu + (relu and residual)),
    )


def edges(channels: int, grid: tuple[int, int], options: Arguments) -> tuple[int, int]:
    """Directed edges of the ring and of the lattice, self loops included."""
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
    # pool's adds and means; z and u from the means; one multiply for the combined gate's two factors, one for x.
    around = pixels + channels * cells + 4 * channels * cells + pixels + channels * cells
    # An edge and head: a difference, a product, exp, the sum of exps, and a multiply-add. A node and head: a t, the
    # mean's division and origin, and b's multiply-add. A node: its sigmoid's exp, add and division.
    heads, every_edge = options.num_heads, sum(edges(channels, grid, options))
    graph = every_edge * heads * 6 + (channels + cells) * (heads * 5 + 3)
    return around + graph + (pixels if residual else 0)


def backward_flops(channels: int, height: int, width: int, grid: tuple[int, int], options: Arguments) -> int:
    """Backward FLOPs for one sample, all gradients asked for."""
    pixels, cells = channels * height * width, grid[0] * grid[1]
    # P again (an add), R (a multiply-add), and dx (a multiply and an add of one number per channel and cell), per
    # element.
    around = 5 * pixels
    # d_g_s and d_g_c from R, d_g_c from P, and the added numbers themselves: a multiply-add per channel and cell each.
    around += 8 * channels * cells
    # An edge and head: the forward's four for alpha, the centred difference, the variance's three, and the gather's
    # four.
    # A node and head: d_m, two products for its own token and four for a and b. A node: the derivative of its sigmoid.
    heads, every_edge = options.num_heads, sum(edges(channels, grid, options))
    graph = every_edge * heads * 12 + (channels + cells) * (heads * 9 + 5)
    return around + graph
