"""FusedSTEAM: one STEAM unit as a layer, with its parameters and options."""

from __future__ import annotations

from .functional import run
from .layer import Layer


class FusedSTEAM(Layer):
    r"""Squeeze and Transform Enhanced Attention on ``(N, C, H, W)`` maps, with a fused forward and a fused backward.

    Source: *STEAM: Squeeze and Transform Enhanced Attention Module*, arXiv 2412.09023. This is a reconstruction,
    because the authors' code is not released. The map is pooled to a ``(gh, gw)`` grid. Channels attend to their
    neighbours on a ring, and cells attend to their neighbours on a lattice. The output is
    ``y = activation(scale * x * channel_gate * spatial_gate + residual)``, where ``residual`` and ``activation`` are
    optional.

    Args:
        channels: C of the maps. If given, x is checked against it. The parameters do not depend on it.
        embed_dim: d, the columns of each weight [second-hand: 8].
        num_heads: h, which divides ``embed_dim``.
        grid_size: cells per axis, an int or ``(gh, gw)``, at most one per pixel. None is 7 [second-hand: one fixed
            grid; ours: 7].
        window: pixels per cell, instead of a fixed grid: ``(ceil(H / window), ceil(W / window))`` cells [ours].
        channel_radius: how far the ring joins channels on either side. With 0 each channel attends only to itself
            [ours].
        spatial_neighbors: 4 or 8 neighbours of a cell [ours: 4].
        self_loops: whether a node also attends to itself [ours].
        order: "sequential" (spatial attention uses the channel-gated map) or "parallel" [ours].
        identity_init: whether the unit starts as the identity, with zero output rows and a scale of 4. The state_dict
            contains the scale [ours].
        activation: None or "relu", applied after the residual is added [ours].
        inplace: whether to write y into x. Autograd must not record the call.
        backend: "triton", "cuda", "cpu" or "reference", or None for the first backend that can run the call.
        device, dtype: device and dtype of the parameters. The dtype is float32 or the dtype of the maps.

    Attributes:
        channel_weight: the ``(4, embed_dim)`` parameter of the channel branch: query, key, value and output rows.
        spatial_weight: the parameter of the spatial branch, of the same shape. Both have 8 d numbers together
            [second-hand].
        scale: a persistent float32 buffer of 0 dimensions. It starts at 1, or at 4 with ``identity_init``, and can be
            set to a number. :mod:`steam_kernels.scale` explains when a unit sees a value that a tool wrote into the
            buffer.
        backend: can be set later. Setting it checks the name.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; the message names the argument and the
            allowed values.
        RuntimeError: in :meth:`forward`, if the backend that was asked for by name cannot run the call, or if autograd
            would record a call with ``inplace``.

    Example:
        >>> unit = FusedSTEAM(256)
        >>> y = unit(torch.randn(8, 256, 56, 56))
    """

    _run = staticmethod(run)
