"""The choice of the Triton backend: the reasons why it cannot run a call, devices, and architecture families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import OPS, SMALL, backward_arguments, forward_arguments
from triton_cases import rounds_to_bfloat16 as rounds_to_bfloat16

import steam_kernels
from steam_kernels import FusedSTEAM, backends, ops
from steam_kernels.backends import gpu


def test_the_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is usable, by argument or environment, and slow: nobody gets it who did not name it."""
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
    unit = steam_kernels.config.Unit(**options)
    return backends.Call(x, weight, weight, None, unit, unit.grid(*x.shape[2:]))


def test_why_not_sizes() -> None:
    one = torch.zeros(1)
    assert gpu.why_not_triton(call_of(one.expand(1, 1, 10_000, 10_000))) == ""
    assert "16 H W below 2^31" in gpu.why_not_triton(call_of(one.expand(1, 1, 20_000, 20_000)))
    # C + 1 + 1 + 2^15: a block beyond the last channel, the ring, one cell's number
    assert gpu.why_not_triton(call_of(one.expand(1, 2**31 - 2**15 - 3, 1, 1))) == ""
    for size in (2**31 - 2**15 - 2, 2**31):
        assert "C + gh gw + channel_radius + 2^15 below 2^31" in gpu.why_not_triton(call_of(one.expand(1, size, 1, 1)))
    wide = one.expand(1, 2**30, 1, 1)
    assert gpu.why_not_triton(call_of(wide, channel_radius=2**28)) == ""
    assert "4 channel_radius + 2^15 below 2^31" in gpu.why_not_triton(call_of(wide, channel_radius=2**29))
    assert gpu.why_not_triton(call_of(one.expand(1, 3 * 2**29, 1, 1), channel_radius=2**31)) != ""
    for space, name in (((2**25, 1), "gh (H + 1)"), ((1, 2**25), "gw (W + 1)")):
        # 63 cells of 2^25 pixels fit; with 64, one pixel less leaves the product below 2^31 and not what ends a cell
        assert gpu.why_not_triton(call_of(one.expand(1, 1, *space), grid_size=63)) == ""
        assert f"{name} below 2^31" in gpu.why_not_triton(call_of(one.expand(1, 1, *space), grid_size=64))
        under = tuple(max(1, size - 1) for size in space)
        assert f"{name} below 2^31" in gpu.why_not_triton(call_of(one.expand(1, 1, *under), grid_size=64))
    assert "embed_dim of 16384" in gpu.why_not_triton(call_of(one.expand(1, 1, 1, 1), embed_dim=16385))


def test_why_not_another_device() -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: .*meta"):
        FusedSTEAM(backend="triton", device="meta")(torch.empty(1, 3, 4, 4, device="meta"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if Triton had been imported to compile; the answers that are kept are forgotten before and after."""
    monkeypatch.setattr(gpu.triton_kernels().module, "INTERPRETED", False)
    gpu._why_not_device.cache_clear()
    gpu.family.cache_clear()
    yield monkeypatch
    gpu._why_not_device.cache_clear()
    gpu.family.cache_clear()


def test_why_not_the_cpu(compiled: pytest.MonkeyPatch) -> None:
    assert "on the CPU" in gpu.why_not_triton(call_of(torch.zeros(1, 1, 2, 2)))


def test_why_not_without_a_gpu(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not_triton(None) == "the triton backend needs a GPU, and PyTorch sees none"


def test_why_not_an_old_gpu(compiled: pytest.MonkeyPatch) -> None:
    capabilities = {0: (6, 1), 1: (9, 0)}
    compiled.setattr(torch.cuda, "is_available", lambda: True)
    compiled.setattr(torch.cuda, "device_count", lambda: 2)
    compiled.setattr(torch.cuda, "get_device_capability", capabilities.get)
    compiled.setattr(torch.version, "hip", None)
    assert gpu.why_not_device("cuda", 0) == "the triton backend needs compute capability 7.0, and cuda:0 has 6.1"
    assert gpu.why_not_device("cuda", 1) == gpu.why_not_triton(None) == ""
    assert gpu.family(1) == "sm90"


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    gpu.triton_kernels.cache_clear()
    gpu._why_not_device.cache_clear()
    monkeypatch.setitem(sys.modules, "steam_kernels.backends.triton", None)
    monkeypatch.delattr(backends, "triton")
    try:
        reason = gpu.why_not_triton(None)
    finally:
        monkeypatch.undo()
        gpu.triton_kernels.cache_clear()
        gpu._why_not_device.cache_clear()
    assert "Triton cannot be imported: ModuleNotFoundError" in reason


@pytest.mark.parametrize("name", ops.Operators._fields)
def test_the_gpu_key_runs_the_first_backend_that_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python function behind the main operators' CUDA key, on CPU tensors as if they were on a GPU."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"steam_kernels::{name}", "CUDA")
    case = SMALL.but(tail="residual_relu")

    def arguments() -> tuple[Any, ...]:
        if name == "backward":
            torch.manual_seed(0)
            return backward_arguments(case, (True, True, True, True))
        return forward_arguments(case)[: None if name == "forward" else -1]

    run = ops._first_on_gpu(name, lambda *args: "plain")
    seen: list[backends.Call] = []
    monkeypatch.setattr(backends, "first", lambda call: seen.append(call) or "triton")
    given, same = arguments(), arguments()
    got, expected = run(*given), getattr(OPS, f"triton_{name}")(*same)
    if name == "forward_":
        got, expected = given[:1], same[:1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    x = given[1] if name == "backward" else given[0]
    assert seen[0].x is x and seen[0].grid == case.resolved_grid and seen[0].channel_weight.shape == (4, 8)
    assert seen[0].unit.options == (4, 1, 4, True, True, 1.0)
    monkeypatch.setattr(backends, "first", lambda call: "reference")
    assert run(*given) == "plain"


@pytest.mark.parametrize("name", ops.Operators._fields)
def test_the_launch_is_on_the_device_of_x(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator makes the device of its first argument the current one around the kernels, told of its family."""
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
    monkeypatch.setattr(gpu, "triton_kernels", lambda: gpu.Kernels(SimpleNamespace(**{name: kernel})))
    monkeypatch.setattr(gpu, "family", {0: "sm70", 3: "sm90"}.get)
    x = SimpleNamespace(device=torch.device("cuda", 3))
    assert ops._triton(name)(x, 1, 2) == "result"
    assert seen == [((x, 1, 2), {"family": "sm90"}, 3)] and current == [0]
