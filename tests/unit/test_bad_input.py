"""Wrong arguments raise a ValueError or TypeError before any work. It names argument, value and allowed values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM, reference

X, W = torch.randn(2, 4, 6, 5), torch.randn(4, 8)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# Each entry: the changed arguments, the error, and parts of the message: the argument, the value, the allowed values.
OPTIONS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"num_heads": 3}, ValueError, ("num_heads", "3", "8")),
    ({"num_heads": 0}, ValueError, ("num_heads", "0", "at least 1")),
    ({"num_heads": -2}, ValueError, ("num_heads", "-2", "at least 1")),
    ({"num_heads": 2.0}, TypeError, ("num_heads", "2.0", "int")),
    ({"num_heads": True}, TypeError, ("num_heads", "True", "int")),
    ({"num_heads": None}, TypeError, ("num_heads", "None", "int")),
    ({"grid_size": 0}, ValueError, ("grid_size", "0", "at least 1")),
    ({"grid_size": (3, 0)}, ValueError, ("grid_size", "0", "at least 1")),
    ({"grid_size": (3, -1)}, ValueError, ("grid_size", "-1", "at least 1")),
    ({"grid_size": (3,)}, ValueError, ("grid_size", "(3,)", "pair")),
    ({"grid_size": (3, 4, 5)}, ValueError, ("grid_size", "(3, 4, 5)", "pair")),
    ({"grid_size": 3.5}, TypeError, ("grid_size", "3.5", "int")),
    ({"grid_size": "7"}, TypeError, ("grid_size", "'7'", "int")),
    ({"window": 0}, ValueError, ("window", "0", "at least 1")),
    ({"window": -4}, ValueError, ("window", "-4", "at least 1")),
    ({"window": 1.5}, TypeError, ("window", "1.5", "int")),
    ({"window": (2, 2)}, TypeError, ("window", "(2, 2)", "int")),
    ({"grid_size": 7, "window": 4}, ValueError, ("grid_size", "window", "7", "4")),
    ({"channel_radius": -1}, ValueError, ("channel_radius", "-1", "at least 0")),
    ({"channel_radius": 0.5}, TypeError, ("channel_radius", "0.5", "int")),
    ({"spatial_neighbors": 6}, ValueError, ("spatial_neighbors", "6", "4 or 8")),
    ({"spatial_neighbors": "4"}, ValueError, ("spatial_neighbors", "'4'", "4 or 8")),
    ({"self_loops": 1}, TypeError, ("self_loops", "1", "True or False")),
    ({"self_loops": None}, TypeError, ("self_loops", "None", "True or False")),
    ({"order": "serial"}, ValueError, ("order", "'serial'", "'sequential'", "'parallel'")),
    ({"order": None}, ValueError, ("order", "None", "'sequential'", "'parallel'")),
    ({"order": ["parallel"]}, ValueError, ("order", "['parallel']", "'sequential'", "'parallel'")),
    ({"activation": "gelu"}, ValueError, ("activation", "'gelu'", "'relu'")),
    ({"inplace": 1}, TypeError, ("inplace", "1", "True or False")),
    ({"backend": "tpu"}, ValueError, ("backend", "'tpu'", "'cpu'", "'reference'")),
    ({"backend": 3}, ValueError, ("backend", "3", "'cpu'", "'reference'")),
]
FUNCTION_ONLY: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"scale": "big"}, TypeError, ("scale", "'big'", "float")),
    ({"scale": float("nan")}, ValueError, ("scale", "nan", "finite")),
    ({"scale": float("inf")}, ValueError, ("scale", "inf", "finite")),
    ({"x": X[0]}, ValueError, ("x", "(4, 6, 5)", "(N, C, H, W)")),
    ({"x": X[None]}, ValueError, ("x", "(1, 2, 4, 6, 5)", "(N, C, H, W)")),
    ({"x": [1.0]}, TypeError, ("x", "list", "tensor")),
    ({"x": None}, TypeError, ("x", "NoneType", "tensor")),
    ({"x": X.int()}, TypeError, ("x", "torch.int32", "float16", "bfloat16", "float32", "float64")),
    ({"x": X.bool()}, TypeError, ("x", "torch.bool", "float32")),
    ({"x": X.to(torch.complex64)}, TypeError, ("x", "torch.complex64", "float32")),
    ({"x": X.to(torch.float8_e4m3fn)}, TypeError, ("x", "float8", "float32")),
    ({"x": zeros(2, 0, 6, 5)}, ValueError, ("x", "(2, 0, 6, 5)", "at least 1")),
    ({"x": zeros(2, 4, 0, 5)}, ValueError, ("x", "(2, 4, 0, 5)", "at least 1")),
    ({"x": zeros(2, 4, 6, 0)}, ValueError, ("x", "(2, 4, 6, 0)", "at least 1")),
    ({"x": X.to_sparse()}, TypeError, ("x", "sparse", "strided")),
    ({"channel_weight": zeros(3, 8)}, ValueError, ("channel_weight", "(3, 8)", "(4, embed_dim)")),
    ({"spatial_weight": zeros(4, 8, 1)}, ValueError, ("spatial_weight", "(4, 8, 1)", "(4, embed_dim)")),
    ({"channel_weight": zeros(4, 0)}, ValueError, ("channel_weight", "(4, 0)", "(4, embed_dim)")),
    ({"spatial_weight": zeros(4, 4)}, ValueError, ("spatial_weight", "(4, 4)", "(4, 8)")),
    ({"channel_weight": W.half()}, TypeError, ("channel_weight", "torch.float16", "torch.float32")),
    ({"spatial_weight": W.double()}, TypeError, ("spatial_weight", "torch.float64", "torch.float32")),
    ({"channel_weight": W.int()}, TypeError, ("channel_weight", "torch.int32", "torch.float32")),
    ({"channel_weight": "w"}, TypeError, ("channel_weight", "str", "tensor")),
    ({"spatial_weight": None}, TypeError, ("spatial_weight", "NoneType", "tensor")),
    ({"spatial_weight": zeros(4, 8, device="meta")}, ValueError, ("spatial_weight", "meta", "cpu")),
    ({"channel_weight": zeros(4, 8, device="meta")}, ValueError, ("channel_weight", "meta", "cpu")),
    ({"residual": X[:1]}, ValueError, ("residual", "(1, 4, 6, 5)", "(2, 4, 6, 5)")),
    ({"residual": X.bfloat16()}, TypeError, ("residual", "torch.bfloat16", "torch.float32")),
    ({"residual": 1.0}, TypeError, ("residual", "float", "tensor")),
    ({"residual": zeros(2, 4, 6, 5, device="meta")}, ValueError, ("residual", "meta", "cpu")),
]


def label(case: tuple[dict[str, Any], Any, Any]) -> str:
    return ",".join(
        f"{k}={v if not isinstance(v, torch.Tensor) else (v.dtype, tuple(v.shape), v.device.type)}"
        for k, v in case[0].items()
    )


def assert_message(error: BaseException, pieces: tuple[str, ...]) -> None:
    text = str(error)
    for piece in pieces:
        assert piece in text, f"{piece!r} is not in {text!r}"
    assert "\n" not in text and not re.search(r"\.(cpp|h|py):\d", text), text


@pytest.mark.parametrize("function", [steam_kernels.steam, reference.steam])
@pytest.mark.parametrize("case", OPTIONS + FUNCTION_ONLY, ids=label)
def test_function(function: Any, case: tuple[dict[str, Any], type[Exception], tuple[str, ...]]) -> None:
    changes, error, pieces = case
    arguments: dict[str, Any] = {"x": X, "channel_weight": W, "spatial_weight": W, **changes}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert caught.type is error
    assert_message(caught.value, pieces)


@pytest.mark.parametrize("cls", [FusedSTEAM, reference.STEAM])
@pytest.mark.parametrize("case", OPTIONS, ids=label)
def test_module(cls: Any, case: tuple[dict[str, Any], type[Exception], tuple[str, ...]]) -> None:
    changes, error, pieces = case
    with pytest.raises(error) as caught:
        cls(4, **changes)
    assert_message(caught.value, pieces)


MODULE_ONLY: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"channels": 0}, ValueError, ("channels", "0", "at least 1")),
    ({"channels": 4.0}, TypeError, ("channels", "4.0", "int")),
    ({"embed_dim": 0}, ValueError, ("embed_dim", "0", "at least 1")),
    ({"embed_dim": 10}, ValueError, ("num_heads", "embed_dim", "10", "4")),
    ({"embed_dim": 8.0}, TypeError, ("embed_dim", "8.0", "int")),
    ({"identity_init": 1}, TypeError, ("identity_init", "1", "True or False")),
    ({"dtype": torch.int32}, TypeError, ("dtype", "torch.int32", "float32")),
    ({"dtype": "float32"}, TypeError, ("dtype", "'float32'", "float32")),
]


@pytest.mark.parametrize("case", MODULE_ONLY, ids=label)
def test_module_only(case: tuple[dict[str, Any], type[Exception], tuple[str, ...]]) -> None:
    changes, error, pieces = case
    with pytest.raises(error) as caught:
        FusedSTEAM(**changes)
    assert_message(caught.value, pieces)


def test_channels_that_x_does_not_have() -> None:
    for method in ("forward", "attention_maps"):
        with pytest.raises(ValueError) as caught:
            getattr(FusedSTEAM(8), method)(X)
        assert_message(caught.value, ("x", "8", "(2, 4, 6, 5)"))


def test_attention_maps_check_x() -> None:
    with pytest.raises(TypeError, match=r"x .*int64"):
        FusedSTEAM().attention_maps(X.long())
    with pytest.raises(ValueError, match="x must"):
        FusedSTEAM().attention_maps(X[0])


def test_nothing_is_written_before_the_checks() -> None:
    """A call in place with a wrong residual changes neither the bits nor the version of x."""
    x = X.clone()
    version = x._version
    for wrong in (X[:1], X.double()):
        with pytest.raises((TypeError, ValueError)):
            steam_kernels.steam(x, W, W, wrong, inplace=True)
    assert torch.equal(x, X) and x._version == version


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        steam_kernels.steam(X, W, W, None, 4)  # type: ignore[misc]
    with pytest.raises(TypeError):
        FusedSTEAM(4, 8)  # type: ignore[misc]


def test_bad_input_is_bad_each_time() -> None:
    """The cache of options returns no wrong options as valid, and no valid options as wrong."""
    for _ in range(3):
        with pytest.raises(TypeError, match="num_heads"):
            steam_kernels.steam(X, W, W, num_heads=True)
        assert steam_kernels.steam(X, W, W, num_heads=1).shape == X.shape
        with pytest.raises(TypeError, match="self_loops"):
            steam_kernels.steam(X, W, W, self_loops=1)  # type: ignore[arg-type]
        assert steam_kernels.steam(X, W, W, self_loops=True).shape == X.shape
