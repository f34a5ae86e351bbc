"""Latency of whole networks at batch 1, 2 and 4: the median and the 95th percentile of one inference.

    python -m benchmarks.latency [--network resnet50,mobilenet_v2] [--contender plain,steam,...] [--batch 1,2,4]
                                 [--layout nchw,channels_last] [--size 224] [--quick] [--json PATH]

The networks, their contenders and the check before the time are those of ``benchmarks.end_to_end``, in eager mode. A
price is the median, over interleaved rounds, of the ratio to the plain network in the same round.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("latency: loads PyTorch and torchvision")

import torch

from benchmarks import runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.end_to_end import CONTENDERS, DEFAULT, LAYOUTS, NETWORKS, Judge, add_network_options, measure
from benchmarks.progress import Progress
from benchmarks.tables import table

#: Of so many rounds three are above the 95th percentile.
ROUNDS = 60
KEYS = ("network", "layout", "batch")
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
    networks = choices(parser, "--network", args.network, NETWORKS) or (["resnet18"] if args.quick else list(DEFAULT))
    batches = choices(parser, "--batch", args.batch, BATCHES) or (["1"] if args.quick else ["1", "2", "4"])
    layouts = choices(parser, "--layout", args.layout, LAYOUTS) or (["nchw"] if args.quick else list(LAYOUTS))
    contenders = choices(parser, "--contender", args.contender, CONTENDERS) or ["steam", "se", "eca"]
    contenders = ["plain", *(c for c in contenders if c != "plain")]
    size = args.size or (64 if args.quick else 224)
    facts = runs.begin()
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    tables = [(int(n), layout) for n in batches for layout in layouts]
    progress = Progress([*("check" for _ in contenders), *(str(n) for n, _ in tables)] * len(networks))
    for network in networks:
        generator = torch.Generator().manual_seed(0)
        judge = Judge(network, torch.randn(4, 3, min(size, 112), min(size, 112), generator=generator), layouts)
        right = judge.right_of(contenders, progress, wrong)
        for batch, layout in tables:
            if "plain" not in right:
                progress.skip(str(batch), 1)
                continue
            images = torch.randn(batch, 3, size, size, generator=generator)
            images = images.contiguous(memory_format=LAYOUTS[layout])
            try:
                with progress.row(f"{network}: measures batch {batch}, {layout}", str(batch)):
                    rows += measure(judge, "inference", "eager", right, images, 0.0, progress, ROUNDS)
            except Exception as error:  # the other tables are measured and kept
                wrong.append(f"{type(error).__name__}: {error}")
                say(f"  FAILED {wrong[-1]}")
        if rows:
            runs.write(args.json, "latency", rows, facts, args.quick)
    for (network, layout, batch), of in runs.networks_of(rows, *KEYS).items():
        title = f"== {network}, {layout}, batch {batch}: latency of one inference =="
        say("\n" + table(title, HEAD, map(line, of.values())))
    if wrong:
        sys.exit(f"{len(wrong)} networks failed or are out of bounds")


if __name__ == "__main__":
    main()
