"""The kernels without torch: the installed CMake package, the C++ example, and the C interface on the CPU."""

from __future__ import annotations

import ctypes
import fcntl
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steam_kernels import reference
from tests.support import cases
from tests.support.build import BUILD_DIR, ROOT, tool
from tests.support.cases import Case
from tests.support.tolerances import judge, to_float64

pytestmark = [
    pytest.mark.skipif(not BUILD_DIR.is_dir(), reason="the native library was not built in this tree"),
    pytest.mark.skipif(sys.platform != "linux", reason="names and links libraries as on Linux"),
]


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_cuda() -> bool:
    return "set(steam_cuda_FOUND TRUE)" in (BUILD_DIR / "steamConfig.cmake").read_text()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the installed CMake package, made from the objects of the Python package's build."""
    target = tmp_path_factory.mktemp("prefix")
    libraries = ["steam_cpu_kernels"] + ["steam_cuda_kernels"] * with_cuda()
    with open(BUILD_DIR / "test.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of pytest-xdist build here too
        run(tool("cmake"), "--build", BUILD_DIR, "--target", *libraries)
        run(tool("cmake"), "--install", BUILD_DIR, "--prefix", target)
    return target


def build_against(prefix: Path, source: Path, build: Path) -> None:
    cmake, ninja = tool("cmake"), tool("ninja")
    run(
        cmake,
        "-S",
        source,
        "-B",
        build,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_PREFIX_PATH={prefix}",
    )
    run(cmake, "--build", build)


# --- the C++ example --------------------------------------------------------------------------------------------------


def test_example_builds_against_the_installed_package_and_computes_the_unit(prefix: Path, tmp_path: Path) -> None:
    build_against(prefix, ROOT / "examples" / "cpp", tmp_path)
    numbers = torch.tensor([[float(word) for word in line.split()] for line in run(tmp_path / "gate").splitlines()])
    x, y = numbers.float().T.reshape(2, 1, 64, 28, 28)
    index = torch.arange(32, dtype=torch.float64)
    inputs = {
        "x": x,
        "channel_weight": (1.3 * index).cos().float().view(4, 8),
        "spatial_weight": (0.7 * index).cos().float().view(4, 8),
    }
    assert x.double().allclose((0.37 * torch.arange(x.numel(), dtype=torch.float64)).sin().view_as(x) + 0.5, atol=2e-3)
    judge({"y": reference.steam(**to_float64(inputs))}, inputs, {}).check({"y": y})


def test_header_is_c(prefix: Path, tmp_path: Path) -> None:
    source = tmp_path / "use.c"
    source.write_text(
        "#include <steam/steam.h>\n"
        "int main(void) { steam_problem p = steam_usual_problem(1, 2, 3, 4); return (int)steam_saved_bytes(&p); }\n"
    )
    compiler = tool("gcc", "cc", "clang")
    run(
        compiler, "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{prefix}/include", source
    )


USE_CUDA = r"""
#include <steam/steam.h>

#include <cstdio>

int main() {
  char message[STEAM_MESSAGE_BYTES];
  char memory[64] = {0};  /* no memory of a GPU: where there is one, nothing is launched */
  int64_t bytes = -1;
  steam_problem p = steam_usual_problem(3, 8, 14, 15);
  steam_forward_args forward = {p, memory, memory, memory, nullptr, memory, nullptr};
  steam_backward_args backward = {p, memory, memory, memory, memory, nullptr, memory, memory, nullptr, memory, memory};
  std::printf("%s\n", steam_cuda_architectures());
  std::printf("%d ", steam_cuda_forward_workspace(&p, &bytes, message));
  std::printf("%d\n", bytes >= 0);
  bytes = -1;
  std::printf("%d ", steam_cuda_backward_workspace(&p, &bytes, message));
  std::printf("%d\n", bytes >= 0);
  bytes = -1;
  std::printf("%d %s\n", steam_cuda_forward_workspace(&p, nullptr, message), message);
  const steam_status usable = steam_cuda_usable(message);
  std::printf("%d %s\n", usable, message);
  if (usable == STEAM_OK) return 0;
  std::printf("%d %s\n", steam_cuda_forward(&forward, memory, nullptr, message), message);
  std::printf("%d %s\n", steam_cuda_backward(&backward, memory, nullptr, message), message);
  forward.problem.num_heads = 3;
  backward.problem.scale = 1e300 * 1e300;
  std::printf("%d %s\n", steam_cuda_forward(&forward, memory, nullptr, message), message);
  std::printf("%d %s\n", steam_cuda_backward(&backward, memory, nullptr, message), message);
}
"""
USE_CUDA_CMAKE = """
cmake_minimum_required(VERSION 3.18...4.0)
project(use LANGUAGES CXX)
find_package(steam REQUIRED COMPONENTS cpu cuda)
add_executable(use use.cpp)
target_link_libraries(use PRIVATE steam::cuda steam::cpu)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is not given a pointer of the host's")
def test_the_cuda_library_links_and_names_kernel_and_shape_without_a_gpu(prefix: Path, tmp_path: Path) -> None:
    if not with_cuda():
        pytest.skip("the CUDA library was not built in this tree")
    (tmp_path / "use.cpp").write_text(USE_CUDA)
    (tmp_path / "CMakeLists.txt").write_text(USE_CUDA_CMAKE)
    build_against(prefix, tmp_path, tmp_path / "build")
    architectures, *lines = run(tmp_path / "build" / "use").splitlines()
    assert all(int(word) >= 750 for word in architectures.split(","))
    assert lines[:3] == ["0 1", "0 1", "1 bytes must not be NULL"]
    assert lines[3].startswith("3 ") and "cudaError" in lines[3]
    for line in lines[4:6]:
        assert re.match(r"3 kernel steam_\w+ failed to launch for x of shape \(3, 8, 14, 15\)", line)
    assert lines[6:] == ["1 num_heads must divide embed_dim, got 3 and 8", "1 scale must be finite, got inf"]


# The project enables no language, so it needs no compiler. It finds components with or without a CUDA toolkit.
FIND = """
cmake_minimum_required(VERSION 3.18...4.0)
project(find LANGUAGES NONE)
find_package(steam {asked})
message(STATUS "steam ${{steam_FOUND}}, cuda ${{steam_cuda_FOUND}}")
foreach(name cpu cuda)
  if(TARGET steam::${{name}})
    message(STATUS "target ${{name}}")
  endif()
endforeach()
"""


@pytest.mark.parametrize("asked", ["", "COMPONENTS cpu", "REQUIRED COMPONENTS cpu OPTIONAL_COMPONENTS cuda"])
def test_the_cpu_component_needs_no_cuda_toolkit(asked: str, prefix: Path, tmp_path: Path) -> None:
    said = found(asked, prefix, tmp_path)
    assert "steam 1, cuda FALSE" in said, said
    assert "target cpu" in said and "target cuda" not in said and "CUDAToolkit" not in said


def test_the_cuda_component_says_that_it_needs_the_toolkit(prefix: Path, tmp_path: Path) -> None:
    if not with_cuda():
        pytest.skip("the CUDA library was not built in this tree")
    said = found("COMPONENTS cuda", prefix, tmp_path)
    assert "steam 0" in said and "CUDAToolkit" in said and "target cuda" not in said


def found(asked: str, prefix: Path, folder: Path) -> str:
    """CMake's output for this find_package without a CUDA toolkit."""
    (folder / "CMakeLists.txt").write_text(FIND.format(asked=asked))
    no_cuda = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=TRUE"
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    command = [tool("cmake"), "-S", folder, "-B", folder / "build", "-G", "Ninja", ninja, "--no-warn-unused-cli"]
    done = subprocess.run(
        [*map(str, command), no_cuda, f"-DCMAKE_PREFIX_PATH={prefix}"], capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


# --- the C interface --------------------------------------------------------------------------------------------------

OK, BAD_ARGUMENT, OUT_OF_MEMORY, CUDA_ERROR = range(4)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SIZES = ("samples", "channels", "height", "width", "grid_h", "grid_w", "channel_radius")
INTS = ("embed_dim", "num_heads", "spatial_neighbors", "self_loops", "sequential", "channels_last", "relu")
WEIGHTS = ("channel_weight", "spatial_weight")
Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
Run = ctypes.CFUNCTYPE(None, ctypes.c_int64, Body, ctypes.c_void_p)


class Problem(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in SIZES]
        + [(name, ctypes.c_int32) for name in (*INTS, "dtype", "weight_dtype")]
        + [("scale", ctypes.c_double)]
    )


def arguments(*pointers: str) -> type[ctypes.Structure]:
    fields = [("problem", Problem), *((name, ctypes.c_void_p) for name in pointers)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


Forward = arguments(*WEIGHTS, "x", "residual", "y", "saved")
Backward = arguments(*WEIGHTS, "dy", "x", "y", "saved", "dx", "dresidual", "channel_grad", "spatial_grad")


class Parallel(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int64), ("run", Run))


@pytest.fixture(scope="module")
def library(prefix: Path) -> ctypes.CDLL:
    """The installed static library, linked as a shared library that this process can load."""
    archive = prefix / "lib" / "libsteam_cpu_kernels.a"
    shared = prefix / "libsteam_test.so"
    whole = ("-Wl,--whole-archive", archive, "-Wl,--no-whole-archive")
    run(tool("g++", "c++", "clang++"), "-shared", "-o", shared, *whole)
    return ctypes.CDLL(str(shared))


def problem_of(case: Case) -> Problem:
    grid_h, grid_w = case.resolved_grid
    return Problem(
        *(case.batch, case.channels, *case.space, grid_h, grid_w, case.radius, *case.attention),
        *(case.neighbors, case.self_loops, case.order == "sequential", "nhwc" in case.layout),
        *(case.tail.endswith("relu"), DTYPES[case.dtype], DTYPES[case.weight_dtype], case.scale),
    )


def call(function: Callable[..., int], args: Any, parallel: Parallel | None = None) -> None:
    message = ctypes.create_string_buffer(256)
    status = function(ctypes.byref(args), None if parallel is None else ctypes.byref(parallel), message)
    assert (status, message.value) == (OK, b"")


def forward_backward(
    library: ctypes.CDLL, case: Case, inputs: dict[str, Tensor], dy: Tensor, parallel: Parallel | None = None
) -> dict[str, Tensor]:
    """All outputs of the C interface by the names of ``cases.forward_backward``. Memory is NaN before the call."""
    problem, relu = problem_of(case), case.tail.endswith("relu")

    def nan(like: Tensor) -> Tensor:
        return torch.empty_like(like).fill_(torch.nan)

    accumulate = torch.float64 if case.dtype is torch.float64 else torch.float32
    row = 2 * (case.channels + problem.grid_h * problem.grid_w)
    saved = torch.full((case.batch, row), torch.nan, dtype=accumulate)
    out = {"y": nan(inputs["x"]), **{"d" + name: nan(value) for name, value in inputs.items()}}
    inputs = {"residual": None, **inputs, "saved": saved, "dy": dy}
    given = {name: None if value is None else value.data_ptr() for name, value in (inputs | out).items()}
    call(
        library.steam_cpu_forward,
        Forward(problem, *(given[name] for name in (*WEIGHTS, "x", "residual", "y", "saved"))),
        parallel,
    )
    masked = relu and "dresidual" in out
    backward = [given[name] for name in (*WEIGHTS, "dy", "x", "y", "saved", "dx")]
    backward += [given["dresidual"] if masked else None, given["dchannel_weight"], given["dspatial_weight"]]
    call(library.steam_cpu_backward, Backward(problem, *backward), parallel)
    if "dresidual" in out and not masked:
        out["dresidual"] = dy
    return out


CASES = [
    Case(),
    Case(space=(9, 8), channels=6, layout="nhwc", tail="residual_relu", dtype=torch.bfloat16, weights="x"),
    Case(space=(13, 5), channels=33, batch=3, grid=(3, 5), tail="relu", dtype=torch.float64, radius=3, neighbors=8),
    Case(space=(5, 3), channels=9, tail="residual", dtype=torch.float16, order="parallel", self_loops=False, scale=4.0),
    Case(space=(6, 7), channels=4, batch=0, attention=(12, 6), layout="nhwc"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_c_interface_computes_the_unit(library: ctypes.CDLL, case: Case) -> None:
    inputs, dy = cases.make(case)
    cases.bounds_of(case, inputs, dy).check(forward_backward(library, case, inputs, dy), case.id)


def test_the_users_threads_run_every_task_and_change_no_bit(library: ctypes.CDLL) -> None:
    case = Case(space=(40, 40), channels=64, batch=3)
    inputs, dy = cases.make(case)
    tasks_seen = []

    def backwards(tasks: int, body: Any, context: int) -> None:
        tasks_seen.append(tasks)
        for task in reversed(range(tasks)):
            body(context, task)

    alone = forward_backward(library, case, inputs, dy)
    shared = forward_backward(library, case, inputs, dy, Parallel(4, Run(backwards)))
    assert max(tasks_seen) > 1
    for name, value in alone.items():
        assert torch.equal(value, shared[name]), name


def test_variants_by_name(library: ctypes.CDLL) -> None:
    library.steam_cpu_supported.restype = library.steam_cpu_variant.restype = ctypes.c_char_p
    names = library.steam_cpu_supported().split(b",")
    assert library.steam_cpu_variant() == names[0]
    if names[-1] != b"generic":
        pytest.skip("the library was built for this processor alone")
    assert library.steam_cpu_select(b"generic") == 0 and library.steam_cpu_variant() == b"generic"
    assert library.steam_cpu_select(b"sse9") == 1 and library.steam_cpu_variant() == b"generic"
    assert library.steam_cpu_select(names[0]) == 0


def refusal(library: ctypes.CDLL, args: Any, parallel: Parallel | None = None) -> tuple[int, str]:
    message = ctypes.create_string_buffer(256)
    function = library.steam_cpu_forward if isinstance(args, Forward) else library.steam_cpu_backward
    by_reference = None if parallel is None else ctypes.byref(parallel)
    status = function(ctypes.byref(args), by_reference, message)
    assert function(ctypes.byref(args), by_reference, None) == status, "without a message"
    return status, message.value.decode()


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("samples", -1, "samples must be at least 0, got -1"),
        *(
            (name, 0, f"{name} must be at least 1, got 0")
            for name in ("channels", "height", "width", "grid_h", "grid_w")
        ),
        ("grid_h", 15, "at most a cell a pixel, got 15 x 7 cells on 14 x 14 pixels"),
        ("grid_w", 15, "at most a cell a pixel, got 7 x 15 cells on 14 x 14 pixels"),
        ("channel_radius", -1, "channel_radius must be at least 0, got -1"),
        ("embed_dim", 0, "embed_dim must be at least 1, got 0"),
        ("num_heads", 0, "num_heads must be at least 1, got 0"),
        ("num_heads", 3, "num_heads must divide embed_dim, got 3 and 8"),
        ("spatial_neighbors", 5, "spatial_neighbors must be 4 or 8, got 5"),
        *((name, 2, f"{name} must be 0 or 1, got 2") for name in ("self_loops", "sequential", "channels_last", "relu")),
        ("dtype", 4, "dtype must be a steam_dtype, got 4"),
        ("weight_dtype", 2, "weight_dtype must be STEAM_FLOAT32 or dtype, got 2"),
        ("scale", float("inf"), "scale must be finite, got inf"),
        ("height", 2**60, "more than 2^63 bytes"),
    ],
)
def test_a_bad_problem_is_named(library: ctypes.CDLL, field: str, value: Any, said: str) -> None:
    inputs, dy = cases.make(Case())
    problem = problem_of(Case())
    setattr(problem, field, value)
    pointers = [inputs[name].data_ptr() for name in (*WEIGHTS, "x")]
    y = torch.full_like(dy, 5.0)
    for args in (Forward(problem, *pointers, None, y.data_ptr()), Backward(problem, *pointers)):
        status, message = refusal(library, args)
        assert status == BAD_ARGUMENT and said in message
    assert (y == 5).all()


@pytest.mark.parametrize("args", [Forward, Backward])
def test_a_missing_pointer_is_named(library: ctypes.CDLL, args: type[ctypes.Structure]) -> None:
    needed = {Forward: (*WEIGHTS, "x", "y"), Backward: (*WEIGHTS, "dy", "x", "y", "saved")}[args]
    buffer = ctypes.create_string_buffer(16)
    for missing in needed:
        problem = problem_of(Case(tail="relu"))
        given = {name: ctypes.addressof(buffer) for name in needed if name != missing}
        assert refusal(library, args(problem, **given)) == (BAD_ARGUMENT, f"{missing} must not be NULL")


def test_other_bad_arguments_are_named(library: ctypes.CDLL) -> None:
    buffer = ctypes.create_string_buffer(16)
    pointers = {name: ctypes.addressof(buffer) for name in (*WEIGHTS, "dy", "x", "y", "saved", "dresidual")}
    assert "dresidual must be NULL where relu is 0" in refusal(library, Backward(problem_of(Case()), **pointers))[1]
    forward = Forward(problem_of(Case()), **{name: pointers[name] for name in (*WEIGHTS, "x", "y")})
    assert refusal(library, forward, Parallel(0)) == (BAD_ARGUMENT, "parallel.threads must be at least 1, got 0")
    assert "parallel.run must not be NULL" in refusal(library, forward, Parallel(2))[1]
    message = ctypes.create_string_buffer(256)
    assert library.steam_cpu_forward(None, None, message) == BAD_ARGUMENT and message.value == b"args must not be NULL"


def test_no_memory_is_a_status_and_leaves_the_library_usable(library: ctypes.CDLL) -> None:
    buffer = ctypes.create_string_buffer(4096)
    problem = problem_of(Case(batch=1, space=(1, 1)))
    problem.channels = 2**55  # the tokens alone exceed the memory
    pointers = {name: ctypes.addressof(buffer) for name in (*WEIGHTS, "dy", "x", "y", "saved", "dx")}
    said = r"there is no memory for \d+ bytes of working space, needed for x of shape \(1, 36028797018963968, 1, 1\)"
    never = Run(lambda *_: pytest.fail("a task ran"))
    for args in (
        Forward(problem, **{name: pointers[name] for name in (*WEIGHTS, "x", "y")}),
        Backward(problem, **pointers),
    ):
        for parallel in (None, Parallel(64, never)):
            status, message = refusal(library, args, parallel)
            assert status == OUT_OF_MEMORY and re.match(said, message), message
    assert buffer.raw == bytes(4096)
    inputs, dy = cases.make(Case())
    assert all(value.isfinite().all() for value in forward_backward(library, Case(), inputs, dy).values())


def test_a_batch_of_none_needs_no_memory(library: ctypes.CDLL) -> None:
    """An empty batch needs no memory, for any size of a sample."""
    problem = problem_of(Case(batch=0, space=(1, 1)))
    problem.channels = 2**55
    weights = {name: (ctypes.c_float * 32)(*range(32)) for name in WEIGHTS}
    grads = {name: (ctypes.c_float * 32)(*[5.0] * 32) for name in ("channel_grad", "spatial_grad")}
    pointers = {name: ctypes.addressof(array) for name, array in weights.items()}
    call(library.steam_cpu_forward, Forward(problem, **pointers))
    pointers |= {name: ctypes.addressof(array) for name, array in grads.items()}
    call(library.steam_cpu_backward, Backward(problem, **pointers))
    assert all(list(array) == [0.0] * 32 for array in grads.values())


def test_a_task_may_make_a_call_of_its_own(library: ctypes.CDLL) -> None:
    """A task may make a call, as a pool whose waiting thread takes other work. The calls do not share memory."""
    outer, inner = Case(space=(40, 40), channels=64, batch=3), Case(space=(9, 8), channels=6, layout="nhwc")
    (x, dy), (inner_x, inner_dy) = cases.make(outer), cases.make(inner)
    expected = forward_backward(library, outer, x, dy)
    inner_expected = forward_backward(library, inner, inner_x, inner_dy)
    seen = []

    def run_both(tasks: int, body: Any, context: int) -> None:
        for task in range(tasks):
            seen.append(forward_backward(library, inner, inner_x, inner_dy))
            body(context, task)

    results = forward_backward(library, outer, x, dy, Parallel(4, Run(run_both)))
    assert all(torch.equal(value, results[name]) for name, value in expected.items())
    assert seen and all(torch.equal(value, one[name]) for one in seen for name, value in inner_expected.items())


@pytest.mark.parametrize("flush", [False, True])
def test_the_users_threads_take_the_callers_floating_point_mode(library: ctypes.CDLL, flush: bool) -> None:
    """The user's threads have the caller's mode during a call, and their own mode again afterwards."""
    case = Case(space=(40, 40), channels=64, batch=3)
    inputs, dy = cases.make(case)
    tiny = torch.finfo(torch.float32).tiny
    inputs["x"] *= tiny / 8
    dy = dy * (tiny / 8)
    denormal = torch.tensor([1000], dtype=torch.int32).view(torch.float32)
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no mode that flushes denormal numbers")
    kept: list[bool] = []

    with ThreadPoolExecutor(1) as pool:

        def other_thread(tasks: int, body: Any, context: int) -> None:
            def work() -> None:
                for task in range(tasks):
                    body(context, task)
                kept.append(((denormal * 0.5).view(torch.int32) == 0).item() is not flush)

            pool.submit(work).result()

        try:
            assert pool.submit(torch.set_flush_denormal, not flush).result()
            torch.set_flush_denormal(flush)
            alone = forward_backward(library, case, inputs, dy)
            shared = forward_backward(library, case, inputs, dy, Parallel(4, Run(other_thread)))
        finally:
            torch.set_flush_denormal(False)
    assert kept and all(kept)
    for name, value in alone.items():
        assert torch.equal(value.view(torch.int32), shared[name].view(torch.int32)), name
    assert (alone["y"].view(torch.int32) & 0x7FFFFFFF).any().item() is not flush, "the control: the mode shows"


def test_cache_by_bytes(library: ctypes.CDLL) -> None:
    for name in ("cache_bytes", "reported_cache_bytes", "processors"):
        getattr(library, f"steam_cpu_{name}").restype = ctypes.c_int64
    library.steam_cpu_set_cache_bytes.argtypes = [ctypes.c_int64]
    before = library.steam_cpu_cache_bytes()
    assert 0 < before <= 8 * 2**20 * library.steam_cpu_processors()
    assert library.steam_cpu_reported_cache_bytes() >= 0
    assert library.steam_cpu_set_cache_bytes(0) == 0 and library.steam_cpu_cache_bytes() == 0
    assert library.steam_cpu_set_cache_bytes(-1) == 1 and library.steam_cpu_cache_bytes() == 0
    library.steam_cpu_unset_cache_bytes()
    assert library.steam_cpu_cache_bytes() == before
