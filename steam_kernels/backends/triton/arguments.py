"""The arguments that kernels share, in groups.

Device functions take groups. A kernel takes its constants in groups, and its runtime arguments one by one: Triton does
not apply ``do_not_specialize`` to the members of a tuple, and would compile a kernel again for a new size.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl

#: Sizes that change from call to call. The constants of a launch give the divisors on which the width of accesses
#: depends (``Layout``), so Triton does not specialise kernels by sizes.
DO_NOT_SPECIALIZE = (
    "samples",
    "rows",
    "steps",
    "channels",
    "area",
    "width",
    "grid_h",
    "grid_w",
    "heads",
    "head_width",
    "ring_first",
    "ring_count",
)


# ---- constants -------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The memory format of the maps, and the divisors by which the size arguments of a kernel are divided."""

    CHANNELS_LAST: bool = False
    CHANNELS_MULTIPLE: int = 1
    AREA_MULTIPLE: int = 1
    WIDTH_MULTIPLE: int = 1


class Options(NamedTuple):
    """The options of the unit: self loops of the ring and of the lattice, 8 neighbours, the order."""

    RING_LOOPS: bool
    LATTICE_LOOPS: bool
    DIAGONAL: bool
    SEQUENTIAL: bool


class PoolTile(NamedTuple):
    """Blocks of the pool stage. RUNS: ``pool_runs`` serves the map, else ``pool_tiles``. A block of 0 is not used."""

    RUNS: bool = False
    #: Whether all cells have the same width.
    UNIFORM: bool = False
    CHANNELS: int = 0
    ROWS: int = 0
    CELLS: int = 0
    COLUMNS: int = 0
    PIXELS: int = 0
    RUN: int = 0


class GraphTile(NamedTuple):
    """Blocks of the graph stage: tiles of CELLS x CHANNELS sums, NODES cells, and one weight's (HEADS, WIDTH)."""

    #: The channels of a program.
    CHANNELS: int
    #: The channels of a group. Several groups let a thread hold several channels of a cell and several cells of a
    #: channel, so that it adds up most of both sums in its own registers.
    LANES: int
    CELLS: int
    #: Whether one tile has all cells. The sums then stay in registers until the gates of their channels are known.
    ONCE: bool
    #: The length of a run of memory that holds a tile, or 0: the tile is read in place.
    RUN: int
    #: The rows and columns of pixels of every cell, if the programs pool them; or 0: their sums are given.
    ROWS: int
    COLUMNS: int
    #: The channels of the neighbouring blocks whose sums are read at once.
    HALO: int
    #: The blocks of channels whose partials are read at once.
    BLOCKS: int
    NODES: int
    HEADS: int
    WIDTH: int


class GateTile(NamedTuple):
    """Blocks of the gate stage: tiles of (ROWS, RUN) numbers; a row has GROUP channels."""

    GROUP: int
    ROWS: int
    RUN: int
    #: Whether a program may have several tiles. Without a loop, a thread needs fewer registers.
    LOOP: bool


class WeightsTile(NamedTuple):
    """Blocks of the gradients of the weights: one weight's (HEADS, WIDTH), and ROWS rows of partials at a time."""

    HEADS: int
    WIDTH: int
    ROWS: int


# ---- runtime arguments -----------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The sizes of a sample: C, H W, W, gh and gw."""

    channels: Any
    area: Any
    width: Any
    grid_h: Any
    grid_w: Any


class Weight(NamedTuple):
    """A weight (4, heads head_width) of one branch: the pointer, and the strides of its rows and columns."""

    data: Any
    row: Any
    column: Any
    heads: Any
    head_width: Any


@triton.jit
def sizes_of(channels, area, width, grid_h, grid_w, LAYOUT: tl.constexpr):
    """The sizes of a sample from the arguments of a kernel; ``width`` stays divided by its divisor."""
    return Sizes(channels * LAYOUT.CHANNELS_MULTIPLE, area * LAYOUT.AREA_MULTIPLE, width, grid_h, grid_w)


@triton.jit
def weights_of(
    channel_weight, channel_row, channel_column, spatial_weight, spatial_row, spatial_column, heads, head_width
):  # fmt: skip
    """Both weights from the arguments of a kernel."""
    channel = Weight(channel_weight, channel_row, channel_column, heads, head_width)
    return channel, Weight(spatial_weight, spatial_row, spatial_column, heads, head_width)


@triton.jit
def weight_numbers(weight, TILE: tl.constexpr, ACC: tl.constexpr):
    """The rows of a weight, (HEADS, WIDTH) each: query, key, value and output, 0 beyond the heads and their width."""
    # [HEADS, 1] and [1, WIDTH]
    head = tl.arange(0, TILE.HEADS)[:, None]
    k = tl.arange(0, TILE.WIDTH)[None, :]
    # [HEADS, WIDTH]
    inside = (head < weight.heads) & (k < weight.head_width)
    at = weight.data + (head * weight.head_width + k) * weight.column
    query = tl.load(at, mask=inside, other=0.0).to(ACC)
    key = tl.load(at + weight.row, mask=inside, other=0.0).to(ACC)
    value = tl.load(at + 2 * weight.row, mask=inside, other=0.0).to(ACC)
    output = tl.load(at + 3 * weight.row, mask=inside, other=0.0).to(ACC)
    return query, key, value, output


@triton.jit
def program_of(blocks):
    """The sample and the block of this program; a sample has ``blocks`` programs."""
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


# ---- groups on the host ----------------------------------------------------------------------------------------------

#: Whether Triton's interpreter runs the kernels: whether TRITON_INTERPRET was 1 when this module was imported.
INTERPRETED = not isinstance(sizes_of, triton.JITFunction)

Group = TypeVar("Group", bound=tuple[Any, ...])


def constants(kind: type[Group], members: dict[str, Any]) -> Group:
    """A group of constants, as kernels take them.

    The compiler of Triton 3.4 needs each member to be a ``tl.constexpr``. The interpreter cannot compute with tensors
    and ``tl.constexpr``, and needs plain values. Equal groups are one object, because a launch looks up its kernel by
    the groups, and Python compares an object with itself faster.
    """
    return _group(kind, kind(**members))


@functools.cache  # a launch table has few groups
def _group(kind: type[Group], members: Group) -> Group:
    return members if INTERPRETED else kind(*map(tl.constexpr, members))
