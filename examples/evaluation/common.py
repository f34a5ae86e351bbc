"""The parts that both training scripts share: the order of the samples, training, checkpoints, and the files of a run.

A run can be killed at any time. A checkpoint holds the whole state after a step, and everything random is a function
of the seed and of a place: the order of an epoch of (seed, epoch), the augmentation of a sample of (seed, epoch, place
in the epoch), and the random numbers of a step of (seed, step, process). So the steps after a checkpoint are the same
in a run that goes on from it and in a run that was never stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from benchmarks import machine
from benchmarks.tables import say
from examples.evaluation.settings import Settings, Wrong

CHECKPOINT, KEPT, RESULTS = "last.ckpt", "settings.json", "results.json"
#: Settings that may change between the parts of a run: they do not change its result.
FREE = ("data", "out", "workers", "accelerator", "checkpoint_minutes")


# ---- the order of the samples ----------------------------------------------------------------------------------------


def seed_of(*key: int) -> int:
    """A seed for torch, from non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Order(Sampler[list[tuple[int, int]]]):
    """The batches of one process in one epoch, from batch ``start`` on: pairs of a sample and of its seed.

    ``len`` is the number of batches in the whole epoch, as Lightning expects in an epoch that goes on. Images that do
    not fill a batch are left out. With ``repeats`` each image comes so many times, differently augmented, and the epoch
    is not longer (repeated augmentation).
    """

    samples: int
    batch: int
    seed: int
    epoch: int
    start: int = 0
    rank: int = 0
    world: int = 1
    repeats: int = 1

    def __len__(self) -> int:
        return self.samples // self.batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        order = np.repeat(order, self.repeats)[: self.samples]
        for step in range(self.start, len(self)):
            places = range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)
            yield [(int(order[place]), seed_of(self.seed, self.epoch, place)) for place in places]


class Seeded(Dataset):
    """The samples of ``dataset`` for the pairs of an :class:`Order`: the augmentation takes the pair's seed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        index, seed = pair
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset[index]


def _as_a_loader(_: int) -> None:
    """A loading process leaves Ctrl-C to the main process, whose handlers it inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Data(lightning.LightningDataModule):
    """Training and validation loaders. The training loader of an epoch that goes on begins at its next batch."""

    def __init__(self, settings: Settings, train: Any, val: Any, collate: Any = None, repeats: int = 1) -> None:
        super().__init__()
        self.settings, self.train, self.val, self.repeats = settings, train, val, repeats
        self.options = {"num_workers": settings.workers, "collate_fn": collate, "worker_init_fn": _as_a_loader}
        if len(train) < settings.batch:
            raise Wrong(f"--batch {settings.batch}: {settings.data} has only {len(train)} training images")

    def train_dataloader(self) -> DataLoader:
        trainer, s = self.trainer, self.settings
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        start = progress.ready if progress.ready < len(self.train) // s.batch else 0
        order = Order(
            len(self.train), s.batch, s.seed, trainer.current_epoch, start,
            trainer.global_rank, trainer.world_size, self.repeats,
        )  # fmt: skip
        return DataLoader(Seeded(self.train), batch_sampler=order, **self.options)

    def val_dataloader(self) -> DataLoader:
        mine = Subset(self.val, range(self.trainer.global_rank, len(self.val), self.trainer.world_size))
        return DataLoader(mine, batch_size=self.settings.batch // self.trainer.world_size, **self.options)


# ---- training --------------------------------------------------------------------------------------------------------


def rate(settings: Settings, step: int, steps_in_epoch: int) -> float:
    """The learning rate of a step over ``lr``."""
    epoch, warm = step // steps_in_epoch, settings.warmup_epochs * steps_in_epoch
    factor = settings.warmup_factor + (1 - settings.warmup_factor) * step / warm if step < warm else 1.0
    if settings.schedule == "step":
        return factor * settings.lr_gamma ** sum(epoch >= at for at in settings.lr_steps)
    if settings.schedule == "exponential":
        return factor * settings.lr_gamma**epoch
    done = max(0.0, epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return factor * (1 + math.cos(math.pi * done)) / 2


def groups(network: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The parameters with a gradient in two groups: those of normalisation layers, and all others."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    own = [(m, p) for m in network.modules() for p in m.parameters(recurse=False) if p.requires_grad]
    norms = [p for m, p in own if isinstance(m, kinds)]
    others = [p for m, p in own if not isinstance(m, kinds)]
    decay = settings.weight_decay if settings.norm_weight_decay is None else settings.norm_weight_decay
    return [{"params": others}, {"params": norms, "weight_decay": decay}]


class Training(lightning.LightningModule):
    """A network in training. ``history`` has a dict for each finished epoch; checkpoints hold it."""

    def __init__(self, settings: Settings, network: nn.Module, steps_in_epoch: int) -> None:
        super().__init__()
        self.settings, self.network, self.steps_in_epoch = settings, network, steps_in_epoch
        self.history: list[dict[str, float]] = []
        self.losses: tuple[Any, int] = (0.0, 0)  # their sum and number in this epoch

    def loss(self, batch: Any) -> Tensor:
        """The loss of a training step."""
        raise NotImplementedError

    def measured(self) -> dict[str, float]:
        """The figures of the validation that has just ended."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        s = self.settings
        optimizer = torch.optim.SGD(groups(self.network, s), s.lr, s.momentum, weight_decay=s.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(s, step, self.steps_in_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        torch.manual_seed(seed_of(self.settings.seed, self.global_step, self.global_rank))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        total, steps = self.losses
        self.losses = total + loss.detach().double(), steps + 1
        return loss

    def on_validation_epoch_end(self) -> None:
        self.figures = self.measured()
        self.log_dict(self.figures, rank_zero_only=True)

    def on_train_epoch_end(self) -> None:
        loss, steps = self._losses_of_all()
        self.losses = 0.0, 0
        row = {"epoch": self.current_epoch + 1, "train_loss": loss / steps, **self.figures}
        self.history.append(row)
        if self.global_rank == 0:
            say(f"epoch {row['epoch']}/{self.settings.epochs}: " + in_words(row))

    def _losses_of_all(self) -> tuple[float, int]:
        mine = torch.tensor([float(v) for v in self.losses], dtype=torch.float64, device=self.device)
        total, steps = self.all_gather(mine).reshape(-1, 2).mean(0).tolist()
        if not math.isfinite(total):
            raise Wrong(f"--lr {self.settings.lr:g}: the loss is not finite before step {self.global_step + 1}")
        return total, round(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["evaluation"] = {"history": self.history, "losses": self._losses_of_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["evaluation"]
        self.history, self.losses = list(kept["history"]), tuple(kept["losses"])


def in_words(row: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "epoch")


class Checkpoints(Checkpoint):
    """Saves every few minutes and after each epoch, replacing the last checkpoint at once.

    The first Ctrl-C or SIGTERM stops the run after the present step, or after the validation, with a checkpoint; the
    second Ctrl-C stops it at once, as a lost machine would, and the run goes on from the checkpoint before.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.seconds = path, 60 * minutes
        self.asked, self.saved = False, time.monotonic()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        # Lightning restores the handlers of before the training at its end.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.is_last_batch:
            return  # the checkpoint comes after the validation
        any_of = trainer.strategy.reduce_boolean_decision
        due = self.asked or time.monotonic() - self.saved >= self.seconds
        if any_of(due, all=False):
            self._save(trainer, any_of(self.asked, all=False))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        last = trainer.current_epoch + 1 >= trainer.max_epochs
        self._save(trainer, not last and trainer.strategy.reduce_boolean_decision(self.asked, all=False))

    def _save(self, trainer: Any, stop: bool) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved = time.monotonic()
        if stop:
            raise SystemExit(f"stopped after step {trainer.global_step}; the same command goes on from there")


def train(module: Training, data: Data, out: Path, callbacks: list[Callback]) -> lightning.Trainer:
    """Trains to the last epoch, from the checkpoint in ``out`` if there is one."""
    s, last, logs = module.settings, out / CHECKPOINT, out / "logs"
    part = f"part_{len(list(logs.glob('part_*')))}"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises other products
    # Lightning expects a loader with a state. An Order needs none, because it takes the place from the trainer.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    trainer = lightning.Trainer(
        accelerator=s.accelerator,
        devices=s.devices,
        strategy="auto" if s.devices == 1 else "ddp",
        precision=s.precision,  # type: ignore[arg-type]
        deterministic=s.deterministic,
        benchmark=not s.deterministic,
        max_epochs=s.epochs,
        logger=[kind(out, name="logs", version=part) for kind in (CSVLogger, TensorBoardLogger)],
        callbacks=[*callbacks, Checkpoints(last, s.checkpoint_minutes)],
        num_sanity_val_steps=0,
        log_every_n_steps=min(50, module.steps_in_epoch),
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    return trainer


# ---- the files of a run ----------------------------------------------------------------------------------------------


def digest(names: Iterable[str]) -> str:
    """A short hash of names, by which a run knows its data again."""
    found = hashlib.sha256()
    for name in names:
        found.update(name.encode() + b"\n")
    return found.hexdigest()[:16]


def name_of(settings: Settings) -> str:
    """The names of model, gate and variant, and the seed, as the name of a folder."""
    parts = (settings.model, settings.gate, settings.variant, f"seed{settings.seed}")
    return "-".join(re.sub(r"[^\w.=,]+", "_", part) for part in parts if part)


def open_run(settings: Settings, task: str, data: dict[str, Any]) -> Path:
    """The folder of the run, with its settings in a file.

    Raises:
        Wrong: the folder has a run of other settings or data, or files but no run.
    """
    out = Path(settings.out or Path("build/evaluation") / task / name_of(settings))
    mine = {"task": task} | {k: v for k, v in asdict(settings).items() if k not in FREE} | {"images": data}
    kept = out / KEPT
    if kept.exists():
        theirs = json.loads(kept.read_text())
        for key in mine:
            if theirs.get(key) != mine[key]:
                raise Wrong(
                    f"--out {out}: has a run with {key} {theirs.get(key)!r}, but {mine[key]!r} is asked for; remove "
                    "the folder or name another one"
                )
    elif out.is_dir() and any(out.iterdir()):
        raise Wrong(f"--out {out}: must be empty or have a run, but it has files and no {KEPT}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write(kept, json.dumps(mine, indent=1) + "\n")
    return out


def write(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    part = path.with_suffix(f".{os.getpid()}.tmp")
    part.write_text(text)
    os.replace(part, path)


def write_results(out: Path, figures: dict[str, Any], history: list[dict[str, float]]) -> None:
    """results.json, and one row of its plain values in results.csv."""
    settings = json.loads((out / KEPT).read_text())
    facts = machine.facts()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    plain = {k: v for k, v in (settings | figures).items() if isinstance(v, (str, int, float))}
    part = out / "results.csv.tmp"
    with part.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows([[*plain, "commit", "torch", "processor"]])
        rows.writerows([[*plain.values(), facts["commit"], facts["torch"], facts.get("gpu", facts["processor"])]])
    os.replace(part, out / "results.csv")
    content = {"settings": settings, "machine": facts, "figures": figures, "history": history}
    write(out / RESULTS, json.dumps(content, indent=1) + "\n")
    say(f"wrote {out / RESULTS}")
