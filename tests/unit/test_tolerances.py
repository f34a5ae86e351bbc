"""Tests of the tolerances. They depend only on the case, their model is the unit, and they catch a few eps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from steam_kernels import reference
from tests.support import cases, tolerances
from tests.support.cases import Case

SAMPLE = cases.all_pairs()


@pytest.mark.parametrize("case", [c.but(dtype=torch.float64) for c in SAMPLE[::7]], ids=lambda c: c.id)
def test_without_roundings_the_model_is_the_unit(case: Case) -> None:
    """Otherwise the bounds would belong to another computation. Both are float64 and judged by the rule itself."""
    inputs, dy = cases.make(case.but(tail=case.tail.replace("x_relu", "relu")))
    bounds = cases.bounds_of(case, inputs, dy)
    model = tolerances.Unit(bounds.truth, {**inputs, "dy": dy}, case.options)
    found = {k: v[0] for k, v in model.run(tolerances.Exact()).items()}

    def pixels(cells: Tensor) -> Tensor:
        n, c, _ = found["gate"].shape
        cells = cells.expand(n, c, -1).unflatten(2, model.grid)
        return torch.stack([reference.spread(cells[:, k], case.space) for k in range(c)], 1)

    arrived = tolerances.masked(bounds.truth, {"dy": dy}, case.options)
    y = pixels(found["gate"]) * inputs["x"]
    if "residual" in inputs:
        y = y + inputs["residual"]
    found["y"] = torch.relu(y) if "activation" in case.options else y
    found["dx"] = pixels(found["gate"]) * arrived + pixels(found["rest"])
    got = {k: found[k] for k in ("y", "dx", "dchannel_weight", "dspatial_weight")}
    if "residual" in inputs:
        got["dresidual"] = arrived
    bounds.check(got, case.id)


BOUNDS = """
import json, sys
import torch
from tests.support import cases
torch.set_num_threads(int(sys.argv[1]))
found = [torch.backends.cpu.get_cpu_capability()]
for case in cases.all_pairs()[::20]:
    found.append(cases.bounds_of(case, *cases.make(case)).bounds)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def here() -> list[dict[str, float]]:
    return [cases.bounds_of(case, *cases.make(case)).bounds for case in SAMPLE[::20]]


@pytest.mark.parametrize("threads,capability", [(1, "default"), (2, "default"), (1, "avx2"), (2, "avx512")])
def test_bounds_do_not_depend_on_the_machine(threads: int, capability: str, here: list[dict[str, float]]) -> None:
    """Other vectors and threads sum float64 in another order, which changes a bound by STEP's quotient times 2^-53."""
    # PyTorch trusts the variable. A processor without these instructions would crash, so the test skips there.
    known = ["DEFAULT", "AVX2", "AVX512"]
    own = torch.backends.cpu.get_cpu_capability()
    if capability != "default" and (own not in known or known.index(capability.upper()) > known.index(own)):
        pytest.skip(f"this processor runs {own}, not {capability}")
    done = subprocess.run(
        [sys.executable, "-c", BOUNDS, str(threads)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used, *found = json.loads(done.stdout)
    if capability == "default":
        assert used in ("DEFAULT", "NO AVX")
    worst = max(abs(a[k] / b[k] - 1) for a, b in zip(found, here, strict=True) for k in a if b[k] > 0)
    assert tolerances.within(worst, 100 * 2.0**-53 / tolerances.STEP, f"bounds, {used}, {threads} threads"), worst


EPS = torch.finfo(torch.float32).eps


def shares(found: dict[str, Tensor], bounds: tolerances.Judge) -> dict[str, float]:
    return {k: tolerances.largest_error(v, bounds.truth[k]) / bounds.bounds[k] for k, v in found.items()}


def gates_off(*args: Tensor) -> Tensor:
    return GOOD["sigmoid"](*args) * (1 + 8 * EPS)


def tokens_off(*args: Any) -> tuple[Tensor, Tensor]:
    means, counts = GOOD["pool"](*args)
    return means * (1 + 32 * EPS), counts


def sums_off(*args: Any) -> Tensor:
    return GOOD["graph_transform"](*args) * (1 + 32 * EPS)


def weights_off(*args: Any) -> tuple[Tensor, ...]:
    """The attention, with the weight of one neighbour off by 256 eps."""
    alpha, *rest = GOOD["attention"](*args)
    first = (torch.arange(alpha.shape[2]) == 0)[:, None]
    return (alpha * (1 + 256 * EPS * first), *rest)


GOOD = {name: getattr(reference, name) for name in ("sigmoid", "pool", "graph_transform", "attention")}
#: Each entry plants one mistake into an otherwise exact computation. The values are the name of the function, and the
#: largest share of a bound that a result of the float32 cases reaches: the smallest and the median over the cases. The
#: tests catch a mistake from a share of 1 on.
PLANTED: dict[Callable[..., Any], tuple[str, float, float]] = {
    gates_off: ("sigmoid", 0.5, 1.5),
    tokens_off: ("pool", 0.2, 2.1),
    sums_off: ("graph_transform", 0.2, 1.9),
    weights_off: ("attention", 0.04, 1.5),
}


@pytest.fixture(scope="module")
def judged() -> list[tuple[Case, dict[str, Tensor], Tensor, tolerances.Judge]]:
    given = [(c, *cases.make(c)) for c in SAMPLE if c.dtype == torch.float32]
    return [(*g, cases.bounds_of(*g)) for g in given]


@pytest.mark.parametrize("mistake", PLANTED, ids=lambda m: m.__name__)
def test_planted_errors_are_caught_in_the_median_case(
    mistake: Callable[..., Any], judged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A badly conditioned case hides a small mistake, so the smallest share is small. The median case shows it."""
    name, smallest, usual = PLANTED[mistake]
    monkeypatch.setattr(reference, name, mistake)
    found = sorted(max(shares(cases.exact(c, inputs, dy), bounds).values()) for c, inputs, dy, bounds in judged)
    assert found[0] >= smallest and median(found) >= usual, (found[0], median(found))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_eps_of_a_rounded_result_are_caught(dtype: torch.dtype) -> None:
    """This holds in every case and for every result, because one rounding is nearly the whole bound there."""
    for case in SAMPLE:
        if case.dtype == dtype and case.weights == "x":
            bounds = cases.bounds_of(case, *cases.make(case))
            for name, value in bounds.truth.items():
                error = 2 * torch.finfo(dtype).eps * value.abs().max().item()
                share = error / bounds.bounds[name]
                assert share > 1 or error < torch.finfo(dtype).smallest_normal, (case.id, name, share)


def test_what_is_out_of_bounds_is_named_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "ratios.jsonl"
    monkeypatch.setenv(tolerances.RECORD, str(record))
    case = Case(space=(5, 4), channels=3)
    bounds = cases.bounds_of(case, *cases.make(case))
    bounds.check(bounds.truth, "right")
    with pytest.raises(AssertionError, match=r"wrong: dx \(torch.float64\): error 1.000e\+00 > bound"):
        bounds.check(bounds.truth | {"dx": bounds.truth["dx"] + 1}, "wrong")
    with pytest.raises(AssertionError, match="error nan"):
        bounds.check(bounds.truth | {"y": bounds.truth["y"] * float("nan")}, "wrong")
    lines = record.read_text().splitlines()
    assert len(lines) == 3 * len(bounds.truth)
    first, *rows = tolerances.summary(lines, 2)
    assert first.startswith(f"{len(lines)} comparisons") and len(rows) == 2
    assert "y (torch.float64) wrong" in rows[0] and "dx (torch.float64) wrong" in rows[1]
    assert "test_what_is_out_of_bounds" in rows[1]
