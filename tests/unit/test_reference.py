"""The reference agrees with the loop oracle and with the collapsed form of the graph transform."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from steam_kernels import reference
from tests.support import cases, oracle
from tests.support.cases import Case

UNITS = [
    Case(space=(7, 5), channels=6, grid=(3, 2)),
    Case(space=(9, 8), channels=9, grid=(4, 3), order="parallel", neighbors=8, scale=4.0),
    Case(space=(6, 6), channels=5, grid=3, radius=2, self_loops=False, attention=(16, 8)),
    Case(space=(5, 7), channels=4, radius=2, self_loops=False, neighbors=8, tail="residual_relu"),
    Case(space=(5, 7), channels=3, radius=9, attention=(3, 1), tail="x_relu"),
    Case(space=(1, 1), channels=1, self_loops=False),
    Case(space=(4, 4), channels=1, self_loops=False, grid=1, batch=1),
    Case(space=(4, 6), channels=2, radius=1, self_loops=False, grid=(1, 2)),
    Case(space=(8, 3), channels=7, radius=0, self_loops=False, grid="w3", tail="relu"),
    Case(space=(6, 5), channels=8, batch=0),
]


@pytest.mark.parametrize("case", [c.but(dtype=torch.float64) for c in UNITS], ids=lambda c: c.id)
def test_matches_oracle(case: Case) -> None:
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy, cases.exact_by_oracle(case, inputs, dy))
    bounds.check(cases.forward_backward(reference.steam, inputs, dy, **case.options), case.id)


def neighborhoods(index: torch.Tensor, inside: torch.Tensor) -> list[list[int]]:
    """For each node, the neighbours that count, in order."""
    return [
        sorted(i for i, ok in zip(*row, strict=True) if ok) for row in zip(index.tolist(), inside.tolist(), strict=True)
    ]


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 12])
def test_ring_is_the_oracles(channels: int, radius: int, self_loops: bool) -> None:
    index, inside = reference.ring(channels, radius, self_loops, torch.device("cpu"))
    assert neighborhoods(index, inside) == [sorted(n) for n in oracle.ring_neighbors(channels, radius, self_loops)]


@pytest.mark.parametrize("neighbors", [4, 8])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 1), (2, 2), (3, 5)])
def test_lattice_is_the_oracles(grid: tuple[int, int], neighbors: int, self_loops: bool) -> None:
    index, inside = reference.lattice(grid, neighbors, self_loops, torch.device("cpu"))
    assert neighborhoods(index, inside) == [
        sorted(near) for near in oracle.lattice_neighbors(*grid, neighbors, self_loops)
    ]


@pytest.mark.parametrize("heads,d", [(1, 8), (2, 8), (4, 8), (8, 8), (4, 16), (1, 3)])
def test_heads_collapse_to_two_numbers_each(heads: int, d: int) -> None:
    """With a = <w_q, w_k> / sqrt(d_h) and b = <w_v, w_o> per head, score = a t_i t_j and o = sum_k b_k m_i."""
    generator = torch.Generator().manual_seed(d + heads)
    t = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, d, generator=generator, dtype=torch.float64)
    w_q, w_k, w_v, w_o = weight.view(4, heads, d // heads).unbind(0)
    a, b = (w_q * w_k).sum(-1) / math.sqrt(d // heads), (w_v * w_o).sum(-1)
    index, inside = reference.ring(11, 2, True, t.device)
    t_j = t[:, index]
    alpha = torch.softmax(a * t[..., None, None] * t_j[..., None], dim=2)
    collapsed = (b * (alpha * t_j[..., None]).sum(2)).sum(-1)
    full = reference.graph_transform(t, weight, heads, (index, inside))
    assert torch.allclose(full, collapsed, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size,grid", [((14, 21), (7, 7)), ((8, 12), (2, 4)), ((56, 56), (7, 7))])
def test_pool_is_adaptive_pooling_where_the_grid_divides(size: tuple[int, int], grid: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    pooled, counts = reference.pool(x, grid)
    assert torch.allclose(pooled, F.adaptive_avg_pool2d(x, grid), rtol=1e-13, atol=1e-14)
    assert counts.sum().item() == size[0] * size[1]


@pytest.mark.parametrize(
    "size,cells", [(s, g) for s in (1, 2, 5, 7, 17, 29, 100) for g in (1, 2, 3, 7, 13, 29) if g <= s]
)
def test_cells_partition_the_axis(size: int, cells: int) -> None:
    first, end = reference.cell_bounds(size, cells, torch.device("cpu"))
    expected = [r * cells // size for r in range(size)]
    got = [i for i, (a, b) in enumerate(zip(first.tolist(), end.tolist(), strict=True)) for _ in range(a, b)]
    assert got == expected
    assert reference.cell_of(size, cells, torch.device("cpu")).tolist() == expected


@pytest.mark.parametrize("case", cases.all_pairs()[::13], ids=lambda c: c.id)
def test_half_and_single_precision_stay_near_float64(case: Case) -> None:
    """The reference in lower precision stays within the bounds, whose truth is the reference in float64."""
    if case.dtype == torch.float64:
        case = case.but(dtype=torch.float32)
    inputs, dy = cases.make(case)
    got = cases.forward_backward(reference.steam, inputs, dy, **case.options)
    cases.bounds_of(case, inputs, dy).check(got, case.id)
