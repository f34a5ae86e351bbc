"""DDP and FSDP2 on two gloo processes of torchrun train like one process with the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from tests.support import distributed_steps

pytest.importorskip("torchvision")
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.xdist_group("distributed"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.support.distributed_steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found = torch.load(folder / "results.pt", weights_only=True)
    assert found["world"] == 2
    return found


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, torch.Tensor], nn.Module]:
    model = distributed_steps.network()
    losses, gradients = distributed_steps.train(model, slice(None))
    return losses, gradients, model


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_losses_and_gradients_are_those_of_one_process(
    how: str, results: dict[str, Any], alone: tuple[list[float], dict[str, torch.Tensor], nn.Module]
) -> None:
    losses, gradients = results[how]
    expected_losses, expected, model = alone
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-5)
    assert expected_losses[0] != expected_losses[-1]
    # Every parameter has a gradient, also those of the units.
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert sum("steam" in name and g.abs().max() > 0 for name, g in gradients.items()) == 8
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item()), name


def test_parameters_were_sharded(results: dict[str, Any]) -> None:
    assert results["placed"] is True


def test_the_first_ranks_scale_is_that_of_all(results: dict[str, Any]) -> None:
    """If one rank has loaded a checkpoint, DDP's broadcast gives the scale to the calls of the other ranks."""
    assert results["first rank's scale"] == [[4.0, 4.0, 1.0]] * 2


def test_distributed_checkpoint(
    folder: Path, results: dict[str, Any], alone: tuple[list[float], dict[str, torch.Tensor], nn.Module]
) -> None:
    """Two other processes load the checkpoint of two processes, and so does one process into an ordinary network."""
    assert torch.equal(results["saved"], results["loaded"])
    model = distributed_steps.network(identity_init=False)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    model.load_state_dict(state)
    images, _ = distributed_steps.batch(distributed_steps.STEPS)
    with torch.no_grad():
        assert torch.allclose(model(images), alone[2](images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(images), distributed_steps.network()(images), rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, results["parameters"][name]), name
