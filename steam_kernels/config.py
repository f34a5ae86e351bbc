"""The options of a STEAM unit, and the values that follow from the options and the shapes of a call.

The symbols are the ones of docs/math.md: ``x`` is ``(N, C, H, W)``, the grid ``(gh, gw)``, ``d`` the embedding width
and ``h`` the heads. :class:`Options` checks every option once, and :meth:`Options.check` every tensor of a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends

ORDERS = ("sequential", "parallel")
ACTIVATIONS = (None, "relu")
DEFAULT_GRID = 7

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_FLOAT32, _FLOAT64, _STRIDED = torch.float32, torch.float64, torch.strided
_RESIDUAL = "residual must be None or a tensor of x's shape, dtype and device"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, gates and saved tokens for an input of ``dtype``: float64 for float64, else float32."""
    return _FLOAT64 if dtype is _FLOAT64 else _FLOAT32


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raises unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_embed_dim(embed_dim: Any, num_heads: int) -> None:
    """Raises unless ``embed_dim`` is a positive int that ``num_heads`` divides."""
    check_integer("embed_dim", embed_dim)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim, got num_heads={num_heads} and embed_dim={embed_dim}")


class Inputs(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    channel_weight: Tensor
    spatial_weight: Tensor
    residual: Tensor | None = None


class Arguments(NamedTuple):
    """The options that the operators take. Every schema ends with them, in this order.

    ``Options`` in ``csrc/common/bindings.h`` has the same order.
    """

    num_heads: int
    channel_radius: int
    spatial_neighbors: int
    self_loops: bool
    sequential: bool
    scale: float
    relu: bool

    def check_backward(self, y: Tensor | None, needs: Sequence[bool]) -> None:
        """Raises ValueError if ``y`` or ``needs`` does not fit ``relu``.

        ``y`` is given exactly if ``relu`` is True, and the gradient of the residual is asked for only then.
        """
        if self.relu != (y is not None):
            raise ValueError(f"y must be {'the output of forward' if self.relu else 'None'} if relu is {self.relu}")
        if needs[3] and y is None:
            raise ValueError(
                "needs[3] must be False if relu is False: without a ReLU the residual's gradient is dy itself"
            )

    def options(self) -> Options:
        """The options of a unit with these arguments. They do not include the grid."""
        order, activation = "sequential" if self.sequential else "parallel", "relu" if self.relu else None
        heads, radius, neighbors, loops, _, scale, _ = self
        return make_options(heads, None, None, radius, neighbors, loops, order, scale, activation, False, None)


@dataclass(frozen=True)
class Options:
    """The options of one STEAM unit; :func:`steam_kernels.steam` explains each of them.

    ``grid_size`` is normalised: an int becomes a pair, and None becomes ``(7, 7)`` unless ``window`` is given.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of its range; the message names it.
    """

    num_heads: int = 4
    grid_size: int | tuple[int, int] | None = None
    window: int | None = None
    channel_radius: int = 1
    spatial_neighbors: int = 4
    self_loops: bool = True
    order: str = "sequential"
    scale: float = 1.0
    activation: str | None = None
    inplace: bool = False
    backend: str | None = None
    sequential: bool = field(init=False)
    relu: bool = field(init=False)
    #: The options in the form that the operators take.
    arguments: Arguments = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("num_heads", self.num_heads)
        if self.window is not None:
            if self.grid_size is not None:
                raise ValueError(
                    f"grid_size and window exclude each other, got grid_size={self.grid_size!r}, window={self.window!r}"
                )
            check_integer("window", self.window)
        else:
            object.__setattr__(self, "grid_size", _grid_size(self.grid_size))
        check_integer("channel_radius", self.channel_radius, 0)
        neighbors = self.spatial_neighbors
        if isinstance(neighbors, bool) or neighbors not in (4, 8):
            raise ValueError(f"spatial_neighbors must be 4 or 8, got {neighbors!r}")
        check_flag("self_loops", self.self_loops)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {self.order!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise TypeError(f"scale must be a finite float, got {self.scale!r}")
        if not -math.inf < self.scale < math.inf:
            raise ValueError(f"scale must be a finite float, got {self.scale!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or 'relu', got {self.activation!r}")
        check_flag("inplace", self.inplace)
        backends.check_name(self.backend)

        object.__setattr__(self, "sequential", self.order == "sequential")
        object.__setattr__(self, "relu", self.activation == "relu")
        graphs = self.num_heads, self.channel_radius, neighbors, self.self_loops
        object.__setattr__(self, "arguments", Arguments(*graphs, self.sequential, float(self.scale), self.relu))

    def given(self) -> dict[str, Any]:
        """The keyword arguments of :func:`steam_kernels.steam` that give these options."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def but(self, **changes: Any) -> Options:
        """A copy of these options with ``changes``, validated again."""
        return replace(self, **changes)

    def grid(self, height: Any, width: Any) -> tuple[int, int]:
        """The numbers of cells ``(gh, gw)`` on a map of ``height`` x ``width`` pixels: at most one cell per pixel."""
        window = self.window
        if window is not None:
            return ceil_div(height, window), ceil_div(width, window)
        gh, gw = self.grid_size  # type: ignore[misc]
        if type(height) is int and type(width) is int:
            return min(gh, height), min(gw, width)
        return _least(gh, height), _least(gw, width)

    def check(self, inputs: Inputs) -> tuple[int, int]:
        """Checks the tensors of one call and returns its grid.

        Raises:
            TypeError: an argument is not a tensor, or has a dtype that the unit does not take.
            ValueError: a shape or device is wrong; the message names the argument, what was given and what is allowed.
        """
        x, channel_weight, spatial_weight, residual = inputs
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of shape (N, C, H, W), got {type(x).__name__}")
        dtype, shape, device = x.dtype, x.shape, x.device
        if dtype not in _DTYPES:
            raise TypeError(f"x must be of dtype float16, bfloat16, float32 or float64, got {dtype}")
        if len(shape) != 4:
            raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {tuple(shape)}")
        if x.layout is not _STRIDED:
            raise TypeError(f"x must be a dense (strided) tensor, got layout {x.layout}")
        _, channels, height, width = shape
        if channels == 0 or height == 0 or width == 0:
            raise ValueError(f"x must have C, H and W of at least 1, got shape {tuple(shape)}")
        weights = _check_weight("channel_weight", channel_weight, dtype, device)
        if _check_weight("spatial_weight", spatial_weight, dtype, device) != weights:
            raise ValueError(
                f"spatial_weight must be of channel_weight's shape {tuple(weights)}, got {tuple(spatial_weight.shape)}"
            )
        if weights[1] % self.num_heads:
            raise ValueError(f"num_heads must divide the weights' {weights[1]} columns, got {self.num_heads}")
        if residual is not None:
            _check_residual(residual, x)
        return self.grid(height, width)


def ceil_div(a: Any, b: Any) -> Any:
    """a / b rounded up. Both are sizes: ints, symbolic ints, or the tensors that stand for sizes in a trace.

    The formula has no negative operand. ONNX rounds the division of integers towards zero, so -(-a // b) would round
    down in an exported graph.
    """
    return (a + (b - 1)) // b


def _least(cells: int, size: Any) -> Any:
    # Python's min() would compare the sizes. The comparison would put a guard on a symbolic size and make a traced size
    # a constant, so an exported graph would serve only a few sizes.
    return torch.where(size < cells, size, cells) if isinstance(size, Tensor) else torch.sym_min(cells, size)


def _grid_size(value: Any) -> tuple[int, int]:
    if value is None:
        return DEFAULT_GRID, DEFAULT_GRID
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"grid_size must be an int or a pair of ints, got {value!r}")
    else:
        value = (value, value)
    for cells in value:
        check_integer("grid_size", cells)
    return value[0], value[1]


def _check_weight(name: str, weight: Any, dtype: torch.dtype, device: torch.device) -> torch.Size:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (4, embed_dim), got {type(weight).__name__}")
    shape = weight.shape
    if len(shape) != 2 or shape[0] != 4 or shape[1] == 0:
        raise ValueError(
            f"{name} must have shape (4, embed_dim): query, key, value and output rows, got {tuple(shape)}"
        )
    own = weight.dtype
    if own is not _FLOAT32 and own is not dtype:
        raise TypeError(f"{name} must be of dtype torch.float32 or x's {dtype}, got {own}")
    if weight.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {weight.device}")
    return shape


def _check_residual(residual: Any, x: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"{_RESIDUAL}, got {type(residual).__name__}")
    if residual.dtype is not x.dtype:
        raise TypeError(f"{_RESIDUAL}: {x.dtype} is allowed, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"{_RESIDUAL}: {tuple(x.shape)} is allowed, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"{_RESIDUAL}: {x.device} is allowed, got {residual.device}")


_cached_options = lru_cache(maxsize=1024, typed=True)(Options)
# Found once, because torch.compile cannot trace `fields` of a class.
_OPTION_NAMES = frozenset(f.name for f in fields(Options) if f.init)


def options_of(function: str, given: dict[str, Any]) -> Options:
    """The :class:`Options` of keyword arguments of ``function``.

    Raises:
        TypeError, ValueError: as :class:`Options`, and TypeError for a name that is not an option.
    """
    for name in given:
        if name not in _OPTION_NAMES:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return Options(**given)


def make_options(*options: Any) -> Options:
    """The :class:`Options` with these values of its fields, in their order. Each combination is validated only once.

    Raises:
        TypeError, ValueError: as :class:`Options`.
    """
    if torch.compiler.is_compiling():
        return Options(*options)
    try:
        return _cached_options(*options)
    except TypeError:
        # An option cannot be hashed: either the grid is a list, or the option is wrong and the constructor names it.
        return Options(*options)


def ring_offsets(channels: int, radius: int, self_loops: bool) -> tuple[int, ...]:
    """The neighbours of a channel as offsets modulo ``channels``. Each node occurs once.

    In a small ring, c - r and c + r may be the same node. An offset that wraps onto the channel itself counts as a self
    loop. A channel without neighbours attends to itself.
    """
    if channels > 2 * radius:
        offsets = [offset for offset in range(-radius, radius + 1) if offset or self_loops]
    else:
        offsets = [offset for offset in range(channels) if offset or self_loops]
    return tuple(offsets) or (0,)


def lattice_offsets(neighbors: int) -> tuple[tuple[int, int], ...]:
    """The 4 or 8 neighbours of a cell as (row, column) offsets, without the cell. They may lie beyond the edge."""
    offsets = [(-1, 0), (0, -1), (0, 1), (1, 0)]
    if neighbors == 8:
        offsets += [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    return tuple(offsets)
