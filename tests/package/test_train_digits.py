"""Tests of examples/train_digits.py: the data, resumed runs, and equal training with fused and reference units."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("train_digits")


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    """The example as a module, which reads the digits only once."""
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_digits"]


def test_split_comes_before_composing(digits: ModuleType) -> None:
    """No digit of the test set is in training, and all classes have the same number of digits."""
    (train, train_labels), (test, test_labels) = digits.split(digits.Plan())
    assert len(train) == 4000 and len(test) == 1000
    # This would fail if the data set had equal images, but it has none.
    assert not {v.tobytes() for v in train} & {v.tobytes() for v in test}
    assert set(np.bincount(train_labels)) == {400} and set(np.bincount(test_labels)) == {100}


def test_a_scene_is_its_digit_among_fragments_of_others(digits: ModuleType) -> None:
    plan = replace(digits.Plan(), noise=0.0, fragments=0)
    data, _ = digits.split(digits.Plan())
    chosen = np.array([0, 7, 4])
    bare, labels = digits.scenes(data, chosen, plan, (3,))
    assert bare.shape == (3, 1, 56, 56) and labels.tolist() == data[1][chosen].tolist()
    for scene, index in zip(bare[:, 0].numpy(), chosen, strict=True):
        image = data[0][index]
        windows = np.lib.stride_tricks.sliding_window_view(scene, (28, 28))
        assert (windows == image).all((2, 3)).any(), "the whole digit is somewhere"
        assert scene.sum() == pytest.approx(image.sum(), rel=1e-5), "and nothing else"
    cluttered, _ = digits.scenes(data, chosen, replace(plan, fragments=8), (3,))
    assert (cluttered.sum((1, 2, 3)) > bare.sum((1, 2, 3))).all()
    again, _ = digits.scenes(data, chosen, digits.Plan(), (3,))
    same, _ = digits.scenes(data, chosen, digits.Plan(), (3,))
    other, _ = digits.scenes(data, chosen, digits.Plan(), (4,))
    assert torch.equal(again, same) and not torch.equal(again, other)


def test_kinds_differ_in_attention_only(digits: ModuleType) -> None:
    nets = {kind: digits.Net(kind, 5) for kind in digits.KINDS}
    base = nets["none"].state_dict()
    for net in nets.values():
        state = net.state_dict()
        assert all(torch.equal(state[k], v) for k, v in base.items())
    sizes = {kind: digits.parameters(net) - digits.parameters(nets["none"]) for kind, net in nets.items()}
    assert sizes["STEAM"] == 3 * 64 and sizes["none"] == 0 < sizes["ECA"] < sizes["STEAM"] < sizes["SE"]
    x = torch.randn(2, 1, 56, 56)
    assert torch.equal(nets["STEAM"].eval()(x), nets["none"].eval()(x)), "the units start as the identity"


def test_a_stopped_run_goes_on_to_the_same_bits(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = replace(digits.Plan.quick(), train=70, test=20, epochs=3, batch=32)
    monkeypatch.setattr(digits, "KINDS", ("STEAM",))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    digits.train(plan, whole, float("inf"))
    capsys.readouterr()
    for done in range(plan.epochs):
        # By this clock one epoch starts before the deadline, and the next one after it.
        clock = iter([0.0] + [2.0] * 9)
        with monkeypatch.context() as patch:
            patch.setattr(digits.time, "monotonic", lambda clock=clock: next(clock))
            if done < plan.epochs - 1:
                with pytest.raises(digits.Stopped):
                    digits.train(plan, parts, 1.0)
            else:
                digits.train(plan, parts, 1.0)
        assert len(digits.load(parts, "STEAM", 0)[1]) == done + 1
        line, *_ = re.findall(r"^\[.*", capsys.readouterr().out, re.MULTILINE)
        assert line.startswith(f"[{done + 1}/3] ") and not line.endswith("left"), "earlier epochs have no duration"
    (net, history), (other, resumed) = digits.load(whole, "STEAM", 0), digits.load(parts, "STEAM", 0)
    assert history == resumed and len(history[0]["losses"]) == 3
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())


def test_fused_and_reference_train_alike(digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both train alike within a bound that is small against the loss. A unit with other results exceeds the bound."""
    plan = replace(digits.Plan.quick(), batch=16, compared_steps=6)
    compared = digits.compare(plan)
    assert max(compared["bound"]) < 1e-2 < 2 < min(compared["reference"])
    assert all(d <= b for d, b in zip(compared["difference"], compared["bound"], strict=True))
    right = digits.FusedSTEAM

    def wrong(*args: Any, backend: str | None, **options: Any) -> torch.nn.Module:
        unit = right(*args, backend=backend, **options)
        if backend is None:
            unit.scale *= 1.001
        return unit

    monkeypatch.setattr(digits, "FusedSTEAM", wrong)
    with pytest.raises(SystemExit, match=r"step \d+: fused differs by .* beyond"):
        digits.compare(plan)


def test_quick_run(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program writes results and pictures, counts its epochs, and refuses a folder with other settings."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--out", str(tmp_path), "--quick"])
    digits.main()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert [r["kind"] for r in result["rows"]] == ["none", "SE", "ECA", "STEAM"]
    for r in result["rows"]:
        assert 0 <= r["accuracy_mean"] <= 1 and len(r["loss"]) == 1 and len(r["loss"][0]) == 2
        assert r["seconds"] > 0 and r["peak_bytes"] > 0
        assert f"| {r['kind']} | {100 * r['accuracy_mean']:.2f} ± 0.00 %" in printed
        (last,) = re.findall(rf"^\[[2468]/8\] {r['kind']}, seed 0, epoch 2 (.*); about .* left$", printed, re.MULTILINE)
        loss, right = re.fullmatch(r"\(so far: loss (.*), accuracy (.*)\)", last).groups()  # type: ignore[union-attr]
        assert float(loss) == pytest.approx(r["loss"][0][0], abs=1e-3) and float(right) == round(r["accuracy"][0][0], 3)
    assert re.findall(r"^\[(\d)/8\]", printed, re.MULTILINE) == [*"12345678"]
    assert re.findall(r"^\[(\d)/5\] compare: ", printed, re.MULTILINE) == [*"12345"]
    assert "\r" not in printed
    assert (tmp_path / "train_digits.svg").read_bytes().lstrip().startswith(b"<?xml")
    assert (tmp_path / "train_digits_gates.png").read_bytes().startswith(b"\x89PNG")
    command = [sys.executable, "examples/train_digits.py", "--out", str(tmp_path), "--only", "report"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "holds a run with other settings" in refused.stderr


def test_page_is_of_the_committed_run(digits: ModuleType) -> None:
    """The table of docs/training.md has the committed results, which are from the full plan."""
    result = json.loads((ROOT / "benchmarks" / "results" / "train_digits.json").read_text())
    assert digits.markdown(result["rows"]) in (ROOT / "docs" / "training.md").read_text()
    plan = digits.Plan()
    assert {k: result["plan"][k] for k in ("epochs", "seeds", "train", "test")} == {
        "epochs": plan.epochs,
        "seeds": plan.seeds,
        "train": plan.train,
        "test": plan.test,
    }
    assert all(d <= b for d, b in zip(result["compare"]["difference"], result["compare"]["bound"], strict=True))
