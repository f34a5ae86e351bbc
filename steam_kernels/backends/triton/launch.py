"""The launch table: block shapes, warps and stages as pure functions of (shape, dtype, layout, architecture family).

Nothing is tuned at run time: a new shape costs a look-up here and, where a constant differs, one compilation. Sizes are
arguments; constants are what shapes a tile (powers of two), the unit's options, and how far sizes are divisible (up to
a 16-byte access), since that decides how wide the accesses are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Family:
    """An architecture family, as far as the table cares."""

    #: Multiprocessors (compute units) that want to be busy.
    processors: int
    #: Threads of a warp.
    warp: int = 32
    #: Registers that a thread may have, where the compiler is to be told.
    registers: int | None = 255


#: By the name of the compilation target; "generic" is what an unknown device gets.
FAMILIES = {
    "generic": Family(processors=80, registers=None),
    "sm70": Family(processors=80),
    "sm80": Family(processors=108),
    "sm90": Family(processors=132),
    "sm100": Family(processors=148),
    "gfx9": Family(processors=304, warp=64, registers=None),
}


@dataclass(frozen=True)
class Problem:
    """What the table is asked about: one call's shape, element size in bytes, layout and family."""

    samples: int
    channels: int
    height: int
    width: int
    grid_h: int
    grid_w: int
    itemsize: int
    channels_last: bool = False
    backward: bool = False
    family: str = "generic"

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def cells(self) -> int:
        return self.grid_h * self.grid_w

    @property
    def pixel_cells(self) -> bool:
        """Whether every cell is one pixel, so that the map is its own sums."""
        return self.cells == self.area

    @property
    def vector(self) -> int:
        """Elements of a 16-byte access."""
        return 16 // self.itemsize

    @property
    def processors(self) -> int:
        return FAMILIES[self.family].processors


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched: ``programs`` in a one-dimensional grid, its constants, warps and stages."""

    kernel: str
    programs: int
    constants: dict[str, Any] = field(hash=False)
    num_warps: int = 4
    #: No kernel has a loop that feeds a matrix product, which is what stages are for.
    num_stages: int = 1
    #: Registers a thread, where occupancy does not matter: ptxas would otherwise spill to fit more programs.
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def unit(n: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides n."""
    return min(n & -n, most)


def fitting(size: int, most: int, least: int) -> int:
    """The largest block from ``most`` down to ``least`` that covers ``size`` with a tenth to spare, or tightest."""
    if size <= least:
        return power(size)
    blocks = [b for b in (most >> k for k in range(most.bit_length())) if least <= b <= power(size)]
    padded = [ceil_div(size, b) * b for b in blocks]
    good = [b for b, p in zip(blocks, padded, strict=True) if p * 9 <= size * 10]
    return good[0] if good else blocks[padded.index(min(padded))]


def steps(programs: int, processors: int, most: int) -> int:
    """How many tiles a program walks to share what it works out once: as many as leave 16 programs a processor."""
    return max(1, min(most, programs // (16 * processors)))


def pool_tile(p: Problem) -> int:
    """Elements of a pooling tile: 32 a thread; half of it backwards (two sums, three maps) and for float64."""
    return 4096 >> (p.backward + (p.itemsize == 8))


@lru_cache(maxsize=4096)
def pool(p: Problem) -> Launch | None:
    """Runs of whole small maps where a cell's row is no whole number of wide accesses, else tiles of cells."""
    if p.pixel_cells:
        return None
    cell_width, cell_height = ceil_div(p.width, p.grid_w), ceil_div(p.height, p.grid_h)
    uniform = p.width % p.grid_w == 0
    if not p.channels_last and not (uniform and cell_width % p.vector == 0):
        launch = pool_runs(p, power(p.cells), power(cell_width * cell_height))
        if launch is not None:
            return launch
    return pool_tiles(p, cell_width, cell_height, uniform)


def pool_runs(p: Problem, cells: int, pixels: int) -> Launch | None:
    """As many whole maps as fill a tile; None where not even one does."""
    tile = pool_tile(p)
    channels = power(p.channels)
    # sorted into cells a tile may be up to twice as large, by ragged cells and powers of two
    while channels > 1 and (channels * p.area > tile or channels * cells * pixels > 2 * tile):
        channels //= 2
    if channels * p.area > tile or channels * cells * pixels > 2 * tile:
        return None
    blocks = ceil_div(p.channels, channels)
    # eight runs pay for the divisions that place a pixel in its cell
    walk = steps(p.samples * blocks, p.processors, 8)
    constants = {
        "CHANNEL_UNIT": unit(p.channels, p.vector),
        "AREA_UNIT": unit(p.area, p.vector),
        "CHANNELS": channels,
        "CELLS": cells,
        "PIXELS": pixels,
        "RUN": power(channels * p.area),
        "STEPS": walk,
    }
    return Launch("pool_runs", p.samples * ceil_div(blocks, walk), constants)


def pool_tiles(p: Problem, cell_width: int, cell_height: int, uniform: bool) -> Launch:
    """What is contiguous fills a tile first: channels where they are last, else the columns of neighbouring cells."""
    tile = pool_tile(p)
    if p.channels_last:
        channels = fitting(p.channels, 512, 64)  # 512 half-precision channels are one wide access of 64 threads
        columns = min(power(cell_width), tile // channels)
        rows = min(power(cell_height), tile // (channels * columns))
        cells = min(power(p.grid_w), tile // (channels * columns * rows))
    else:
        columns = min(power(cell_width), 256)
        cells = min(power(p.grid_w), max(1, 64 // columns))  # 64 columns: whole sectors of memory
        rows = min(power(cell_height), tile // (columns * cells), 16)
        channels = min(power(p.channels), tile // (columns * cells * rows))
    constants = {
        "CHANNEL_UNIT": unit(p.channels, p.vector),
        "AREA_UNIT": unit(p.area, p.vector),
        "WIDTH_UNIT": unit(cell_width, p.vector) if uniform else 1,
        "UNIFORM": uniform,
        "CHANNELS_LAST": p.channels_last,
        "CHANNELS": channels,
        "ROWS": rows,
        "CELLS": cells,
        "COLUMNS": columns,
    }
    programs = p.samples * p.grid_h * ceil_div(p.grid_w, cells) * ceil_div(p.channels, channels)
    return Launch("pool_tiles", programs, constants, maxnreg=FAMILIES[p.family].registers)


def graph_tile(p: Problem) -> int:
    """Elements of a graph tile: 32 a thread, fewer where both directions' numbers or float64 would spill."""
    wide = p.itemsize == 8
    return 8192 >> (p.backward + wide + (wide and not p.channels_last and not p.backward))


@lru_cache(maxsize=4096)
def graph(p: Problem, heads: int, head_width: int, reach: int) -> Launch:
    """One program a sample: its tiles are large, since only a program's own loads hide each other's latency."""
    tile = graph_tile(p)
    cells = min(power(p.cells), 128)
    channels = min(power(p.channels), tile // cells)
    runs = not p.channels_last and p.cells <= cells
    constants = {
        "CHANNEL_UNIT": unit(p.channels, p.vector),
        "CHANNELS_LAST": p.channels_last,
        "CHANNELS": channels,
        "CELLS": cells,
        "RUN": power(channels * p.cells) if runs else 0,
        # one node and head a thread, of 256
        "NODES": min(power(max(p.channels, p.cells)), max(1, 256 // power(heads))),
        "HEADS": power(heads),
        "WIDTH": power(head_width),
    }
    if p.backward:
        constants["ONCE"] = p.cells <= cells
    else:
        constants["WALK"] = p.cells <= cells and reach <= channels
    name = "graph_backward" if p.backward else "graph"
    of = FAMILIES[p.family]
    return Launch(name, p.samples, constants, num_warps=256 // of.warp, maxnreg=of.registers)


@lru_cache(maxsize=4096)
def gate(p: Problem) -> Launch:
    """Rows of whole wide accesses: a channel's pixels, those of a group of channels, or a pixel's channels."""
    # 32 elements a thread, four to eight wide loads in flight; half of it where that would spill
    narrow = not p.channels_last or unit(p.channels, p.vector) < p.vector
    tile = 4096 >> (p.itemsize == 8 or (p.backward and narrow))
    if p.channels_last:
        group = 1
        rows = fitting(p.channels, 512, 64)
        run = min(power(p.area), max(1, tile // rows))
    else:
        group = min(p.vector // unit(p.area, p.vector), power(p.channels))
        run = fitting(group * p.area, 1024, 128)
        rows = min(power(ceil_div(p.channels, group)), max(1, tile // run))
    row_blocks, run_blocks = ceil_div(ceil_div(p.channels, group), rows), ceil_div(group * p.area, run)
    # eight tiles pay for the divisions that find a column's cell
    walk = min(row_blocks, steps(p.samples * row_blocks * run_blocks, p.processors, 8))
    constants = {
        "CHANNEL_UNIT": unit(p.channels, p.vector),
        "AREA_UNIT": unit(p.area, p.vector),
        "CHANNELS_LAST": p.channels_last,
        "GROUP": group,
        "ROWS": rows,
        "RUN": run,
        "STEPS": walk,
    }
    name = "gate_backward" if p.backward else "gate"
    return Launch(name, p.samples * ceil_div(row_blocks, walk) * run_blocks, constants)


#: Elements of a sample, at most, that one program sees through all stages: 64 for each of 256 threads.
SMALL = 16384


def is_small(p: Problem) -> bool:
    """Whether a sample is one program's."""
    return p.channels * p.area * max(1, p.itemsize // 4) <= SMALL


@lru_cache(maxsize=4096)
def whole(p: Problem, heads: int, head_width: int, reach: int) -> Launch:
    """The stages' own tiles, by as many threads as the graph stage wants."""
    pooling, graphs, gating = pool(p), graph(p, heads, head_width, reach), gate(p)
    of_pool = {} if pooling is None else pooling.constants
    constants: dict[str, Any] = {
        "CHANNEL_UNIT": unit(p.channels, p.vector),
        "AREA_UNIT": unit(p.area, p.vector),
        "WIDTH_UNIT": of_pool.get("WIDTH_UNIT", 1),
        "CHANNELS_LAST": p.channels_last,
        "POOL_RUNS": pooling is not None and pooling.kernel == "pool_runs",
        "POOL_UNIFORM": of_pool.get("UNIFORM", False),
        "HEADS": power(heads),
        "WIDTH": power(head_width),
    }
    for name in ("CHANNELS", "ROWS", "CELLS", "COLUMNS", "PIXELS", "RUN"):
        constants["POOL_" + name] = of_pool.get(name, 0)
    for name in ("CHANNELS", "CELLS", "ONCE" if p.backward else "WALK", "RUN", "NODES"):
        constants["GRAPH_" + name] = graphs.constants[name]
    for name in ("GROUP", "ROWS", "RUN"):
        constants["GATE_" + name] = gating.constants[name]
    constants["GATE_STEPS"] = ceil_div(ceil_div(p.channels, constants["GATE_GROUP"]), constants["GATE_ROWS"])
    return Launch(
        "whole_backward" if p.backward else "whole", p.samples, constants, graphs.num_warps, maxnreg=graphs.maxnreg
    )


def weights(heads: int, head_width: int) -> Launch:
    """One program of one warp: a few numbers a sample, 64 samples at a time."""
    constants = {"HEADS": power(heads), "WIDTH": power(head_width), "SAMPLES": 64}
    return Launch("weights_backward", 1, constants, num_warps=1)
