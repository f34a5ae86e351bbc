"""The model of the GPU kernels' time: the formula on launches made by hand, the record of counts, and the output."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_model import __main__ as command  # noqa: E402
from benchmarks.gpu_model import estimate, launches, targets  # noqa: E402
from benchmarks.gpu_model.gpus import COPY_SHARE, GPUS, LIMITS, Gpu  # noqa: E402
from benchmarks.gpu_model.launches import CALLS, DIRECTIONS, Launch, Program, Record, Tensor, name_of  # noqa: E402
from tests.support import tile_instructions  # noqa: E402

#: Ten multiprocessors of 1 GHz that hold 64 warps; 1 GB/s of memory after COPY_SHARE; a cache of 1000 bytes.
TOY = Gpu(
    name="toy",
    target="sm_90",
    family="sm90",
    multiprocessors=10,
    clock=1e9,
    peak_bandwidth=1e9 / COPY_SHARE,
    cache=1000,
    cache_bandwidth=10e9,
    cache_latency=100e-9,
    memory_latency=500e-9,
    launch=2e-6,
)


def read(size: int) -> Tensor:
    return Tensor(size, size, 0)


def written(size: int) -> Tensor:
    return Tensor(size, 0, size)


def seconds(given: Launch, gpu: Gpu = TOY) -> float:
    (found,) = estimate.estimates([given], gpu)
    return found.seconds


# ---- the formula -----------------------------------------------------------------------------------------------------


def test_bound_by_memory() -> None:
    """A copy of 4000 bytes at 1 byte a nanosecond. Its work is one round of loads."""
    copy = Launch("copy", {"x": read(4000), "y": written(4000)}, programs=10, program=Program(100, 1))
    assert seconds(copy) == pytest.approx(8e-6)
    assert seconds(replace(copy, tensors={"x": Tensor(4000, 100, 0), "y": written(0)})) == pytest.approx(0.9e-6)
    # A tensor is read from memory once, and through the cache as often as programs load it.
    assert seconds(replace(copy, tensors={"x": Tensor(100, 40000, 0)})) == pytest.approx(4e-6)


def test_bound_by_latency() -> None:
    """Five rounds, one of them of memory, and 400 instructions of one warp, which begins one in four cycles."""
    chain = Launch("chain", {"x": read(8)}, programs=10, threads=32, program=Program(400, 5), first=Program(0, 0))
    assert seconds(chain) == pytest.approx(500e-9 + 4 * 100e-9 + 1600e-9)
    # Each of three tiles has a round of memory.
    assert seconds(replace(chain, tiles=3)) == pytest.approx(3 * 500e-9 + 2 * 100e-9 + 1600e-9)
    # Nothing comes from memory.
    assert seconds(replace(chain, tensors={"y": written(8)})) == pytest.approx(5 * 100e-9 + 1600e-9)
    # Two programs of 8 warps reach the full rate of 4 instructions a cycle.
    full = replace(chain, programs=20, threads=256, program=Program(8000, 1))
    assert seconds(full) == pytest.approx(500e-9 + 2 * 8000 / 4 * 1e-9)


def test_several_waves() -> None:
    """255 registers: 8 warps at a time, two programs of four. 45 programs on 10 multiprocessors are 2 + 2 + 1."""
    given = Launch("waves", {}, programs=45, threads=128, registers=255, program=Program(1000, 2), first=Program(0, 0))
    assert estimate.waves(given, TOY) == [2, 2, 1]
    two, one = 200e-9 + 2 * 1000 / 2 * 1e-9, 200e-9 + 1000 / 1 * 1e-9
    assert seconds(given) == pytest.approx(2 * two + one)
    assert estimate.waves(replace(given, programs=10), TOY) == [1]


def test_the_first_program_may_be_the_longest() -> None:
    given = Launch("first", {}, programs=10, program=Program(4, 1), first=Program(40000, 20))
    assert seconds(given) == pytest.approx(20 * 100e-9 + 40000 * 4e-9)


def test_a_wider_warp_has_fewer_instructions() -> None:
    wide = replace(TOY, target="gfx942", warp=64, issue=1)
    given = Launch("wide", {}, programs=10, threads=256, registers=32, program=Program(1600, 0), first=Program(0, 0))
    assert seconds(given, wide) == pytest.approx(800e-9) and seconds(given) == pytest.approx(800e-9)
    assert targets.instructions_a_warp(given, wide) == 400 and targets.instructions_a_warp(given, TOY) == 200


def test_launches_add_up() -> None:
    copy = Launch("copy", {"x": read(4000), "y": written(4000)}, programs=10)
    calls = [copy, replace(copy, tensors={"z": read(500)})]
    assert estimate.kernels_seconds(calls, TOY) == pytest.approx(8.5e-6)
    assert estimate.launches_seconds(calls, TOY) == pytest.approx(4e-6)
    assert estimate.call_seconds(calls, TOY) == pytest.approx(12.5e-6)
    assert estimate.floor_seconds(1000, "forward", TOY) == pytest.approx(2e-6)
    assert estimate.floor_seconds(1000, "backward", TOY) == pytest.approx(3e-6)


def test_a_launch_without_counts_has_one_round() -> None:
    assert seconds(Launch("bytes", {"x": read(8)})) == pytest.approx(500e-9)


@pytest.mark.parametrize(
    "target,registers,shared,warps,resident",
    [
        ("sm_90", 16, 0, 1, 32),  # by programs
        ("sm_90", 32, 0, 4, 16),  # by warps
        ("sm_89", 32, 0, 4, 12),
        ("sm_90", 255, 0, 8, 1),  # by registers
        ("sm_80", 32, 100 << 10, 4, 1),  # by shared memory
        ("sm_90", 32, 100 << 10, 4, 2),
        ("gfx942", 64, 0, 4, 8),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 32, 16 << 10, 4, 4),
    ],
)
def test_resident_programs(target: str, registers: int, shared: int, warps: int, resident: int) -> None:
    assert LIMITS[target].resident(registers, shared, warps) == resident


# ---- the cache -------------------------------------------------------------------------------------------------------


def memory_bytes(*calls: Launch) -> list[float]:
    cache = estimate.Cache(TOY.cache)
    return [cache.run(each) for each in calls]


def test_a_whole_tensor_is_found() -> None:
    """The second launch reads what the first has written; 600 bytes of x are replaced by 900 of another tensor."""
    pool = Launch("pool", {"x": read(600), "sums": written(100)})
    graph = Launch("graph", {"sums": read(100)})
    assert memory_bytes(pool, graph, replace(pool, tensors={"x": read(600)})) == [600, 0, 0]
    other = Launch("other", {"y": written(900)})
    assert memory_bytes(pool, other, replace(pool, tensors={"x": read(600)})) == [600, 0, 600]


def test_the_end_of_a_tensor_is_found_in_reverse() -> None:
    """1000 of 4000 bytes are held. In the same order the cache has given up each of them before it is read."""
    pool = Launch("pool", {"x": read(4000)})
    gate = Launch("gate", {"x": read(4000), "y": written(4000)})
    assert memory_bytes(pool, gate) == [4000, 4000]
    assert memory_bytes(pool, replace(gate, is_reversed=True, evict_first=True)) == [4000, 3000]
    # Each byte of y that is written replaces one of x.
    assert memory_bytes(pool, replace(gate, is_reversed=True)) == [4000, 3500]


def test_the_oldest_bytes_are_given_up_first() -> None:
    """Of 500 bytes of a, 300 of b and 400 of c, in this order, the cache holds 300 of a."""
    calls = [Launch(name, {name: read(size)}) for name, size in (("a", 500), ("b", 300), ("c", 400))]
    cache = estimate.Cache(TOY.cache)
    for each in calls:
        cache.run(each)
    assert {name: held.bytes for name, held in cache.held.items()} == {"a": 300, "b": 300, "c": 400}


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record() -> Record:
    return launches.load()


def test_the_record_has_every_call(record: Record) -> None:
    names = [name_of(call, direction) for call in CALLS for direction in DIRECTIONS]
    assert set(record.ours) == set(GPUS)
    for calls in (*record.ours.values(), record.inductor, record.before):
        assert sorted(calls) == sorted(names) and all(calls.values())


def expected(call: str, direction: str, family: str) -> Iterator[tuple[str, int, int]]:
    """The kernel, programs and threads of each launch, by the launch table of today."""
    from steam_kernels.backends.triton import launch as table

    (n, c, h, w), layout = CALLS[call]
    backward = direction == "backward"
    p = table.Pass(n, c, h, w, 7, 7, launches.ITEMSIZE, layout == "channels_last", backward, family)
    assert table.merges_lattice(p, 4, 2)
    graph, gate, pool = table.graph(p, 4, 2), table.gate(p), table.pool(p)
    cells = [table.cells(p, 4, 2, True)] if backward else []
    for how in [*([pool] if pool else []), *cells, graph, gate]:
        more = how.kernel == "gate_backward"
        yield how.kernel, how.programs + more, how.num_warps * table.FAMILIES[family].warp


@pytest.mark.parametrize("gpu", GPUS)
def test_the_record_is_of_the_launch_table(gpu: str, record: Record) -> None:
    pytest.importorskip("triton")
    for call in CALLS:
        for direction in DIRECTIONS:
            ours = record.ours[gpu][name_of(call, direction)]
            found = [(each.kernel, each.programs, each.threads) for each in ours]
            assert found == list(expected(call, direction, GPUS[gpu].family)), "--count counts anew"


def test_known_structure(record: Record) -> None:
    """2048x7x7, batch 32: 32 blocks of 64 channels for each sample, and x is read once by each of two launches."""
    forward = record.ours["h100"]["32x2048x7x7 nchw forward"]
    assert [each.kernel for each in forward] == ["graph", "gate"]
    graph, gate = forward
    assert (graph.programs, graph.threads, graph.tiles) == (32 * 32, 128, 1)
    size = 32 * 2048 * 49 * 4
    assert graph.tensors["x"] == Tensor(size, size + 32 * 32 * 448, 0)  # the halo is 2 channels of 7 sectors
    assert gate.tensors["x"] == Tensor(size, size, 0) and gate.tensors["y"] == Tensor(size, 0, size)
    assert gate.is_reversed and gate.evict_first and not graph.is_reversed
    backward = record.ours["h100"]["32x2048x7x7 nchw backward"]
    assert [each.kernel for each in backward] == [
        "graph_backward_cells", "graph_backward_ring", "gate_backward",
    ]  # fmt: skip
    pooled = record.ours["h100"]["32x256x56x56 nchw forward"]
    assert [each.kernel for each in pooled] == ["pool_tiles", "graph", "gate"]
    assert pooled[0].tensors["x"].read == pooled[2].tensors["x"].read == 32 * 256 * 56 * 56 * 4


def test_the_docs_tell_the_rounds_of_the_earlier_kernels(record: Record) -> None:
    rounds = [
        max(each.program.rounds for each in record.before[f"32x2048x7x7 nchw {direction}"]) for direction in DIRECTIONS
    ]
    assert "a chain of {} (forward)\nand {} (backward) rounds".format(*rounds) in command.PAGE.read_text()


def raw(gpu: str, call: str) -> dict[str, Any]:
    recorded = json.loads(launches.RECORD.read_text())["triton"][gpu]
    return {name_of(call, direction): recorded[name_of(call, direction)] for direction in DIRECTIONS}


def test_the_docs_tell_the_instructions_of_a_program(record: Record) -> None:
    gpu, text = GPUS["h100"], re.sub(r"\s+", " ", (ROOT / "docs" / "gpu.md").read_text())
    found = []
    for layout in ("nchw", "channels_last"):
        (graph,) = [each for each in record.ours["h100"][f"32x2048x7x7 {layout} forward"] if each.kernel == "graph"]
        found.append(targets.instructions_a_warp(graph, gpu))
        assert 0 < graph.of_tile < found[-1]
    assert (
        f"A warp executes {found[0]} instructions in NCHW and {found[1]} in channels_last for a whole program" in text
    )


def test_the_parts_of_the_tile_are_in_the_kernel() -> None:
    """If one were renamed, fewer instructions would count."""
    source = (ROOT / "steam_kernels" / "backends" / "triton" / "graph.py").read_text()
    assert set(re.findall(r"^def (\w+)", source, re.M)) >= tile_instructions.OF_TILE | tile_instructions.OF_HALO
    assert set(map(str.strip, source.splitlines())) >= tile_instructions.LINES


def test_instructions_have_the_functions_that_called_them(tmp_path: Path) -> None:
    """An instruction of a function of another file belongs to the tile if a function of the tile called it."""
    source = tmp_path / "graph.py"
    source.write_text("def load_cells():\n    a\ndef halo_sums():\n    b\ndef graph_of():\n    c\n    tile *= g\n")
    ptx = """.visible .entry graph()
{
\t.reg .b32 \t%r<2>;
\t.loc\t1 2 1, function_name $L, inlined_at 1 6 1
\tld.global.b32 \t%r1, [%rd1];
\t.loc\t2 9 1, function_name $L, inlined_at 1 2 1
\tadd.s32 \t%r1, %r1, 1;
\t.loc\t1 4 1, function_name $L, inlined_at 1 6 1
\tadd.s32 \t%r1, %r1, 2;
\t.loc\t2 9 1, function_name $L, inlined_at 1 4 1
$L__BB0_1:
\t@%p1 bra \t$L__BB0_1;
\t.loc\t1 6 1
\tadd.s32 \t%r1, %r1, 3;
\t.loc\t1 7 1
\tmul.f32 \t%r1, %r1, %r1;
\tret;
}
\t.file\t1 "/a/graph.py"
\t.file\t2 "/b/standard.py"
"""
    assert len(tile_instructions.frames(ptx)) == 7
    # The load and its caller's addition, and then the product and the return after it.
    assert tile_instructions.of_tile(ptx, source) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpu,call", [("h100", "32x2048x7x7 nchw"), ("a100", "32x1024x14x14 channels_last"), ("mi300x", "32x512x28x28 nchw")]
)
def test_counts_are_those_recorded(gpu: str, call: str) -> None:
    pytest.importorskip("triton")
    from tests.support import triton_aot
    from tests.support.ptx import executor

    if executor.is_missing() or not triton_aot.tools():
        pytest.skip(f"{executor.WHY_NOT}, or Triton's wheel has no cuobjdump and nvdisasm that can be run")
    assert launches.counted("gpu_counts", gpu, call) == raw(gpu, call), "--count counts anew"


@pytest.mark.slow
def test_code_of_inductor_is_the_one_recorded() -> None:
    """Another torch may emit other code."""
    recorded = json.loads(launches.RECORD.read_text())
    if metadata.version("torch") != recorded["torch"]:
        pytest.skip(f"the record is of torch {recorded['torch']}, and this is another")
    pytest.importorskip("triton")
    call = "32x2048x7x7 nchw"
    found = launches.counted("inductor_counts", call)
    assert found == {name: recorded["inductor"][name] for name in found} and len(found) == 2


@pytest.mark.parametrize("path", [launches.RECORD, launches.BEFORE], ids=lambda path: path.name)
def test_a_record_has_a_line_for_each_launch(path: Path) -> None:
    text = path.read_text()
    assert launches.text_of(json.loads(text)) + "\n" == text


def test_the_earlier_kernels_have_the_times_of_the_design_on_paper(record: Record) -> None:
    """The graph stage of commit 215d867 was worked out by hand: 12, 20, 35 and 64 µs at batch 32 in NCHW.

    The model has the same counts as its source, and other constants. So a factor of 1.2 is allowed.
    """
    by_hand = {"256x56x56": 12, "512x28x28": 20, "1024x14x14": 35, "2048x7x7": 64}
    for stage, micro in by_hand.items():
        calls = record.before[f"32x{stage} nchw forward"]
        times = zip(calls, estimate.estimates(calls, GPUS["h100"]), strict=True)
        (found,) = [each.seconds * 1e6 for launch, each in times if launch.kernel == "graph"]
        assert micro / 1.2 <= found <= micro * 1.2, stage


def test_counting_anew_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded answers in place of the programs that count."""
    recorded = json.loads(launches.RECORD.read_text())
    answers = {("gpu_counts", gpu): recorded["triton"][gpu] for gpu in GPUS} | {
        ("inductor_counts",): recorded["inductor"]
    }
    monkeypatch.setattr(launches, "counted", lambda *arguments: answers.pop(arguments))
    monkeypatch.setattr(launches, "RECORD", tmp_path / "counts.json")
    launches.count()
    assert json.loads((tmp_path / "counts.json").read_text()) == recorded | {"torch": metadata.version("torch")}
    assert answers == {}


# ---- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS)
def test_every_line_of_figures_says_estimate(gpu: str, record: Record) -> None:
    lines = command.page(gpu, record, with_launches=True).splitlines()
    figures = [line for line in lines if re.search(r"\| -?[\d.]+ \||\d µs", line)]
    assert len(figures) > 80 and [line for line in figures if "estimate" not in line] == []
    assert "No GPU has checked these estimates." in lines[0]


def test_targets_are_judged(record: Record) -> None:
    """A target is met or missed by the figure that is printed beside it."""
    assert [targets.judged(2.0, sign, 2) for sign in ("≤", "≥")] == ["2 ≤ 2", "2 ≥ 2"]
    assert targets.judged(2.01, "≤", 2) == "2.01, not ≤ 2" and targets.judged(1.99, "≥", 2) == "1.99, not ≥ 2"
    assert len(list(targets.rows(record))) == 2 * len(CALLS)
    # Few programs with many tiles and instructions in each launch
    few = {
        name: [
            replace(each, programs=400, tiles=9, registers=255, of_tile=701, program=Program(10**6, 9))
            for each in calls
        ]
        for name, calls in record.ours["h100"].items()
    }
    for _, *cells in targets.rows(Record({"h100": few}, record.inductor, {})):
        assert all("not" in cell for cell in cells if cell), cells


def test_an_unknown_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--gpu", "h1000"])
    with pytest.raises(SystemExit) as raised:
        command.main()
    said = capsys.readouterr().err
    assert raised.value.code == 2 and "--gpu" in said and "h1000" in said and all(name in said for name in GPUS)


def test_an_unknown_call_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    launches.add_calls(parser)
    assert parser.parse_args([]).calls == [] and parser.parse_args(list(CALLS)).calls == list(CALLS)
    with pytest.raises(SystemExit):
        parser.parse_args(["32x3x224x224 nchw"])
    said = capsys.readouterr().err
    assert "32x3x224x224 nchw" in said and all(call in said for call in CALLS)


def test_the_command_prints_the_page(python: Any, record: Record) -> None:
    assert python("-m", "benchmarks.gpu_model", "--gpu", "a100").rstrip() == command.page("a100", record, False)


#: Rows of the table of constants in docs/gpu.md: the attribute of a GPU and its unit.
CONSTANTS = {
    "multiprocessors": ("multiprocessors", 1),
    "clock, GHz": ("clock", 1e9),
    "bandwidth of memory, TB/s": ("peak_bandwidth", 1e12),
    "bytes that stay in the cache, MB": ("cache", 1e6),
    "bandwidth of the cache, TB/s": ("cache_bandwidth", 1e12),
    "latency of the cache, ns": ("cache_latency", 1e-9),
    "latency of memory, ns": ("memory_latency", 1e-9),
    "fixed time of a launch, µs": ("launch", 1e-6),
}


def test_the_docs_have_the_constants() -> None:
    text = command.PAGE.read_text()
    rows = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 6}
    for title, (name, unit) in CONSTANTS.items():
        assert [float(cell) for cell in rows[title][:4]] == [
            pytest.approx(getattr(gpu, name) / unit) for gpu in GPUS.values()
        ], title
    assert f"a copy reaches {COPY_SHARE} of it" in text


def test_the_docs_show_what_the_command_prints(record: Record) -> None:
    text = command.PAGE.read_text()
    assert command.filled(text, record) == text, "python -m benchmarks.gpu_model --gpu h100 --write"
