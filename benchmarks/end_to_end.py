"""The price of attention: time and memory of a whole network over the same network without attention.

    python -m benchmarks.end_to_end [--network resnet50,mobilenet_v2] [--contender plain,steam,...]
                                    [--mode eager,compiled] [--layout nchw,channels_last] [--batch 8] [--size 224]
                                    [--quick | --full] [--json PATH]

The contenders are ``plain``, the network without attention; ``steam``, with fused STEAM units at the sites of
``insert_steam()`` (5 in ResNet-50); ``steam-reference``, with the same units in plain PyTorch; ``se`` and ``eca``, with
timm's layers in every block, before the addition (16 in ResNet-50). All have the same random convolutions, in float32.
Images and weights are in NCHW or in channels_last.

A price is the extra time over the plain network in per cent: the median, over interleaved rounds, of the ratio of times
in the same round. *Training* is a step: forward, cross-entropy, backward, SGD. *Inference* is a forward pass without
gradients. The price in memory compares the peaks of allocated memory in a step. Where the noise of whole networks is
larger than the price, *units alone* is the better figure: the sum of the times of the network's units, each called
alone with the map that it gets in the network.

A network is judged before it is timed. Outputs and gradients are compared with the network's own float64 copy by norms,
in training and in inference mode and in each layout, on four images of at most 112x112. The bound is four times the
change of the float64 results if every input and parameter moves by 4 eps of float32 with random signs (the largest of
three draws). Gradients may jump at a ReLU's kink, both by that perturbation and by rounding. The bound between a
compiled and the eager network is twice as wide. Compilation takes longer than all other work here, so compiled networks
are measured in inference only, without ``steam-reference``; ``--full`` measures all.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import malloc
from benchmarks.tables import say

if __name__ == "__main__":
    malloc.restart()
    say("end_to_end: loads PyTorch and torchvision")

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import memory, runs
from benchmarks.commandline import add_run_options, choices, parser_of
from benchmarks.contenders import Steady, backends_that_ran, check_kernels, forget_compiled
from benchmarks.gates import insert_gate
from benchmarks.progress import Progress
from benchmarks.tables import micro, table
from benchmarks.timing import Effort, interleaved, timed
from steam_kernels import FusedSTEAM, insert_steam

NETWORKS = ("resnet50", "mobilenet_v2", "resnet18")
DEFAULT = ("resnet50", "mobilenet_v2")
CONTENDERS = ("plain", "steam", "steam-reference", "se", "eca")
MODES = ("eager", "compiled")
TASKS = ("training", "inference")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
#: The least number of rounds, however slow they are, because quartiles of fewer rounds mean nothing.
ROUNDS = 9


def make(network: str, contender: str, seed: int = 0) -> nn.Module:
    """A network with random weights, the same convolutions for every contender."""
    import torchvision.models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(torchvision.models, network)(weights=None)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # the random mask of each pass would make the networks differ
        if contender.startswith("steam"):
            insert_steam(model, backend="reference" if contender == "steam-reference" else None)
        elif contender != "plain":
            insert_gate(model, contender)
    return model


def layout_of(images: Tensor) -> str:
    return "nchw" if images.is_contiguous() else "channels_last"


def placed(model: nn.Module, images: Tensor) -> nn.Module:
    """The model, with its weights in the layout of the images."""
    return model.to(memory_format=LAYOUTS[layout_of(images)])  # type: ignore[call-overload]


def attention_layers(model: nn.Module) -> int:
    return sum(isinstance(m, FusedSTEAM) or name.endswith(".attention") for name, m in model.named_modules())


# ---- correctness -----------------------------------------------------------------------------------------------------


def results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits in training and in inference mode, and the gradients of the images and of all parameters in training."""
    images = images.detach().requires_grad_()
    model.train()
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(images)))
    gradients = torch.autograd.grad(loss, [images, *model.parameters()])
    out = {"logits": logits.detach(), "gradient": gradients[0], "parameters": _joined(gradients[1:])}
    model.eval()
    with torch.no_grad():
        out["inference"] = model(images)
    return out


def distance(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def exact(network: str, contender: str) -> nn.Module:
    """The float64 copy. Its units run on the reference, whichever backend is judged."""
    return make(network, "steam-reference" if contender == "steam" else contender).double()


def moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """``value`` with each number moved up or down by 4 eps of float32."""
    sign = torch.randint(0, 2, value.shape, generator=generator).to(value.dtype) * 2 - 1
    return value * (1 + 4 * torch.finfo(torch.float32).eps * sign)


class Judge:
    """Judges the contenders of one network in each layout, each against its own float64 copy in NCHW."""

    def __init__(self, network: str, images: Tensor, layouts: Iterable[str] = ("nchw",)) -> None:
        self.network, self.images, self.layouts = network, images, list(layouts)
        self.bounds: dict[str, dict[str, float]] = {}
        #: The backend of the units, for those contenders that have units.
        self.backends: dict[str, str] = {}

    def check(self, contender: str) -> None:
        """Raises AssertionError if the network is out of bounds. Keeps the bounds for the compiled form."""
        truth = results(exact(self.network, contender), self.images.double())
        generator = torch.Generator().manual_seed(0)
        changes = []
        for _ in range(3):
            other = exact(self.network, contender)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.copy_(moved(parameter, generator))
            changes.append(results(other, moved(self.images.double(), generator)))
        bounds = {k: 4 * max(distance(c[k], v) for c in changes) for k, v in truth.items()}
        for layout in self.layouts:
            images = self.images.contiguous(memory_format=LAYOUTS[layout])
            with backends_that_ran() as ran:
                found = results(placed(make(self.network, contender), images), images)
            if contender.startswith("steam"):
                self.backends[contender] = check_kernels(ran, "reference" if contender != "steam" else None)
            for name, bound in bounds.items():
                self._within(f"{contender}, {layout}", name, distance(found[name], truth[name]), bound)
        self.bounds[contender] = bounds

    def right_of(self, contenders: list[str], progress: Progress, wrong: list[str]) -> list[str]:
        """The contenders that are within their bounds. Adds a sentence to ``wrong`` for each of the others."""
        right = []
        for contender in contenders:
            try:
                with progress.row(f"{self.network}: checks {contender}", "check"):
                    self.check(contender)
                right.append(contender)
            except (AssertionError, RuntimeError) as error:  # the network is out of bounds, or no kernel ran
                wrong.append(str(error))
                say(f"  WRONG {error}")
        return right

    def check_compiled(self, contender: str, task: str, compiled: Any, images: Tensor) -> None:
        """Compares with the eager network. Each of the two may be off by the bound, so they may differ by two
        bounds."""
        eager = placed(make(self.network, contender), images)
        if task == "inference":
            pair = [inference(m, images)() for m in (compiled, eager)]
        else:
            pair = [parameter_gradient(m, images) for m in (compiled, eager)]
        name = "inference" if task == "inference" else "parameters"
        self._within(
            f"{contender}, {layout_of(images)}, compiled", name, distance(*pair), 2 * self.bounds[contender][name]
        )

    def _within(self, contender: str, name: str, error: float, bound: float) -> None:
        if not error <= bound:
            raise AssertionError(f"{self.network} {contender}: {name} is off by {error:.2e}, allowed are {bound:.2e}")


def parameter_gradient(model: Any, images: Tensor) -> Tensor:
    """The gradient of a training step by all parameters, in one vector."""
    model.train()
    loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)))
    return _joined(torch.autograd.grad(loss, list(model.parameters())))


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


# ---- measurement -----------------------------------------------------------------------------------------------------


def training_step(model: Any, images: Tensor) -> Callable[[], object]:
    labels = torch.arange(len(images))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def step() -> None:
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: Any, images: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(images)

    return run


CALLS = {"training": training_step, "inference": inference}


def units_seconds(model: nn.Module, task: str, images: Tensor, effort: Effort) -> float:
    """The sum of the times of the model's units, each called alone with the map that it gets in the model: forward
    without gradients, or in training forward with a graph and backward."""
    maps: dict[FusedSTEAM, Tensor] = {}

    def keep(unit: Any, args: tuple[Tensor, ...]) -> None:
        maps[unit] = args[0].detach().clone()

    units = [m for m in model.modules() if isinstance(m, FusedSTEAM)]
    hooks = [unit.register_forward_pre_hook(keep) for unit in units]
    inference(model, images)()
    for hook in hooks:
        hook.remove()
    blocks = {}
    for i, unit in enumerate(units):
        x = maps[unit]
        leaf = x.detach().requires_grad_()

        def forward(unit: FusedSTEAM = unit, x: Tensor = x) -> None:
            with torch.no_grad():
                unit(x)

        def both(unit: FusedSTEAM = unit, x: Tensor = x, leaf: Tensor = leaf) -> None:
            torch.autograd.grad(unit(leaf), [leaf, *unit.parameters()], x)

        blocks[str(i)] = timed(task, both if task == "training" else forward)
    m = interleaved(blocks, effort)
    return sum(m.median(name, task) for name in blocks)


def measure(
    judge: Judge,
    task: str,
    mode: str,
    contenders: list[str],
    images: Tensor,
    seconds: float,
    progress: Progress | None = None,
    least: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Rows of one network, task and mode, in the layout of the images, from at least ``least`` rounds."""
    progress = progress or Progress(())
    network = judge.network
    forget_compiled()
    calls: dict[str, Callable[[], object]] = {}
    models = {}
    for contender in contenders:
        models[contender] = placed(make(network, contender), images)
        runner = models[contender]
        if mode == "compiled":
            progress.step(f"compiles {contender} and checks it", long=True)
            runner = torch.compile(runner, dynamic=False)  # type: ignore[assignment]
            judge.check_compiled(contender, task, runner, images)
        calls[contender] = CALLS[task](runner, images)
        for _ in range(2):
            calls[contender]()
    steady = Steady()
    progress.step(f"measures {', '.join(contenders)} in turn", long=mode == "compiled")
    peaks = {name: memory.traced(call)[1].peak for name, call in calls.items()}
    blocks = {name: timed(task, call, warm=False) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    once = {name: block(1)[task] for name, block in blocks.items()}
    for _ in range(max(least, min(60, int(seconds / sum(once.values()))))):
        for name, block in blocks.items():
            times[name].append(block(1)[task])
    if mode == "compiled":
        steady.check()
    effort = Effort(seconds=0.2 if seconds else 0.02, least=5)
    alone = {n: units_seconds(models[n], task, images, effort) for n in contenders if n in judge.backends}
    rows = []
    for name in contenders:
        ratios = sorted(a / b for a, b in zip(times[name], times["plain"], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            {
                "network": network,
                "contender": name,
                "task": task,
                "mode": mode,
                "layout": layout_of(images),
                "backend": judge.backends.get(name),
                "batch": images.shape[0],
                "size": images.shape[2],
                "layers": attention_layers(models[name]),
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "rounds": len(ratios),
                "seconds": statistics.median(times[name]),
                "seconds_95": statistics.quantiles(times[name], n=20, method="inclusive")[-1],
                "time_over_plain": statistics.median(ratios),
                "time_over_plain_quartiles": [low, high],
                "peak_bytes": peaks[name],
                "memory_over_plain": peaks[name] / peaks["plain"],
                "units_over_plain": alone[name] / statistics.median(times["plain"]) if name in alone else None,
            }
        )
    return rows


def line(row: dict[str, Any]) -> tuple[object, ...]:
    low, high = row["time_over_plain_quartiles"]
    return (
        row["contender"],
        micro(row["seconds"]),
        f"{100 * (row['time_over_plain'] - 1):+.1f}%",
        f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f}",
        runs.alone(row),
        f"{row['peak_bytes'] / 2**20:.0f} MiB",
        f"{100 * (row['memory_over_plain'] - 1):+.1f}%",
        row["layers"],
        row["parameters"],
    )


HEAD = ("contender", "time", "price", "quartiles", "units alone", "peak", "price", "layers", "parameters")


@dataclass(frozen=True)
class Table:
    """The networks that are measured in turn: what they do, and with which images. Tables of a ``kind`` take about as
    long as each other."""

    name: str
    kind: str
    task: str
    mode: str
    images: Tensor
    contenders: list[str]


def measure_all(
    networks: list[str],
    contenders: list[str],
    checked: Tensor,
    tables: list[Table],
    seconds: float,
    least: int,
    write: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all tables of each network, and a sentence for each network that failed or is out of bounds.

    ``checked`` are the images with which networks are judged. ``write`` gets the rows after each network.
    """
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    layouts = dict.fromkeys(layout_of(each.images) for each in tables)
    progress = Progress([*("check" for _ in contenders), *(each.kind for each in tables)] * len(networks))
    for network in networks:
        judge = Judge(network, checked, layouts)
        right = judge.right_of(contenders, progress, wrong)
        for each in tables:
            if "plain" not in right:
                progress.skip(each.kind, 1)
                continue
            chosen = [c for c in right if c in each.contenders]
            try:
                with progress.row(f"{network}: measures {each.name}", each.kind):
                    rows += measure(judge, each.task, each.mode, chosen, each.images, seconds, progress, least)
            except Exception as error:  # the other tables are measured and kept
                wrong.append(f"{type(error).__name__}: {error}")
                say(f"  FAILED {wrong[-1]}")
        if rows:
            write(rows)
    return rows, wrong


def end(wrong: list[str]) -> None:
    if wrong:
        sys.exit(f"{len(wrong)} networks failed or are out of bounds")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options that every measurement of whole networks has."""
    parser.add_argument("--network", default="", help=f"comma list: {', '.join(NETWORKS)} ({','.join(DEFAULT)})")
    parser.add_argument(
        "--contender", default="", help=f"comma list: {', '.join(CONTENDERS)}; plain is always measured"
    )
    parser.add_argument("--layout", default="", help=f"comma list: {', '.join(LAYOUTS)}")
    parser.add_argument("--size", type=int, default=0, help="side of the images in pixels (224)")


def network_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, contenders: Iterable[str]
) -> tuple[list[str], list[str], list[str], int]:
    """The networks, the contenders, the layouts and the size of the images; ``contenders`` are those by default."""
    networks = choices(parser, "--network", args.network, NETWORKS) or (["resnet18"] if args.quick else list(DEFAULT))
    chosen = choices(parser, "--contender", args.contender, CONTENDERS) or list(contenders)
    layouts = choices(parser, "--layout", args.layout, LAYOUTS) or (["nchw"] if args.quick else list(LAYOUTS))
    return networks, ["plain", *(c for c in chosen if c != "plain")], layouts, args.size or (64 if args.quick else 224)


def main() -> None:
    parser = parser_of("end_to_end", __doc__)
    add_network_options(parser)
    parser.add_argument("--mode", default="", help=f"comma list: {', '.join(MODES)}")
    parser.add_argument("--batch", type=int, default=0, help="images (8)")
    parser.add_argument(
        "--seconds", type=float, default=25, help=f"seconds for each table, in at least {ROUNDS} rounds (25)"
    )
    parser.add_argument("--full", action="store_true", help="compiled training steps too")
    add_run_options(parser, "ResNet-18 in eager mode with small images")
    args = parser.parse_args()
    networks, contenders, layouts, size = network_options(parser, args, CONTENDERS)
    modes = choices(parser, "--mode", args.mode, MODES) or (["eager"] if args.quick else list(MODES))
    batch = args.batch or (2 if args.quick else 8)
    facts = runs.begin()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    in_layout = {layout: images.contiguous(memory_format=LAYOUTS[layout]) for layout in layouts}
    tables = []
    for mode, task in itertools.product(modes, TASKS):
        if (mode, task) == ("compiled", "training") and not args.full:
            continue
        slow = mode == "compiled" and not (args.full or args.contender)
        chosen = [c for c in contenders if not (slow and c == "steam-reference")]
        for layout, given in in_layout.items():
            tables.append(Table(f"{task}, {mode}, {layout}", mode, task, mode, given, chosen))
    rows, wrong = measure_all(
        networks,
        contenders,
        images[:4, :, :112, :112],  # float64 convolutions are slow
        tables,
        0.0 if args.quick else args.seconds,
        ROUNDS,
        lambda rows: runs.write(args.json, "end_to_end", rows, facts, args.quick),
    )
    for (network, task, mode, layout), of in runs.networks_of(rows).items():
        title = f"== {network}, {task}, {mode}, {layout}: the price of attention over the plain network =="
        say("\n" + table(title, HEAD, map(line, of.values())))
    end(wrong)


if __name__ == "__main__":
    main()
