"""One of two processes that torchrun starts: training steps under DDP and FSDP2, and a distributed checkpoint.

    torchrun --nproc-per-node 2 -m tests.support.distributed_steps FOLDER

Rank 0 writes FOLDER/results.pt. tests/models/test_distributed.py compares it with the results of one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from steam_kernels import FusedSTEAM
from tests.support import networks

BATCH, STEPS = 4, 3


def network(identity_init: bool = True) -> nn.Module:
    """A ResNet-18 with units and GroupNorm, whose statistics do not depend on the other samples of the batch.

    The units' weights are drawn anew, so ``identity_init`` sets only the scale. A checkpoint must contain the scale.
    """
    torch.manual_seed(0)
    return networks.resnet(norm=lambda channels: nn.GroupNorm(8, channels), identity_init=identity_init)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 64, 64, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


def train(model: nn.Module, own: slice) -> tuple[list[float], dict[str, Tensor]]:
    """Trains by SGD on this process's part of each batch. Returns the losses and the gradients of the first step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, gradients = [], {}
    for step in range(STEPS):
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(model(images[own]), labels[own])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.detach())
    found = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found.tolist(), gradients


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def sharded(identity_init: bool = True) -> nn.Module:
    """The network under FSDP2. Each residual block with its unit is one group of parameters."""
    model = network(identity_init)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def scales_of_all(rank: int, world: int) -> list[list[float]]:
    """The scale of each rank as a buffer and as a float, and whether calls use it.

    Only the first rank has loaded a checkpoint when DDP sends its buffers to all ranks.
    """
    unit = FusedSTEAM()
    if rank == 0:
        unit.load_state_dict(FusedSTEAM(identity_init=True).state_dict())
    x = torch.randn(1, 4, 8, 8)
    DistributedDataParallel(unit)(x).sum().backward()
    own = torch.tensor([unit.scale.item(), unit.host_scale(), float(torch.equal(unit(x), x))])
    found = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(found, own)
    return [numbers.tolist() for numbers in found]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    results: dict[str, object] = {"world": world}
    # find_unused_parameters is off, so DDP raises at the second step if a parameter was unused in the first.
    losses, gradients = train(DistributedDataParallel(network()), own)
    results["ddp"] = losses, {name.removeprefix("module."): g for name, g in gradients.items()}

    model = sharded()
    results["placed"] = all(isinstance(p, DTensor) for p in model.parameters())
    results["fsdp"] = train(model, own)

    dcp.save(get_model_state_dict(model), checkpoint_id=str(folder / "checkpoint"))
    other = sharded(identity_init=False)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    set_model_state_dict(other, state)
    images, _ = batch(STEPS)
    with torch.no_grad():
        results["saved"], results["loaded"] = model(images), other(images)
    results["parameters"] = {name: full(p) for name, p in other.named_parameters()}
    results["first rank's scale"] = scales_of_all(rank, world)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
