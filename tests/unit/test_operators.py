"""Tests of the operators: schemas, fakes and their strides, meta tensors, FLOP counts."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import steam_kernels
from tests.support import cases
from tests.support.cases import Case
from tests.support.operators import OPS, backward_arguments, forward_arguments, in_place_arguments, same_layout

CASES = [
    Case(space=(9, 8), channels=6),
    Case(space=(9, 8), channels=6, layout="nhwc", tail="residual_relu", dtype=torch.bfloat16),
    Case(space=(1, 1), channels=3, batch=1, layout="nhwc", tail="relu"),
    Case(space=(7, 7), channels=1, tail="residual", dtype=torch.float64, weights="x"),
    Case(space=(14, 5), channels=9, batch=3, grid="w4", dtype=torch.float16, weights="x", layout="offset_nhwc"),
]
UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_opcheck_forward(case: Case, save: bool) -> None:
    torch.library.opcheck(OPS.forward.default, forward_arguments(case, save), test_utils=UTILITIES)


@pytest.mark.parametrize("need", [(True, True, True, True), (False, True, False, False), (True, False, False, True)])
@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.id)
def test_opcheck_backward(case: Case, need: tuple[bool, ...]) -> None:
    torch.library.opcheck(OPS.backward.default, backward_arguments(case, need), test_utils=UTILITIES)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_opcheck_in_place(case: Case) -> None:
    torch.library.opcheck(OPS.forward_.default, in_place_arguments(case), test_utils=UTILITIES)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
@pytest.mark.parametrize(
    "space,channels,batch", [((9, 8), 6, 2), ((1, 1), 5, 3), ((6, 7), 1, 2), ((5, 1), 4, 1), ((4, 4), 3, 0)]
)
def test_fake_outputs_have_the_real_strides(
    space: tuple[int, int], channels: int, batch: int, layout: str, dtype: torch.dtype
) -> None:
    case = Case(
        space=space, channels=channels, batch=batch, layout=layout, dtype=dtype, tail="residual_relu", weights="x"
    )
    calls = [(OPS.forward, forward_arguments(case)), (OPS.forward, forward_arguments(case, save=False))]
    calls += [
        (OPS.backward, backward_arguments(case, need))
        for need in ((True,) * 4, (False, True, False, True), (True, False, True, False))
    ]
    for operator, arguments in calls:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        assert len(real) == len(fake)
        for r, f in zip(real, fake, strict=True):
            assert same_layout(r, f), f"{operator}: {tuple(r.shape)} {r.stride()} is not {tuple(f.shape)} {f.stride()}"


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "column_slice"])
def test_meta_tensors(layout: str) -> None:
    """y and the gradients have the right shapes, dtypes and strides without data."""
    case = Case(space=(9, 8), channels=6, layout=layout, tail="residual_relu")
    inputs, dy = cases.make(case)
    expected = cases.forward_backward(steam_kernels.steam, inputs, dy, **case.options)
    meta = {k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for k, v in inputs.items()}
    got = cases.forward_backward(steam_kernels.steam, meta, dy.to("meta"), **case.options)
    for name, value in got.items():
        assert (
            value.device.type == "meta" and value.shape == expected[name].shape and value.dtype == expected[name].dtype
        )
    assert got["y"].stride() == expected["y"].stride()


def test_flops_of_both_directions(backend: str) -> None:
    """FlopCounterMode counts the operators by the formula of cost(), once per sample."""
    case = Case(space=(28, 28), channels=64, batch=3)
    inputs, dy = cases.make(case)
    x = inputs["x"].requires_grad_()
    expected = steam_kernels.cost(64, 28, 28)
    with FlopCounterMode(display=False) as counter:
        y = steam_kernels.steam(**inputs, backend=backend)
    assert counter.get_total_flops() == 3 * expected.flops
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    assert counter.get_total_flops() == 3 * expected.backward_flops
    assert x.grad is not None


def test_cost_by_hand() -> None:
    """The parameters are 8 d, the bytes those of the maps, and the FLOPs a few per element if the graphs are small."""
    for d in (8, 16):
        assert steam_kernels.cost(256, 56, 56, embed_dim=d).parameters == 8 * d
    numel = 256 * 56 * 56
    plain = steam_kernels.cost(256, 56, 56)
    assert plain.bytes == 2 * 4 * numel and plain.backward_bytes == 3 * 4 * numel
    tail = steam_kernels.cost(256, 56, 56, residual=True, activation="relu", dtype=torch.bfloat16)
    assert tail.bytes == 3 * 2 * numel and tail.backward_bytes == 5 * 2 * numel
    assert 2 * numel <= plain.flops <= 2.5 * numel
    assert 5 * numel <= plain.backward_flops <= 6 * numel
    assert tail.flops == plain.flops + numel
    # A radius of 2 gives two more edges for every channel.
    assert steam_kernels.cost(256, 56, 56, channel_radius=2).flops - plain.flops == 2 * 256 * 4 * 6
    for wrong, error in (({"channels": 0}, ValueError), ({"width": 1.5}, TypeError), ({"heads": 2}, TypeError)):
        with pytest.raises(error):
            steam_kernels.cost(**{"channels": 4, "height": 4, "width": 4, **wrong})
