"""Latency of whole networks at batch 1, 2 and 4: the median and the 95th percentile of one inference.

    python -m benchmarks.latency [--network resnet50,mobilenet_v2] [--contender plain,steam,...] [--batch 1,2,4]
                                 [--layout nchw,channels_last] [--size 224] [--quick] [--json PATH]

The networks, their contenders and the check before the time are those of ``benchmarks.end_to_end``, in eager mode. A
price is the median, over interleaved rounds, of the ratio to the plain network in the same round.
"""

from __future__ import annotations

from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("latency: loads PyTorch and torchvision")

import torch

from benchmarks import runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.end_to_end import LAYOUTS, Table, add_network_options, end, measure_all, network_options
from benchmarks.tables import table

#: Of so many rounds three are above the 95th percentile.
ROUNDS = 60
BATCHES = ("1", "2", "4", "8", "16", "32")


def line(row: dict[str, Any]) -> tuple[object, ...]:
    low, high = row["time_over_plain_quartiles"]
    return (
        row["contender"],
        f"{1e3 * row['seconds']:.1f}",
        f"{1e3 * row['seconds_95']:.1f}",
        f"{100 * (row['time_over_plain'] - 1):+.1f}%",
        f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f}",
        row["rounds"],
    )


HEAD = ("contender", "median, ms", "95th percentile, ms", "price", "quartiles", "rounds")


def main() -> None:
    parser = parser_of("latency", __doc__)
    add_network_options(parser)
    parser.add_argument("--batch", default="", help=f"comma list: {', '.join(BATCHES)} (1,2,4)")
    add_run_options(parser, "ResNet-18 at batch 1 with small images in NCHW")
    args = parser.parse_args()
    networks, contenders, layouts, size = network_options(parser, args, ("steam", "se", "eca"))
    batches = choices(parser, "--batch", args.batch, BATCHES) or (["1"] if args.quick else ["1", "2", "4"])
    facts = runs.begin()
    generator = torch.Generator().manual_seed(0)
    checked = torch.randn(4, 3, min(size, 112), min(size, 112), generator=generator)
    tables = []
    for batch in batches:
        images = torch.randn(int(batch), 3, size, size, generator=generator)
        for layout in layouts:
            given = images.contiguous(memory_format=LAYOUTS[layout])
            tables.append(Table(f"batch {batch}, {layout}", batch, "inference", "eager", given, contenders))
    rows, wrong = measure_all(
        networks,
        contenders,
        checked,
        tables,
        0.0,
        ROUNDS,
        lambda rows: runs.write(args.json, "latency", rows, facts, args.quick),
    )
    for (network, layout, batch), of in runs.networks_of(rows, *runs.LATENCY).items():
        title = f"== {network}, {layout}, batch {batch}: latency of one inference =="
        say("\n" + table(title, HEAD, map(line, of.values())))
    end(wrong)


if __name__ == "__main__":
    main()
