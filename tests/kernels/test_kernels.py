"""The output and every gradient of each backend's kernels against the reference, over a designed sample of units."""

from __future__ import annotations

import pytest
import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case
from tests.support.tolerances import within

pytestmark = pytest.mark.kernels

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# The sample is too small for these cases: large maps with odd rows, many channels on a small map, and one pixel.
LARGE = [
    Case(space=(100, 167), channels=20, batch=1),
    Case(space=(100, 167), channels=9, grid=(13, 21), layout="nhwc", dtype=BF16),
    Case(space=(100, 167), channels=3, grid=(13, 21), layout="offset_nhwc", order="parallel", neighbors=8),
    Case(space=(100, 167), channels=5, grid="w8", layout="offset_nchw", dtype=BF16, tail="residual_relu"),
    Case(space=(7, 7), channels=512, batch=1, radius=3),
    Case(space=(7, 7), channels=515, batch=3, layout="nhwc", dtype=BF16, tail="residual_relu"),
    Case(space=(14, 14), channels=257, layout="offset_nhwc", tail="residual_relu"),
    Case(space=(1, 1), channels=300, batch=5, layout="nhwc", self_loops=False),
    Case(space=(28, 28), channels=130, dtype=BF16, layout="nhwc", attention=(8, 8), radius=2, neighbors=8),
    Case(space=(57, 61), channels=33, batch=1, layout="nhwc", dtype=F16, tail="other_relu"),
    # The ring reaches beyond a block of channels, and beyond a short last block.
    Case(space=(5, 5), channels=650, radius=40),
    Case(space=(18, 17), channels=146, radius=5),
]


def test_sample_covers_every_pair() -> None:
    """The sample contains every value of every factor, and every pair of values that is small enough to run."""
    sample = cases.all_pairs()
    for name, values in cases.FACTORS.items():
        if name == "where":
            assert {(c.space, c.grid) for c in sample} == set(values)
        else:
            assert {getattr(c, name) for c in sample} == set(values)
    pairs = {(c.layout, c.dtype) for c in sample}
    assert len(pairs) == len(cases.LAYOUTS) * 4
    assert len({(c.channels, c.layout) for c in sample}) == len(cases.FACTORS["channels"]) * len(cases.LAYOUTS)


@pytest.mark.parametrize("case", cases.all_pairs(), ids=lambda c: c.id)
def test_sample(case: Case, backend: str) -> None:
    cases.check(case, backend, *cases.make(case))


@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_large(case: Case, backend: str) -> None:
    cases.check(case, backend, *cases.make(case))


# These maps have more than 16 MB, so kernels may write outputs past the cache.
STREAMED = [
    Case(space=(56, 57), channels=33, batch=41, layout="nchw"),
    Case(space=(57, 61), channels=35, batch=36, layout="offset_nchw"),
    Case(space=(57, 61), channels=35, batch=36, layout="offset_nhwc", tail="residual_relu"),
    Case(space=(28, 28), channels=130, batch=44, layout="nhwc"),
    Case(space=(61, 57), channels=130, batch=20, layout="offset_nchw", dtype=BF16, tail="residual_relu"),
    Case(space=(57, 61), channels=67, batch=38, layout="offset_nhwc", dtype=BF16),
    Case(space=(7, 7), channels=515, batch=170, layout="nchw", radius=2),
    Case(space=(7, 7), channels=515, batch=340, layout="offset_nchw", dtype=BF16),
]


@pytest.mark.parametrize("case", STREAMED, ids=lambda c: c.id)
def test_outputs_larger_than_the_cache(case: Case, backend: str) -> None:
    """A large call and parts of its batch have equal bits in y and dx. The first samples are within the bounds."""
    size = torch.empty((), dtype=case.dtype).element_size()
    assert case.numel * size > 16e6
    inputs, dy = cases.make(case)
    large = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    sums = {k: torch.zeros_like(v, dtype=F64) for k, v in large.items() if v.dim() == 2}
    sizes = {k: v.clone() for k, v in sums.items()}
    step = max(1, case.batch // 6)
    maps = ("x", "residual")
    for start in range(0, case.batch, step):
        part = {k: v[start : start + step] if k in maps else v for k, v in inputs.items()}
        small = cases.forward_backward(
            steam_kernels.steam, part, dy[start : start + step], backend=backend, **case.options
        )
        for name, value in small.items():
            if value.dim() == 4:
                assert torch.equal(large[name][start : start + step], value), f"{name}, samples from {start}"
            else:
                sums[name] += value.double()
                sizes[name] += value.double().abs()
    for name, total in sums.items():
        # The other gradients are sums over samples in another order: one rounding per sample, of at most the parts'
        # sizes.
        bound = case.batch * torch.finfo(F32).eps * sizes[name].max()
        error = (large[name].double() - total).abs().max().item()
        assert within(error, bound.item(), f"{name} over parts {case.id}"), name
    few = case.but(batch=2)
    part = {k: v[:2] if k in maps else v for k, v in inputs.items()}
    cases.check(few, backend, part, dy[:2])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_empty_batch(backend: str, dtype: torch.dtype, layout: str) -> None:
    case = Case(space=(9, 7), channels=5, batch=0, dtype=dtype, layout=layout, tail="residual_relu", weights="x")
    inputs, dy = cases.make(case)
    got = cases.forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    assert got["y"].shape == (0, 5, 9, 7) and got["dx"].shape == (0, 5, 9, 7)
    for name in ("dchannel_weight", "dspatial_weight"):
        assert got[name].shape == (4, 8) and got[name].dtype == dtype
        assert torch.equal(got[name], torch.zeros_like(got[name]))
