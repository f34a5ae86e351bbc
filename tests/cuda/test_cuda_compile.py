"""No figure of the compiled CUDA kernels is worse than the recorded one, and the reader finds planted code."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support import cuda_binary
from tests.support.build import tool
from tests.support.cuda_binary import Figures

PLANTED = """
extern "C" {
__global__ void wide(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void narrow(const short* x, short* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void mixed(const float4* x, float* y) { y[threadIdx.x] = x[threadIdx.x].x + x[threadIdx.x].w; }
__global__ void shared(const float* x, float* y) {
  __shared__ float room[1000];
  room[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = room[999 - threadIdx.x];
}
// 200 values that are all alive at once, where a thread has 64 registers
__global__ void __launch_bounds__(1024) spilling(const float* x, float* y) {
  float value[200];
#pragma unroll
  for (int k = 0; k < 200; ++k) value[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 200; ++k) y[k * 1024 + threadIdx.x] = value[199 - k] * value[k];
}
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> cuda_binary.Table:
    for name in ("cuobjdump", "nvdisasm", "c++filt"):
        if cuda_binary.tool(name) is None:
            pytest.skip(f"{name} is neither on the PATH nor in triton's wheel")
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cu").write_text(PLANTED)
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in (80, 90)]
    subprocess.run([tool("nvcc"), "-c", *targets, "planted.cu", "-o", "planted.o"], cwd=folder, check=True, timeout=300)
    return cuda_binary.read_objects([folder / "planted.o"])


def test_reader_finds_what_is_planted(planted: cuda_binary.Table) -> None:
    assert set(planted) == {"wide", "narrow", "mixed", "shared", "spilling"}
    for kernel, row in planted.items():
        assert set(row) == {80, 90}
        for figures in row.values():
            assert (figures.spills > 100) == (kernel == "spilling")
            assert 4 <= figures.registers <= 64
            assert figures.wide == {"wide": 100}.get(kernel, 0)
            # Some targets reserve a kilobyte of the shared memory of a block.
            assert figures.static_shared in ((4000, 5024) if kernel == "shared" else (0, 1024))


def test_wide_is_a_percentage_of_bytes() -> None:
    code = """
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x20] ;
        /*0020*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0030*/                   LDG.E R9, desc[UR4][R2.64+0x40] ;
        /*0040*/                   STS.128 [R2], R4 ;
        /*0050*/                   STL.64 [R1], R4 ;
        /*0060*/                   LDL.LU R4, [R1+0x8] ;
"""
    assert cuda_binary.read_code(code) == {"kernel": (2, round(100 * 16 / (16 + 2 + 8 + 4)))}


@pytest.mark.parametrize("worse", Figures._fields)
def test_each_figure_is_gated(worse: str) -> None:
    recorded = Figures(64, 128, 0, 50)
    now = recorded._replace(**{worse: getattr(recorded, worse) + (-1 if worse == "wide" else 1)})
    assert cuda_binary.complaints({"kernel": {80: recorded}}, {"kernel": {80: recorded}}) == []
    (complaint,) = cuda_binary.complaints({"kernel": {80: now}}, {"kernel": {80: recorded}})
    assert complaint.startswith(f"kernel on sm_80: {worse} ")
    better = recorded._replace(**{worse: getattr(recorded, worse) + (1 if worse == "wide" else -1)})
    assert cuda_binary.complaints({"kernel": {80: better}}, {"kernel": {80: recorded}}) == []


def test_kernels_that_come_and_go_are_named() -> None:
    row = {80: Figures(64, 0, 0, 50)}
    assert cuda_binary.complaints({"new": row}, {"old": row}) == [
        "new: no figures are recorded",
        "old: recorded, but not in the objects",
    ]


def test_spills_are_named(planted: cuda_binary.Table) -> None:
    for target, said in zip((80, 90), cuda_binary.spilling(planted), strict=True):
        assert re.fullmatch(rf"spilling on sm_{target}: \d+ spills", said)


@pytest.mark.parametrize("arguments", [[], ["--record"]])
def test_spills_of_any_nvcc_fail_the_script(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded figures are from one version of nvcc. With another version only spills are judged."""
    nvcc, budgets = cuda_binary.recorded()
    monkeypatch.setattr(cuda_binary, "why_not", lambda: "")
    monkeypatch.setattr(cuda_binary, "compiler", lambda: nvcc + "0")
    monkeypatch.setattr(cuda_binary, "read_objects", lambda paths: budgets)
    monkeypatch.setattr(sys, "argv", ["cuda_binary.py"])
    assert cuda_binary.main() == 0 and "NOT COMPARED" in capsys.readouterr().out
    kernel = min(budgets)
    budgets[kernel][90] = budgets[kernel][90]._replace(spills=3)
    monkeypatch.setattr(sys, "argv", ["cuda_binary.py", *arguments])
    assert cuda_binary.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{kernel} on sm_90: 3 spills"


def test_built_kernels_do_not_spill() -> None:
    if reason := cuda_binary.why_not():
        pytest.skip(reason)
    table = cuda_binary.read_objects(cuda_binary.OBJECTS / f"{name}.cu.o" for name in cuda_binary.SOURCES)
    assert table
    assert cuda_binary.spilling(table) == []


def test_no_figure_is_worse_than_recorded() -> None:
    if reason := cuda_binary.why_not():
        pytest.skip(reason)
    nvcc, budgets = cuda_binary.recorded()
    if nvcc != cuda_binary.compiler():
        pytest.skip(f"the figures are of nvcc {nvcc}, the objects of {cuda_binary.compiler()}")
    table = cuda_binary.read_objects(cuda_binary.OBJECTS / f"{name}.cu.o" for name in cuda_binary.SOURCES)
    assert table
    assert cuda_binary.complaints(table, budgets) == []


def test_every_kernel_and_target_is_recorded_and_none_spills() -> None:
    _, budgets = cuda_binary.recorded()
    source = "".join(path.read_text() for path in (cuda_binary.ROOT / "csrc" / "cuda").glob("*.cu*"))
    kernels = set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source))
    assert {kernel.split("<")[0] for kernel in budgets} == kernels - {"probe"}  # probe computes nothing
    for kernel, row in budgets.items():
        assert tuple(row) == cuda_binary.TARGETS
        assert not any(figures.spills for figures in row.values()), kernel


def test_the_page_shows_the_recorded_figures() -> None:
    nvcc, budgets = cuda_binary.recorded()
    assert cuda_binary.page_with(budgets, nvcc) == cuda_binary.PAGE.read_text()
