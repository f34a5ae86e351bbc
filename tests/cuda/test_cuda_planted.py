"""Mistakes in the structure of the CUDA kernels: each is planted in a copy of the source, and the rule must find it.

The copy is compiled for this machine's processor, for float32 only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from steam_kernels import backends, ops
from tests.support import cases, on_host
from tests.support.cases import Case

pytestmark = [
    pytest.mark.skipif(on_host.compiler() is None, reason="no g++ on Linux to build the CUDA kernels with"),
    pytest.mark.slow,
]


class Mistake(NamedTuple):
    """A text in a file of csrc/cuda, the text in its place, and a case whose results must then be wrong."""

    file: str
    text: str
    other: str
    case: Case


#: Three blocks of channels, each with a halo.
BLOCKS = Case(space=(7, 7), channels=150, batch=2, radius=2)
#: Two tiles of cells for each block.
TILES = Case(space=(24, 24), channels=12, batch=1, grid="w1")

MISTAKES = {
    "a halo too short by one": Mistake(
        "launch.cuh", "sizes.blocks == 1 ? 0 : reach(plan)", "sizes.blocks == 1 ? 0 : reach(plan) - 1", BLOCKS
    ),
    "a window one channel off": Mistake("graph.cuh", "first - halo + place;", "first - halo + place + 1;", BLOCKS),
    "a window of tokens as short as the window of flows": Mistake(
        "graph_backward.cuh", "halo(2 * sizes.halo)", "halo(sizes.halo)", BLOCKS
    ),
    "one block's partials too few": Mistake(
        "graph.cuh", "      sizes.blocks, cells, scratch", "      sizes.blocks - 1, cells, scratch", BLOCKS
    ),
    "partials in another sample's order": Mistake(
        "graph_backward.cuh", "memory.partials + block.index *", "memory.partials + (block.index ^ 1) *", BLOCKS
    ),
    "the lattice of the first sample alone": Mistake(
        "graph_backward.cuh", "is_first = block.first == 0", "is_first = block.index == 0", BLOCKS
    ),
    "shifts of the lattice that another block may not have stored yet": Mistake(
        "graph_backward.cuh", "has_lattice ? shares[s] : cell_shifts[s]", "cell_shifts[s]", BLOCKS
    ),
    "the halo's terms in the weight's gradient": Mistake(
        "transform.cuh",
        "slope_grad += mean_grad * token * variance;\n          gain_grad",
        "slope_grad += mean_grad * token * variance;\n        }\n        {\n          gain_grad",
        BLOCKS,
    ),
    "the last tile in place of each tile": Mistake("graph.cuh", "plan.cells() > sizes.cells", "false", TILES),
    "the flows of the first tile alone": Mistake(
        "graph_backward.cuh", "first > 0 ? gradients[c] + sum : sum", "first > 0 ? gradients[c] : sum", TILES
    ),
    "a group of channels with one channel's gate": Mistake(
        "gate.cuh", "* range.group + columns.member[l]", "* range.group", Case(space=(7, 7), channels=8)
    ),
    "cells of unequal heights as if they were equal": Mistake(
        "pool.cuh", "(i * height + grid_h - 1) / grid_h", "i * (height / grid_h)", Case(space=(57, 56), channels=3)
    ),
}
#: Barriers whose absence only some orders of the threads show.
BARRIERS = {
    "between the tokens and the ring": Mistake(
        "graph.cuh",
        "  __syncthreads();\n  transform(plan, plan.channel_weight",
        "  transform(plan, plan.channel_weight",
        BLOCKS,
    ),
    "between the lattice and the tile in its place": Mistake(
        "graph_backward.cuh", "    });\n    __syncthreads();\n  }\n  load_heads", "    });\n  }\n  load_heads", BLOCKS
    ),
}

Planted = Callable[[Mistake, str], on_host.Host]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from a mistake and a variant to the kernels with it, as the backend "cuda"."""
    hosts = []
    monkeypatch.setattr(on_host, "BUILD", tmp_path / "build")

    def plant(mistake: Mistake | None, variant: str = "plain") -> on_host.Host:
        kernels = tmp_path / "csrc" / "cuda"
        shutil.copytree(on_host.ROOT / "csrc" / "common", kernels.parent / "common")
        shutil.copytree(on_host.KERNELS, kernels)
        replace(kernels / "launch.cuh", ONLY_FLOAT, "{")
        if mistake is not None:
            replace(kernels / mistake.file, mistake.text, mistake.other)
        runner = on_host.SHIM / "runner.cpp", kernels / "forward.cu", kernels / "backward.cu"
        host = on_host.Host(variant, runner, kernels, shared_memory_limit=0)
        hosts.append(host)
        monkeypatch.setitem(ops.OPERATORS, "cuda", host.operators())
        usable = backends.BACKENDS["cuda"]._replace(why_not=lambda call: "")
        monkeypatch.setitem(backends.BACKENDS, "cuda", usable)
        return host

    yield plant
    for host in hosts:
        host.close()


#: The dtypes that the copy is not compiled for.
ONLY_FLOAT = """{
    case DType::kFloat64: return f.template operator()<double>();
    case DType::kFloat16: return f.template operator()<__half>();
    case DType::kBFloat16: return f.template operator()<__nv_bfloat16>();"""


def replace(path: Path, text: str, other: str) -> None:
    source = path.read_text()
    assert text in source, f"{path.name} has no {text!r}"
    path.write_text(source.replace(text, other))


def test_the_copy_without_a_mistake_is_right(planted: Planted) -> None:
    planted(None, "plain")
    for case in sorted({mistake.case for mistake in MISTAKES.values()}, key=lambda case: case.id):
        cases.check(case, "cuda", *cases.make(case))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, planted: Planted) -> None:
    planted(MISTAKES[name], "plain")
    with pytest.raises((AssertionError, on_host.Failed)):
        cases.check(MISTAKES[name].case, "cuda", *cases.make(MISTAKES[name].case))


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_a_race(name: str, planted: Planted) -> None:
    planted(BARRIERS[name], "thread")
    with pytest.raises(on_host.Failed, match="data race"):
        cases.check(BARRIERS[name].case, "cuda", *cases.make(BARRIERS[name].case))
