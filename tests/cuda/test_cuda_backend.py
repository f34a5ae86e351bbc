"""The cuda backend without a GPU: its library loads, its operators exist, and each reason why it cannot run."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import steam_kernels
from steam_kernels import FusedSTEAM, backends
from steam_kernels.backends import native
from tests.support import cases
from tests.support.cases import Case
from tests.support.operators import OPS, backward_arguments, forward_arguments, same_layout
from tests.support.processes import output

NAMES = ("forward", "backward", "forward_")
REASON = "import steam_kernels, torch\nprint(steam_kernels.available_backends()['cuda'])\n"


@pytest.fixture
def library() -> ctypes.CDLL:
    """The CUDA library, loaded in this process."""
    if native.CUDA.reason:
        pytest.skip(native.CUDA.reason)
    return ctypes.CDLL(str(native.CUDA.path))


# ---- the operators, which exist with and without the library


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_those_of_the_main_operators(name: str) -> None:
    main, ours = (getattr(OPS, prefix + name).default._schema for prefix in ("", "cuda_"))
    assert str(ours).replace("cuda_", "") == str(main)
    assert torch.Tag.pt2_compliant_tag in getattr(OPS, "cuda_" + name).default.tags


@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
def test_fakes_are_those_of_the_main_operators(layout: str) -> None:
    case = Case(space=(9, 8), channels=6, layout=layout, tail="residual_relu", dtype=torch.bfloat16)
    calls = [
        ("forward", forward_arguments(case)),
        ("forward", forward_arguments(case, save=False)),
        ("backward", backward_arguments(case)),
        ("backward", backward_arguments(case, (True, False, True, False))),
    ]
    for name, arguments in calls:
        expected = getattr(OPS, name)(*arguments)
        with FakeTensorMode() as mode:
            given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fakes = getattr(OPS, "cuda_" + name)(*given)
        assert all(same_layout(r, f) for r, f in zip(expected, fakes, strict=True)), name


def test_flops_are_those_of_the_main_operators() -> None:
    case = Case(space=(28, 28), channels=64, batch=3)
    counts = []
    for prefix in ("", "cuda_"):
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            getattr(OPS, prefix + "forward")(*forward_arguments(case))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * steam_kernels.cost(64, 28, 28).flops


def test_a_tensor_on_the_cpu_is_refused_by_the_operators() -> None:
    with pytest.raises(NotImplementedError, match="cuda_forward"):
        OPS.cuda_forward(*forward_arguments(Case()))


# ---- reasons


def test_a_torch_without_cuda_is_a_reason_and_opens_nothing() -> None:
    text = output(
        "import ctypes, torch\ntorch.version.cuda = None\nload = ctypes.CDLL\n"
        "def watch(name, *rest, **more):\n    assert 'steam_cuda' not in str(name)\n"
        "    return load(name, *rest, **more)\n"
        "ctypes.CDLL = watch\n" + REASON
    )
    assert text.strip() == f"torch {torch.__version__} is built without CUDA"


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA, which is the reason then")
def test_a_missing_or_broken_library_is_a_reason(without_library: Path, tmp_path: Path) -> None:
    assert "libsteam_cuda.so is not in" in output(REASON, path=without_library)
    shutil.copytree(without_library / "steam_kernels", tmp_path / "steam_kernels")
    (tmp_path / "steam_kernels" / "_build.txt").write_text("libsteam_cuda: not built: nvcc was not found\n")
    assert output(REASON, path=tmp_path).strip().endswith("not built: nvcc was not found")
    (tmp_path / "steam_kernels" / "libsteam_cuda.so").write_bytes(b"not a library")
    reason = output(REASON, path=tmp_path).strip()
    assert "libsteam_cuda.so cannot be loaded" in reason and "\n" not in reason


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA, which is the reason then")
@pytest.mark.skipif(not native.CPU.path.is_file(), reason="the CPU library, which stands in, was not built")
def test_a_library_of_another_version_is_a_reason(without_library: Path, tmp_path: Path) -> None:
    shutil.copytree(without_library / "steam_kernels", tmp_path / "steam_kernels")
    shutil.copy(native.CPU.path, tmp_path / "steam_kernels" / "libsteam_cuda.so")
    reason = output(REASON, path=tmp_path).strip()
    assert reason.endswith("libsteam_cuda.so is not of this version: build the package again")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_library_loads_and_says_so(library: ctypes.CDLL) -> None:
    assert "there is no GPU" in steam_kernels.available_backends()["cuda"]
    assert all(word.isdigit() and int(word) >= 750 for word in native.CUDA.supported)
    message = ctypes.create_string_buffer(native.MESSAGE_BYTES)
    assert library.steam_cuda_usable(message) != 0 and library.steam_cuda_usable(None) != 0
    assert b"cudaError" in message.value


def test_a_tensor_elsewhere_is_a_reason(library: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run this call: .*x is on cpu"):
        FusedSTEAM(backend="cuda")(torch.randn(1, 2, 3, 4))


def test_a_gpu_that_cannot_is_asked_once_and_is_a_reason(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ``why_not`` on a call whose x claims to be on a GPU."""
    from steam_kernels import backends

    x = torch.empty(1, 2, 3, 4, device="meta")
    unit = FusedSTEAM()
    call = backends.Call(x, unit.channel_weight, unit.spatial_weight, None, None, (3, 4))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_gpus", {0: "too old", 1: ""})

    class OnGPU:
        def __init__(self, index: int) -> None:
            self.device, self.shape = torch.device("cuda", index), x.shape

    assert backends.cuda.why_not(call._replace(x=OnGPU(0))) == "too old"
    assert backends.cuda.why_not(call._replace(x=OnGPU(1))) == ""


def test_the_compiler_does_not_look_into_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_gpus", {0: ""})

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if native.why_not_gpu(0) else x + 2

    torch._dynamo.reset()
    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 2


def test_env_report_names_the_library() -> None:
    from steam_kernels.env_report import report

    (line,) = (line for line in report().splitlines() if line.startswith("CUDA kernels"))
    assert ("not built" in line) == (not native.CUDA.path.is_file())
    if native.CUDA.supported:
        assert f"built for    {', '.join(native.CUDA.supported)}" in report()


# Shapes of x at each limit and next to it, with a part of the reason.
SIZES = [
    ((1, 1, 1, 2**31 - 33), ""),
    ((1, 1, 1, 2**31 - 32), "the cuda backend needs W + 32 below 2^31, and it is 2147483648"),
    ((1, 1, 2**33, 2), ""),
    ((2**28, 448, 1, 1), "the cuda backend needs N (C H W + 64) below 2^37, and it is 137438953472"),
    ((2**28 - 1, 448, 1, 1), ""),
    ((2**31, 1, 1, 1), "the cuda backend needs N (C H W + 64) below 2^37, and it is 139586437120"),
    ((2**31 - 2**26, 1, 1, 1), ""),
]


@pytest.mark.parametrize("shape, said", SIZES)
def test_sizes_that_the_kernels_cannot_count_are_a_reason(
    shape: tuple[int, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "CUDA", SimpleNamespace(reason=""))
    monkeypatch.setattr(native, "why_not_gpu", lambda index: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x: Any = SimpleNamespace(device=torch.device("cuda:0"), shape=shape)
    weight = torch.empty(4, 8)
    options = steam_kernels.config.Options()
    assert backends.cuda.why_not(backends.Call(x, weight, weight, None, options, options.grid(*shape[2:]))) == said
