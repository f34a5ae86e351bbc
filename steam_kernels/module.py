"""FusedSTEAM: the parameters and configuration of one STEAM unit, for use as a layer."""

from __future__ import annotations

from .functional import run
from .layer import Layer


class FusedSTEAM(Layer):
    r"""Squeeze and Transform Enhanced Attention on ``(N, C, H, W)`` maps, in one fused pass forwards and one backwards.

    Source: *STEAM: Squeeze and Transform Enhanced Attention Module*, arXiv 2412.09023; a reconstruction, as its code is
    not released. The map is pooled to a ``(gh, gw)`` grid, channels attend to their neighbours on a ring, cells to
    theirs on a lattice, and ``y = scale * x * channel_gate * spatial_gate``. With ``activation="relu"`` and
    ``residual``, ``y = relu(that + residual)``.

    Args:
        channels: C of the maps, checked against x where given; the parameters do not depend on it.
        embed_dim: d, the columns of each weight [second-hand: 8].
        num_heads: h, a divisor of ``embed_dim``.
        grid_size: cells per axis, an int or ``(gh, gw)``, at most one per pixel; None is 7 [second-hand: one fixed
            grid; ours: 7].
        window: pixels per cell instead of a fixed grid: ``(ceil(H / window), ceil(W / window))`` cells [ours].
        channel_radius: how far the ring joins channels on either side; 0 leaves each to itself [ours].
        spatial_neighbors: 4 or 8 neighbours of a cell [ours: 4].
        self_loops: whether a node attends to itself too [ours].
        order: "sequential" (space looks at the channel-gated map) or "parallel" [ours].
        identity_init: start as the identity: output rows zero and a scale of 4, kept in the state_dict [ours].
        activation: None or "relu", applied after the residual is added [ours].
        inplace: write y into x; only where no gradient is recorded.
        backend: "triton", "cuda", "cpu" or "reference" by name, or None for the first that can run the call.
        device, dtype: of the parameters: float32 or the maps' dtype.

    Attributes:
        channel_weight, spatial_weight: ``(4, embed_dim)`` parameters: query, key, value and output rows; 8 d numbers in
            all [second-hand].
        scale: persistent float32 buffer of 0 dimensions, 1 or, after ``identity_init``, 4. May be set to a number;
            see :mod:`steam_kernels.scale` for when a buffer that a tool has written is seen.
        backend: may be set later, checked when set.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it and what is
            allowed.
        RuntimeError: in :meth:`forward`, where the backend asked for by name cannot run the call, or ``inplace`` meets
            autograd.

    Example:
        >>> unit = FusedSTEAM(256)
        >>> y = unit(torch.randn(8, 256, 56, 56))
    """

    _run = staticmethod(run)
