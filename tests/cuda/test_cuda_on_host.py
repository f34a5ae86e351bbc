"""The CUDA kernels, compiled for this machine's processor, stay within the bounds; and planted mistakes are found.

As on a GPU, ``cuda`` is a backend here and the whole call of the package runs, but the kernels use this machine's
memory. A case runs on the general path and on the path that keeps a sample in shared memory. The size of the pretended
device's shared memory decides.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steam_kernels
from steam_kernels import backends, ops
from tests.support import cases, nonfinite, on_host
from tests.support.cases import Case

pytestmark = pytest.mark.skipif(on_host.compiler() is None, reason="no g++ on Linux to build the CUDA kernels with")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

#: The shared memory of one block in bytes: 0, so that no sample fits, and the size of an H100.
GENERAL, FUSED = 0, 227 << 10


@pytest.fixture(scope="module")
def runners() -> Iterator[dict[str, on_host.Host]]:
    hosts: dict[str, on_host.Host] = {}
    yield hosts
    for host in hosts.values():
        host.close()


@pytest.fixture
def host(
    request: pytest.FixtureRequest, runners: dict[str, on_host.Host], monkeypatch: pytest.MonkeyPatch
) -> on_host.Host:
    """The kernels as the backend "cuda". The parameter is the variant, which defaults to plain."""
    variant = getattr(request, "param", "plain")
    host = runners.setdefault(variant, on_host.Host(variant))
    host.shared_memory_limit, host.failing_launch, host.seed, host.keeps_phase = FUSED, 0, 1, False
    monkeypatch.setitem(ops.OPERATORS, "cuda", host.operators())
    usable = backends.BACKENDS["cuda"]._replace(why_not=lambda call: "")
    monkeypatch.setitem(backends.BACKENDS, "cuda", usable)
    return host


def sanitized(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("host", names, indirect=True)


# The four stages of a ResNet at 224 with few channels, cases that the sample is too small for, and limits of launches.
STAGES = [
    Case(space=(56, 56), channels=8, batch=1),
    Case(space=(56, 56), channels=16, batch=1, layout="nhwc", dtype=BF16, tail="residual_relu"),
    Case(space=(28, 28), channels=24, layout="nhwc"),
    Case(space=(28, 28), channels=12, dtype=F16, tail="residual_relu"),
    Case(space=(14, 14), channels=40, dtype=BF16),
    Case(space=(14, 14), channels=36, layout="nhwc", tail="x_relu"),
    Case(space=(7, 7), channels=256, batch=1, dtype=BF16),
    Case(space=(7, 7), channels=130, layout="nhwc", dtype=F16),
]
LARGE = [
    Case(space=(100, 167), channels=3, batch=1, grid="w4"),
    Case(space=(100, 167), channels=2, batch=1, layout="offset_nchw", tail="residual_relu"),
    Case(space=(100, 167), channels=4, batch=1, layout="nhwc", grid=(13, 21), dtype=BF16),
    Case(space=(130, 70), channels=2, batch=1, grid="w1"),
    Case(space=(40, 50), channels=3, batch=1, layout="nhwc", grid="w1", neighbors=8, self_loops=False),
    Case(space=(7, 7), channels=1031, batch=1, radius=3),
    Case(space=(3, 3), channels=4200, batch=1, layout="nhwc"),
    Case(space=(1, 1), channels=300, batch=3, self_loops=False),
    Case(space=(2, 1), channels=1500, batch=1, tail="residual"),
    Case(space=(6, 5), channels=5, attention=(40, 20)),
    Case(space=(4, 4), channels=2, batch=70),
    Case(space=(1, 1), channels=1),
    # Several blocks of channels: with long halos, with a ring of all channels, and with more cells than a tile has.
    Case(space=(7, 7), channels=150, radius=9, layout="nhwc"),
    Case(space=(7, 7), channels=140, batch=1, radius=100, order="parallel"),
    Case(space=(24, 24), channels=20, batch=1, grid="w1", radius=2),
    Case(space=(24, 23), channels=21, batch=1, grid="w1", layout="nhwc", dtype=F16),
    # Windows in the workspace: of a block, of a block and the lattice in float64, and of the lattice.
    Case(space=(1, 1), channels=1800, batch=1, radius=899, dtype=F64, attention=(4, 1)),
    Case(space=(70, 66), channels=2, batch=1, grid="w1"),
    # More heads than lanes and than a table has: the lattice with a launch of its own, and in blocks of the ring.
    Case(space=(7, 7), channels=70, attention=(40, 20)),
    Case(space=(5, 4), channels=300, batch=1, attention=(40, 20)),
    # Cells whose rows are packs: of unequal heights, and of more lanes than one.
    Case(space=(57, 56), channels=6, tail="residual_relu"),
    Case(space=(64, 64), channels=5, grid=2, dtype=BF16),
]


def turns(sample: list[Case]) -> list[Any]:
    """(limit, keeps_phase, case): the cases of a sample alternate between the two paths and the alignments."""
    return [pytest.param((GENERAL, FUSED)[k % 2], k // 2 % 2 == 1, case, id=case.id) for k, case in enumerate(sample)]


def test_results_lie_beside_a_boundary_as_x_does_or_not() -> None:
    """On both paths and in both memory orders: x is one element past a boundary, and y and dx are there or aligned."""
    seen = {(p.values[0], p.values[1], p.values[2].layout) for p in turns(cases.all_pairs())}
    for layout in ("offset_nchw", "offset_nhwc"):
        assert {(limit, keeps, layout) for limit in (GENERAL, FUSED) for keeps in (False, True)} <= seen
        case = Case(layout=layout)
        x = cases.make(case)[0]["x"]
        assert x.data_ptr() % 16 == 4
        for keeps in (False, True):
            assert on_host.Host(keeps_phase=keeps).poisoned_like(x).data_ptr() % 16 == 4 * keeps


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize("case", STAGES + LARGE, ids=lambda c: c.id)
def test_case(case: Case, limit: int, host: on_host.Host) -> None:
    host.shared_memory_limit = limit
    cases.check(case, "cuda", *cases.make(case))


@sanitized("address")
@pytest.mark.parametrize(("limit", "keeps_phase", "case"), turns(cases.all_pairs()))
def test_sample(limit: int, keeps_phase: bool, case: Case, host: on_host.Host) -> None:
    """Runs the ordinary sample under AddressSanitizer and UBSan."""
    host.shared_memory_limit, host.keeps_phase = limit, keeps_phase
    cases.check(case, "cuda", *cases.make(case))


@pytest.mark.parametrize(("limit", "keeps_phase", "case"), turns(cases.random_cases(40, seed=77)))
def test_random_unit(limit: int, keeps_phase: bool, case: Case, host: on_host.Host) -> None:
    """Compares random units with the loop oracle, which shares no code with the package."""
    host.shared_memory_limit, host.keeps_phase = limit, keeps_phase
    inputs, dy = cases.make(case)
    bounds = cases.bounds_of(case, inputs, dy, cases.exact_by_oracle(case, inputs, dy))
    bounds.check(cases.forward_backward(steam_kernels.steam, inputs, dy, backend="cuda", **case.options), case.id)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def run(case: Case, inputs: dict[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    return cases.forward_backward(steam_kernels.steam, inputs, dy, backend="cuda", **case.options)


ORDERED = [
    Case(space=(14, 14), channels=9, grid=(3, 5), tail="residual_relu"),
    Case(space=(30, 17), channels=20, layout="nhwc", dtype=BF16),
    Case(space=(5, 3), channels=17, order="parallel", radius=2),
]


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize("case", ORDERED, ids=lambda c: c.id)
def test_bits_do_not_depend_on_the_schedule(case: Case, limit: int, host: on_host.Host) -> None:
    """The bits are equal for other orders of threads and blocks, and for a sample alone and in a batch."""
    host.shared_memory_limit = limit
    inputs, dy = cases.make(case)
    first = run(case, inputs, dy)
    for seed in (2, 3, 4):
        host.seed = seed
        same_bits(first, run(case, inputs, dy))
    part = {k: v[1:] if v.dim() == 4 else v for k, v in inputs.items()}
    alone = run(case, part, dy[1:])
    assert torch.equal(first["y"][1:], alone["y"]) and torch.equal(first["dx"][1:], alone["dx"])


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize(
    "case",
    [
        Case(space=(28, 28), channels=5, tail="relu"),
        Case(space=(14, 14), channels=7),
        Case(space=(7, 7), channels=70, dtype=F64),
        Case(space=(9, 10), channels=72, layout="nhwc"),
    ],
    ids=lambda c: c.id,
)
def test_bits_do_not_depend_on_the_alignment(case: Case, limit: int, host: on_host.Host) -> None:
    """The same results from maps that begin one element past a boundary."""
    host.shared_memory_limit = limit
    inputs, dy = cases.make(case)
    host.keeps_phase = True
    offset = "offset_" + case.layout
    moved = {k: cases.lay_out(v, offset) if v.dim() == 4 else v for k, v in inputs.items()}
    same_bits(run(case, inputs, dy), run(case, moved, cases.lay_out(dy, offset)))


@sanitized("thread")
@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize(
    "case",
    [
        Case(space=(5, 6), channels=5, grid=(2, 3), tail="residual_relu"),
        Case(space=(6, 5), channels=8, grid=(3, 2), layout="nhwc", neighbors=8),
        Case(space=(3, 2), channels=4, layout="nhwc", order="parallel"),
        Case(space=(70, 66), channels=1, batch=1, grid=(2, 2)),
        Case(space=(30, 20), channels=4, batch=1, grid=1, layout="nhwc", dtype=F16),
        # Several blocks of channels, each of which has the lattice in the place of its tile, or only the first has.
        Case(space=(7, 7), channels=150, radius=2),
        Case(space=(7, 7), channels=150, layout="nhwc", order="parallel"),
    ],
    ids=lambda c: c.id,
)
def test_no_races(case: Case, limit: int, host: on_host.Host) -> None:
    """Runs under ThreadSanitizer, where only barriers and launches order memory accesses."""
    host.shared_memory_limit = limit
    cases.check(case, "cuda", *cases.make(case))


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("case", nonfinite.CASES, ids=lambda c: c.id)
def test_one_bad_value(case: Case, value: float, limit: int, host: on_host.Host) -> None:
    """NaN and infinities stay in their sample, at the same places as in the reference."""
    host.shared_memory_limit = limit
    nonfinite.one_bad_value_in_x(case, "cuda", value)
    nonfinite.one_bad_value_in_dy(case, "cuda", value)


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize("dtype,magnitude", nonfinite.MAGNITUDES, ids=str)
def test_finite_maps_of_any_size(dtype: torch.dtype, magnitude: float, limit: int, host: on_host.Host) -> None:
    host.shared_memory_limit = limit
    for case in nonfinite.LARGE_MAPS:
        nonfinite.finite_maps_of_any_size(case, dtype, magnitude, "cuda")
        nonfinite.finite_maps_of_any_size_through_open_gates(case, dtype, magnitude, "cuda")


def test_relu_keeps_nan(host: on_host.Host) -> None:
    for layout in ("nchw", "nhwc"):
        nonfinite.relu_keeps_nan("cuda", layout)


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize("layout", ["nchw", "offset_nhwc"])
def test_in_place(layout: str, limit: int, host: on_host.Host) -> None:
    host.shared_memory_limit = limit
    case = Case(space=(9, 10), channels=6, layout=layout, tail="residual_relu")
    inputs, _ = cases.make(case)
    y = steam_kernels.steam(**inputs, backend="cuda", **case.options)
    x = inputs["x"]
    assert steam_kernels.steam(**inputs, backend="cuda", inplace=True, **case.options) is x
    assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_empty_batch(dtype: torch.dtype, host: on_host.Host) -> None:
    case = Case(space=(9, 7), channels=5, batch=0, dtype=dtype, tail="residual_relu", weights="x")
    got = run(case, *cases.make(case))
    assert got["y"].shape == (0, 5, 9, 7)
    for name in ("dchannel_weight", "dspatial_weight"):
        assert got[name].dtype == dtype and torch.equal(got[name], torch.zeros(4, 8, dtype=dtype))


@pytest.mark.parametrize("limit", [GENERAL, FUSED], ids=["general", "fused"])
@pytest.mark.parametrize("wanted", ["x", "channel_weight", "spatial_weight", "residual"])
def test_gradients_one_at_a_time(wanted: str, limit: int, host: on_host.Host) -> None:
    host.shared_memory_limit = limit
    case = Case(space=(9, 8), channels=6, tail="residual_relu")
    inputs, dy = cases.make(case)
    everything = run(case, inputs, dy)
    given = {k: v.detach().requires_grad_(k == wanted) for k, v in inputs.items()}
    steam_kernels.steam(**given, backend="cuda", **case.options).backward(dy)
    assert torch.equal(given[wanted].grad, everything["d" + wanted])


def test_launches(host: on_host.Host) -> None:
    """A sample that fits into shared memory takes one launch, and one more for the parameters' gradients.

    Without a pool stage, where the cells are pixels, the general path has one launch less. With a lattice of more than
    128 cells at four heads, its backward pass has one more.
    """
    for case, general in (
        (Case(space=(14, 14), channels=16), (4, 4)),
        (Case(space=(7, 7), channels=16), (3, 3)),
        (Case(space=(24, 24), channels=16, grid=(8, 16)), (4, 4)),
        (Case(space=(24, 24), channels=16, grid=(8, 17)), (4, 5)),
        (Case(space=(12, 11), channels=16, grid="w1"), (3, 4)),
    ):
        inputs, dy = cases.make(case)
        counts = {}
        for limit in (GENERAL, FUSED):
            host.shared_memory_limit = limit
            steam_kernels.steam(**inputs, backend="cuda", **case.options)
            forward = len(host.launched)
            run(case, inputs, dy)
            counts[limit] = forward, len(host.launched)
        assert counts == {GENERAL: general, FUSED: (1, 2)}


def launches(case: Case, backward: bool, host: on_host.Host) -> dict[str, on_host.Launch]:
    problem = on_host.problem_at(case)
    return on_host.walk(problem, backward, host.plan(problem, backward))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_half_precision_sample_of_the_last_stage_is_one_launch(
    layout: str, dtype: torch.dtype, host: on_host.Host
) -> None:
    """On a device whose blocks may have 227 KB of shared memory (sm_90). One copy of the gates more would not fit."""
    case = Case(space=(7, 7), channels=2048, batch=32, layout=layout, dtype=dtype)
    whole = launches(case, False, host)["whole"]
    assert whole.shared_bytes <= FUSED < whole.shared_bytes + 4 * 2048


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_multiprocessor_has_work(dtype: torch.dtype, layout: str, backward: bool, host: on_host.Host) -> None:
    """At least three blocks for each of 132 multiprocessors, or at most two, which run at once.

    The lattice has one small block for each sample.
    """
    host.shared_memory_limit = GENERAL
    for channels, height, width in on_host.STAGES:
        case = Case(space=(height, width), channels=channels, batch=32, layout=layout, dtype=dtype)
        for name, launch in launches(case, backward, host).items():
            assert launch.blocks >= (32 if name == "lattice" else 128), (case.id, name)
            assert not 2 * 132 < launch.blocks < 3 * 132, (case.id, name)


SAMPLES = [(1, 1, 1), (2, 1, 1), (64, 1, 1), (65, 1, 1), (1, 8, 8), (3, 7, 7), (5, 2, 1), (130, 3, 5), (4200, 7, 7)]
LARGE_SAMPLES = [(8, 224, 224), (1, 1, 100_000), (1, 100_000, 1), (2**20, 1, 2), (3, 2**17, 2**17), (1, 1, 2**31 - 33)]


@pytest.mark.parametrize("dtype", [F64, F16])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("sample", SAMPLES + LARGE_SAMPLES)
def test_grids_have_room_for_every_call_that_is_let_through(
    sample: tuple[int, int, int], layout: str, dtype: torch.dtype, host: on_host.Host
) -> None:
    """For the largest batch that the backend accepts, no launch has too many blocks."""
    size = math.prod(sample)
    case = Case(space=sample[1:], channels=sample[0], batch=(2**37 - 1) // (size + 64), layout=layout, dtype=dtype)
    x: Any = SimpleNamespace(shape=case.shape)
    weight = torch.empty(4, 8)
    call = backends.Call(x, weight, weight, None, steam_kernels.config.Options(), case.resolved_grid)
    assert backends.cuda.why_not_sizes(call) == ""
    for limit in (GENERAL, FUSED):
        host.shared_memory_limit = limit
        for backward in (False, True):
            assert host.plan(on_host.problem_at(case), backward)


def test_a_grid_of_too_many_blocks_is_an_error(host: on_host.Host) -> None:
    with pytest.raises(on_host.Failed, match=r"2147483648 blocks, .*: more blocks than a grid can have"):
        host.plan(on_host.problem_at(Case(space=(1, 1), channels=1, batch=2**31)), False)


def test_a_reach_beyond_32_bits_is_an_error(host: on_host.Host) -> None:
    """The largest reach for which a window of the backward pass has less than 2^31 nodes."""
    most = (2**31 - 1 - 256) // 4
    case = Case(space=(1, 1), channels=2**31, batch=1, radius=most)
    for backward in (False, True):
        assert host.plan(on_host.problem_at(case), backward)
        with pytest.raises(on_host.Failed, match=f"{most + 1} channels away, and the kernels take {most}"):
            host.plan(on_host.problem_at(case.but(radius=most + 1)), backward)


def test_a_plan_is_what_is_launched(host: on_host.Host) -> None:
    for limit in (GENERAL, FUSED):
        host.shared_memory_limit = limit
        for case in (Case(space=(9, 8), channels=6), Case(space=(5, 3), channels=40, layout="nhwc", dtype=BF16)):
            plans = [host.plan(on_host.problem_at(case), backward) for backward in (False, True)]
            inputs, dy = cases.make(case)
            steam_kernels.steam(**inputs, backend="cuda", **case.options)
            assert host.launched == plans[0]
            run(case, inputs, dy)
            assert host.launched == plans[1]


def test_the_page_shows_the_shared_memory_of_the_stages(host: on_host.Host) -> None:
    assert on_host.page_with(on_host.shared_memory(host)) == on_host.PAGE.read_text()


def test_errors_name_the_kernel_and_the_shape(host: on_host.Host) -> None:
    """A refused launch raises the call's error, and no kernel is launched after it."""
    case = Case(space=(4, 5), channels=3, grid=(2, 2))
    inputs, dy = cases.make(case)
    host.failing_launch = 1
    with pytest.raises(
        on_host.Failed, match=r"kernel steam_forward failed .* \(2, 3, 4, 5\) in NCHW .*: invalid argument"
    ):
        run(case, inputs, dy)
    host.shared_memory_limit = GENERAL
    host.failing_launch = 2
    with pytest.raises(
        on_host.Failed, match=r"kernel steam_graph_forward failed .* grid of \(2, 2\) .*: invalid argument"
    ):
        run(case, inputs, dy)


# For each planted mistake: its number in planted.cu, the variant that finds it, and a part of the message.
PLANTED: dict[str, tuple[int, str, str]] = {
    "overrun of global memory": (1, "address", "heap-buffer-overflow.*READ of size 4"),
    "overrun of shared memory": (2, "address", "heap-buffer-overflow.*WRITE of size 4"),
    "missing barrier, by a schedule": (3, "plain", r"y\[\d+\] is -?nan"),
    "missing barrier, as a race": (3, "thread", "data race"),
    "barrier in a divergent branch": (4, "plain", r"planted.cu:\d+: thread \d+ is .* must come there too"),
    "mask without its caller": (5, "plain", "mask does not name the thread that gives it"),
    "shuffle in a divergent branch": (6, "plain", "must come there too, is at the kernel's end"),
    "unwritten output": (7, "plain", r"y\[191\] is nan"),
    "wide load off its boundary": (8, "address", "misaligned address"),
    "more shared memory than launched with": (9, "plain", "takes 272 bytes of shared memory"),
    "blocks that write one place": (10, "thread", "data race"),
    "barriers at two places": (11, "plain", r"is at the barrier of .*planted.cu:\d+; thread .* is at the barrier of"),
    "mask without the lane that is read": (12, "plain", "mask does not name the lane that is read"),
    "less shared memory than launched with": (13, "plain", "launched with 272 bytes of shared memory, and takes 256"),
    "threads that take other pieces": (14, "plain", "threads of one block take different pieces"),
    "more than 48 KB unasked": (15, "plain", "the launch failed: invalid argument"),
    "block that reads what another writes": (16, "thread", "data race"),
    "overflow of an offset": (19, "address", "signed integer overflow"),
    "shift out of range": (20, "address", "shift exponent"),
    "conversion out of range": (21, "address", "outside the range of representable values of type 'int'"),
}
#: The planted mistakes that only other seeds show.
ORDERED_MISTAKES = {"result by the order of blocks": 17, "result by the order of threads": 18}


def planted(number: int, variant: str, seed: int) -> tuple[int, str]:
    program = on_host.build(variant, [on_host.SHIM / "planted.cu"])
    environment = {**os.environ, **on_host.VARIANTS[variant][1]}
    done = subprocess.run([program, str(number), str(seed)], capture_output=True, text=True, env=environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistake_is_caught(name: str) -> None:
    number, variant, says = PLANTED[name]
    code, output = planted(number, variant, seed=1)
    assert code != 0
    assert re.search(says, output), output


@pytest.mark.parametrize("variant", on_host.VARIANTS)
def test_kernel_without_a_mistake_passes(variant: str) -> None:
    for seed in range(5):
        assert planted(0, variant, seed) == (0, "")


def test_a_missing_barrier_shows_in_most_schedules() -> None:
    assert sum(planted(3, "plain", seed)[0] != 0 for seed in range(10)) >= 9


@pytest.mark.parametrize("name", ORDERED_MISTAKES)
def test_a_result_by_an_order_shows_over_seeds(name: str) -> None:
    """Three more seeds give other bits, so test_bits_do_not_depend_on_the_schedule finds the mistake."""
    runs = [planted(ORDERED_MISTAKES[name], "plain", seed) for seed in (1, 2, 3, 4)]
    assert {code for code, _ in runs} == {0}
    assert len({output for _, output in runs}) > 1


def planted_call(variant: str, mistake: int, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the output of planted_call.cu, which is a copy of x if ``mistake`` is 0."""
    host = on_host.Host(variant, (on_host.SHIM / "runner.cpp", on_host.SHIM / "planted_call.cu"))
    arrays = {name: (on_host.READ, torch.randn(2, 3, 4, 5)) for name in CALL_READS[backward]}
    out = torch.zeros(2, 3, 4, 5)
    arrays["dx" if backward else "y"] = (on_host.WRITTEN, out)
    try:
        host.call(on_host.Problem(2, 3, 4, 5, radius=mistake), F32, backward, **arrays)
    finally:
        host.close()
    return arrays["x"][1], out


# The inputs that planted_call.cu counts from 1.
CALL_READS = {
    False: ("channel_weight", "spatial_weight", "x", "residual"),
    True: ("channel_weight", "spatial_weight", "x", "dy", "y", "saved"),
}


@pytest.mark.parametrize("backward", [False, True])
def test_an_input_that_is_written_into_is_named(backward: bool) -> None:
    x, out = planted_call("plain", 0, backward)
    assert torch.equal(x, out)
    for k, name in enumerate(CALL_READS[backward]):
        with pytest.raises(on_host.Failed, match=f"^array {on_host.ARRAYS.index(name)} was written into$"):
            planted_call("plain", 1 + k, backward)


def test_a_workspace_that_is_read_unwritten_shows() -> None:
    x, out = planted_call("plain", 100, False)
    assert out.flatten()[-1].isnan() and torch.equal(x.flatten()[:-1], out.flatten()[:-1])


def test_an_overrun_of_the_workspace_is_caught() -> None:
    with pytest.raises(on_host.Failed, match=r"(?s)heap-buffer-overflow.*WRITE of size 4"):
        planted_call("address", 101, False)
