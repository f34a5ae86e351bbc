"""examples/evaluation/classification.py: runs on a tiny folder, stopped anywhere and continued, and bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.conftest import NEEDED, Killed

for package in NEEDED:
    pytest.importorskip(package)

from examples.evaluation import classification, common, cost, settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--model", "shufflenet_v2_x0_5", "--epochs", 2, "--batch", 6, "--train_size", 32, "--val_resize", 36,
    "--val_size", 32, "--lr", 0.01, "--cost_rounds", 2, "--accelerator", "cpu",
)  # fmt: skip
#: Everything random at once, and a checkpoint after each step.
RANDOM = (
    "--gate", "steam", "--augment", "trivial", "--random_erase", 0.5, "--mixup", 0.2, "--cutmix", 1, "--repeats", 2,
    "--ema", "true", "--ema_steps", 2, "--ema_decay", 0.9, "--schedule", "cosine", "--warmup_epochs", 0.5,
    "--norm_weight_decay", 0, "--checkpoint_minutes", 0,
)  # fmt: skip


@pytest.fixture
def run(images: Path, tmp_path: Path, parsed: Callable[..., Any]) -> Callable[..., Path]:
    def call(name: str, *arguments: object) -> Path:
        return classification.run(
            parsed("classification", "--data", images, "--out", tmp_path / name, *TINY, *arguments)
        )

    return call


@pytest.fixture
def without_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "costs", lambda *args: {})


def test_a_run_writes_its_results(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run("run", "--gate", "steam", "--variant", "order=parallel,radius=2,placement=blocks")
    result = json.loads((out / "results.json").read_text())
    figures = result["figures"]
    assert figures["gates"] == 16 and figures["parameters_of_gates"] == 16 * 64
    assert figures["parameters"] > figures["parameters_of_gates"] and 0.0005 < figures["gflops"] < 0.05
    assert 0 <= figures["top1"] <= figures["best_top1"] <= 100 and figures["backend"]
    assert figures["step_seconds"] > 0 and figures["step_over_none"] > 0 and figures["peak_bytes"] > 0
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    assert {"commit", "torch", "processor"} <= result["machine"].keys()
    assert result["settings"]["variant"].startswith("order=parallel") and result["settings"]["images"]["train"] == 18
    (row,) = csv.DictReader((out / "results.csv").open())
    assert row["gate"] == "steam" and float(row["top1"]) == figures["top1"]
    logs = list((out / "logs").glob("part_0/*"))
    assert any(p.name == "metrics.csv" for p in logs) and any("tfevents" in p.name for p in logs)
    assert "epoch 2/2" in capsys.readouterr().out
    run("run", "--gate", "steam", "--variant", "order=parallel,radius=2,placement=blocks")
    assert "finished" in capsys.readouterr().out


@pytest.mark.usefixtures("without_costs")
def test_a_run_knows_its_images_in_another_folder_and_not_others(
    run: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run")
    capsys.readouterr()
    moved = images.rename(tmp_path / "moved")
    run("run", "--data", moved)
    assert "finished" in capsys.readouterr().out
    (moved / "val" / "a" / "0.png").rename(moved / "val" / "a" / "other.png")
    with pytest.raises(settings.Wrong, match="has a run with images"):
        run("run", "--data", moved)


@pytest.mark.usefixtures("without_costs")
@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("training_step", 4),
        *[("training_step", n) for n in (1, 2, 3, 5)],
        ("on_validation_epoch_end", 0),
        ("on_validation_epoch_end", 1),
    ],
)
def test_a_lost_run_goes_on_to_the_same_bits(
    method: str, calls: int, run: Callable[..., Path], kill: Any, same_training: Any
) -> None:
    """Three steps in an epoch: the loss hits inside the epochs, between them, and in the validations."""
    whole = run("whole", *RANDOM)
    kill(method, calls)
    with pytest.raises(Killed):
        run("parts", *RANDOM)
    same_training(run("parts", *RANDOM), whole)


@pytest.mark.usefixtures("without_costs")
def test_a_run_goes_on_from_the_checkpoint_of_its_last_epoch(
    run: Callable[..., Path], kill: Any, same_training: Any
) -> None:
    whole = run("whole")
    kill("training_step", 5)
    with pytest.raises(Killed):
        run("parts")
    assert torch.load(whole.parent / "parts" / "last.ckpt", weights_only=False)["global_step"] == 3
    same_training(run("parts"), whole)


@pytest.mark.usefixtures("without_costs")
def test_ctrl_c_saves_the_step_and_the_command_goes_on(
    run: Callable[..., Path], same_training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = run("whole")
    step = common.Training.training_step

    def interrupted(self: Any, *args: Any) -> Any:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(common.Training, "training_step", interrupted)
        with pytest.raises(SystemExit, match="stopped after step 2; the same command goes on"):
            run("parts")
    assert signal.getsignal(signal.SIGINT) is before
    same_training(run("parts"), whole)


@pytest.mark.usefixtures("without_costs")
def test_a_run_that_is_lost_before_its_results_trains_no_more(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_results", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run("run")
    monkeypatch.setattr(common.Training, "training_step", lambda *args: pytest.fail("it trains again"))
    assert json.loads((run("run") / "results.json").read_text())["history"][-1]["epoch"] == 2


def test_loading_processes_change_no_bit(images: Path, parsed: Callable[..., Any]) -> None:
    given = parsed("classification", "--data", images, *TINY, "--augment", "trivial", "--random_erase", 0.5)
    train, _ = classification.datasets(given)
    order = common.Order(len(train), 6, seed=0, epoch=1)
    alone, others = (
        [x for x, _ in torch.utils.data.DataLoader(common.Seeded(train), batch_sampler=order, num_workers=n)]
        for n in (0, 2)
    )
    assert len(alone) == 3 and all(torch.equal(a, b) for a, b in zip(alone, others, strict=True))


def test_the_order_of_an_epoch() -> None:
    whole = [pair for batch in common.Order(10, 4, seed=1, epoch=2) for pair in batch]
    assert len(whole) == 8 == len(set(whole)) and len({index for index, _ in whole}) == 8
    assert [p for b in common.Order(10, 4, seed=1, epoch=2, start=1) for p in b] == whole[4:]
    halves = [list(common.Order(10, 4, seed=1, epoch=2, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted(p for half in halves for b in half for p in b) == sorted(whole)
    assert whole != [p for b in common.Order(10, 4, seed=1, epoch=3) for p in b]
    repeated = [p for b in common.Order(10, 4, seed=1, epoch=2, repeats=2) for p in b]
    assert len({index for index, _ in repeated}) == 4 and len(set(repeated)) == 8


def test_schedules_are_those_of_torch(parsed: Callable[..., Any], images: Path) -> None:
    """The rates after whole epochs are those of torch's schedulers."""
    kinds = torch.optim.lr_scheduler
    makers = {
        "step": lambda o: kinds.MultiStepLR(o, [2, 4], 0.5),
        "exponential": lambda o: kinds.ExponentialLR(o, 0.5),
        "cosine": lambda o: kinds.CosineAnnealingLR(o, 6),
    }
    for name, make in makers.items():
        given = parsed(
            "classification", "--data", images, *TINY, "--epochs", 6, "--schedule", name, "--lr_gamma", 0.5,
            "--lr_steps", "[2,4]", "--lr", 1,
        )  # fmt: skip
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        schedule = make(optimizer)
        for epoch in range(6):
            for step in range(3):
                assert common.rate(given, 3 * epoch + step, 3) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    warm = parsed("classification", "--data", images, *TINY, "--warmup_epochs", 1, "--warmup_factor", 0.1)
    assert [common.rate(warm, step, 4) for step in (0, 2, 4)] == pytest.approx([0.1, 0.55, 1.0])


@pytest.mark.parametrize("gate", settings.GATES)
def test_gates_share_the_convolutions(gate: str, images: Path, parsed: Callable[..., Any]) -> None:
    given = parsed("classification", "--data", images, *TINY, "--gate", gate)
    plain, gated = (classification.network(given, 3, gated=g) for g in (False, True))
    mine = [m.weight for m in plain.modules() if isinstance(m, torch.nn.Conv2d)]
    theirs = [m.weight for n, m in gated.named_modules() if isinstance(m, torch.nn.Conv2d) and "attention" not in n]
    assert len(mine) == len(theirs) == 56 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert len(cost.gate_modules(gated)) == {"none": 0, "steam": 4}.get(gate, 16)


@pytest.mark.parametrize(("gate", "sites"), [("steam", 0.00115), ("cbam", 0.00505)])
def test_gflops_are_those_of_the_page(gate: str, sites: float, images: Path, parsed: Callable[..., Any]) -> None:
    """docs/cost.md: 3.62815 for a ResNet-18 of 1000 classes at 224, and so much for the gates."""
    given = parsed("classification", "--data", images, *TINY, "--model", "resnet18", "--gate", gate)
    plain, gated = (classification.network(given, 1000, gated=g) for g in (False, True))
    x = torch.zeros(1, 3, 224, 224)
    assert cost.gflops(plain, gated, given, lambda net: net(x)) == pytest.approx(3.62815 + sites, abs=1e-5)


def test_timm_networks(images: Path, parsed: Callable[..., Any]) -> None:
    given = parsed("classification", "--data", images, *TINY, "--model", "timm/resnet18", "--gate", "steam")
    assert type(classification.network(given, 3)).__module__.startswith("timm.")


# ---- bad input -------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gate", "sse"), "--gate 'sse': must be one of none, se, eca, cbam, gct, steam"),
        (("--model", "resnet51"), "--model 'resnet51': must be a classifier of torchvision"),
        (("--gate", "steam", "--variant", "radios=2"), "--variant 'radios=2': must be key=value with a key of"),
        (("--gate", "steam", "--variant", "radius=-1"), "--variant 'radius=-1': radius must be one of an integer"),
        (("--gate", "steam", "--variant", "heads=3"), "--variant 'heads=3': heads must be one of a divisor of 8"),
        (("--gate", "steam", "--variant", "placement=top"), "--variant 'placement=top': placement must be one of"),
        (("--gate", "steam", "--variant", "grid=7,window=8"), "grid_size and window exclude each other"),
        (("--gate", "se", "--variant", "radius=2"), "only --gate steam has variants, but the gate is 'se'"),
        (("--model", "alexnet", "--gate", "se"), "--model 'alexnet' cannot have the gate 'se'"),
        (("--epochs", "0"), "--epochs 0: must be at least 1"),
        (("--epochs", "many"), 'key "epochs"'),
        (("--epoch_s", "3"), "unrecognized arguments: --epoch_s"),
        (("--batch", "64"), "--batch 64: .* has only 18 training images"),
        (("--devices", "4"), "--batch 6: must be a multiple of --devices, which is 4"),
        (("--augment", "much"), "--augment 'much': must be one of none, trivial, rand, auto"),
        (("--data", "/nowhere"), "--data /nowhere: must have the folders train and val"),
    ],
)
def test_bad_settings(arguments: tuple[str, ...], sentence: str, run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(settings.Wrong, match=sentence) as caught:
        run("run", *arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: [p.unlink() for p in (d / "train" / "b").iterdir()], "in train, the class 'b' has no image"),
        (lambda d: remove(d / "val"), "must have the folders train and val .* but has no val"),
        (lambda d: remove(d / "val" / "c"), "the class 'c' is in one of train and val only"),
        (lambda d: [remove(d / "train" / c) for c in "abc"], "in train, it has no folder of a class"),
    ],
)
def test_bad_folders(change: Any, sentence: str, run: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    change(images)
    with pytest.raises(settings.Wrong, match=sentence):
        run("run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_costs")
def test_a_folder_of_another_run(run: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    run("run", "--epochs", 1)
    with pytest.raises(settings.Wrong, match=r"has a run with lr 0\.01, but 0\.5 is asked for"):
        run("run", "--epochs", 1, "--lr", 0.5)
    (images / "train" / "a" / "0.png").rename(images / "train" / "a" / "9.png")
    with pytest.raises(settings.Wrong, match="has a run with images"):
        run("run", "--epochs", 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(settings.Wrong, match=r"must be empty or have a run, but it has files and no settings\.json"):
        run("other")


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/evaluation/classification.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_script(images: Path, tmp_path: Path) -> None:
    """Two processes (DDP) train, --help explains every setting, and bad input ends with one line."""
    done = script("--data", images, "--out", tmp_path / "run", *TINY, "--devices", 2, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["settings"]["devices"] == 2 and len(result["history"]) == 1
    told = script("--help").stdout
    assert "IMAGENET" not in told and "must" not in told.partition("options:")[0]
    for name in classification.Settings.__dataclass_fields__:
        assert f"--{name} " in told
    refused = script("--data", images, "--gate", "sse")
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: --gate 'sse'")
    assert "Traceback" not in refused.stderr


@pytest.mark.usefixtures("without_costs")
def test_a_loss_that_is_not_finite_ends_the_run(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(settings.Wrong, match="--lr 1e\\+30: the loss is not finite before step"):
        run("run", "--lr", 1e30)
    assert not (tmp_path / "run" / "last.ckpt").exists()
