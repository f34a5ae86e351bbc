"""The targets of the design of the GPU kernels, for an H100, and whether counts and estimates meet them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu_model import estimate
from benchmarks.gpu_model.gpus import GPUS, Gpu
from benchmarks.gpu_model.launches import CALLS, DIRECTIONS, Launch, Record, map_bytes, name_of

GPU = "h100"
HEAD = (
    "target", "call", "estimate over floor", "Inductor over ours", "launches of few programs", "tiles",
    "instructions a warp and tile, graph",
)  # fmt: skip
#: The estimate over the floor at most, by the height of the map.
OVER_FLOOR = {
    "forward": {56: 1.6, 28: 1.6, 14: 1.8, 7: 2.4},
    "backward": {56: 1.6, 28: 1.8, 14: 2.3, 7: 3.5},
}
#: The estimate for Inductor's code over ours at least.
OVER_INDUCTOR = {56: 1.0, 28: 1.0, 14: 1.8, 7: 1.8}
#: Programs for each multiprocessor at least, unless all programs run at once.
PROGRAMS = 4
#: Tiles of a program one after the other at most.
TILES = 8
#: Instructions of a warp that belong to the tile of the graph stage forward: 128 channels of 49 cells for eight warps,
#: or as much work for each of fewer warps.
INSTRUCTIONS = {"nchw": 700, "channels_last": 500}


def instructions_a_warp(launch: Launch, gpu: Gpu) -> int:
    return -(-launch.program.instructions // estimate.warps(launch, gpu))


def starved(calls: list[Launch], gpu: Gpu) -> list[Launch]:
    """The launches with too few programs that do not run at once."""
    few = [launch for launch in calls if launch.programs < PROGRAMS * gpu.multiprocessors]
    return [launch for launch in few if len(estimate.waves(launch, gpu)) > 1]


def judged(found: float, sign: str, allowed: float) -> str:
    """A figure and its target, and whether they agree."""
    met = found <= allowed if sign == "≤" else found >= allowed
    return f"{found:.4g} {sign} {allowed:g}" if met else f"{found:.4g}, not {sign} {allowed:g}"


def rows(record: Record) -> Iterator[tuple[str, ...]]:
    """A row for each call: the figure of each target, and what is allowed."""
    gpu = GPUS[GPU]
    for direction in DIRECTIONS:
        for call, ((_, _, height, _), layout) in CALLS.items():
            name = name_of(call, direction)
            ours = record.ours[GPU][name]
            seconds = estimate.call_seconds(ours, gpu)
            floor = estimate.floor_seconds(map_bytes(call), direction, gpu)
            inductor = estimate.call_seconds(record.inductor[name], gpu)
            graph = [launch.of_tile for launch in ours if launch.kernel == "graph"]
            yield (
                name,
                judged(seconds / floor, "≤", OVER_FLOOR[direction][height]),
                judged(inductor / seconds, "≥", OVER_INDUCTOR[height]),
                judged(len(starved(ours, gpu)), "≤", 0),
                judged(max(launch.tiles for launch in ours), "≤", TILES),
                judged(graph[0], "≤", INSTRUCTIONS[layout]) if graph else "",
            )
