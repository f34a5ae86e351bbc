"""The choice of the backend, the reason why a backend cannot run, and calls without the compiled library or Triton."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM
from steam_kernels.backends import native
from tests.support.processes import PACKAGE, SMOKE, output, python

VARIANTS = ("avx512", "avx2", "generic")


def test_without_compiled_library(without_library: Path) -> None:
    """The import and all calls work by the reference. A call that names the cpu backend raises the reason."""
    text = output(
        SMOKE
        + f"assert steam_kernels.__file__.startswith({str(without_library)!r}), steam_kernels.__file__\n"
        + "backends = steam_kernels.available_backends()\nassert backends['reference'] == ''\nprint(backends['cpu'])\n"
        + "try:\n    FusedSTEAM(backend='cpu')(x)\nexcept RuntimeError as error:\n    print(error)\n",
        path=without_library,
    )
    reason, error = text.splitlines()
    assert "libsteam_cpu" in reason
    assert "backend='cpu'" in error and reason in error


def test_broken_library_is_a_reason(without_library: Path, tmp_path: Path) -> None:
    shutil.copytree(without_library / "steam_kernels", tmp_path / "steam_kernels")
    (tmp_path / "steam_kernels" / "libsteam_cpu.so").write_bytes(b"not a library")
    reason = output(SMOKE + "print(steam_kernels.available_backends()['cpu'])", path=tmp_path).strip()
    assert "libsteam_cpu.so" in reason and "\n" not in reason


CALLS = """
import warnings
warnings.simplefilter("always")
import torch, steam_kernels
x, unit = torch.randn(2, 6, 9, 8), steam_kernels.FusedSTEAM()
"""


def warnings_of(code: str, path: Path, **environment: str) -> list[str]:
    done = python(CALLS + code, path=path, **environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "runs its reference" in line]


@pytest.mark.parametrize(
    "call", ["unit(x); unit(x)", "torch.compile(unit, fullgraph=True, backend='eager')(x); unit(x)"]
)
def test_the_reference_does_not_run_in_silence(without_library: Path, call: str) -> None:
    """A process warns once. The warning names the missing backend, the reason and the command that helps."""
    (found,) = warnings_of(call, without_library)
    assert "cpu: libsteam_cpu.so is not in" in found and "never built" in found
    assert found.endswith(
        "python -m pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps PATH_OF_THE_SOURCES"
    )


@pytest.mark.parametrize("name,value", [("STEAM_KERNELS_CPU", "sse9"), ("STEAM_KERNELS_CACHE", "16M")])
def test_a_variable_that_stops_the_kernels_is_warned_of(backend: str, name: str, value: str) -> None:
    (found,) = warnings_of("unit(x)", PACKAGE.parent, **{name: value})
    assert repr(value) in found and found.endswith(f"What mends it: unset {name}")


def test_no_warning_where_the_reference_was_asked_for_or_kernels_run(without_library: Path, backend: str) -> None:
    assert warnings_of("unit.backend = 'reference'; unit(x)", without_library) == []
    assert warnings_of("unit(x)", without_library, STEAM_KERNELS_BACKEND="reference") == []
    assert warnings_of("unit(x)", PACKAGE.parent) == []


def test_a_source_tree_that_hides_the_installed_package(without_library: Path, tmp_path: Path) -> None:
    """The warning and env_report give the folder of the installed package."""
    shutil.copytree(without_library / "steam_kernels", tmp_path / "steam_kernels")
    metadata = tmp_path / "steam_kernels-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: steam_kernels\nVersion: 0.1.0\n")
    installed = f"import sys; sys.path.insert(1, {str(tmp_path)!r})\n"
    done = python(
        installed + CALLS + "unit(x)\nfrom steam_kernels import env_report; print(env_report.report())",
        path=without_library,
    )
    assert done.returncode == 0, done.stderr
    (found,) = [line for line in done.stderr.splitlines() if "runs its reference" in line]
    assert f"run from another folder than {without_library}" in found and str(tmp_path) in found
    assert f"hides        {tmp_path / 'steam_kernels'}" in done.stdout


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0a0+git123", "1.13.1"])
def test_an_older_torch_is_an_import_error(version: str) -> None:
    done = python(f"import torch; torch.__version__ = {version!r}\nimport steam_kernels")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: steam_kernels needs torch 2.10 or newer, and this is torch {version}")


def test_without_triton() -> None:
    output("sys.modules['triton'] = None\n" + SMOKE)


def test_without_torchvision_and_plotting() -> None:
    output("for name in ('torchvision', 'matplotlib', 'sklearn', 'numpy'):\n    sys.modules[name] = None\n" + SMOKE)


def test_import_is_quiet_and_brings_no_compiler_and_no_toolkit() -> None:
    """Importing torch's compiler takes about as long as importing torch."""
    done = python(
        "import sys, steam_kernels.models, steam_kernels.integrations\nsys.stdout.write(repr([*sys.modules]))"
    )
    assert done.returncode == 0 and "steam" not in done.stderr
    imported = set(ast.literal_eval(done.stdout))
    compiler = {"torch._dynamo", "torch._inductor", "sympy"}
    toolkits = {"detectron2", "lightning", "mmengine", "timm", "torchvision", "ultralytics"}
    toolkits.add("segmentation_models_pytorch")
    assert "steam_kernels.integrations" in imported and imported.isdisjoint(compiler | toolkits)


@pytest.mark.parametrize("variant", ["sse9", "AVX2", "avx2 "])
def test_unknown_cpu_variant_is_a_reason(backend: str, variant: str) -> None:
    reason = output(SMOKE + "print(steam_kernels.available_backends()['cpu'])", STEAM_KERNELS_CPU=variant)
    assert "STEAM_KERNELS_CPU" in reason and repr(variant) in reason
    assert any(known in reason for known in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forced_cpu_variant(backend: str, variant: str) -> None:
    """A forced variant runs, or the reason names it and the available variants. No other variant runs instead."""
    text = output(
        "import steam_kernels, torch\nfrom steam_kernels.backends import native\n"
        "reason = steam_kernels.available_backends()['cpu']\nprint(reason)\nprint(native.CPU.variant)\n"
        "if reason:\n    try:\n        steam_kernels.FusedSTEAM(backend='cpu')(torch.randn(1, 2, 3, 4))\n"
        "    except RuntimeError as error:\n        assert reason in str(error)\n"
        "    else:\n        raise SystemExit('it ran')\n"
        "else:\n    steam_kernels.FusedSTEAM(backend='cpu')(torch.randn(1, 2, 3, 4))\n",
        STEAM_KERNELS_CPU=variant,
    )
    reason, running = text.splitlines()
    if reason:
        assert variant in reason and "STEAM_KERNELS_CPU" in reason
        pytest.skip(f"this processor: {reason}")
    assert running == variant


@pytest.mark.kernels
def test_kernel_tests_run_the_variant_asked_for(backend: str) -> None:
    """When the tests are repeated for a variant, this variant runs."""
    from steam_kernels.backends import native

    asked = os.environ.get("STEAM_KERNELS_CPU")
    assert native.CPU.variant in native.CPU.supported
    assert native.CPU.variant == (asked or native.CPU.supported[0])


def test_variants_agree(backend: str) -> None:
    """All variants that this processor supports give the same result, up to rounding."""
    code = (
        "import torch, steam_kernels\nif steam_kernels.available_backends()['cpu']:\n    raise SystemExit\n"
        "torch.manual_seed(0)\nunit = steam_kernels.FusedSTEAM(backend='cpu')\n"
        "x = torch.randn(2, 33, 28, 27, requires_grad=True)\ny = unit(x)\ny.square().sum().backward()\n"
        "print(' '.join(repr(v.double().abs().sum().item()) for v in (y, x.grad, unit.channel_weight.grad)))"
    )
    results = {}
    for variant in VARIANTS:
        if text := output(code, STEAM_KERNELS_CPU=variant):
            results[variant] = [float(v) for v in text.split()]
    assert results
    first = next(iter(results.values()))
    for variant, values in results.items():
        assert values == pytest.approx(first, rel=1e-5), variant


# ---- choice


def test_names_and_order() -> None:
    names = list(steam_kernels.available_backends())
    assert names[-1] == "reference" and "cpu" in names
    assert steam_kernels.available_backends()["reference"] == ""
    assert all(isinstance(v, str) and "\n" not in v for v in steam_kernels.available_backends().values())


def test_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.profiler import profile

    unit, x = FusedSTEAM(), torch.randn(1, 3, 8, 8)
    monkeypatch.setenv("STEAM_KERNELS_BACKEND", "reference")
    with profile() as record:
        unit(x)
    assert not any(e.key.startswith("steam_kernels::") for e in record.key_averages())
    monkeypatch.setenv("STEAM_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"STEAM_KERNELS_BACKEND.*'nonsense'"):
        unit(x)
    unit.backend = "reference"
    assert unit(x).shape == x.shape


def test_environment_counts_as_asked_by_name(without_library: Path) -> None:
    text = output(
        "import torch, steam_kernels\ntry:\n    steam_kernels.FusedSTEAM()(torch.randn(1, 2, 3, 4))\n"
        "except RuntimeError as error:\n    print(error)\n",
        path=without_library,
        STEAM_KERNELS_BACKEND="cpu",
    )
    assert "STEAM_KERNELS_BACKEND='cpu'" in text and "libsteam_cpu" in text


def test_named_backend_that_cannot_run_this_call(backend: str) -> None:
    if backend != "cpu":
        pytest.skip("the sentence is the cpu backend's")
    unit = FusedSTEAM(backend="cpu", device="meta")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run this call: .*meta"):
        unit(torch.randn(1, 3, 8, 8, device="meta"))


def test_automatic_choice_runs_the_kernels(backend: str) -> None:
    """Without a named backend, a CPU call runs the fused operators, forward and backward."""
    from torch.profiler import profile

    unit, x = FusedSTEAM(), torch.randn(1, 3, 8, 8, requires_grad=True)
    with profile() as record:
        unit(x).sum().backward()
    names = {e.key for e in record.key_averages()}
    assert {"steam_kernels::forward", "steam_kernels::backward"} <= names
    assert "aten::index_select" not in names


def test_env_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "steam_kernels.env_report"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert torch.__version__ in done.stdout and steam_kernels.__version__ in done.stdout
    for name, reason in steam_kernels.available_backends().items():
        assert name in done.stdout and reason in done.stdout
    from steam_kernels.backends import native

    assert native.CPU.variant in done.stdout


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_library_of_other_schemas_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with other schemas is not used, because its operators would read wrong arguments."""
    load, library = getattr(native, f"load_{name}"), getattr(native, name.upper())
    if library.reason:
        pytest.skip(library.reason)
    assert load().reason == ""
    monkeypatch.setattr(native, "OPERATORS", native.OPERATORS + 1)
    assert load().reason == f"{library.path} is not of this version: build the package again"
