"""The choice of the Triton backend: the reasons why it cannot run a call, devices, and architecture families."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM, backends, ops
from steam_kernels.backends import triton as backend
from steam_kernels.config import Inputs
from steam_kernels.schemas import Backward, Forward
from tests.support.operators import OPS, forward_arguments, in_place_arguments
from tests.support.triton_cases import SMALL, backward_arguments
from tests.support.triton_cases import rounds_to_bfloat16 as rounds_to_bfloat16


def test_the_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow. It runs only if the argument or the environment variable names it."""
    from torch.profiler import profile

    assert steam_kernels.available_backends()["triton"] == ""
    unit, x = FusedSTEAM(), torch.randn(1, 3, 4, 5)

    def operators() -> set[str]:
        with profile() as record:
            unit(x)
        return {e.key for e in record.key_averages() if e.key.startswith("steam_kernels::")}

    assert "steam_kernels::triton_forward" not in operators()
    monkeypatch.setenv("STEAM_KERNELS_BACKEND", "triton")
    assert operators() == {"steam_kernels::triton_forward"}


def call_of(x: torch.Tensor, embed_dim: int = 8, **options: Any) -> backends.Call:
    weight = torch.empty(4, embed_dim)
    given = steam_kernels.config.Options(**options)
    return backends.Call(x, weight, weight, None, given, given.grid(*x.shape[2:]))


def test_why_not_sizes() -> None:
    one = torch.zeros(1)
    assert backend.why_not(call_of(one.expand(1, 1, 10_000, 10_000))) == ""
    assert "16 H W below 2^31" in backend.why_not(call_of(one.expand(1, 1, 20_000, 20_000)))
    # C + 1 + 1 + 2^15: the channels, the number of one cell, the ring, and a block beyond the last channel
    assert backend.why_not(call_of(one.expand(1, 2**31 - 2**15 - 3, 1, 1))) == ""
    for size in (2**31 - 2**15 - 2, 2**31):
        assert "C + gh gw + channel_radius + 2^15 below 2^31" in backend.why_not(call_of(one.expand(1, size, 1, 1)))
    wide = one.expand(1, 2**30, 1, 1)
    assert backend.why_not(call_of(wide, channel_radius=2**28)) == ""
    assert "4 channel_radius + 2^15 below 2^31" in backend.why_not(call_of(wide, channel_radius=2**29))
    assert backend.why_not(call_of(one.expand(1, 3 * 2**29, 1, 1), channel_radius=2**31)) != ""
    for space, name in (((2**25, 1), "gh (H + 1)"), ((1, 2**25), "gw (W + 1)")):
        # 63 cells of 2^25 pixels fit. With 64 cells and one pixel less, the product is below 2^31, but not the number
        # that is divided for the end of the last cell.
        assert backend.why_not(call_of(one.expand(1, 1, *space), grid_size=63)) == ""
        assert f"{name} below 2^31" in backend.why_not(call_of(one.expand(1, 1, *space), grid_size=64))
        under = tuple(max(1, size - 1) for size in space)
        assert f"{name} below 2^31" in backend.why_not(call_of(one.expand(1, 1, *under), grid_size=64))
    assert "embed_dim of 16384" in backend.why_not(call_of(one.expand(1, 1, 1, 1), embed_dim=16385))


def test_why_not_another_device() -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: .*meta"):
        FusedSTEAM(backend="triton", device="meta")(torch.empty(1, 3, 4, 4, device="meta"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Triton seems to have been imported to compile. Cached answers are cleared before and after."""
    monkeypatch.setattr(backend.triton_kernels().module, "INTERPRETED", False)
    backend._why_not_device.cache_clear()
    backend.family.cache_clear()
    yield monkeypatch
    backend._why_not_device.cache_clear()
    backend.family.cache_clear()


def test_why_not_the_cpu(compiled: pytest.MonkeyPatch) -> None:
    assert "on the CPU" in backend.why_not(call_of(torch.zeros(1, 1, 2, 2)))


def test_why_not_without_a_gpu(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_not(None) == "the triton backend needs a GPU, and PyTorch sees none"


class Driver:
    """Stands in for Triton's driver on a machine without a GPU."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    @property
    def utils(self) -> object:
        if self.error is not None:
            raise self.error
        return object()


@pytest.fixture
def driver(compiled: pytest.MonkeyPatch) -> Iterator[Callable[[Driver], None]]:
    """Makes a driver Triton's active one, on a GPU of compute capability 9.0."""
    from triton.runtime import driver

    compiled.setattr(torch.cuda, "is_available", lambda: True)
    compiled.setattr(torch.cuda, "device_count", lambda: 1)
    compiled.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    compiled.setattr(torch.version, "hip", None)
    backend._why_not_driver.cache_clear()
    compiled.setattr(driver, "_active", None)
    yield driver.set_active
    backend._why_not_driver.cache_clear()


def test_why_not_without_a_compiler(
    driver: Callable[[Driver], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton would raise at the first launch. The reason comes before it, and has Triton's own sentence."""
    from triton.runtime import build

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as caught:
        build._find_compiler.__wrapped__("c")
    driver(Driver(caught.value))
    reason = backend.why_not(None)
    assert reason.startswith("Triton cannot start its driver: RuntimeError: Failed to find C compiler")
    assert "\n" not in reason


def test_why_not_an_older_triton_without_a_compiler(
    driver: Callable[[Driver], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before 3.8 the module of the driver compiles a launcher for each kernel."""
    driver(Driver())
    assert backend.why_not(None) == ""
    monkeypatch.setattr(sys.modules[__name__], "compile_module_from_src", None, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for cc, reason in (("", "Triton before 3.8 needs a C compiler"), ("/opt/cc", "")):
        monkeypatch.setenv("CC", cc)
        backend._why_not_device.cache_clear()
        backend._why_not_driver.cache_clear()
        assert backend.why_not(None).startswith(reason) and bool(backend.why_not(None)) == bool(reason)


def test_why_not_an_old_gpu(compiled: pytest.MonkeyPatch) -> None:
    capabilities = {0: (6, 1), 1: (9, 0)}
    compiled.setattr(torch.cuda, "is_available", lambda: True)
    compiled.setattr(torch.cuda, "device_count", lambda: 2)
    compiled.setattr(torch.cuda, "get_device_capability", capabilities.get)
    compiled.setattr(torch.version, "hip", None)
    assert backend.why_not_device("cuda", 0) == "the triton backend needs compute capability 7.0, and cuda:0 has 6.1"
    compiled.setattr(backend, "_why_not_driver", lambda: "")
    assert backend.why_not_device("cuda", 1) == backend.why_not(None) == ""
    assert backend.family(1) == "sm90"


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    backend.triton_kernels.cache_clear()
    backend._why_not_device.cache_clear()
    monkeypatch.setitem(sys.modules, "steam_kernels.backends.triton.operators", None)
    monkeypatch.delattr(backend, "operators", raising=False)
    try:
        reason = backend.why_not(None)
    finally:
        monkeypatch.undo()
        backend.triton_kernels.cache_clear()
        backend._why_not_device.cache_clear()
    assert "Triton cannot be imported: ModuleNotFoundError" in reason


@pytest.mark.parametrize("name", ops.Operators._fields)
def test_the_gpu_key_runs_the_first_backend_that_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python function of the main operators' CUDA key, called with CPU tensors."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"steam_kernels::{name}", "CUDA")
    case = SMALL.but(tail="residual_relu")

    def arguments() -> tuple[Any, ...]:
        if name == "backward":
            torch.manual_seed(0)
            return backward_arguments(case, (True, True, True, True))
        return (forward_arguments if name == "forward" else in_place_arguments)(case)

    of = {"forward": Forward.of, "backward": Backward.of, "forward_": Forward.of_in_place}[name]
    run = ops._on_gpu(name, of)
    seen: list[backends.Call] = []
    monkeypatch.setattr(backends, "first", lambda call: seen.append(call) or "triton")
    given, same = arguments(), arguments()
    got, expected = run(*given), getattr(OPS, f"triton_{name}")(*same)
    if name == "forward_":
        got, expected = given[:1], same[:1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    x = given[1] if name == "backward" else given[0]
    assert seen[0].x is x and seen[0].grid == case.resolved_grid and seen[0].channel_weight.shape == (4, 8)
    assert seen[0].options.arguments == (4, 1, 4, True, True, 1.0, True)
    monkeypatch.setattr(backends, "first", lambda call: "reference")
    monkeypatch.setattr(ops, "_PLAIN", ops.Operators(*[lambda *args: "plain"] * 3))
    assert run(*given) == "plain"


@pytest.mark.parametrize("name", ops.Operators._fields)
def test_the_launch_is_on_the_device_of_x(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator makes the device of its first argument current around the kernels, and passes its family to them."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    current = [0]
    seen: list[tuple[Any, ...]] = []

    @contextmanager
    def device(wanted: torch.device) -> Any:
        current.append(wanted.index)
        yield
        current.pop()

    def kernel(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs, current[-1]))
        return "result"

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend, "triton_kernels", lambda: backend.Kernels(SimpleNamespace(**{name: kernel})))
    monkeypatch.setattr(backend, "family", {0: "sm70", 3: "sm90"}.get)
    call = SimpleNamespace(inputs=Inputs(*[SimpleNamespace(device=torch.device("cuda", 3))] * 3))
    assert ops._triton(name)(call) == "result"
    assert seen == [((call,), {"family": "sm90"}, 3)] and current == [0]
