"""Tests of the tensors that autograd keeps, and that kernels write every element of the results."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

import steam_kernels
from tests.support import cases
from tests.support.cases import Case
from tests.support.poison import POISONED

pytestmark = pytest.mark.kernels


def kept(inputs: dict[str, torch.Tensor], frozen: tuple[str, ...], backend: str, case: Case) -> list[torch.Tensor]:
    """The tensors that one forward pass saves, one for each storage, without the parameters."""
    leaves = {k: v.detach().requires_grad_(k not in frozen) for k, v in inputs.items()}
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = steam_kernels.steam(**leaves, backend=backend, **case.options)
    assert y.requires_grad
    parameters = {inputs[k].untyped_storage().data_ptr() for k in ("channel_weight", "spatial_weight")}
    return [t for pointer, t in found.items() if pointer not in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tail", ["none", "residual", "relu", "residual_relu"])
def test_saved_are_x_and_two_numbers_per_node(backend: str, tail: str, dtype: torch.dtype) -> None:
    case = Case(space=(28, 28), channels=20, batch=3, tail=tail, dtype=dtype)
    inputs, _ = cases.make(case)
    saved = kept(inputs, (), backend, case)
    maps = [t for t in saved if t.shape == case.shape]
    rest = [t for t in saved if t.shape != case.shape]
    pointers = {t.data_ptr() for t in maps}
    assert inputs["x"].data_ptr() in pointers
    assert len(maps) == (2 if tail.endswith("relu") else 1), "x, and y only where a ReLU ends the unit"
    assert "residual" not in inputs or inputs["residual"].data_ptr() not in pointers
    assert sum(t.numel() for t in rest) <= 3 * 2 * (20 + 49) + 16


@pytest.mark.parametrize("tail", ["residual", "residual_relu"])
def test_frozen_unit_saves_no_x(backend: str, tail: str) -> None:
    """If only the residual needs a gradient, x is not kept, and y is kept only for the ReLU's mask."""
    case = Case(space=(28, 28), channels=20, batch=3, tail=tail)
    inputs, _ = cases.make(case)
    saved = kept(inputs, ("x", "channel_weight", "spatial_weight"), backend, case)
    assert inputs["x"].data_ptr() not in {t.data_ptr() for t in saved}
    assert sum(t.numel() for t in saved) <= (inputs["x"].numel() if tail == "residual_relu" else 0)


def test_no_gradient_keeps_nothing(backend: str) -> None:
    case = Case(space=(14, 14), channels=8)
    inputs, _ = cases.make(case)
    y = steam_kernels.steam(**inputs, backend=backend, **case.options)
    assert not y.requires_grad and y.grad_fn is None
    with torch.no_grad():
        inputs["x"].requires_grad_()
        assert not steam_kernels.steam(**inputs, backend=backend, **case.options).requires_grad


@pytest.mark.skipif(not POISONED, reason="this C library has no mallopt(M_PERTURB)")
@pytest.mark.parametrize("size", [600, 4096, 3_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unwritten_memory_is_nan(size: int, dtype: torch.dtype) -> None:
    """The control: memory that torch allocates is NaN, also after reuse."""
    for _ in range(2):
        for make in (torch.empty, lambda n, dtype: torch.empty_like(torch.zeros(n, dtype=dtype))):
            t = make(size, dtype=dtype)
            assert t.isnan().all()
            t.fill_(1.0)
            del t


@pytest.mark.skipif(not POISONED, reason="this C library has no mallopt(M_PERTURB)")
@pytest.mark.parametrize("size", [300, 1000, 3_000_000])
def test_memory_of_stable_abi_operators_is_nan(size: int) -> None:
    """Memory from LibTorch's stable ABI is NaN, so an element that a kernel does not write would be NaN."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    handle, data = ctypes.c_void_p(), ctypes.c_void_p()
    sizes, strides = (ctypes.c_int64 * 1)(size), (ctypes.c_int64 * 1)(1)
    float32 = library.aoti_torch_dtype_float32()
    for _ in range(2):
        status = library.aoti_torch_empty_strided(
            ctypes.c_int64(1), sizes, strides, float32, library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle)
        )
        assert status == 0
        assert library.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
        words = (ctypes.c_uint32 * size).from_address(data.value or 0)
        assert all(w == 0xFFFFFFFF for w in words[:: max(1, size // 1000)])
        library.aoti_torch_delete_tensor_object(handle)


@pytest.mark.skipif(not POISONED, reason="this C library has no mallopt(M_PERTURB)")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 8, 9, 17, 33])
def test_working_memory_is_not_read_before_it_is_written(
    backend: str, channels: int, dtype: torch.dtype, layout: str
) -> None:
    """A new thread has fresh and so poisoned working memory. It gives the same bits as a used thread."""
    for space, grid in (
        ((1, 1), 1),
        ((4, 3), 1),
        ((15, 8), (1, 3)),
        ((6, 5), (3, 5)),
        ((28, 28), 7),
        ((20, 61), (13, 21)),
    ):
        case = Case(
            space=space, channels=channels, grid=grid, layout=layout, dtype=dtype, tail="residual_relu", radius=2
        )
        inputs, dy = cases.make(case)
        call = partial(cases.forward_backward, steam_kernels.steam, inputs, dy, backend=backend, **case.options)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
            fresh = thread.submit(call).result()
        for name, value in call().items():
            assert value.isfinite().all(), f"{name} at {space}"
            assert torch.equal(value, fresh[name]), f"{name} at {space}"
