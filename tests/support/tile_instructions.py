"""How many instructions of the graph stage's code belong to its tile: the loads, both sums, and the product with gates.

The PTX names for each instruction the line that it comes from, and the lines from which functions were called. In code
whose programs have one tile nothing of the tile is in a loop, so a warp executes each of these instructions once.
"""

from __future__ import annotations

import re
from pathlib import Path

#: Functions whose instructions belong to the tile, and functions whose instructions do not, whoever calls them.
OF_TILE = {"load_cells", "sum_of_cells", "sum_of_channels", "by_channel"}
OF_HALO = {"halo_sums"}
#: Lines whose instructions belong to the tile.
LINES = {"tile *= g", "tl.store(partial + ij, sum_of_channels(tile), mask=ij < cells)"}
LOC = re.compile(r"\.loc\s+(\d+ \d+ \d+)(?:,.*inlined_at (\d+ \d+ \d+))?")


def frames(ptx: str) -> list[list[tuple[str, int]]]:
    """For each instruction the file and the line that it comes from, and then those of its callers."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx))
    body = ptx[ptx.index("\n{") : ptx.index("\n}")]
    callers: dict[str, str | None] = {}
    out: list[list[tuple[str, int]]] = []
    place: str | None = None
    for line in map(str.strip, body.splitlines()):
        if found := LOC.match(line):
            place = found[1]
            callers[place] = found[2]
        elif line.endswith(";") and not line.startswith("."):
            chain: list[str] = []
            at = place
            while at is not None and at not in chain:
                chain.append(at)
                at = callers.get(at)
            places = [at.split() for at in chain]
            out.append([(Path(files[file]).name, int(number)) for file, number, _ in places])
    return out


def of_tile(ptx: str, source: Path) -> int:
    """The instructions of the tile; ``source`` is the file of the kernel."""
    lines = source.read_text().splitlines()
    functions = [""]
    for line in lines:
        found = re.match(r"def (\w+)", line)
        functions.append(found[1] if found else functions[-1])
    count = 0
    for chain in frames(ptx):
        numbers = [number for file, number in chain if file == source.name and number > 0]
        names = {functions[n] for n in numbers}
        is_line = any(lines[n - 1].strip() in LINES for n in numbers)
        count += (bool(names & OF_TILE) or is_line) and not names & OF_HALO
    return count
