"""The cases of the tests of the Triton kernels in the interpreter, and their fixtures.

Importing this module skips a test file if Triton is missing, or was imported to run on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import steam_kernels
from steam_kernels.backends import triton as backend
from tests.support import cases, operators
from tests.support.cases import Case

pytest.importorskip("triton")
if not backend.triton_kernels().module.INTERPRETED:
    pytest.skip("Triton was imported to run on a GPU", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

from steam_kernels.backends.triton import launch

#: The levels of the factors of ``PAIRS``. The cost in the interpreter grows with the number of tiles and neighbours.
FACTORS: dict[str, tuple[Any, ...]] = {
    "where": (
        ((7, 7), None),
        ((14, 14), None),
        ((14, 14), (3, 5)),
        ((28, 28), None),
        ((9, 8), "w2"),
        ((13, 2), (5, 7)),
        ((1, 1), None),
    ),
    "channels": (1, 5, 24),
    "layout": ("nchw", "nhwc", "offset_nchw", "offset_nhwc", "column_slice"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "attention": ((8, 4), (8, 1), (16, 8), (3, 1), (12, 6)),
    "radius": (1, 0, 2),
    "neighbors": (4, 8),
    "self_loops": (True, False),
    "order": ("sequential", "parallel"),
    "scale": (1.0, 1.1),
    "weights": ("float32", "x"),
    "tail": ("none", "relu", "residual", "residual_relu", "x_relu"),
    "dy_layout": ("same", "other"),
}
#: The stages of a ResNet at 224, wide enough for several tiles, and maps of other kinds.
MAPS = [
    Case(space=(56, 56), channels=9, batch=1),
    Case(space=(56, 56), channels=9, batch=1, layout="nhwc", dtype=torch.bfloat16),
    Case(space=(28, 28), channels=6, batch=1, dtype=torch.bfloat16, tail="residual_relu"),
    Case(space=(28, 28), channels=70, batch=1, layout="nhwc"),
    Case(space=(14, 14), channels=40, batch=1, dtype=torch.float16, tail="relu"),
    Case(space=(14, 14), channels=130, batch=1, layout="nhwc", dtype=torch.bfloat16),
    Case(space=(7, 28), channels=70, batch=2, radius=2, tail="relu"),
    Case(space=(7, 28), channels=37, batch=1, layout="nhwc", dtype=torch.bfloat16, order="parallel"),
    Case(space=(14, 7), channels=33, batch=1, dtype=torch.float64),
    Case(space=(14, 7), channels=70, batch=1, layout="nhwc", dtype=torch.float16, tail="residual"),
    Case(space=(16, 32), channels=20, batch=1, grid=(8, 16)),
    Case(space=(7, 7), channels=300, batch=1, radius=2),
    Case(space=(7, 7), channels=300, batch=1, order="parallel", dtype=torch.bfloat16, tail="residual_relu"),
    Case(space=(7, 7), channels=300, batch=1, layout="nhwc", self_loops=False),
    Case(space=(112, 112), channels=3, batch=1),
    Case(space=(60, 92), channels=2, batch=1, grid="w8", self_loops=False, tail="relu"),
    Case(space=(61, 300), channels=2, batch=1, grid=(3, 1)),
    Case(space=(2, 700), channels=3, batch=1, grid=(2, 1), layout="nhwc"),
    Case(space=(24, 31), channels=5, batch=1, grid="w2"),
    Case(space=(24, 31), channels=5, batch=1, grid="w2", layout="nhwc"),
    Case(space=(12, 12), channels=10, batch=1, grid=(12, 12)),
    # Several blocks of channels: cells in several tiles, and halos as large as the ring.
    Case(space=(12, 12), channels=40, batch=1, grid=(12, 12), layout="nhwc", tail="relu"),
    Case(space=(14, 14), channels=70, batch=2, radius=20, attention=(2, 1), order="parallel"),
    Case(space=(7, 7), channels=70, batch=1, radius=40, attention=(2, 1), layout="nhwc", self_loops=False),
    # The ring reaches itself.
    Case(space=(5, 4), channels=21, batch=1, radius=10, attention=(2, 1)),
    Case(space=(3, 3), channels=4, radius=9, self_loops=False),
]
#: Cases with the levels that the CPU's grid has and FACTORS does not have, each at least once.
OTHERS = [
    Case((6, 5), 7, 3, 3, "channel_slice", attention=(8, 2), radius=3, tail="other_relu", dy_layout="expanded"),
    Case((5, 4), 5, 1, 2, "channel_slice_nhwc", torch.bfloat16, attention=(8, 8), tail="other_relu", dy_layout="other"),
    Case((4, 6), 6, 2, (3, 2), "transposed", torch.float16, attention=(16, 4), radius=3, dy_layout="expanded"),
    Case((3, 4), 130, 1, (2, 2), "nhwc", torch.float64, attention=(8, 2), tail="other_relu", dy_layout="expanded"),
    Case((3, 5), 130, 1, (3, 5), "offset_nchw", attention=(16, 4), order="parallel", scale=4.0, tail="residual_relu"),
]
SMALL = Case(space=(9, 8), channels=6, grid=(3, 5), batch=2)
PAIRS = cases.all_pairs(FACTORS)
#: Only cases of few channels have radii beyond 2, because the cost grows with the square of the number of neighbours.
RANDOM = [c for c in cases.random_cases(40, seed=77) if c.radius < 3 or c.channels < 8][:14]


@pytest.fixture(autouse=True)
def rounds_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds to nearest, ties to even, as GPUs and PyTorch do. The interpreter truncates, with twice the error."""
    cut_off = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(params=["whole", "stages"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One launch for a small sample, or one per stage."""
    if request.param == "stages":
        monkeypatch.setattr(launch, "SMALL", 0)
    return request.param


def run(case: Case) -> dict[str, torch.Tensor]:
    inputs, dy = cases.make(case)
    return cases.forward_backward(steam_kernels.steam, inputs, dy, backend="triton", **case.options)


def backward_arguments(case: Case, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """The arguments of ``backward``, of which the Triton kernels computed y and saved."""
    return operators.backward_arguments(case, needs, "triton_")
