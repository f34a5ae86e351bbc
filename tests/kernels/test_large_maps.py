"""Maps of more than 2**31 elements on the CPU: an offset into them that is kept in 32 bits is wrong.

A map has 4.4 GB, so no test has a second one: forward calls are in place, and backward calls have x as dy and compute
no dx.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from steam_kernels import reference, steam
from tests.support.backends import usable_backends

# One process runs all of these tests, so that only one map is in memory.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("large_maps")]

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
LIMIT = 2**31
FREE_BYTES = 12e9
HEADS = 4
OPS = torch.ops.steam_kernels


def free_bytes() -> float:
    """The memory that programs can still take; 0 if the system does not report it."""
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.is_file() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return 0.0


@pytest.fixture(autouse=True)
def _room() -> Iterator[None]:
    if "cpu" not in usable_backends():
        pytest.skip("the CPU kernels cannot run here")
    if (free := free_bytes()) < FREE_BYTES:
        pytest.skip(f"needs {FREE_BYTES / 1e9:.0f} GB of free memory, and there are {free / 1e9:.0f} GB")
    torch.set_num_threads(2)
    yield


SHAPE = (56, 40, 1000, 1001)
SAMPLE = 40 * 1000 * 1001
assert 53 * SAMPLE < LIMIT < 54 * SAMPLE, "sample 53 crosses the limit"


def samples(layout: str) -> tuple[Tensor, list[float]]:
    """One sample, and the factors that make all others from it."""
    one = torch.empty((1, *SHAPE[1:]), dtype=torch.bfloat16, memory_format=LAYOUTS[layout]).uniform_(-1, 2)
    return one, torch.linspace(0.5, 2, SHAPE[0]).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_have_the_bits_that_they_have_alone(layout: str) -> None:
    weights = torch.randn(2, 4, 8)
    one, factors = samples(layout)
    x = torch.empty(SHAPE, dtype=torch.bfloat16, memory_format=LAYOUTS[layout])
    for n, factor in enumerate(factors):
        torch.mul(one, factor, out=x[n : n + 1])
    with torch.no_grad():
        steam(x, *weights, num_heads=HEADS, inplace=True, backend="cpu")
        for n in (0, 53, 54, 55):
            alone = one * factors[n]
            steam(alone, *weights, num_heads=HEADS, inplace=True, backend="cpu")
            assert torch.equal(x[n : n + 1], alone), f"sample {n} differs from the sample alone"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_weights_are_sums_over_samples(layout: str) -> None:
    weights = torch.randn(2, 4, 8)
    options = ((7, 7), HEADS, 1, 4, True, True, 1.0, False)
    needs = (False, True, True, False)
    one, factors = samples(layout)
    x = torch.empty(SHAPE, dtype=torch.bfloat16, memory_format=LAYOUTS[layout])
    rows, alone = [], []
    for n, factor in enumerate(factors):
        sample = torch.mul(one, factor, out=x[n : n + 1])
        _, saved = OPS.forward(sample, *weights, None, True, *options)
        rows.append(saved)
        alone.append(torch.stack(OPS.backward(sample, sample, None, *weights, saved, needs, *options)[1:3]).double())
    gradients = torch.stack(OPS.backward(x, x, None, *weights, torch.cat(rows), needs, *options)[1:3]).double()
    each = torch.stack(alone)
    # Sums over samples are in float64, so the only roundings are those of each result to float32, 2**-24 of it.
    bound = 2**-23 * (each.abs().sum(0) + gradients.abs())
    assert ((gradients - each.sum(0)).abs() <= bound).all()
    assert (each[53:].abs().amax(0) > 100 * bound).all(), "the samples beyond the limit must be seen in the sum"


def gates_by_chunks(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gates of one sample of 28 x 28 pixels, (C,) and (7, 7), by plain PyTorch on some channels at a time."""
    channels, some = x.size(1), 10_000
    cells = torch.empty(1, channels, 7, 7)
    for means, part in zip(cells.split(some, 1), x.split(some, 1), strict=True):
        means.copy_(F.avg_pool2d(part.float(), 4))
    ring = reference.ring(channels, 1, True, x.device)
    lattice = reference.lattice((7, 7), 4, True, x.device)
    channel_gate = reference.graph_transform(cells.mean((2, 3)), weights[0], HEADS, ring).sigmoid()[0].double()
    sums = torch.zeros(7, 7, dtype=torch.float64)
    for gates, means in zip(channel_gate.split(some), cells[0].split(some), strict=True):
        sums += torch.einsum("c,cij->ij", gates, means.double())
    tokens = (sums / channels).view(1, 49)
    spatial_gate = reference.graph_transform(tokens, weights[1].double(), HEADS, lattice).sigmoid()
    return channel_gate, spatial_gate.view(7, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_sample_of_many_channels(layout: str) -> None:
    repeats, few = 2800, 1000
    channels = repeats * few
    weights = torch.randn(2, 4, 8) / 2
    one = torch.randn(few, 28, 28) + torch.randn(7, 7).repeat_interleave(4, 0).repeat_interleave(4, 1)
    factors = torch.empty(repeats).uniform_(0.5, 2)
    if layout == "nchw":
        memory = torch.empty(repeats, few, 28, 28, dtype=torch.bfloat16)
        torch.mul(one.bfloat16(), factors.bfloat16().view(-1, 1, 1, 1), out=memory)
        x = memory.view(1, channels, 28, 28)
    else:
        memory = torch.empty(28, 28, repeats, few, dtype=torch.bfloat16)
        torch.mul(one.bfloat16().permute(1, 2, 0).unsqueeze(2), factors.bfloat16().view(-1, 1), out=memory)
        x = memory.view(1, 28, 28, channels).permute(0, 3, 1, 2)
    assert x.numel() > LIMIT
    channel_gate, spatial_gate = gates_by_chunks(x, weights)
    crossing = LIMIT // 784
    checked = [slice(begin, begin + few) for begin in (0, crossing - few // 2, channels - few)]
    before = [x[0, some].double() for some in checked]
    with torch.no_grad():
        steam(x, *weights, num_heads=HEADS, inplace=True, backend="cpu")
    by_pixel = spatial_gate.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for some, given in zip(checked, before, strict=True):
        expected = given * channel_gate[some].view(-1, 1, 1) * by_pixel
        # One rounding of y is 2**-9 of it, and the errors of the gates in float32 are far smaller.
        assert ((x[0, some].double() - expected).abs() <= 2**-8 * expected.abs()).all(), f"channels {some} differ"
