"""The STEAM unit in plain PyTorch: pool, graph transform and gate, in the order of the paper.

Source: *STEAM: Squeeze and Transform Enhanced Attention Module*, arXiv 2412.09023. This module defines the results of
every backend. It runs on any device and in any floating dtype, and can be differentiated twice. Exporters and function
transforms see its operators. Calls that no other backend can run use it. Symbols: ``x`` is ``(N, C, H, W)``, the grid
is ``(gh, gw)``, and ``t`` are the ``(N, n)`` tokens of ``n`` graph nodes.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Inputs, Options, accumulation_dtype, ceil_div, lattice_offsets, options_of
from .layer import Layer
from .memory import check_inplace, dense, match_strides
from .tracing import exporting, factor, looked_into

__all__ = ["STEAM", "gate", "graph_transform", "lattice", "pool", "ring", "steam"]


# ---- cells -----------------------------------------------------------------------------------------------------------


def cell_of(size: int, cells: int, device: torch.device) -> Tensor:
    """``(size,)`` int64: the cell floor(r * cells / size) of each pixel r on one axis."""
    return torch.arange(size, device=device) * cells // size


def cell_bounds(size: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first pixel of each cell on one axis, and one past the last pixel. Each is ``(cells,)`` int64."""
    cell = torch.arange(cells, device=device)
    return ceil_div(cell * size, cells), ceil_div((cell + 1) * size, cells)


def cell_sums(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(N, C, gh, gw)``: the sum of ``x`` over each cell. A NaN or an Inf changes only its own cell."""
    if exporting():
        return _cell_sums_by_matrices(x, grid)
    return _sum_intervals(_sum_intervals(x, 2, grid[0]), 3, grid[1])


def _sum_intervals(x: Tensor, dim: int, cells: int) -> Tensor:
    size = x.shape[dim]
    first, end = cell_bounds(size, cells, x.device)
    pixel = first[:, None] + torch.arange(ceil_div(size, cells), device=x.device)
    shape = [1] * (x.dim() + 1)
    shape[dim], shape[dim + 1] = pixel.shape
    inside = (pixel < end[:, None]).view(shape)
    # Indexing is used, because index_select takes several times as long on the CPU.
    gathered = x[(slice(None),) * dim + (pixel.clamp(max=size - 1).flatten(),)].unflatten(dim, (cells, -1))
    return torch.where(inside, gathered, 0).sum(dim + 1)


def _cell_sums_by_matrices(x: Tensor, grid: tuple[int, int]) -> Tensor:
    matrices = []
    for size, cells in zip(x.shape[2:], grid, strict=True):
        first, end = cell_bounds(size, cells, x.device)
        pixel = torch.arange(size, device=x.device)
        matrices.append(((pixel >= first[:, None]) & (pixel < end[:, None])).to(x.dtype))
    with _without_autocast(x.device.type):
        columns = F.linear(x, matrices[1])
        # The result is made contiguous. Otherwise the order of its symbolic strides would become guards.
        return F.linear(columns.transpose(2, 3), matrices[0]).transpose(2, 3).contiguous()


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def cell_counts(size: tuple[int, int], grid: tuple[int, int], like: Tensor) -> Tensor:
    """``(gh, gw)``: the number of pixels n_ij of each cell, in ``like``'s dtype and on its device."""
    rows, columns = (
        torch.sub(*reversed(cell_bounds(s, g, like.device))).to(like.dtype) for s, g in zip(size, grid, strict=True)
    )
    return rows[:, None] * columns


def pool(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Output Guided Pooling [paper: its name and purpose; ours: this partition].

    Args:
        x: ``(N, C, H, W)`` in the accumulation dtype.
        grid: ``(gh, gw)``, at most ``(H, W)``.

    Returns:
        The means P ``(N, C, gh, gw)`` and the cells' pixel counts n ``(gh, gw)``.
    """
    counts = cell_counts((x.shape[2], x.shape[3]), grid, x)
    return cell_sums(x, grid) / counts, counts


def spread(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """``(N, gh, gw)`` to ``(N, H, W)``: each pixel takes the value of its cell."""
    rows = cell_of(size[0], cells.shape[-2], cells.device)
    columns = cell_of(size[1], cells.shape[-1], cells.device)
    return cells.index_select(-2, rows).index_select(-1, columns)


# ---- graphs ----------------------------------------------------------------------------------------------------------

#: The indices of the neighbours ``(n, K)``, and a mask of the ones that count ``(n, K)``. A node without neighbours
#: attends to itself. The functions below use sizes only in tensor operations: a Python condition on a size would be
#: fixed in an exported graph, also for other sizes.
Graph = tuple[Tensor, Tensor]


def ring(channels: int, radius: int, self_loops: bool, device: torch.device) -> Graph:
    """The channel graph: each channel is joined to the channels within ``radius``, modulo ``channels`` [ours]."""
    offsets = torch.arange(-radius, radius + 1, device=device)
    # In a small ring several offsets may lead to the same node, which counts once. Some may lead to the channel itself.
    residues = offsets % channels
    first = ~((residues[:, None] == residues) & (offsets[:, None] > offsets)).any(1)
    inside = first if self_loops else first & (residues > 0)
    inside = inside | (first & ~inside.any())
    return (torch.arange(channels, device=device)[:, None] + offsets) % channels, inside.expand(channels, -1)


def lattice(grid: tuple[int, int], neighbors: int, self_loops: bool, device: torch.device) -> Graph:
    """The spatial graph: each cell is joined to its 4 or 8 bounded neighbours [second-hand: a few; ours: four]."""
    gh, gw = grid
    down, right = torch.tensor(lattice_offsets(neighbors), device=device).unbind(1)
    # Rows and columns are separate axes, because ONNX's exporter cannot translate a division by a symbolic gw.
    i, j = torch.arange(gh, device=device)[:, None, None], torch.arange(gw, device=device)[:, None]
    row, column, cell = i + down, j + right, i * gw + j
    inside = ((row >= 0) & (row < gh)) & ((column >= 0) & (column < gw))
    alone = ~inside.any(-1, keepdim=True)
    index = torch.cat((torch.where(inside, row * gw + column, cell), cell), -1)
    inside = torch.cat((inside, torch.ones_like(alone) if self_loops else alone), -1)
    return index.flatten(0, 1), inside.flatten(0, 1)


def graph_transform(t: Tensor, weight: Tensor, num_heads: int, graph: Graph) -> Tensor:
    """Multi-head attention of scalar tokens over a sparse graph [paper: multi-head graph transformer].

        score_ij = <w_q t_i, w_k t_j> / sqrt(d_h),  m_i = sum_j softmax_j(score_ij) w_v t_j,  o_i = sum_heads <w_o, m_i>

    Args:
        t: tokens ``(N, n)``.
        weight: query, key, value and output rows ``(4, d)``, in ``t``'s dtype.
        num_heads: h, which divides d. Head k has the columns from k d_h to (k + 1) d_h.
        graph: from :func:`ring` or :func:`lattice`.

    Returns:
        The pre-activations o ``(N, n)``.
    """
    w_v, w_o = weight.view(4, num_heads, -1)[2:].unbind(0)  # (h, d_h) each
    alpha, origin, delta, scale = attention(t, weight, num_heads, graph)
    # The mean is taken about an origin, so the softmax multiplies only differences of tokens, forward and backward.
    mean = origin[..., None] * w_v + (alpha[..., None] * (delta[..., None] * w_v)).sum(2)  # (N, n, h, d_h)
    # The scale multiplies w_o first. The gradient of o times the scale could overflow, and Inf times a zero w_o is NaN.
    return (mean * (w_o * scale[..., None, None])).sum((-2, -1))


def attention(t: Tensor, weight: Tensor, num_heads: int, graph: Graph) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attention weights of each node, and the tokens of its neighbours in units of a scale.

    Returns:
        The weights alpha ``(N, n, K, h)``, origin ``(N, n, h)``, delta ``(N, n, K, h)`` and scale ``(N, n)``. The
        tokens of the neighbours are (origin + delta) * scale. Each neighbourhood has a power of two as its scale. The
        origin is the token of the neighbour with the largest score. The softmax and the mean do not depend on the
        choice of the origin, so no gradient flows through it.
    """
    neighbors, inside = graph
    w_q, w_k = weight.view(4, num_heads, -1)[:2].unbind(0)
    t_j = t[:, neighbors]  # (N, n, K)
    largest = t_j.detach().masked_fill(~inside, -math.inf).amax(-1)  # (N, n)
    smallest = t_j.detach().masked_fill(~inside, math.inf).amin(-1)
    scale, own = scale_of(torch.maximum(largest, -smallest)), scale_of(t.detach().abs())
    rises = ((w_q * w_k).sum(-1) * t[..., None] > 0).detach()  # (N, n, h): whether the score grows with t_j
    origin = torch.where(rises, (largest / scale)[..., None], (smallest / scale)[..., None])
    delta = (t_j / scale[..., None])[..., None] - origin[:, :, None]
    delta = delta.masked_fill(~inside[..., None], 0)
    query, key = (t / own)[..., None, None] * w_q, delta[..., None] * w_k
    score = (query[:, :, None] * key).sum(-1) / factor(math.sqrt(w_q.shape[1]), key)
    # The score is multiplied by the scales after its sum. The terms of the sum may have both signs, so terms that
    # overflow could give Inf - Inf. The sum has one sign and may overflow.
    score = score * own[..., None, None] * scale[..., None, None]
    return torch.softmax(score.masked_fill(~inside[..., None], -math.inf), 2), origin, delta, scale


def scale_of(size: Tensor) -> Tensor:
    """The power of two by which numbers of this size are divided, so that a product of two of them does not overflow.

    The power is 1 for sizes up to 2^48 (2^384 in float64), and 2^80 (2^640) for larger sizes. After the division,
    larger numbers are between 2^-32 and 2^48, and their differences are no smaller than 2^-56.
    """
    bits = math.frexp(torch.finfo(size.dtype).max)[1]  # 128, or 1024
    large = torch.full_like(size, 2.0 ** (bits * 5 // 8))
    return torch.where(size > torch.full_like(size, 2.0 ** (bits * 3 // 8)), large, torch.ones_like(size))


def sigmoid(o: Tensor) -> Tensor:
    """The logistic function. Autograd's derivative is sigma(o) sigma(-o), which is precise where sigma saturates."""
    e = torch.exp(torch.where(o >= 0, -o, o))
    return torch.where(o >= 0, 1, e) / (1 + e)


# ---- the unit --------------------------------------------------------------------------------------------------------


def widen(inputs: Inputs) -> Inputs:
    """The inputs with x and both weights in the accumulation dtype."""
    dtype = accumulation_dtype(inputs.x.dtype)
    x, channel_weight, spatial_weight, residual = inputs
    return Inputs(x.to(dtype), channel_weight.to(dtype), spatial_weight.to(dtype), residual)


def tokens(inputs: Inputs, options: Options, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens and pre-activations z, o_c ``(N, C)`` and u, o_s ``(N, gh * gw)`` of :func:`widen`'s inputs."""
    x, channel_weight, spatial_weight, _ = inputs
    _, channels, height, width = x.shape
    pooled, counts = pool(x, grid)
    z = (pooled * counts).sum((2, 3)) / (height * width)
    o_c = graph_transform(
        z, channel_weight, options.num_heads, ring(channels, options.channel_radius, options.self_loops, x.device)
    )
    weighted = sigmoid(o_c)[:, :, None, None] * pooled if options.sequential else pooled
    u = (weighted.sum(1) / channels).flatten(1)
    o_s = graph_transform(
        u, spatial_weight, options.num_heads, lattice(grid, options.spatial_neighbors, options.self_loops, x.device)
    )
    return z, o_c, u, o_s


def gate(x: Tensor, g_c: Tensor, g_s: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """``scale * x * g_c * g_s``, with g_s of each pixel's cell [second-hand: sigmoid gating; ours: nearest cell].

    Args:
        x: ``(N, C, H, W)``, in the accumulation dtype like both gates.
        g_c: ``(N, C)``, the channel gate.
        g_s: ``(N, gh, gw)``, the spatial gate.
        scale: a factor of the gates.
    """
    return x * ((factor(scale, g_c) * g_c)[:, :, None, None] * spread(g_s, (x.shape[2], x.shape[3]))[:, None])


def maps(inputs: Inputs, options: Options, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The channel gate ``(N, C)`` and the spatial gate ``(N, gh, gw)``, in the accumulation dtype."""
    _, o_c, _, o_s = tokens(widen(inputs), options, grid)
    # view is used: ONNX's legacy exporter has unflatten only from opset 13 on, and makes its result's shape a constant.
    return sigmoid(o_c), sigmoid(o_s).view(inputs.x.shape[0], *grid)


def evaluate(inputs: Inputs, options: Options, grid: tuple[int, int], scale: Tensor | None = None) -> Tensor:
    """The unit on checked arguments, differentiable and out of place.

    ``scale``, if given, is a tensor of 0 dimensions that replaces the scale of the options.
    """
    wide = widen(inputs)
    y = gate(wide.x, *maps(wide, options, grid), options.scale if scale is None else scale)
    return finish(y, inputs.residual, options.relu, inputs.x.dtype)


def finish(y: Tensor, residual: Tensor | None, relu: bool, dtype: torch.dtype) -> Tensor:
    """The tail [ours]. ``y`` is rounded once, from the accumulation dtype to ``dtype``."""
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = y.to(dtype)
    # The ReLU comes after the rounding. This does not change y, but autograd then makes the mask from the returned y.
    return torch.relu(y) if relu else y


def forward(inputs: Inputs, options: Options, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """y of :func:`evaluate`, and ``saved`` for :func:`backward`: ``(N, 2 (C + gh gw))``, rows [z | o_c | u | o_s]."""
    wide = widen(inputs)
    z, o_c, u, o_s = tokens(wide, options, grid)
    y = gate(wide.x, sigmoid(o_c), sigmoid(o_s).view(wide.x.shape[0], *grid), options.scale)
    return finish(y, inputs.residual, options.relu, inputs.x.dtype), torch.cat((z, o_c, u, o_s), 1)


def backward(
    dy: Tensor, inputs: Inputs, saved: Tensor, options: Options, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of both weights in closed form [derived], in the accumulation dtype.

    Args:
        dy: ``(N, C, H, W)``, already masked if the options have a ReLU.
        saved: from :func:`forward`.
    """
    x, channel_weight, spatial_weight, _ = widen(inputs)
    dy = dy.to(x.dtype)
    samples, channels, height, width = x.shape
    cells = grid[0] * grid[1]
    z, o_c, u, o_s = saved.split((channels, channels, cells, cells), 1)
    g_c, g_s = torch.sigmoid(o_c), torch.sigmoid(o_s)
    products = cell_sums(dy * x, grid).flatten(2)  # R, (N, C, gh gw)
    pooled, counts = pool(x, grid)

    d_o_s = options.scale * (g_c[:, :, None] * products).sum(1) * g_s * torch.sigmoid(-o_s)
    graph = lattice(grid, options.spatial_neighbors, options.self_loops, x.device)
    d_u, d_spatial = _graph_backward(d_o_s, u, spatial_weight, options.num_heads, graph)

    d_g_c = options.scale * (g_s[:, None] * products).sum(2)
    if options.sequential:
        d_g_c = d_g_c + (d_u[:, None] * pooled.flatten(2)).sum(2) / channels
    d_o_c = d_g_c * g_c * torch.sigmoid(-o_c)
    graph = ring(channels, options.channel_radius, options.self_loops, x.device)
    d_z, d_channel = _graph_backward(d_o_c, z, channel_weight, options.num_heads, graph)

    share = spread(d_u.view(samples, *grid) / (channels * counts), (height, width))[:, None]
    if options.sequential:
        share = share * g_c[:, :, None, None]
    d_x = gate(dy, g_c, g_s.view(samples, *grid), options.scale) + share + d_z[:, :, None, None] / (height * width)
    return d_x, d_channel, d_spatial


def _graph_backward(d_o: Tensor, t: Tensor, weight: Tensor, num_heads: int, graph: Graph) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`graph_transform`'s tokens ``(N, n)`` and weight ``(4, d)``, from the gradient of o."""
    neighbors, inside = graph
    w_q, w_k, w_v, w_o = weight.view(4, num_heads, -1).unbind(0)
    root = math.sqrt(w_q.shape[1])
    a, b = (w_q * w_k).sum(1) / root, (w_v * w_o).sum(1)
    alpha, origin, delta, scale = attention(t, weight, num_heads, graph)
    scale, own = scale[..., None], scale_of(t.abs())[..., None]
    token = t[..., None] / own
    shift = (alpha * delta).sum(2)
    spread_j = delta - shift[:, :, None]  # t_j - m_i, in units of the scale
    # From here on a product begins with the factors that may be zero and ends with the factors that may be large. Large
    # factors alone could overflow to Inf, and 0 * Inf is NaN.
    weighted = alpha * spread_j
    variance = (weighted * spread_j).sum(2)
    d_m = b * d_o[..., None]  # (N, n, h)
    tilt = weighted * (a * token)[:, :, None] * own[:, :, None] * scale[:, :, None]
    through = (d_m[:, :, None] * (alpha + tilt)).masked_fill(~inside[..., None], 0)
    d_t = (d_m * a * variance * scale * scale).sum(2)
    d_t = d_t.index_add(1, neighbors.flatten(), through.sum(3).flatten(1))
    d_a = (d_m * token * variance * own * scale * scale).sum((0, 1))[:, None] / root
    d_b = (d_o[..., None] * (origin + shift) * scale).sum((0, 1))[:, None]
    return d_t, torch.stack((d_a * w_k, d_a * w_q, d_b * w_o, d_b * w_v)).flatten(1)


def steam(
    x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None = None, **options: Any
) -> Tensor:
    """:func:`steam_kernels.steam` in plain PyTorch, with the same arguments and errors. ``backend`` is only checked."""
    tensor = None
    if isinstance(options.get("scale"), Tensor) and looked_into():
        tensor = options.pop("scale")
    return run(Inputs(x, channel_weight, spatial_weight, residual), options_of("steam", options), tensor)


def run(inputs: Inputs, options: Options, scale: Tensor | None = None) -> Tensor:
    """:func:`steam` with checked options. ``scale``, if given, replaces the scale of the options."""
    return compute(inputs, options, options.check(inputs), scale)


def compute(inputs: Inputs, options: Options, grid: tuple[int, int], scale: Tensor | None = None) -> Tensor:
    """:func:`evaluate`, with y in the strides of a dense x, or written into x if the options are in place."""
    if options.inplace:
        check_inplace(*inputs)
        return inputs.x.copy_(evaluate(inputs, options, grid, scale))
    y = evaluate(inputs, options, grid, scale)
    if exporting() or torch._C._are_functorch_transforms_active():
        return y
    return match_strides(y, dense(inputs.x))


class STEAM(Layer):
    """:class:`steam_kernels.FusedSTEAM` in plain PyTorch, with the same constructor and the same state_dict."""

    _run = staticmethod(run)
