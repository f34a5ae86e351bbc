"""The loop oracle: one STEAM unit in float64, as loops over samples, pixels, nodes, neighbours and heads.

The oracle shares no code with ``steam_kernels``. It computes the naive multi-head form: query, key and value vectors of
width d for every node, and a softmax over an explicit list of neighbours. The kernels never compute this form.
Gradients come from autograd in float64. The oracle is slow and meant for small shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["cell_of", "gates", "gradients", "lattice_neighbors", "resolve_grid", "ring_neighbors", "unit"]


def resolve_grid(
    height: int, width: int, grid_size: int | tuple[int, int] | None, window: int | None
) -> tuple[int, int]:
    """The grid (gh, gw) of a map: 7 by default, never finer than the map, or one cell per window."""
    if window is not None:
        return min(-(-height // window), height), min(-(-width // window), width)
    if grid_size is None:
        grid_size = 7
    gh, gw = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    return min(gh, height), min(gw, width)


def cell_of(r: int, q: int, height: int, width: int, gh: int, gw: int) -> int:
    """The cell of pixel (r, q), row-major."""
    return (r * gh // height) * gw + q * gw // width


def ring_neighbors(nodes: int, radius: int, self_loops: bool) -> list[list[int]]:
    """For each channel: the other channels at a ring distance of 1..radius, and itself with self loops or if alone."""
    lists = []
    for i in range(nodes):
        near = [j for j in range(nodes) if j != i and min((i - j) % nodes, (j - i) % nodes) <= radius]
        if self_loops or not near:
            near.append(i)
        lists.append(near)
    return lists


def lattice_neighbors(gh: int, gw: int, neighbors: int, self_loops: bool) -> list[list[int]]:
    """For each cell: the 4 or 8 cells around it that exist, and itself with self loops or if alone."""
    lists = []
    for i in range(gh):
        for j in range(gw):
            near = []
            for k in range(gh):
                for m in range(gw):
                    di, dj = abs(i - k), abs(j - m)
                    if (di + dj == 1) if neighbors == 4 else (max(di, dj) == 1):
                        near.append(k * gw + m)
            if self_loops or not near:
                near.append(i * gw + j)
            lists.append(near)
    return lists


def transform(t: Tensor, neighborhoods: list[list[int]], weight: Tensor, heads: int) -> Tensor:
    """The pre-activations (n,) of the multi-head graph transform of node scalars ``t`` (n,) by ``weight`` (4, d)."""
    d = weight.shape[1]
    width = d // heads
    nodes = t.unbind(0)
    per_head = []
    for k in range(heads):
        per_head.append([weight[row, k * width : (k + 1) * width] for row in range(4)])
    out = []
    for i, near in enumerate(neighborhoods):
        o_i = t.new_zeros(())
        for w_q, w_k, w_v, w_o in per_head:
            query = w_q * nodes[i]
            scores = [torch.dot(query, w_k * nodes[j]) / math.sqrt(width) for j in near]
            # Subtracting the largest score keeps exp in range and does not change the softmax.
            top = max(s.item() for s in scores)
            powers = [torch.exp(s - top) for s in scores]
            total = sum(powers[1:], start=powers[0])
            message = torch.zeros_like(w_v)
            for p, j in zip(powers, near, strict=True):
                message = message + (p / total) * (w_v * nodes[j])
            o_i = o_i + torch.dot(w_o, message)
        out.append(o_i)
    return torch.stack(out)


def _sigmoid(o: Tensor) -> Tensor:
    return torch.sigmoid(o)


DEFAULTS: dict[str, Any] = {
    "num_heads": 4,
    "grid_size": None,
    "window": None,
    "channel_radius": 1,
    "spatial_neighbors": 4,
}
DEFAULTS |= {"self_loops": True, "order": "sequential"}


def gates(
    sample: Tensor, channel_weight: Tensor, spatial_weight: Tensor, **options: Any
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The channel gate (C,), the spatial gate (gh * gw,) and the grid of one sample (C, H, W)."""
    assert options.keys() <= DEFAULTS.keys(), options
    num_heads, grid_size, window, channel_radius, spatial_neighbors, self_loops, order = (DEFAULTS | options).values()
    channels, height, width = sample.shape
    gh, gw = resolve_grid(height, width, grid_size, window)
    members: list[list[Tensor]] = [[] for _ in range(gh * gw)]
    for r in range(height):
        for q in range(width):
            members[cell_of(r, q, height, width, gh, gw)].append(sample[:, r, q])
    cells = torch.stack([torch.stack(pixels).mean(0) for pixels in members], dim=1)
    counts = [len(pixels) for pixels in members]
    z = sum(n * cells[:, ij] for ij, n in enumerate(counts)) / (height * width)
    g_c = _sigmoid(transform(z, ring_neighbors(channels, channel_radius, self_loops), channel_weight, num_heads))
    if order == "sequential":
        u = torch.stack([(g_c * cells[:, ij]).sum() / channels for ij in range(gh * gw)])
    else:
        u = torch.stack([cells[:, ij].sum() / channels for ij in range(gh * gw)])
    near = lattice_neighbors(gh, gw, spatial_neighbors, self_loops)
    g_s = _sigmoid(transform(u, near, spatial_weight, num_heads))
    return g_c, g_s, (gh, gw)


def unit(
    x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None = None, **options: Any
) -> Tensor:
    """The unit's output (N, C, H, W) in float64. The arguments are those of ``steam_kernels.steam``."""
    scale, activation = options.pop("scale", 1.0), options.pop("activation", None)
    x, channel_weight, spatial_weight = (v.to(torch.float64) for v in (x, channel_weight, spatial_weight))
    _, channels, height, width = x.shape
    out = []
    for n in range(x.shape[0]):
        g_c, g_s, (gh, gw) = gates(x[n], channel_weight, spatial_weight, **options)
        rows = []
        for r in range(height):
            row = [g_s[cell_of(r, q, height, width, gh, gw)] for q in range(width)]
            rows.append(torch.stack(row))
        out.append(scale * x[n] * g_c.reshape(channels, 1, 1) * torch.stack(rows))
    y = torch.stack(out) if out else x * 1.0
    if residual is not None:
        y = y + residual.to(torch.float64)
    if activation == "relu":
        y = torch.where(y > 0, y, torch.zeros_like(y))
    return y


def gradients(
    dy: Tensor,
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of ``(dy * y).sum()`` by name, in float64."""
    given = {"x": x, "channel_weight": channel_weight, "spatial_weight": spatial_weight}
    if residual is not None:
        given["residual"] = residual
    leaves = {k: v.detach().to(torch.float64, copy=True).requires_grad_() for k, v in given.items()}
    y = unit(**leaves, **options)  # type: ignore[arg-type]
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(torch.float64), allow_unused=True)
    return y.detach(), {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(leaves, found, strict=True)}
