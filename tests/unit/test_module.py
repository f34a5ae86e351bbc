"""Tests of FusedSTEAM as a layer: parameters, state, copies, repr, attention maps, window, backend."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM, reference
from tests.support import cases, oracle
from tests.support.cases import Case

CLASSES = [FusedSTEAM, reference.STEAM]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("d", [8, 16, 64])
def test_parameters(cls: type[FusedSTEAM], d: int) -> None:
    """There are 8 d numbers. Query, key and value rows fill (-1, 1), output rows (-1/sqrt(d), 1/sqrt(d))."""
    units = [cls(embed_dim=d, num_heads=4) for _ in range(400)]
    assert sum(p.numel() for p in units[0].parameters()) == 8 * d
    for name in ("channel_weight", "spatial_weight"):
        stack = torch.stack([getattr(u, name).detach() for u in units])
        assert stack.shape == (400, 4, d)
        for row in range(4):
            bound = 1.0 if row < 3 else 1 / math.sqrt(d)
            largest = stack[:, row].abs().max().item()
            assert 0.98 * bound < largest <= bound
            assert abs(stack[:, row].mean().item()) < 5 * bound / math.sqrt(3 * 400 * d)


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_is_shared(cls: type[FusedSTEAM]) -> None:
    other = CLASSES[1 - CLASSES.index(cls)]
    for options in ({}, {"identity_init": True}, {"embed_dim": 12, "num_heads": 2}):
        source = cls(**options)
        shape = {k: v for k, v in options.items() if k != "identity_init"}
        target = other(**shape)
        assert set(source.state_dict()) == {"channel_weight", "spatial_weight", "scale"}
        assert target.load_state_dict(source.state_dict()).missing_keys == []
        assert target.scale == source.scale == (4.0 if "identity_init" in options else 1.0)
        x = torch.randn(2, 5, 9, 8)
        assert torch.allclose(source(x), target(x), rtol=1e-5, atol=1e-6)


def test_scale_travels(any_backend: str) -> None:
    """The scale goes through a file into a unit without identity_init and back, with strict loading."""
    unit = FusedSTEAM(identity_init=True, backend=any_backend)
    buffer = io.BytesIO()
    torch.save(unit.state_dict(), buffer)
    buffer.seek(0)
    loaded = FusedSTEAM(backend=any_backend)
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    x = torch.randn(2, 5, 9, 8)
    assert loaded.scale == 4.0 and torch.equal(loaded(x), x)
    back = FusedSTEAM(identity_init=True)
    back.load_state_dict(FusedSTEAM().state_dict())
    assert back.scale == 1.0
    net = torch.nn.Sequential(FusedSTEAM(), FusedSTEAM(identity_init=True))
    other = torch.nn.Sequential(FusedSTEAM(identity_init=True), FusedSTEAM())
    other.load_state_dict(net.state_dict())
    assert [u.scale for u in other] == [1.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_identity_init_changes_nothing(any_backend: str, dtype: torch.dtype, layout: str) -> None:
    """Forward keeps every bit of x. The output rows get a gradient, so the unit can learn."""
    unit = FusedSTEAM(identity_init=True, backend=any_backend)
    inputs, dy = cases.make(Case(space=(14, 14), channels=20, dtype=dtype, layout=layout))
    y = unit(inputs["x"])
    assert torch.equal(y, inputs["x"])
    y.backward(dy)
    for weight in (unit.channel_weight, unit.spatial_weight):
        assert weight.grad is not None and weight.grad[3].abs().min() > 0 and not weight.grad[:3].any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(any_backend: str, how: str) -> None:
    unit = FusedSTEAM(5, embed_dim=12, num_heads=3, window=3, order="parallel", identity_init=True, backend=any_backend)
    torch.nn.init.normal_(unit.channel_weight)
    if how == "deepcopy":
        twin = copy.deepcopy(unit)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(unit))
    else:
        buffer = io.BytesIO()
        torch.save(unit, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 5, 9, 8)
    assert torch.equal(twin(x), unit(x)) and repr(twin) == repr(unit)
    assert twin.backend == any_backend and twin.scale == 4.0
    with torch.no_grad():
        twin.spatial_weight.add_(1)
    assert not torch.equal(twin(x), unit(x))


def test_repr_names_what_differs() -> None:
    assert repr(FusedSTEAM()).startswith("FusedSTEAM(")
    text = repr(
        FusedSTEAM(
            64,
            embed_dim=16,
            num_heads=2,
            window=5,
            channel_radius=2,
            spatial_neighbors=8,
            self_loops=False,
            order="parallel",
            activation="relu",
            inplace=True,
            backend="reference",
            identity_init=True,
        )
    )
    for part in (
        "64",
        "embed_dim=16",
        "num_heads=2",
        "window=5",
        "channel_radius=2",
        "spatial_neighbors=8",
        "self_loops=False",
        "order='parallel'",
        "activation='relu'",
        "inplace=True",
        "backend='reference'",
        "4.0",
    ):
        assert part in text, part
    assert "grid_size=(3, 5)" in repr(FusedSTEAM(grid_size=(3, 5)))


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("grid", [{}, {"grid_size": (3, 2)}, {"window": 4}])
def test_attention_maps_are_the_oracles(grid: dict[str, Any], order: str) -> None:
    unit = FusedSTEAM(order=order, identity_init=True, **grid)
    for weight in (unit.channel_weight, unit.spatial_weight):
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 6, 9, 8)
    channel, spatial = unit.attention_maps(x)
    for n in range(2):
        g_c, g_s, (gh, gw) = oracle.gates(
            x[n].double(),
            unit.channel_weight.detach().double(),
            unit.spatial_weight.detach().double(),
            order=order,
            **grid,
        )
        assert torch.allclose(channel[n].double(), g_c, rtol=1e-5, atol=1e-6)
        assert spatial.shape == (2, gh, gw)
        assert torch.allclose(spatial[n].double().flatten(), g_s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_maps_are_float32_and_differentiable(dtype: torch.dtype) -> None:
    unit = FusedSTEAM(activation="relu")
    x = torch.randn(2, 6, 9, 8).to(dtype).requires_grad_()
    channel, spatial = unit.attention_maps(x)
    assert channel.dtype == spatial.dtype == torch.float32
    assert channel.shape == (2, 6) and spatial.shape == (2, 7, 7)
    (channel.sum() + spatial.sum()).backward()
    assert x.grad is not None and x.grad.abs().max() > 0 and unit.spatial_weight.grad is not None


def test_attention_maps_make_the_output(any_backend: str) -> None:
    """y is scale * x * channel gate * spatial gate of the pixel's cell."""
    unit = FusedSTEAM(identity_init=True, grid_size=(2, 4), backend=any_backend)
    for weight in (unit.channel_weight, unit.spatial_weight):
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 6, 8, 8)
    channel, spatial = unit.attention_maps(x)
    own = spatial.repeat_interleave(4, 1).repeat_interleave(2, 2)
    assert torch.allclose(unit(x), 4 * x * channel[:, :, None, None] * own[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "window,size,grid", [(4, (9, 8), (3, 2)), (1, (5, 3), (5, 3)), (100, (9, 8), (1, 1)), (7, (50, 61), (8, 9))]
)
def test_window_grows_the_grid(any_backend: str, window: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    unit = FusedSTEAM(window=window, backend=any_backend)
    x = torch.randn(2, 6, *size)
    assert unit.attention_maps(x)[1].shape == (2, *grid)
    same = steam_kernels.steam(x, unit.channel_weight, unit.spatial_weight, grid_size=grid, backend=any_backend)
    assert torch.equal(unit(x), same)


def test_grid_of_none_is_seven_and_never_finer_than_the_map() -> None:
    unit = FusedSTEAM()
    assert unit.attention_maps(torch.randn(1, 3, 20, 30))[1].shape == (1, 7, 7)
    assert unit.attention_maps(torch.randn(1, 3, 3, 30))[1].shape == (1, 3, 7)


def test_module_is_the_function(any_backend: str) -> None:
    options: dict[str, Any] = {
        "num_heads": 2,
        "grid_size": (3, 5),
        "channel_radius": 2,
        "spatial_neighbors": 8,
        "self_loops": False,
        "order": "parallel",
        "activation": "relu",
    }
    unit = FusedSTEAM(6, backend=any_backend, **options)
    x, residual = torch.randn(2, 6, 9, 8), torch.randn(2, 6, 9, 8)
    expected = steam_kernels.steam(
        x, unit.channel_weight, unit.spatial_weight, residual, backend=any_backend, **options
    )
    assert torch.equal(unit(x, residual), expected) and torch.equal(unit(x, residual=residual), expected)


def test_half_model(any_backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        unit = FusedSTEAM(backend=any_backend, identity_init=True).to(dtype)
        x = torch.randn(2, 6, 9, 8, dtype=dtype)
        y = unit(x)
        assert y.dtype == dtype and torch.equal(y, x) and unit.scale == 4.0
        y.sum().backward()
        assert unit.channel_weight.grad is not None and unit.channel_weight.grad.dtype == dtype


def test_dtype_and_device_of_parameters() -> None:
    unit = FusedSTEAM(8, dtype=torch.float64, device="meta")
    assert unit.channel_weight.dtype == torch.float64 and unit.spatial_weight.device.type == "meta"
    real = unit.to_empty(device="cpu")
    real.reset_parameters()
    assert real.channel_weight.isfinite().all()


def test_backend_may_be_set_later() -> None:
    unit = FusedSTEAM()
    assert unit.backend is None
    unit.backend = "reference"
    assert unit.backend == "reference"
    with pytest.raises(ValueError, match=r"backend .*'nonsense'"):
        unit.backend = "nonsense"
    assert unit.backend == "reference"
    unit.backend = None


def test_options_may_be_set_later(any_backend: str) -> None:
    """Setting an option checks it, and the next call uses it."""
    unit, x = FusedSTEAM(6, backend=any_backend).double(), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for name, value, wrong in (
        ("num_heads", 2, 0),
        ("grid_size", (3, 4), 0),
        ("channel_radius", 2, -1),
        ("spatial_neighbors", 8, 5),
        ("self_loops", False, 1),
        ("order", "parallel", "serial"),
        ("activation", "relu", "gelu"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(unit, name, wrong)
        before = unit(x)
        setattr(unit, name, value)
        assert getattr(unit, name) == value and f"{name}={value!r}" in repr(unit)
        assert not torch.equal(unit(x), before)
        assert torch.allclose(
            unit(x), steam_kernels.steam(x, *unit.parameters(), **unit.options.given()), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match="grid_size and window"):
        unit.window = 4


def test_inplace_may_be_set_later_but_tools_do_not_find_it() -> None:
    """Ultralytics sets ``inplace`` on each module that has it, but another module may read the unit's input."""
    unit, x = FusedSTEAM(6).requires_grad_(False), torch.randn(2, 6, 9, 8)
    assert not hasattr(unit, "inplace") and unit(x) is not x
    unit.inplace = True
    assert unit(x) is x and "inplace=True" in repr(unit)
    with pytest.raises(TypeError, match="inplace must be True or False, got 1"):
        unit.inplace = 1  # type: ignore[assignment]
    assert "inplace=True" in repr(unit)
