"""The sizes that are measured: a :class:`Shape` of maps, and the :class:`Options` of the unit at that shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
#: (C, H, W) of the outputs of ResNet-50's stages, of a detector's first stage, and of blocks of MobileNetV2.
STAGES = {"56": (256, 56, 56), "28": (512, 28, 28), "14": (1024, 14, 14), "7": (2048, 7, 7)}
DETECTION = {"det": (256, 200, 334)}
MOBILE = {"m56": (24, 56, 56), "m28": (32, 28, 28), "m14": (96, 14, 14), "m7": (320, 7, 7)}
SHAPES = STAGES | DETECTION | MOBILE

#: The passes of each direction that is measured.
DIRECTIONS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
}


@dataclass(frozen=True)
class Options:
    """The options of a unit, named as in ``steam()``. ``tail`` adds a residual and a ReLU."""

    grid_size: tuple[int, int] = (7, 7)
    embed_dim: int = 8
    num_heads: int = 4
    channel_radius: int = 1
    spatial_neighbors: int = 4
    self_loops: bool = True
    order: str = "sequential"
    tail: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of ``steam()``."""
        return {
            "num_heads": self.num_heads,
            "grid_size": self.grid_size,
            "channel_radius": self.channel_radius,
            "spatial_neighbors": self.spatial_neighbors,
            "self_loops": self.self_loops,
            "order": self.order,
        } | ({"activation": "relu"} if self.tail else {})

    @property
    def label(self) -> str:
        """The options that differ from the defaults, except the grid; empty for the default unit."""
        parts = {
            "embed_dim": f"d{self.embed_dim}",
            "num_heads": f"heads{self.num_heads}",
            "channel_radius": f"radius{self.channel_radius}",
            "spatial_neighbors": f"neighbors{self.spatial_neighbors}",
            "self_loops": "no_self_loops",
            "order": self.order,
            "tail": "tail",
        }
        return "".join(f"-{text}" for name, text in parts.items() if getattr(self, name) != getattr(DEFAULT, name))


DEFAULT = Options()
#: Other options than the defaults, by name.
OPTIONS = {
    "radius 2": Options(channel_radius=2),
    "radius 3": Options(channel_radius=3),
    "8 neighbours": Options(spatial_neighbors=8),
    "parallel": Options(order="parallel"),
    "8 heads": Options(num_heads=8),
}
#: The names that the command line accepts.
NAMED_OPTIONS = {
    "default": DEFAULT,
    **{name.replace(" ", "-"): options for name, options in OPTIONS.items()},
    "grid": Options(grid_size=(13, 21)),
    "tail": Options(tail=True),
}


@dataclass(frozen=True)
class Shape:
    """The size, dtype, memory format and device of a map, and the options of the unit that gets it."""

    n: int
    c: int
    h: int
    w: int
    dtype: str = "float32"
    layout: str = "nchw"
    options: Options = DEFAULT
    device: str = "cpu"

    def with_options(self, **changes: Any) -> Shape:
        return replace(self, options=replace(self.options, **changes))

    @property
    def grid(self) -> tuple[int, int]:
        """The resolved grid (gh, gw), which is no finer than the map."""
        return min(self.options.grid_size[0], self.h), min(self.options.grid_size[1], self.w)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """The last arguments of the operators: the grid, and ``config.Arguments`` of the package."""
        o = self.options
        graphs = o.num_heads, o.channel_radius, o.spatial_neighbors, o.self_loops
        return list(self.grid), *graphs, o.order == "sequential", 1.0, o.tail

    @property
    def numel(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def map_bytes(self) -> int:
        """Bytes of x."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def name(self) -> str:
        """The name in :data:`SHAPES`, or else CxHxW."""
        size = (self.c, self.h, self.w)
        return next((name for name, chw in SHAPES.items() if chw == size), "x".join(map(str, size)))

    @property
    def label(self) -> str:
        grid = "" if self.options.grid_size == DEFAULT.grid_size else f"-grid{self.grid[0]}x{self.grid[1]}"
        device = "" if self.device == "cpu" else f"-{self.device}"
        size = f"{self.n}x{self.c}x{self.h}x{self.w}"
        return f"{size}{grid}-{self.dtype}-{self.layout}{self.options.label}{device}"

    def flops(self, direction: str) -> int:
        """Floating-point operations of ``forward``, ``backward`` or ``both``."""
        from steam_kernels import cost

        keywords = self.options.keywords
        report = cost(self.c, self.h, self.w, embed_dim=self.options.embed_dim, residual=self.options.tail, **keywords)
        each = {"forward": report.flops, "backward": report.backward_flops}
        return self.n * sum(each[d] for d in DIRECTIONS[direction])

    def ideal_bytes(self, direction: str) -> int:
        """Bytes that the direction must move. Forward reads x and writes y; backward reads x and dy and writes dx. The
        tail adds one read forward (the residual), and one read (y) and one write (the residual's gradient) backward."""
        maps = {"forward": 2 + self.options.tail, "backward": 3 + 2 * self.options.tail}
        return self.map_bytes * sum(maps[d] for d in DIRECTIONS[direction])

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """x, dy and both weights (with a tail also the residual), without recorded gradients."""
        generator = torch.Generator().manual_seed(seed)
        size = (self.n, self.c, self.h, self.w)

        def feature_map() -> Tensor:
            value = torch.randn(size, generator=generator).to(self.torch_dtype)
            return value.contiguous(memory_format=LAYOUTS[self.layout])

        def weight() -> Tensor:
            rows = torch.rand(4, self.options.embed_dim, generator=generator) * 2 - 1
            rows[3] /= math.sqrt(self.options.embed_dim)
            return rows.double() if self.dtype == "float64" else rows

        out = {"x": feature_map(), "dy": feature_map(), "channel_weight": weight(), "spatial_weight": weight()}
        if self.options.tail:
            # The residual is larger than the gated map. Otherwise a rounding would decide the sign before the ReLU.
            noise = feature_map()
            out["residual"] = torch.sign(noise) * (0.5 + noise.abs() + out["x"].abs())
        return {k: v.to(self.device) for k, v in out.items()}
