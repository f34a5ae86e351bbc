"""The launch table: block shapes, warps and registers as pure functions of a pass.

Nothing is tuned at run time: a new shape costs a look-up here and, if a constant differs, one compilation. Sizes are
arguments. Constants are the blocks that shape a tile (powers of two), the options of the unit, and the powers of two
that divide the sizes (up to a 16-byte access), because they decide the width of accesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from .arguments import GateTile, GraphTile, Layout, PoolTile, WeightsTile, constants


@dataclass(frozen=True)
class Family:
    """The properties of an architecture family that the table uses."""

    #: Multiprocessors (compute units) that must have work.
    processors: int
    #: Threads of a warp.
    warp: int = 32
    #: The limit of registers per thread that the compiler is told; None: the compiler's own limit.
    registers: int | None = 255


#: By the name of the compilation target; an unknown device is "generic".
FAMILIES = {
    "generic": Family(processors=80, registers=None),
    "sm70": Family(processors=80),
    "sm80": Family(processors=108),
    "sm90": Family(processors=132),
    "sm100": Family(processors=148),
    "gfx9": Family(processors=304, warp=64, registers=None),
}


@dataclass(frozen=True)
class Pass:
    """The forward or backward pass of one call: the shape, element size in bytes, memory format and family."""

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
        """Whether every cell is one pixel. The map is then its own sums."""
        return self.cells == self.area

    @property
    def vector(self) -> int:
        """Elements of a 16-byte access."""
        return 16 // self.itemsize

    @property
    def processors(self) -> int:
        return FAMILIES[self.family].processors


#: The groups of constants that each kernel takes. A constant has the name of its member. In kernels of several stages,
#: the name of a stage's group comes first: POOL_ROWS.
GROUPS: dict[str, dict[str, Any]] = {
    "pool_runs": {"LAYOUT": Layout, "TILE": PoolTile},
    "pool_tiles": {"LAYOUT": Layout, "TILE": PoolTile},
    "graph": {"LAYOUT": Layout, "TILE": GraphTile},
    "lattice": {"LAYOUT": Layout, "TILE": GraphTile},
    "graph_backward_cells": {"LAYOUT": Layout, "TILE": GraphTile},
    "lattice_backward": {"LAYOUT": Layout, "TILE": GraphTile},
    "graph_backward_ring": {"LAYOUT": Layout, "TILE": GraphTile},
    "gate": {"LAYOUT": Layout, "TILE": GateTile},
    "gate_backward": {"LAYOUT": Layout, "TILE": GateTile},
    "whole": {"LAYOUT": Layout, "POOL": PoolTile, "GRAPH": GraphTile, "GATE": GateTile},
    "whole_backward": {"LAYOUT": Layout, "POOL": PoolTile, "GRAPH": GraphTile, "GATE": GateTile},
    "weights_backward": {"TILE": WeightsTile},
}


#: The kernels in which the compiler may contract a product and a sum. The others add up products across the lanes of a
#: warp: contracted into the first step of a butterfly, a product would be rounded in one lane and not in the other, and
#: lanes that hold copies of one sum would hold different bits.
FUSING = ("gate_backward",)


@dataclass(frozen=True)
class Launch:
    """The launch of one kernel: ``programs`` in a one-dimensional grid, the constants, warps and stages."""

    kernel: str
    programs: int
    constants: dict[str, Any] = field(hash=False)
    #: The tiles of a program one after the other, a runtime argument of ``pool_runs`` and of the gate stage.
    steps: int = 1
    num_warps: int = 4
    #: Stages pipeline the loads of a matrix product, and no kernel has one.
    num_stages: int = 1
    #: The limit of registers per thread for kernels whose occupancy does not matter. Without a limit ptxas spills, to
    #: make room for more programs.
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Everything that distinguishes compilations: the constants, warps, stages and the limit of registers."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        fusion = {} if self.kernel in FUSING else {"enable_fp_fusion": False}
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit, **fusion}

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the launch: the options, with the constants in the groups that the kernel takes."""
        options, out = self.options, {}
        for group, kind in GROUPS[self.kernel].items():
            prefix = "" if group in ("LAYOUT", "TILE") else f"{group}_"
            members = {name: options.pop(prefix + name) for name in kind._fields if prefix + name in options}
            out[group] = constants(kind, members)
        return out | options


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def divisor(n: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides n."""
    return min(n & -n, most)


def fitting(size: int, most: int, least: int) -> int:
    """The largest block of ``least`` to ``most`` that wastes at most a tenth of its elements on ``size``.

    If there is none, the block that wastes the least.
    """
    if size <= least:
        return power(size)
    blocks = [b for b in (most >> k for k in range(most.bit_length())) if least <= b <= power(size)]
    padded = [ceil_div(size, b) * b for b in blocks]
    good = [b for b, p in zip(blocks, padded, strict=True) if p * 9 <= size * 10]
    return good[0] if good else blocks[padded.index(min(padded))]


def steps(programs: int, processors: int, most: int) -> int:
    """The tiles of one program, which share index arithmetic: as many as leave 16 programs per processor."""
    return max(1, min(most, programs // (16 * processors)))


def pool_tile(p: Pass) -> int:
    """Elements of a pooling tile: 32 per thread; half of them backward (two sums, three maps) and for float64."""
    return 4096 >> (p.backward + (p.itemsize == 8))


@lru_cache(maxsize=4096)
def pool(p: Pass) -> Launch | None:
    """The pool stage, unless the graph stage reads the map itself."""
    return None if is_pooled_by_graph(p) else pool_alone(p)


def pool_alone(p: Pass) -> Launch | None:
    """Runs of whole small maps if a row of a cell is not a whole number of wide accesses, else tiles of cells."""
    if p.pixel_cells:
        return None
    cell_width, cell_height = ceil_div(p.width, p.grid_w), ceil_div(p.height, p.grid_h)
    uniform = p.width % p.grid_w == 0
    if not p.channels_last and not (uniform and cell_width % p.vector == 0):
        launch = pool_runs(p, power(p.cells), power(cell_width * cell_height))
        if launch is not None:
            return launch
    return pool_tiles(p, cell_width, cell_height, uniform)


def pool_runs(p: Pass, cells: int, pixels: int) -> Launch | None:
    """As many whole maps as a tile has room for; None if a tile has no room for one."""
    tile = pool_tile(p)
    channels = power(p.channels)
    # Cells of different sizes and powers of two make the tile up to twice as large once it is sorted into cells.
    while channels > 1 and (channels * p.area > tile or channels * cells * pixels > 2 * tile):
        channels //= 2
    if channels * p.area > tile or channels * cells * pixels > 2 * tile:
        return None
    blocks = ceil_div(p.channels, channels)
    # The divisions that find the cells of pixels are done once for up to eight runs.
    walk = steps(p.samples * blocks, p.processors, 8)
    constants = {
        "CHANNELS_MULTIPLE": divisor(p.channels, p.vector),
        "AREA_MULTIPLE": divisor(p.area, p.vector),
        "CHANNELS": channels,
        "CELLS": cells,
        "PIXELS": pixels,
        "RUN": power(channels * p.area),
    }
    return Launch("pool_runs", p.samples * ceil_div(blocks, walk), constants, steps=walk)


def pool_tiles(p: Pass, cell_width: int, cell_height: int, uniform: bool) -> Launch:
    """A tile is filled along contiguous memory first: channels in channels_last, else columns of neighbouring cells."""
    tile, warps = pool_tile(p), 4
    if p.channels_last:
        channels, warps = pool_channels(p, cell_width, cell_height)
        tile = tile * warps // 4
        columns = min(power(cell_width), tile // channels)
        rows = min(power(cell_height), tile // (channels * columns))
        cells = min(power(p.grid_w), tile // (channels * columns * rows))
    else:
        columns = min(power(cell_width), 256)
        cells = min(power(p.grid_w), max(1, 64 // columns))  # 64 columns are whole sectors of memory
        rows = min(power(cell_height), tile // (columns * cells), 16)
        channels = min(power(p.channels), tile // (columns * cells * rows))
    constants = {
        "CHANNELS_MULTIPLE": divisor(p.channels, p.vector),
        "AREA_MULTIPLE": divisor(p.area, p.vector),
        "WIDTH_MULTIPLE": divisor(cell_width, p.vector) if uniform else 1,
        "UNIFORM": uniform,
        "CHANNELS_LAST": p.channels_last,
        "CHANNELS": channels,
        "ROWS": rows,
        "CELLS": cells,
        "COLUMNS": columns,
    }
    programs = p.samples * p.grid_h * ceil_div(p.grid_w, cells) * ceil_div(p.channels, channels)
    return Launch("pool_tiles", programs, constants, num_warps=warps, maxnreg=FAMILIES[p.family].registers)


def pool_channels(p: Pass, cell_width: int, cell_height: int) -> tuple[int, int]:
    """The channels of a tile in channels_last, and its warps.

    The fewer channels, the more programs has a sample, and the fewer tiles has a program one after the other. The
    channels are the most for which a program has one tile, with at least 64 bytes. In large maps a program has two
    tiles, or up to eight tiles of twice the size, with at least 32 bytes, a whole sector of memory.
    """

    def tiles(channels: int, warps: int) -> int:
        tile = pool_tile(p) * warps // 4
        columns = min(power(cell_width), tile // channels)
        rows = min(power(cell_height), tile // (channels * columns))
        return ceil_div(cell_height, rows) * ceil_div(cell_width, columns)

    channels, least = fitting(p.channels, 512, 64), 64 // p.itemsize
    while channels > least and tiles(channels, 4) > 1:
        channels //= 2
    if tiles(channels, 4) <= 2:
        return channels, 4
    return channels if tiles(channels, 8) <= 8 else min(channels, least // 2), 8


#: The threads of a program of the graph stage that has a block of channels, of one that has the cells of a sample, and
#: of one that has a whole sample.
GRAPH_THREADS, LATTICE_THREADS, WHOLE_THREADS = 128, 256, 256
#: The most cells of a tile of the graph stage.
MOST_CELLS = 128


def is_pooled_by_graph(p: Pass) -> bool:
    """Whether the programs of the graph stage pool the cells of their channels: cells of two or four pixels, in at most
    two rows.

    They read the map once, as the pool stage does, and its sums are neither written nor read. The pixels of a tile with
    larger cells have no room in registers, and those with more rows have none in 64 KiB of shared memory. Backward two
    launches need the sums.
    """
    rows, columns = p.height // p.grid_h, p.width // p.grid_w
    equal = p.area == rows * columns * p.cells
    return not p.backward and equal and rows <= 2 and rows * columns in (2, 4) and p.cells <= MOST_CELLS


def graph_blocks(p: Pass, heads: int, head_width: int, tile: int, pools: bool = False) -> dict[str, Any]:
    """The constants of the graph stage, with tiles of at most ``tile`` elements; ``pools``: of cells of a map.

    They decide the order of sums, and do not depend on the number of samples: a sample has the same bits in any batch.
    """
    cells = min(power(p.cells), MOST_CELLS)
    # The ring's transform has a number for each channel and head: eight for a thread.
    channels = max(1, min(power(p.channels), tile // cells, 256, 1024 // power(heads)))
    once = p.cells <= cells
    runs = once and not p.channels_last
    return {
        "CHANNELS_MULTIPLE": divisor(p.channels, p.vector),
        "CHANNELS_LAST": p.channels_last,
        "CHANNELS": channels,
        # In channels_last the wide loads of one group have this effect.
        "LANES": min(16, channels) if runs else channels,
        "CELLS": cells,
        "ONCE": once,
        "RUN": power(channels * (p.area if pools else p.cells)) if runs else 0,
        "ROWS": p.height // p.grid_h if pools else 0,
        "COLUMNS": p.width // p.grid_w if pools else 0,
        "HALO": max(2, min(16, 128 // cells)),
        "BLOCKS": min(power(ceil_div(p.channels, channels)), max(1, 2048 // cells)),
        # One cell and head per thread.
        "NODES": min(power(p.cells), max(1, LATTICE_THREADS // power(heads))),
        "HEADS": power(heads),
        "WIDTH": power(head_width),
    }


def stage_blocks(p: Pass, heads: int, head_width: int) -> dict[str, Any]:
    """The constants of the graph stage in launches of its own.

    A tile has 32 sums for each thread, and half of them in float64 or if the programs pool: 64 pixels for each thread.
    """
    pools = is_pooled_by_graph(p)
    return graph_blocks(p, heads, head_width, GRAPH_THREADS * 32 >> (p.itemsize == 8) >> pools, pools)


def channel_blocks(p: Pass, heads: int, head_width: int) -> int:
    """The blocks of channels of a sample."""
    return ceil_div(p.channels, stage_blocks(p, heads, head_width)["CHANNELS"])


def graph_stage(p: Pass, kernel: str, programs: int, threads: int, heads: int, head_width: int) -> Launch:
    of = FAMILIES[p.family]
    constants = stage_blocks(p, heads, head_width)
    if kernel in ("graph", "graph_backward_cells"):
        # They read no partials, and are compiled once for all numbers of channels.
        constants["BLOCKS"] = 1
    return Launch(kernel, programs, constants, num_warps=threads // of.warp, maxnreg=of.registers)


@lru_cache(maxsize=4096)
def graph(p: Pass, heads: int, head_width: int) -> Launch:
    """One program per block of channels. Backward, it is the launch of the ring."""
    kernel = "graph_backward_ring" if p.backward else "graph"
    return graph_stage(p, kernel, p.samples * channel_blocks(p, heads, head_width), GRAPH_THREADS, heads, head_width)


@lru_cache(maxsize=4096)
def cells(p: Pass, heads: int, head_width: int, merged: bool) -> Launch:
    """One program per block of channels, and if ``merged`` one per sample, for the derivatives of the lattice."""
    programs = p.samples * (channel_blocks(p, heads, head_width) + merged)
    return graph_stage(p, "graph_backward_cells", programs, GRAPH_THREADS, heads, head_width)


@lru_cache(maxsize=4096)
def lattice(p: Pass, heads: int, head_width: int) -> Launch:
    """One program per sample."""
    kernel = "lattice_backward" if p.backward else "lattice"
    return graph_stage(p, kernel, p.samples, LATTICE_THREADS, heads, head_width)


@lru_cache(maxsize=4096)
def merges_lattice(p: Pass, heads: int, head_width: int) -> bool:
    """Whether programs of another launch compute the lattice of their sample, each of them alone: those of the gate
    stage forward, and those of ``graph_backward_ring`` backward. Otherwise the lattice has a launch of its own.

    A launch takes longer than the work, if a program has at most four pairs of a cell and a head for each thread, and
    adds up the partials of all blocks of channels at once.
    """
    most = stage_blocks(p, heads, head_width)["BLOCKS"]
    return power(p.cells) * power(heads) <= 512 and channel_blocks(p, heads, head_width) <= most


#: The most threads that a program of the gate stage has, alone or in a whole sample.
GATE_THREADS = 256


@lru_cache(maxsize=4096)
def gate(p: Pass) -> Launch:
    """Rows of whole wide accesses: the pixels of a channel or of a group of channels, or the channels of a pixel."""
    # 32 elements per thread are four to eight wide loads in flight. Half of them if that would spill.
    narrow = not p.channels_last or divisor(p.channels, p.vector) < p.vector
    tile = 4096 >> (p.itemsize == 8 or (p.backward and narrow))
    if p.channels_last:
        group = 1
        rows = fitting(p.channels, 512, 64)
        run = min(power(p.area), max(1, tile // rows))
    else:
        group = min(p.vector // divisor(p.area, p.vector), power(p.channels))
        run = fitting(group * p.area, 1024, 128)
        rows = min(power(ceil_div(p.channels, group)), max(1, tile // run))
    # No element has copies in other threads: a copy of x could be read after its owner has stored y in its place.
    rows = max(rows, ceil_div(GATE_THREADS, run))
    row_blocks, run_blocks = ceil_div(ceil_div(p.channels, group), rows), ceil_div(group * p.area, run)
    # The divisions that find the cells of columns are done once for up to eight tiles. A tile in channels_last has few
    # columns.
    loop = not p.channels_last and row_blocks > 1
    walk = min(row_blocks, steps(p.samples * row_blocks * run_blocks, p.processors, 8)) if loop else 1
    constants = {
        "CHANNELS_MULTIPLE": divisor(p.channels, p.vector),
        "AREA_MULTIPLE": divisor(p.area, p.vector),
        "CHANNELS_LAST": p.channels_last,
        "GROUP": group,
        "ROWS": rows,
        "RUN": run,
        "LOOP": loop,
    }
    name = "gate_backward" if p.backward else "gate"
    return Launch(name, p.samples * ceil_div(row_blocks, walk) * run_blocks, constants, steps=walk)


#: The most elements of a sample that one program processes through all stages: 64 for each of 256 threads.
SMALL = 16384


def is_small(p: Pass) -> bool:
    """Whether one program processes all stages of a sample."""
    return p.channels * p.area * max(1, p.itemsize // 4) <= SMALL


@lru_cache(maxsize=4096)
def whole(p: Pass, heads: int, head_width: int) -> Launch:
    """The tiles of each stage, with more threads than those of the graph stage."""
    pooling, gating, of = pool_alone(p), gate(p), FAMILIES[p.family]
    graphs = graph_blocks(p, heads, head_width, WHOLE_THREADS * 32 >> (p.backward + (p.itemsize == 8)))
    of_pool = {} if pooling is None else pooling.constants
    constants: dict[str, Any] = {
        "CHANNELS_MULTIPLE": divisor(p.channels, p.vector),
        "AREA_MULTIPLE": divisor(p.area, p.vector),
        "WIDTH_MULTIPLE": of_pool.get("WIDTH_MULTIPLE", 1),
        "CHANNELS_LAST": p.channels_last,
        "POOL_RUNS": pooling is not None and pooling.kernel == "pool_runs",
        "POOL_UNIFORM": of_pool.get("UNIFORM", False),
    }
    for name in ("CHANNELS", "ROWS", "CELLS", "COLUMNS", "PIXELS", "RUN"):
        constants["POOL_" + name] = of_pool.get(name, 0)
    for name in GraphTile._fields:
        constants["GRAPH_" + name] = graphs[name]
    for name in GateTile._fields:
        constants["GATE_" + name] = gating.constants[name]
    kernel = "whole_backward" if p.backward else "whole"
    return Launch(kernel, p.samples, constants, num_warps=WHOLE_THREADS // of.warp, maxnreg=of.registers)


@lru_cache(maxsize=64)
def weights(heads: int, head_width: int) -> Launch:
    """One program. It has eight numbers per thread of the partials of da, and of db, at a time."""
    constants = {"HEADS": power(heads), "WIDTH": power(head_width), "ROWS": max(1, 1024 // power(heads))}
    return Launch("weights_backward", 1, constants)
