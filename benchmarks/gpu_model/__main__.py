"""Estimates of the time of the GPU kernels, from counts of their code. No GPU has checked them.

    python -m benchmarks.gpu_model --gpu h100             # a line for each call, in Markdown
    python -m benchmarks.gpu_model --gpu h100 --launches  # and a line for each launch
    python -m benchmarks.gpu_model --gpu h100 --write     # and writes the tables of docs/gpu.md anew
    python -m benchmarks.gpu_model --gpu h100 --count     # counts anew first, for every GPU, in some minutes

docs/gpu.md describes the model and its limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.commandline import parser_of
from benchmarks.gpu_model import estimate, launches, targets
from benchmarks.gpu_model.gpus import GPUS, Gpu
from benchmarks.gpu_model.launches import CALLS, DIRECTIONS, Launch, Record, map_bytes, name_of
from benchmarks.tables import fill_marks, markdown_table, say

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
#: Every line of figures begins with this word.
ESTIMATE = "estimate"
CALL_HEAD = (
    "", "call, µs", "floor", "kernels", "launches", "sum", "over floor", "Inductor: kernels", "launches", "sum",
    "over ours",
)  # fmt: skip
BEFORE_HEAD = ("", "call, µs", "commit 215d867", "over floor", "today", "over floor")
STRUCTURE_HEAD = ("call", "launches", "programs for each multiprocessor", "tiles of a program", "sum")
LAUNCH_HEAD = (
    "", "launch", "programs", "per multiprocessor", "waves", "tiles", "instructions a warp",
    "in machine code", "load rounds", "registers", "MB", "memory µs", "cache µs", "work µs",
)  # fmt: skip


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def call_rows(record: Record, gpu: str) -> Iterator[tuple[str, ...]]:
    """A row for each call: its floor, the estimate for our kernels, and the one for Inductor's."""
    of = GPUS[gpu]
    for direction in DIRECTIONS:
        for call in CALLS:
            name = name_of(call, direction)
            floor = estimate.floor_seconds(map_bytes(call), direction, of)
            found = [record.ours[gpu][name], record.inductor[name]]
            parts = [[f(each, of) for f in (estimate.kernels_seconds, estimate.launches_seconds)] for each in found]
            ours, inductor = map(sum, parts)
            cells = [micro(floor), *map(micro, (*parts[0], ours)), f"{ours / floor:.2f}"]
            cells += [*map(micro, (*parts[1], inductor)), f"{inductor / ours:.2f}"]
            yield (ESTIMATE, name, *cells)


def before_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """A row for each call: the estimate for the kernels of commit 215d867, and for those of today."""
    of = GPUS[targets.GPU]
    for direction in DIRECTIONS:
        for call in CALLS:
            name = name_of(call, direction)
            floor = estimate.floor_seconds(map_bytes(call), direction, of)
            found = [estimate.call_seconds(each[name], of) for each in (record.before, record.ours[targets.GPU])]
            over = [f"{seconds / floor:.2f}" for seconds in found]
            yield ESTIMATE, name, micro(found[0]), over[0], micro(found[1]), over[1]


def structure_rows(record: Record, gpu: str) -> Iterator[tuple[str, ...]]:
    """A row for each call: programs for each multiprocessor, and tiles one after the other, of each launch."""
    of = GPUS[gpu]
    for direction in DIRECTIONS:
        for call in CALLS:
            ours = record.ours[gpu][name_of(call, direction)]
            programs = ", ".join(f"{each.kernel} {each.programs / of.multiprocessors:.1f}" for each in ours)
            tiles = ", ".join(str(each.tiles) for each in ours)
            seconds = micro(estimate.call_seconds(ours, of))
            yield name_of(call, direction), str(len(ours)), programs, tiles, f"{ESTIMATE} {seconds} µs"


def launch_rows(calls: Sequence[Launch], gpu: Gpu) -> Iterator[tuple[str, ...]]:
    """A row for each launch of a call. Programs, tiles, instructions, rounds and registers are counts."""
    for launch, times in zip(calls, estimate.estimates(calls, gpu), strict=True):
        moved = sum(min(t.bytes, t.read) + min(t.bytes, t.written) for t in launch.tensors.values())
        yield (
            ESTIMATE,
            launch.kernel,
            str(launch.programs),
            f"{launch.programs / gpu.multiprocessors:.1f}",
            str(len(estimate.waves(launch, gpu))),
            str(launch.tiles),
            str(targets.instructions_a_warp(launch, gpu)),
            str(launch.machine),
            str(launch.program.rounds),
            str(launch.registers),
            f"{moved / 1e6:.1f}",
            *map(micro, (times.memory, times.cache, times.work)),
        )


def page(gpu: str, record: Record, with_launches: bool) -> str:
    """All that the command prints."""
    of = GPUS[gpu]
    out = [
        f"{of.name}, batch {launches.BATCH}, float32. No GPU has checked these estimates. Counts are exact.",
        f"The GPU's part of a launch is {micro(of.launch)} µs ({ESTIMATE}); the host's part is not counted.",
        "Inductor: the code that Inductor emits for benchmarks/plain.py on an H100, by its bytes and launches alone.",
    ]
    if of.warp != 32:
        out.append("Instructions and load rounds are counted in the code for sm_90, and scaled to the width of a warp.")
    out += ["", *markdown_table(CALL_HEAD, call_rows(record, gpu))]
    if gpu == targets.GPU:
        out += markdown_table(targets.HEAD, ((ESTIMATE, *row) for row in targets.rows(record)))
        out += markdown_table(BEFORE_HEAD, before_rows(record))
    out += markdown_table(STRUCTURE_HEAD, structure_rows(record, gpu))
    for direction in DIRECTIONS if with_launches else ():
        for call in CALLS:
            name = name_of(call, direction)
            out += [f"{name}:", "", *markdown_table(LAUNCH_HEAD, launch_rows(record.ours[gpu][name], of))]
    return "\n".join(out).rstrip()


def filled(text: str, record: Record) -> str:
    """docs/gpu.md with what the command prints for each GPU, between two comments with the GPU's name."""
    for gpu in re.findall(r"<!-- (\w+) -->", text):
        text = fill_marks(text, gpu, f"{page(gpu, record, False)}\n")
    return text


def main() -> None:
    parser = parser_of("gpu_model", __doc__)
    parser.add_argument("--gpu", choices=GPUS, required=True)
    parser.add_argument("--launches", action="store_true", help="print a line for each launch too")
    parser.add_argument("--count", action="store_true", help="count the launches of every GPU anew, and record them")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/gpu.md anew")
    args = parser.parse_args()
    if args.count:
        launches.count()
    record = launches.load()
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), record))
    say(page(args.gpu, record, args.launches))


if __name__ == "__main__":
    main()
