"""The cases of the tests: a designed sample of shapes, grids, options, dtypes and layouts, and their inputs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import steam_kernels
from steam_kernels import reference
from tests.support import oracle, tolerances

Steam = Callable[..., Tensor]

LAYOUTS = (
    "nchw",
    "nhwc",
    "offset_nchw",
    "offset_nhwc",
    "channel_slice",
    "channel_slice_nhwc",
    "column_slice",
    "transposed",
)
DENSE_LAYOUTS = ("nchw", "nhwc", "offset_nchw", "offset_nhwc")


@dataclass(frozen=True)
class Case:
    """One call of the unit. ``grid`` is an int, a pair, None (7), or a string "w<n>" for a window of n pixels."""

    space: tuple[int, int] = (14, 14)
    channels: int = 8
    batch: int = 2
    grid: Any = None
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    weights: str = "float32"  # or "x": parameters in x's dtype
    attention: tuple[int, int] = (8, 4)  # embed_dim, num_heads
    radius: int = 1
    neighbors: int = 4
    self_loops: bool = True
    order: str = "sequential"
    scale: float = 1.0
    # none, relu, residual, residual_relu, x_relu (residual is x), other_relu (residual of the other memory format)
    tail: str = "none"
    dy_layout: str = "same"  # same, other, expanded
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [f"{self.batch}x{self.channels}x{self.space[0]}x{self.space[1]}"]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={str(value).replace('torch.', '').replace(' ', '')}")
        return "-".join(parts)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, *self.space

    @property
    def numel(self) -> int:
        return self.batch * self.channels * self.space[0] * self.space[1]

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype if self.weights == "x" else torch.float32

    @property
    def resolved_grid(self) -> tuple[int, int]:
        options = self.options
        return oracle.resolve_grid(*self.space, options.get("grid_size"), options.get("window"))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``steam`` and of the oracle."""
        out: dict[str, Any] = {
            "num_heads": self.attention[1],
            "channel_radius": self.radius,
            "spatial_neighbors": self.neighbors,
            "self_loops": self.self_loops,
            "order": self.order,
            "scale": self.scale,
        }
        if isinstance(self.grid, str):
            out["window"] = int(self.grid[1:])
        elif self.grid is not None:
            out["grid_size"] = self.grid
        if self.tail.endswith("relu"):
            out["activation"] = "relu"
        return out

    @property
    def operator_options(self) -> tuple[Any, ...]:
        """The options of the operators, from grid to relu."""
        return (
            list(self.resolved_grid),
            self.attention[1],
            self.radius,
            self.neighbors,
            self.self_loops,
            self.order == "sequential",
            self.scale,
            self.tail.endswith("relu"),
        )

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values (N, C, H, W) in another layout. The memory around a slice is NaN."""
    n, c, h, w = values.shape
    nan = float("nan")
    if layout == "nchw":
        return values.contiguous().clone(memory_format=torch.contiguous_format)
    if layout == "nhwc":
        return values.clone(memory_format=torch.channels_last)
    if layout in ("offset_nchw", "offset_nhwc"):
        # The map begins one element past an aligned address.
        out = values.new_full((values.numel() + 1,), nan)[1:]
        out = out.view(n, c, h, w) if layout == "offset_nchw" else out.view(n, h, w, c).permute(0, 3, 1, 2)
    elif layout == "channel_slice":
        out = values.new_full((n, c + 5, h, w), nan)[:, 3 : 3 + c]
    elif layout == "channel_slice_nhwc":
        out = values.new_full((n, h, w, c + 5), nan).permute(0, 3, 1, 2)[:, 3 : 3 + c]
    elif layout == "column_slice":
        out = values.new_full((n, c, h, w + 3), nan)[..., 1 : 1 + w]
    elif layout == "transposed":
        out = values.new_full((n, c, w, h), nan).transpose(2, 3)
    else:
        raise ValueError(layout)
    out.copy_(values)
    return out


def other_format(layout: str) -> str:
    return "nchw" if "nhwc" in layout else "nhwc"


def make(
    case: Case, *, mean: float = 0.5, spread: float = 1.0, weight_scale: float = 0.7
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs by the names of ``steam``'s arguments, and dy.

    The residual keeps the sum away from 0, so that the ReLU's mask does not depend on rounding.
    """
    generator = torch.Generator().manual_seed(1000 + case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d = case.attention[0]
    x = (mean + spread * normal(*case.shape)).to(case.dtype)
    inputs = {
        "x": lay_out(x, case.layout),
        "channel_weight": (weight_scale * normal(4, d)).to(case.weight_dtype),
        "spatial_weight": (weight_scale * normal(4, d)).to(case.weight_dtype),
    }
    if case.tail == "x_relu":
        inputs["residual"] = inputs["x"]
    elif "residual" in case.tail or case.tail == "other_relu":
        noise = normal(*case.shape)
        residual = (torch.sign(noise) * (0.5 + noise.abs() + case.scale * x.double().abs())).to(case.dtype)
        layout = other_format(case.layout) if case.tail == "other_relu" else case.layout
        inputs["residual"] = lay_out(residual, layout)
    if case.dy_layout == "expanded":
        dy = normal(case.batch, case.channels, 1, 1).to(case.dtype).expand(case.shape)
    else:
        layout = other_format(case.layout) if case.dy_layout == "other" else case.layout
        dy = lay_out(normal(*case.shape).to(case.dtype), layout)
    return inputs, dy


def forward_backward(steam: Steam, inputs: dict[str, Tensor], dy: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient, by name ("y", "d" + input). Aliased inputs get one gradient."""
    leaves: dict[int, Tensor] = {}
    named = {k: leaves.setdefault(id(v), v.detach().requires_grad_()) for k, v in inputs.items()}
    y = steam(**named, **options)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    out = {"y": y.detach()}
    for name, value in inputs.items():
        if name == "residual" and value is inputs["x"]:
            continue
        out["d" + name] = found[id(value)]
    return out


def exact(case: Case, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The results of the reference in float64."""
    return forward_backward(reference.steam, tolerances.to_float64(inputs), dy.double(), **case.options)


def exact_by_oracle(case: Case, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The results of the loop oracle."""
    if case.tail == "x_relu":
        leaves = {k: inputs[k].detach().double().requires_grad_() for k in ("x", "channel_weight", "spatial_weight")}
        y = oracle.unit(**leaves, residual=leaves["x"], **case.options)
        gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.double()), strict=True))
    else:
        y, gradients = oracle.gradients(dy, **inputs, **case.options)
    return {"y": y.detach(), **{"d" + k: v for k, v in gradients.items()}}


def bounds_of(
    case: Case, inputs: dict[str, Tensor], dy: Tensor, truth: dict[str, Tensor] | None = None
) -> tolerances.Judge:
    """The bounds of one case. ``truth`` defaults to the results of the reference in float64."""
    truth = exact(case, inputs, dy) if truth is None else truth
    return tolerances.judge(truth, {**inputs, "dy": dy}, case.options)


def check(case: Case, backend: str, inputs: dict[str, Tensor], dy: Tensor) -> None:
    """Runs one case by ``steam_kernels.steam`` and checks the output, every gradient, and that inputs are unchanged."""
    bounds = bounds_of(case, inputs, dy)
    before = {k: v.clone() for k, v in inputs.items()} | {"dy": dy.clone()}
    got = forward_backward(steam_kernels.steam, inputs, dy, backend=backend, **case.options)
    for name, value in (inputs | {"dy": dy}).items():
        assert torch.equal(value, before[name]), f"{case.id}: {name} was written into"
    for name, value in got.items():
        source = dy if name == "dresidual" and value.dtype == dy.dtype else inputs["x" if name == "y" else name[1:]]
        assert value.dtype == source.dtype, f"{case.id}: {name} is {value.dtype}"
    bounds.check(got, case.id)


SPACES: tuple[tuple[tuple[int, int], Any], ...] = (
    ((7, 7), None),
    ((14, 14), None),
    ((14, 14), (3, 5)),
    ((5, 3), None),
    ((1, 1), None),
    ((2, 9), (7, 3)),
    ((9, 2), (3, 7)),
    ((6, 11), (6, 11)),
    ((28, 28), None),
    ((28, 28), (13, 21)),
    ((30, 17), None),
    ((30, 17), "w4"),
    ((33, 64), (1, 1)),
    ((57, 61), None),
    ((57, 61), (13, 21)),
    ((300, 1), None),
    ((1, 500), (3, 5)),
    ((56, 56), None),
    ((16, 21), (16, 21)),
)

FACTORS: dict[str, tuple[Any, ...]] = {
    "where": SPACES,
    "channels": (1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 100, 130),
    "layout": LAYOUTS,
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "batch": (1, 2, 3, 5),
    "attention": ((8, 4), (8, 1), (8, 2), (8, 8), (16, 4), (16, 8), (3, 1), (12, 6)),
    "radius": (1, 0, 2, 3, 9),
    "neighbors": (4, 8),
    "self_loops": (True, False),
    "order": ("sequential", "parallel"),
    "scale": (1.0, 4.0),
    "weights": ("float32", "x"),
    "tail": ("none", "relu", "residual", "residual_relu", "x_relu", "other_relu"),
    "dy_layout": ("same", "other", "expanded"),
}
LARGEST = 400_000  # the most elements of x in the sample; larger maps are listed by hand


def all_pairs(factors: dict[str, tuple[Any, ...]] | None = None) -> list[Case]:
    """Cases that contain every feasible pair of values of two factors. The search is greedy and seeded."""
    rng = random.Random(7)
    factors = FACTORS if factors is None else factors
    names = list(factors)

    def build(row: tuple[int, ...]) -> Case:
        values = {name: factors[name][i] for name, i in zip(names, row, strict=True)}
        space, grid = values.pop("where")
        return Case(space=space, grid=grid, **values)

    def feasible(row: tuple[int, ...]) -> bool:
        return build(row).numel <= LARGEST

    missing = set()
    for a, b in itertools.combinations(range(len(names)), 2):
        for i, j in itertools.product(range(len(factors[names[a]])), range(len(factors[names[b]]))):
            missing.add((a, i, b, j))
    rows = []
    while missing:
        # Each row starts from a missing pair. The rest is random, and the best of a few rows is kept.
        a, i, b, j = min(missing, key=lambda m: hash(m) ^ len(rows))
        best, gain = None, 0
        for _ in range(24):
            row = [rng.randrange(len(factors[name])) for name in names]
            row[a], row[b] = i, j
            candidate = tuple(row)
            if not feasible(candidate):
                continue
            new = sum(
                (p, candidate[p], q, candidate[q]) in missing for p, q in itertools.combinations(range(len(names)), 2)
            )
            if new > gain:
                best, gain = candidate, new
        if best is None:
            missing.discard((a, i, b, j))
            continue
        for p, q in itertools.combinations(range(len(names)), 2):
            missing.discard((p, best[p], q, best[q]))
        rows.append(best)
    return [build(row).but(seed=k) for k, row in enumerate(rows)]


def random_cases(count: int, seed: int, largest_nodes: int = 90) -> list[Case]:
    """Small random units for the loop oracle."""
    rng = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        h, w = rng.randint(1, 17), rng.randint(1, 17)
        c = rng.choice((1, 2, 3, 4, 5, 7, 8, 11, 16, 19, 24, 37))
        grid = rng.choice((None, rng.randint(1, 9), (rng.randint(1, 9), rng.randint(1, 9)), f"w{rng.randint(1, 6)}"))
        case = Case(
            space=(h, w),
            channels=c,
            batch=rng.choice((1, 1, 2, 3)),
            grid=grid,
            layout=rng.choice(LAYOUTS),
            dtype=rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)),
            weights=rng.choice(("float32", "x")),
            attention=rng.choice(((8, 4), (8, 1), (8, 2), (8, 8), (16, 4), (3, 1), (6, 3))),
            radius=rng.randint(0, 5),
            neighbors=rng.choice((4, 8)),
            self_loops=rng.random() < 0.6,
            order=rng.choice(("sequential", "parallel")),
            scale=rng.choice((1.0, 4.0, 0.5)),
            tail=rng.choice(("none", "none", "relu", "residual", "residual_relu", "x_relu", "other_relu")),
            dy_layout=rng.choice(("same", "other", "expanded")),
            seed=len(cases),
        )
        gh, gw = case.resolved_grid
        if c + gh * gw <= largest_nodes:
            cases.append(case)
    return cases


#: Cases with few numbers, for finite differences.
SMALL = [
    Case(space=(5, 4), channels=3, grid=(2, 3)),
    Case(space=(4, 5), channels=5, grid=(3, 2), order="parallel", neighbors=8, radius=2, layout="nhwc"),
    Case(space=(3, 3), channels=4, grid=2, self_loops=False, attention=(6, 3), scale=4.0, tail="residual"),
    Case(space=(4, 3), channels=2, batch=1, attention=(3, 1), tail="residual_relu"),
    Case(space=(3, 4), channels=1, batch=3, self_loops=False, tail="relu"),
    Case(space=(2, 2), channels=2, tail="other_relu", order="parallel"),
]
