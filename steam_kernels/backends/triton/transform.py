"""The graph transform of one branch, and its gradient, by the nodes of one program.

Heads are collapsed: with a = <w_q, w_k> / sqrt(d_h) and b = <w_v, w_o>, head k of node i has
alpha_ij = softmax_j(a t_i t_j), m_i = sum_j alpha_ij t_j, and o_i = sum_k b m_i.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import weight_numbers


class Graph(NamedTuple):
    """The nodes of a branch, and where their neighbours are.

    The nodes are rows of ``columns`` nodes. Each node has ``neighbors`` places for neighbours, itself among them if
    LOOPS; places of the lattice may be empty. RING: one row, and the neighbours of node i are i + ``first`` and the
    following nodes. WRAPS: the first node of the row follows the last. DIAGONAL: the lattice has 8 neighbours, else 4.
    """

    nodes: Any
    columns: Any
    first: Any
    neighbors: Any
    RING: Any
    WRAPS: Any
    LOOPS: Any
    DIAGONAL: Any


@triton.jit
def sigmoid(o):
    """sigma(o), and its derivative sigma(o) sigma(-o), which is precise where sigma saturates."""
    e = tl.exp(-tl.abs(o))
    below = 1.0 / (1.0 + e)
    return tl.where(o >= 0.0, 1.0, e) * below, e * below * below


@triton.jit
def collapse(weight, TILE: tl.constexpr, ACC: tl.constexpr):
    """a and b of every head, (HEADS, 1) each, 0 beyond the heads."""
    query, key, value, output = weight_numbers(weight, TILE, ACC)
    # [HEADS]
    a = tl.sum(query * key, 1) / tl.sqrt((weight.head_width + tl.zeros([TILE.HEADS], tl.int32)).to(ACC))
    return a[:, None], tl.sum(value * output, 1)[:, None]


@triton.jit
def neighbor(node, k, graph):
    """The k-th neighbour of each node, and whether it exists; the node's own index if it does not."""
    if graph.RING:
        step = graph.first + k
        if not graph.LOOPS:
            step = tl.where(step >= 0, step + 1, step)
        j = node + step
        if graph.WRAPS:
            j = tl.where(j < 0, j + graph.nodes, j)
            j = tl.where(j >= graph.nodes, j - graph.nodes, j)
        exists = j == j  # Each neighbour of a ring exists.
    else:
        if graph.DIAGONAL:
            down = k // 3 - 1
            right = k - k // 3 * 3 - 1
        else:
            down = k // 4 - (4 - k) // 4
            right = k - 2 - 2 * down
        row = node // graph.columns + down
        column = node % graph.columns + right
        exists = (row >= 0) & (row < graph.nodes // graph.columns) & (column >= 0) & (column < graph.columns)
        if not graph.LOOPS:
            exists = exists & ((down != 0) | (right != 0))
        j = tl.where(exists, row * graph.columns + column, node)
    return j, exists


@triton.jit
def reverse(k, graph):
    """The place of a node among the neighbours of its k-th neighbour."""
    if graph.RING:
        step = graph.first + k
        if not graph.LOOPS:
            step = tl.where(step >= 0, step + 1, step)
        # In a small ring, a distance to one side may be the same node as a distance to the other side.
        back = tl.where(-step < graph.first, graph.nodes - step, -step)
        if not graph.LOOPS:
            back = tl.where(back > 0, back - 1, back)
        place = back - graph.first
    else:
        place = graph.neighbors - 1 - k
    return place  # one return, because the compiler does not inline a function with two


@triton.jit
def attend(tokens, node, a, graph):
    """The softmax of each head at each node, (HEADS, NODES) each: the slope a t, the extreme, 1 / total, m - extreme.

    The extreme is the token with the largest score, and the total is the sum of the weights. A score is a difference
    before it is a product, so its exponential is at most 1.
    """
    # [HEADS, NODES]
    slope = a * tl.load(tokens + node)[None, :]
    # [NODES]
    low = tl.full(node.shape, float("inf"), slope.dtype)
    high = tl.full(node.shape, float("-inf"), slope.dtype)
    for k in range(graph.neighbors):
        j, exists = neighbor(node, k, graph)
        t = tl.load(tokens + j)
        low = tl.where(exists & (t < low), t, low)
        high = tl.where(exists & (t > high), t, high)
    # [HEADS, NODES]
    extreme = tl.where(slope > 0.0, high[None, :], low[None, :])
    total = tl.zeros(slope.shape, slope.dtype)
    moment = tl.zeros(slope.shape, slope.dtype)
    for k in range(graph.neighbors):
        j, exists = neighbor(node, k, graph)
        difference = tl.where(exists[None, :], tl.load(tokens + j)[None, :] - extreme, 0.0)
        weight = tl.where(exists[None, :], tl.exp(slope * difference), 0.0)
        total += weight
        moment += weight * difference
    inverse = 1.0 / total
    return slope, extreme, inverse, moment * inverse


@triton.jit
def transform(tokens, node, a, b, heads, graph):
    """The pre-activations o of the nodes, (NODES,)."""
    # [HEADS, NODES]
    _, extreme, _, mean = attend(tokens, node, a, graph)
    # [HEADS, 1]
    head = tl.arange(0, a.shape[0])[:, None]
    return tl.sum(tl.where(head < heads, b * (extreme + mean), 0.0), 0)


@triton.jit
def store_jacobian(tokens, jacobian, node, inside, a, b, heads, graph):
    """Stores the derivatives of the nodes' pre-activations o, and returns those by a and b, (HEADS, NODES) each.

    ``jacobian`` has a row of one number for each node of the graph and each neighbour: row k has the derivatives by the
    token of the k-th neighbour. One more row has the derivatives by the node's own token through the slopes.
    """
    # [HEADS, 1]
    head = tl.arange(0, a.shape[0])[:, None]
    # [HEADS, NODES]
    slope, extreme, inverse, mean = attend(tokens, node, a, graph)
    variance = tl.zeros(slope.shape, slope.dtype)
    for k in range(graph.neighbors):
        j, exists = neighbor(node, k, graph)
        difference = tl.where(exists[None, :], tl.load(tokens + j)[None, :] - extreme, 0.0)
        weight = tl.where(exists[None, :], tl.exp(slope * difference), 0.0) * inverse
        difference -= mean
        variance += weight * difference * difference
        # The weight comes before the slope: it is 0 where the product of slope and distance may overflow.
        through = tl.where(head < heads, b * (weight + slope * (weight * difference)), 0.0)
        tl.store(jacobian + k * graph.nodes + node, tl.sum(through, 0), mask=inside)
    own = tl.where(head < heads, b * variance * a, 0.0)
    tl.store(jacobian + graph.neighbors * graph.nodes + node, tl.sum(own, 0), mask=inside)
    return b * variance * tl.load(tokens + node)[None, :], extreme + mean


@triton.jit
def transform_backward(jacobian, index, graph, flows, node, near):
    """The gradients of the tokens, (NODES,), from ``flows``, the gradients of the pre-activations.

    The graph is symmetric, so a node gathers the gradients that its neighbours give back, without atomics. ``flows``
    may be of a part of the graph: node ``node`` of the graph ``near`` is node ``index`` of the whole graph.
    """
    out = tl.load(jacobian + graph.neighbors * graph.nodes + index) * tl.load(flows + node)
    for k in range(graph.neighbors):
        i, exists = neighbor(index, k, graph)
        j, _ = neighbor(node, k, near)
        back = tl.load(jacobian + reverse(k, graph) * graph.nodes + i) * tl.load(flows + j)
        out += tl.where(exists, back, 0.0)
    return out
