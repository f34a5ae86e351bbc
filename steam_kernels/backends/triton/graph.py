"""The graph stage: from sums over cells to tokens and gates, and from the gates' gradients to the tokens'.

One program a sample. Heads are collapsed: with a = <w_q, w_k> / sqrt(d_h) and b = <w_v, w_o>, head k of node i has
alpha_ij = softmax_j(a t_i t_j), m_i = sum_j alpha_ij t_j, and o_i = sum_k b m_i. Tokens that other nodes look at are
written to global memory and read again behind a barrier, so no size is too large.
"""

import triton
import triton.language as tl

from .pool import cell_begin, rearrange, upstream
from .sizes import DO_NOT_SPECIALIZE


@triton.jit
def sigmoid(o):
    """sigma(o), and its derivative sigma(o) sigma(-o), precise where it saturates."""
    e = tl.exp(-tl.abs(o))
    below = 1.0 / (1.0 + e)
    return tl.where(o >= 0.0, 1.0, e) * below, e * below * below


@triton.jit
def collapse(weight, row, column, heads, head_width, HEADS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """a and b of every head, (1, HEADS) each, 0 beyond the heads; ``row`` and ``column`` are the weight's strides."""
    head = tl.arange(0, HEADS)[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (k < head_width)
    at = weight + (head * head_width + k) * column
    query = tl.load(at, mask=inside, other=0.0).to(ACC)
    key = tl.load(at + row, mask=inside, other=0.0).to(ACC)
    value = tl.load(at + 2 * row, mask=inside, other=0.0).to(ACC)
    output = tl.load(at + 3 * row, mask=inside, other=0.0).to(ACC)
    a = tl.sum(query * key, 1) / tl.sqrt((head_width + tl.zeros([HEADS], tl.int32)).to(ACC))
    return a[None, :], tl.sum(value * output, 1)[None, :]


@triton.jit
def neighbor(node, k, nodes, columns, first, RING: tl.constexpr, LOOPS: tl.constexpr, DIAGONAL: tl.constexpr):
    """The k-th neighbour of each node and whether it exists; a node's own index where it does not.

    The ring's are node + first + k modulo nodes. The lattice's are the 4 or, DIAGONAL, 8 around it and itself. Without
    LOOPS the node itself is left out.
    """
    if RING:
        step = first + k
        if not LOOPS:
            step = tl.where(step >= 0, step + 1, step)
        j = node + step
        j = tl.where(j < 0, j + nodes, j)
        j = tl.where(j >= nodes, j - nodes, j)
        exists = j >= 0
    else:
        if DIAGONAL:
            down = k // 3 - 1
            right = k - k // 3 * 3 - 1
        else:
            down = k // 4 - (4 - k) // 4
            right = k - 2 - 2 * down
        row = node // columns + down
        column = node % columns + right
        exists = (row >= 0) & (row < nodes // columns) & (column >= 0) & (column < columns)
        if not LOOPS:
            exists = exists & ((down != 0) | (right != 0))
        j = tl.where(exists, row * columns + column, node)
    return j, exists


@triton.jit
def attend(
    tokens, node, a, count, nodes, columns, first, RING: tl.constexpr, LOOPS: tl.constexpr, DIAGONAL: tl.constexpr
):
    """What each head sees at each node, (NODES, HEADS) each.

    The slope a t, the extreme token, which has the largest score, 1 / sum of weights, and mean - extreme. A score is a
    difference before it is a product, so its exponential is at most 1.
    """
    slope = a * tl.load(tokens + node)[:, None]
    low = tl.full(node.shape, float("inf"), slope.dtype)
    high = tl.full(node.shape, float("-inf"), slope.dtype)
    for k in range(count):
        j, exists = neighbor(node, k, nodes, columns, first, RING, LOOPS, DIAGONAL)
        t = tl.load(tokens + j)
        low = tl.where(exists & (t < low), t, low)
        high = tl.where(exists & (t > high), t, high)
    extreme = tl.where(slope > 0.0, high[:, None], low[:, None])
    total = tl.zeros(slope.shape, slope.dtype)
    moment = tl.zeros(slope.shape, slope.dtype)
    for k in range(count):
        j, exists = neighbor(node, k, nodes, columns, first, RING, LOOPS, DIAGONAL)
        difference = tl.where(exists[:, None], tl.load(tokens + j)[:, None] - extreme, 0.0)
        weight = tl.where(exists[:, None], tl.exp(slope * difference), 0.0)
        total += weight
        moment += weight * difference
    inverse = 1.0 / total
    return slope, extreme, inverse, moment * inverse


@triton.jit
def transform(
    tokens, node, a, b, heads, count, nodes, columns, first,
    RING: tl.constexpr, LOOPS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Pre-activations o of the nodes."""
    _, extreme, _, mean = attend(tokens, node, a, count, nodes, columns, first, RING, LOOPS, DIAGONAL)
    head = tl.arange(0, a.shape[1])[None, :]
    return tl.sum(tl.where(head < heads, b * (extreme + mean), 0.0), 1)


@triton.jit
def transform_backward(
    tokens, gradients, node, a, b, heads, count, nodes, columns, first,
    RING: tl.constexpr, LOOPS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The tokens' gradients, and each node's terms of the gradients of a and b, (NODES, HEADS) each.

    ``gradients`` are those of the pre-activations. The graph is symmetric, so what the neighbours give back is
    gathered: their softmax is worked out again from their own neighbours, which takes no memory and no atomics.
    """
    head = tl.arange(0, a.shape[1])[None, :]
    slope, extreme, inverse, mean = attend(tokens, node, a, count, nodes, columns, first, RING, LOOPS, DIAGONAL)
    variance = tl.zeros(slope.shape, slope.dtype)
    for k in range(count):
        j, exists = neighbor(node, k, nodes, columns, first, RING, LOOPS, DIAGONAL)
        difference = tl.where(exists[:, None], tl.load(tokens + j)[:, None] - extreme, 0.0)
        weight = tl.where(exists[:, None], tl.exp(slope * difference), 0.0)
        variance += weight * inverse * (difference - mean) * (difference - mean)
    t = tl.load(tokens + node)[:, None]
    own = tl.load(gradients + node)[:, None]
    through = b * own * variance
    out = tl.where(head < heads, through * a, 0.0)
    for k in range(count):
        j, exists = neighbor(node, k, nodes, columns, first, RING, LOOPS, DIAGONAL)
        slope, extreme_j, inverse_j, mean_j = attend(tokens, j, a, count, nodes, columns, first, RING, LOOPS, DIAGONAL)
        difference = t - extreme_j
        weight = tl.exp(slope * difference) * inverse_j
        # The weight comes before the slope: it is 0 where their product with a distance may overflow.
        back = b * tl.load(gradients + j)[:, None] * (weight + slope * (weight * (difference - mean_j)))
        out += tl.where(exists[:, None] & (head < heads), back, 0.0)
    return tl.sum(out, 1), through * t, own * (extreme + mean)


@triton.jit
def load_cells(
    x,
    dy,  # None: the sums themselves
    y,
    first_channel,
    first_cell,
    channels,
    cells,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    RUN: tl.constexpr,
    ACC: tl.constexpr,
):
    """A (CHANNELS, CELLS) tile of a sample's sums, 0 outside; with dy, of x dy (where a cell is a pixel).

    RUN is the length of a run of memory that holds CHANNELS rows of all cells, sorted on the chip; 0: read as it lies.
    """
    c = first_channel + tl.arange(0, CHANNELS)[:, None]
    ij = first_cell + tl.arange(0, CELLS)[None, :]
    inside = (c < channels) & (ij < cells)
    if RUN > 0:
        flat = tl.arange(0, RUN)
        start = cells.to(tl.int64) * first_channel
        read = (flat < CHANNELS * cells) & (flat < channels.to(tl.int64) * cells - start)
        values = tl.load(x + start + flat, mask=read, other=0.0)
        if dy is not None:
            values = values.to(ACC) * upstream(dy, y, start + flat, read, ACC)
        index = tl.where(inside, (c - first_channel) * cells + ij, 0)
        tile = rearrange(values, index, inside, CHANNELS, CELLS, ACC)
    else:
        if CHANNELS_LAST:
            offset = ij.to(tl.int64) * channels + c
        else:
            offset = c.to(tl.int64) * cells + ij
        tile = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
        if dy is not None:
            tile *= upstream(dy, y, offset, inside, ACC)
    return tile


@triton.jit
def pixels_of(cell, height, width, grid_h, grid_w):
    """How many pixels each cell has."""
    i = cell // grid_w
    j = cell % grid_w
    rows = cell_begin(i + 1, grid_h, height) - cell_begin(i, grid_h, height)
    return rows * (cell_begin(j + 1, grid_w, width) - cell_begin(j, grid_w, width))


@triton.jit
def channel_gate(c, z, o_c, g_c, a, b, heads, channels, ring_first, ring_count, LOOPS: tl.constexpr):
    """The gates of channels c, stored with their pre-activations."""
    node = tl.where(c < channels, c, 0)
    o = transform(z, node, a, b, heads, ring_count, channels, channels, ring_first, True, LOOPS, False)
    g, _ = sigmoid(o)
    tl.store(o_c + c, o, mask=c < channels)
    tl.store(g_c + c, g, mask=c < channels)
    return tl.where(c < channels, g, 0.0)


@triton.jit
def graph_of(
    n,
    sums,  # over the cells, or x where a cell is a pixel
    saved,
    gates,
    channel_weight,
    spatial_weight,
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    heads,
    head_width,
    ring_first,
    ring_count,
    RING_LOOPS: tl.constexpr,
    LATTICE_LOOPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    WALK: tl.constexpr,
    RUN: tl.constexpr,
    NODES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Tokens and pre-activations [z | o_c | u | o_s] of one sample, and its gates [g_c | g_s].

    WALK: one tile has all cells, and the ring reaches no farther than the next block of channels. The sums are then
    read once: a block waits in registers for its neighbours' tokens, the first one until the ring has closed.
    """
    cells = grid_h * grid_w
    sums += n * channels * cells
    z = saved + n * 2 * (channels + cells)
    o_c = z + channels
    u = o_c + channels
    o_s = u + cells
    g_c = gates + n * (channels + cells)
    g_s = g_c + channels
    block = tl.arange(0, NODES)

    a, b = collapse(channel_weight, channel_row, channel_column, heads, head_width, HEADS, WIDTH, ACC)
    if WALK:
        total = tl.zeros([CHANNELS, CELLS], ACC)
        c = tl.arange(0, CHANNELS)
        head = load_cells(sums, None, None, 0, 0, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC)
        tl.store(z + c, tl.sum(head, 1) / area, mask=c < channels)
        last = head
        for first in range(CHANNELS, channels, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            tile = load_cells(sums, None, None, first, 0, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC)
            tl.store(z + c, tl.sum(tile, 1) / area, mask=c < channels)
            tl.debug_barrier()
            if first > CHANNELS:
                g = channel_gate(c - CHANNELS, z, o_c, g_c, a, b, heads, channels, ring_first, ring_count, RING_LOOPS)
                total += last * g[:, None] if SEQUENTIAL else last
            last = tile
        tl.debug_barrier()
        c = tl.arange(0, CHANNELS)
        if channels > CHANNELS:
            first = (channels - 1) // CHANNELS * CHANNELS
            g = channel_gate(first + c, z, o_c, g_c, a, b, heads, channels, ring_first, ring_count, RING_LOOPS)
            total += last * g[:, None] if SEQUENTIAL else last
        g = channel_gate(c, z, o_c, g_c, a, b, heads, channels, ring_first, ring_count, RING_LOOPS)
        total += head * g[:, None] if SEQUENTIAL else head
        ij = tl.arange(0, CELLS)
        pixels = pixels_of(ij, area // width, width, grid_h, grid_w).to(ACC)
        tl.store(u + ij, tl.sum(total, 0) / (pixels * channels), mask=ij < cells)
    else:
        for first in range(0, channels, CHANNELS):
            total = tl.zeros([CHANNELS, CELLS], ACC)
            for cell in range(0, cells, CELLS):
                total += load_cells(
                    sums, None, None, first, cell, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC
                )
            c = first + tl.arange(0, CHANNELS)
            tl.store(z + c, tl.sum(total, 1) / area, mask=c < channels)
        tl.debug_barrier()
        for first in range(0, channels, NODES):
            channel_gate(first + block, z, o_c, g_c, a, b, heads, channels, ring_first, ring_count, RING_LOOPS)
        tl.debug_barrier()
        for cell in range(0, cells, CELLS):
            total = tl.zeros([CHANNELS, CELLS], ACC)
            for first in range(0, channels, CHANNELS):
                tile = load_cells(
                    sums, None, None, first, cell, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC
                )
                if SEQUENTIAL:
                    c = first + tl.arange(0, CHANNELS)
                    tile *= tl.load(g_c + c, mask=c < channels, other=0.0)[:, None]
                total += tile
            ij = cell + tl.arange(0, CELLS)
            pixels = pixels_of(ij, area // width, width, grid_h, grid_w).to(ACC)
            tl.store(u + ij, tl.sum(total, 0) / (pixels * channels), mask=ij < cells)
    tl.debug_barrier()

    a, b = collapse(spatial_weight, spatial_row, spatial_column, heads, head_width, HEADS, WIDTH, ACC)
    for first in range(0, cells, NODES):
        i = first + block  # not ij, which may be of another length
        node = tl.where(i < cells, i, 0)
        o = transform(u, node, a, b, heads, 9 if DIAGONAL else 5, cells, grid_w, 0, False, LATTICE_LOOPS, DIAGONAL)
        tl.store(o_s + i, o, mask=i < cells)
        tl.store(g_s + i, sigmoid(o)[0], mask=i < cells)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph(
    sums,  # over the cells, or x where a cell is a pixel
    saved,
    gates,
    channel_weight,
    spatial_weight,
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    heads,
    head_width,
    ring_first,
    ring_count,
    RING_LOOPS: tl.constexpr,
    LATTICE_LOOPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    WALK: tl.constexpr,
    RUN: tl.constexpr,
    NODES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is a sample."""
    n = tl.program_id(0).to(tl.int64)
    channels = channels * CHANNEL_UNIT
    graph_of(
        n,
        sums,
        saved,
        gates,
        channel_weight,
        spatial_weight,
        channel_row,
        channel_column,
        spatial_row,
        spatial_column,
        channels,
        area,
        width,
        grid_h,
        grid_w,
        heads,
        head_width,
        ring_first,
        ring_count,
        RING_LOOPS,
        LATTICE_LOOPS,
        DIAGONAL,
        SEQUENTIAL,
        CHANNELS_LAST,
        CHANNELS,
        CELLS,
        WALK,
        RUN,
        NODES,
        HEADS,
        WIDTH,
        ACC,
    )


@triton.jit
def graph_backward_of(
    n,
    sums,  # over the cells, or x where a cell is a pixel
    products,  # None: a cell is a pixel, and they are worked out from x and dy
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
    saved,
    gates,
    flows,
    shifts,
    partials,
    channel_weight,
    spatial_weight,
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    heads,
    head_width,
    ring_first,
    ring_count,
    SCALE: tl.constexpr,
    RING: tl.constexpr,
    RING_LOOPS: tl.constexpr,
    LATTICE_LOOPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    ONCE: tl.constexpr,
    RUN: tl.constexpr,
    NODES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """One sample's gates [g_c | g_s], shifts [dz / (H W) | du / (C n_cell)] and (4, heads) terms of da and db.

    ``flows`` are the gradients of the pre-activations, on their way between nodes. Without RING nobody asks for what
    lies behind the channel gate. ONCE: one tile has all cells, so the products are read once.
    """
    cells = grid_h * grid_w
    sums += n * channels * cells
    if products is not None:
        factor = products + n * channels * cells
        dy_n = None
        y_n = None
    else:
        factor = sums
        dy_n = dy + n * channels * cells
        y_n = None
        if y is not None:
            y_n = y + n * channels * cells
    z = saved + n * 2 * (channels + cells)
    o_c = z + channels
    u = o_c + channels
    o_s = u + cells
    g_c = gates + n * (channels + cells)
    g_s = g_c + channels
    flow_c = flows + n * (channels + cells)
    flow_s = flow_c + channels
    shift_c = shifts + n * (channels + cells)
    shift_s = shift_c + channels
    head = tl.arange(0, HEADS)
    partial = partials + n * 4 * heads + head
    block = tl.arange(0, NODES)

    for cell in range(0, cells, CELLS):
        ij = cell + tl.arange(0, CELLS)
        gate_s, slope_s = sigmoid(tl.load(o_s + ij, mask=ij < cells, other=0.0))
        tl.store(g_s + ij, gate_s, mask=ij < cells)
        total = tl.zeros([CHANNELS, CELLS], ACC)
        for first in range(0, channels, CHANNELS):
            tile = load_cells(factor, dy_n, y_n, first, cell, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC)
            c = first + tl.arange(0, CHANNELS)
            gate_c, _ = sigmoid(tl.load(o_c + c, mask=c < channels, other=0.0))
            total += tile * gate_c[:, None]
            if RING and ONCE:
                tl.store(shift_c + c, tl.sum(tile * gate_s[None, :], 1) * SCALE, mask=c < channels)
        tl.store(flow_s + ij, tl.sum(total, 0) * SCALE * slope_s, mask=ij < cells)
    tl.debug_barrier()

    a, b = collapse(spatial_weight, spatial_row, spatial_column, heads, head_width, HEADS, WIDTH, ACC)
    da = tl.zeros([NODES, HEADS], ACC)
    db = tl.zeros([NODES, HEADS], ACC)
    for first in range(0, cells, NODES):
        ij = first + block
        node = tl.where(ij < cells, ij, 0)
        du, da_i, db_i = transform_backward(
            u, flow_s, node, a, b, heads, 9 if DIAGONAL else 5, cells, grid_w, 0, False, LATTICE_LOOPS, DIAGONAL
        )
        da += tl.where((ij < cells)[:, None], da_i, 0.0)
        db += tl.where((ij < cells)[:, None], db_i, 0.0)
        pixels = pixels_of(node, area // width, width, grid_h, grid_w).to(ACC)
        tl.store(shift_s + ij, du / (pixels * channels), mask=ij < cells)
    tl.store(partial + 2 * heads, tl.sum(da, 0), mask=head < heads)
    tl.store(partial + 3 * heads, tl.sum(db, 0), mask=head < heads)

    if RING:
        tl.debug_barrier()
        for first in range(0, channels, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            gate_c, slope_c = sigmoid(tl.load(o_c + c, mask=c < channels, other=0.0))
            tl.store(g_c + c, gate_c, mask=c < channels)
            total = tl.zeros([CHANNELS, CELLS], ACC)
            if SEQUENTIAL or not ONCE:
                for cell in range(0, cells, CELLS):
                    ij = cell + tl.arange(0, CELLS)
                    if not ONCE:
                        tile = load_cells(
                            factor, dy_n, y_n, first, cell, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC
                        )
                        total += tile * (tl.load(g_s + ij, mask=ij < cells, other=0.0) * SCALE)[None, :]
                    if SEQUENTIAL:
                        tile = load_cells(
                            sums, None, None, first, cell, channels, cells, CHANNELS_LAST, CHANNELS, CELLS, RUN, ACC
                        )
                        total += tile * tl.load(shift_s + ij, mask=ij < cells, other=0.0)[None, :]
            gradient = tl.sum(total, 1)
            if ONCE:
                gradient += tl.load(shift_c + c, mask=c < channels, other=0.0)
            tl.store(flow_c + c, gradient * slope_c, mask=c < channels)
        tl.debug_barrier()

        a, b = collapse(channel_weight, channel_row, channel_column, heads, head_width, HEADS, WIDTH, ACC)
        da = tl.zeros([NODES, HEADS], ACC)
        db = tl.zeros([NODES, HEADS], ACC)
        for first in range(0, channels, NODES):
            c = first + block
            node = tl.where(c < channels, c, 0)
            dz, da_i, db_i = transform_backward(
                z, flow_c, node, a, b, heads, ring_count, channels, channels, ring_first, True, RING_LOOPS, False
            )
            da += tl.where((c < channels)[:, None], da_i, 0.0)
            db += tl.where((c < channels)[:, None], db_i, 0.0)
            tl.store(shift_c + c, dz / area, mask=c < channels)
        tl.store(partial, tl.sum(da, 0), mask=head < heads)
        tl.store(partial + heads, tl.sum(db, 0), mask=head < heads)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def graph_backward(
    sums,  # over the cells, or x where a cell is a pixel
    products,  # None: a cell is a pixel, and they are worked out from x and dy
    dy,  # None: there are products
    y,  # None: no ReLU, or there are products
    saved,
    gates,
    flows,
    shifts,
    partials,
    channel_weight,
    spatial_weight,
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    channels,
    area,
    width,
    grid_h,
    grid_w,
    heads,
    head_width,
    ring_first,
    ring_count,
    SCALE: tl.constexpr,
    RING: tl.constexpr,
    RING_LOOPS: tl.constexpr,
    LATTICE_LOOPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
    ONCE: tl.constexpr,
    RUN: tl.constexpr,
    NODES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program is a sample."""
    n = tl.program_id(0).to(tl.int64)
    channels = channels * CHANNEL_UNIT
    graph_backward_of(
        n,
        sums,
        products,
        dy,
        y,
        saved,
        gates,
        flows,
        shifts,
        partials,
        channel_weight,
        spatial_weight,
        channel_row,
        channel_column,
        spatial_row,
        spatial_column,
        channels,
        area,
        width,
        grid_h,
        grid_w,
        heads,
        head_width,
        ring_first,
        ring_count,
        SCALE,
        RING,
        RING_LOOPS,
        LATTICE_LOOPS,
        DIAGONAL,
        SEQUENTIAL,
        CHANNELS_LAST,
        CHANNELS,
        CELLS,
        ONCE,
        RUN,
        NODES,
        HEADS,
        WIDTH,
        ACC,
    )


@triton.jit
def weight_gradient(
    weight, gradient, row, column, gradient_row, gradient_column, partials, samples, heads, head_width,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One branch's gradient from its samples' terms of the gradients of a and b, added up in a fixed order."""
    head = tl.arange(0, HEADS)[None, :]
    da = tl.zeros([SAMPLES, HEADS], ACC)
    db = tl.zeros([SAMPLES, HEADS], ACC)
    for first in range(0, samples, SAMPLES):
        n = first + tl.arange(0, SAMPLES)[:, None]
        inside = (n < samples) & (head < heads)
        at = partials + n.to(tl.int64) * 4 * heads + head
        da += tl.load(at, mask=inside, other=0.0)
        db += tl.load(at + heads, mask=inside, other=0.0)
    da = (tl.sum(da, 0) / tl.sqrt((head_width + tl.zeros([HEADS], tl.int32)).to(ACC)))[:, None]
    db = tl.sum(db, 0)[:, None]
    head = tl.arange(0, HEADS)[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (k < head_width)
    at = weight + (head * head_width + k) * column
    query = tl.load(at, mask=inside, other=0.0).to(ACC)
    key = tl.load(at + row, mask=inside, other=0.0).to(ACC)
    value = tl.load(at + 2 * row, mask=inside, other=0.0).to(ACC)
    output = tl.load(at + 3 * row, mask=inside, other=0.0).to(ACC)
    at = gradient + (head * head_width + k) * gradient_column
    tl.store(at, (da * key).to(gradient.dtype.element_ty), mask=inside)
    tl.store(at + gradient_row, (da * query).to(gradient.dtype.element_ty), mask=inside)
    tl.store(at + 2 * gradient_row, (db * output).to(gradient.dtype.element_ty), mask=inside)
    tl.store(at + 3 * gradient_row, (db * value).to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def weights_backward(
    partials,
    channel_weight,
    spatial_weight,
    dchannel_weight,  # None: not asked for
    dspatial_weight,  # None: not asked for
    channel_row,
    channel_column,
    spatial_row,
    spatial_column,
    dchannel_row,
    dchannel_column,
    dspatial_row,
    dspatial_column,
    samples,
    heads,
    head_width,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Both weights' gradients, by one program."""
    if dchannel_weight is not None:
        weight_gradient(
            channel_weight, dchannel_weight, channel_row, channel_column, dchannel_row, dchannel_column,
            partials, samples, heads, head_width, HEADS, WIDTH, SAMPLES, ACC,
        )  # fmt: skip
    if dspatial_weight is not None:
        weight_gradient(
            spatial_weight, dspatial_weight, spatial_row, spatial_column, dspatial_row, dspatial_column,
            partials + 2 * heads, samples, heads, head_width, HEADS, WIDTH, SAMPLES, ACC,
        )  # fmt: skip
