"""The honest baseline: the fastest form of the unit in plain PyTorch that we could write, eager or for
``torch.compile``.

It computes the same function as ``steam_kernels.reference``, rearranged for speed:

* The heads are collapsed. The 4d parameters act through a_k = <q_k, k_k>/sqrt(d_h) and b_k = <v_k, o_k>, so that no
  d-wide vector is formed.
* Neighbours are shifted slices of a padded array, not gathers. The softmax over them is written out, elementwise over
  nodes, so that it vectorises over channels and fuses.
* If cells are single pixels, the pooled map is the map itself. In NCHW, column sums come first (contiguous,
  vectorised), then sums within rows. In channels_last, pooling is ``adaptive_avg_pool2d``.
* Both gates are combined on the grid of cells, (N, C, gh, gw), and multiply a view of x by broadcasting. Autograd then
  needs one pass over x and dy for all gate gradients instead of one per gate.
* If the grid does not divide the map, rows are split and summed, a matrix of zeros and ones reduces the columns, and
  ``index_select`` spreads the gate.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["steam"]


def _heads(weight: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(a, b), each (heads,): the four rows act only through these numbers."""
    q, k, v, o = weight.unflatten(1, (heads, -1)).unbind(0)
    return (q * k).sum(1) / math.sqrt(q.shape[1]), (v * o).sum(1)


def _attend(t: Tensor, near: list[Tensor], masks: list[Tensor | None], a: Tensor, b: Tensor) -> Tensor:
    """o_i = sum_k b_k m_i. ``t`` is (N, nodes), and ``near`` has the values of each neighbour, (N, nodes). A mask,
    (nodes,), is true where the neighbour exists; None means that it exists at every node."""
    at = a[:, None] * t[:, None]  # (N, heads, nodes)
    steps = [(s - t)[:, None] for s in near]  # the softmax is invariant to a common shift
    scores = [at * d if m is None else (at * d).masked_fill(~m, -math.inf) for d, m in zip(steps, masks, strict=True)]
    top = scores[0].detach()
    for s in scores[1:]:
        top = torch.maximum(top, s.detach())
    total, message = torch.zeros_like(top), torch.zeros_like(top)
    for s, d in zip(scores, steps, strict=True):
        e = torch.exp(s - top)
        total, message = total + e, message + e * d
    return (b[:, None] * (message / total)).sum(1) + b.sum() * t


def _ring(z: Tensor, radius: int, self_loops: bool, a: Tensor, b: Tensor) -> Tensor:
    """The channel branch; ``z`` (N, C)."""
    c = z.shape[1]
    offsets = sorted({o % c for o in range(-radius, radius + 1)} - {0})
    if self_loops or not offsets:
        offsets.insert(0, 0)
    low = max(0, max((c - o if o > c // 2 else 0) for o in offsets))
    high = max((o if o <= c // 2 else 0) for o in offsets)
    wide = torch.cat([z[:, c - low :], z, z[:, :high]], 1) if low or high else z
    near = [wide[:, low + (o if o <= c // 2 else o - c) :][:, :c] for o in offsets]
    return _attend(z, near, [None] * len(near), a, b)


def _lattice(u: Tensor, neighbors: int, self_loops: bool, a: Tensor, b: Tensor) -> Tensor:
    """The spatial branch; ``u`` (N, gh, gw)."""
    gh, gw = u.shape[1:]
    around = [(0, 1), (1, 0), (0, -1), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if neighbors == 8 else [])
    offsets = [(i, j) for i, j in around if abs(i) < gh and abs(j) < gw]
    if self_loops or not offsets:
        offsets.insert(0, (0, 0))
    wide = F.pad(u, (1, 1, 1, 1))
    rows, cols = torch.arange(gh, device=u.device)[:, None], torch.arange(gw, device=u.device)

    def there(i: int, j: int) -> Tensor | None:
        if not (i or j):
            return None
        return ((rows + i >= 0) & (rows + i < gh) & (cols + j >= 0) & (cols + j < gw)).flatten()

    near = [wide[:, 1 + i : 1 + i + gh, 1 + j : 1 + j + gw].flatten(1) for i, j in offsets]
    return _attend(u.flatten(1), near, [there(i, j) for i, j in offsets], a, b).unflatten(1, (gh, gw))


def _sizes(length: int, cells: int) -> list[int]:
    """Pixels of each cell along one axis: pixel r belongs to cell r * cells // length."""
    edges = [-(-i * length // cells) for i in range(cells + 1)]
    return [hi - lo for lo, hi in itertools.pairwise(edges)]


def _pool(x: Tensor, gh: int, gw: int) -> tuple[Tensor, Tensor]:
    """Sums over cells in float32 (or float64), (N, C, gh, gw), and the number of pixels of each cell, (gh, gw)."""
    h, w = x.shape[2:]
    x = x if x.dtype == torch.float64 else x.float()
    if h % gh or w % gw:
        rows, cols = _sizes(h, gh), _sizes(w, gw)
        sums = torch.stack([part.sum(2) for part in x.split(rows, 2)], 2)  # (N, C, gh, W)
        cell = torch.arange(w, device=x.device) * gw // w
        interval = (cell == torch.arange(gw, device=x.device)[:, None]).to(x.dtype)
        count = torch.tensor(rows, device=x.device)[:, None] * torch.tensor(cols, device=x.device)
        return F.linear(sums, interval), count.to(x.dtype)
    count = x.new_full((gh, gw), (h // gh) * (w // gw))
    if (h > gh or w > gw) and not x.is_contiguous():
        return F.adaptive_avg_pool2d(x, (gh, gw)) * count, count
    if h > gh:
        x = x.unflatten(2, (gh, h // gh)).sum(3)
    if w > gw:
        x = x.unflatten(3, (gw, w // gw)).sum(4)
    return x, count


def _spread(x: Tensor, gate: Tensor) -> Tensor:
    """x (N, C, H, W) times each pixel's gate (N, C, gh, gw), in the gate's dtype."""
    h, w = x.shape[2:]
    gh, gw = gate.shape[2:]
    if h % gh or w % gw:
        rows = torch.arange(h, device=x.device) * gh // h
        cols = torch.arange(w, device=x.device) * gw // w
        return x * gate.index_select(3, cols).index_select(2, rows)
    if w > gw:
        gate = (
            gate.unsqueeze(4).expand(-1, -1, -1, -1, w // gw).flatten(3)
        )  # (N, C, gh, W), so that rows stay contiguous in the product
    if h == gh:
        return x * gate
    return (x.unflatten(2, (gh, h // gh)) * gate.unsqueeze(3)).flatten(2, 3)


def _gated(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    *,
    num_heads: int = 4,
    grid_size: tuple[int, int] = (7, 7),
    channel_radius: int = 1,
    spatial_neighbors: int = 4,
    self_loops: bool = True,
    order: str = "sequential",
) -> Tensor:
    """The unit without a tail: ``x`` (N, C, H, W) -> the same shape, in float32 (or float64)."""
    c, h, w = x.shape[1:]
    gh, gw = min(grid_size[0], h), min(grid_size[1], w)
    sums, count = _pool(x, gh, gw)
    z = sums.sum((2, 3)) / (h * w)
    gc = torch.sigmoid(_ring(z, channel_radius, self_loops, *_heads(channel_weight.to(z.dtype), num_heads)))
    weighted = sums * gc[:, :, None, None] if order == "sequential" else sums
    u = weighted.sum(1) / (c * count)
    gs = torch.sigmoid(_lattice(u, spatial_neighbors, self_loops, *_heads(spatial_weight.to(z.dtype), num_heads)))
    return _spread(x, gc[:, :, None, None] * gs[:, None])


def steam(
    x: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    **options: Any,
) -> Tensor:
    """The unit, with those arguments of ``steam_kernels.steam`` that the benchmarks use. ``options`` are the keyword
    arguments of :func:`_gated`. ``x`` (N, C, H, W) -> the same shape."""
    y = _gated(x, channel_weight, spatial_weight, **options)
    if residual is not None:
        y = y + residual
    return (F.relu(y) if activation == "relu" else y).to(x.dtype)
