"""The rule that judges all results.

    largest error against float64  <=  DEVIATIONS / sqrt(3) * R  +  one rounding to the result's dtype

The right side depends only on the case: its inputs, options and dtypes. It uses no run in the judged dtype. So it is
the same on every machine, for any number of threads and any instruction set.

**One rounding.** A result is rounded once to its dtype of precision eps. The error is at most eps/2 of its size. The
bound allows twice as much: eps of the largest magnitude, and at least the smallest subnormal number. If one tensor is
both x and residual, autograd rounds the unit's dx, adds the residual's gradient and rounds the sum. The bound then has
two such terms.

**R: the effect of roundings inside the computation.** Let u = eps/2 of the accumulation dtype (float32; float64 for
float64 x). An operation returns its exact result times (1 + e) with |e| <= u. To first order the results change by J e,
where e has a component for each operation, and J is the Jacobian of the results with respect to e. The worst case, the
sum of u |J|, grows with the number of operations, but real errors grow with its root. A bound by the worst case would
therefore miss mistakes. Rounding errors behave almost like independent random numbers. Their deviation is at most
u / sqrt(3), the one of uniform numbers in (-u, u). With random signs s instead of e,

    R = sqrt(mean over draws of s of (largest u |J s| over the elements of a result)^2)

is therefore at least sqrt(3) deviations of a result's largest error. The bound is DEVIATIONS = 6 deviations. A result
at 60 % of the bound (``LIMIT``, above which CI fails) has an error of 3.6 deviations.

J s is a difference quotient in float64. ``Unit`` computes a unit by the equations of docs/math.md, and moves the result
of each operation by STEP. STEP is far larger than float64's rounding, and small enough that the quotient is the
derivative. m operations in a row count as one with sqrt(m) STEP. The computation begins at the sums over cells. It ends
at the factor and the shift of each pixel. So a draw costs as much as the graphs, and not as much as the map. In a cell
dx is linear in dy, so the largest change of dx is at an extreme of dy.

*Sums.* No order of summation is promised. Pairs, lanes and blocks round partial sums. A partial sum of n terms t_k is
at most about hypot(sum of t_k, root of the sum of t_k^2). The first is large if the terms have one sign, and the second
if their signs are random. The last partial sums are the largest, so a sum counts as SUM = 2 operations of that size.
The operations inside each term count separately. One running sum over many pixels exceeds this, and it should.

*Draws.* A single draw depends on luck. If a result depends on few numbers, one draw is below a tenth of its deviation 8
times in 100. The root of DRAWS = 32 squares is within 12 % of the limit in two cases of three, and below half of it
once in a hundred thousand. Problems with many numbers have 16 draws. The signs are the same in every run.

If x is float64, the truth itself is a run with such errors, so R counts twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steam_kernels import config, reference

#: The number of allowed deviations of a rounding error that is uniform in (-u, u).
DEVIATIONS = 6.0
DRAWS, DRAWS_OF_LARGE = 32, 16
STEP = 2.0**-30
#: A run that records its comparisons fails above this share of a bound.
LIMIT = 0.6
#: A problem is large from this count of numbers in a draw on. CHUNK is the count of numbers in memory at a time.
LARGE = 2**20
CHUNK = 2**21
#: The number of operations that a sum counts as.
SUM = 2

Tensors = Mapping[str, Tensor]

# ---- judging ---------------------------------------------------------------------------------------------------------

#: The environment variable that names a file. If set, every comparison appends its result as a line of JSON.
RECORD = "STEAM_KERNELS_TEST_RATIOS"


def within(error: float, bound: float, what: str) -> bool:
    """Whether an error is within its bound. The comparison is recorded if ``RECORD`` is set."""
    if path := os.environ.get(RECORD):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        ratio = error / bound if bound > 0 else float(error > 0)
        ratio = math.inf if math.isnan(ratio) else ratio
        line = json.dumps({"ratio": ratio, "error": error, "bound": bound, "what": what, "test": test})
        with open(path, "a") as file:
            file.write(line + "\n")
    return error <= bound


def summary(lines: list[str], rows: int = 10) -> list[str]:
    """The comparisons nearest to their bounds, from the lines that ``within`` wrote."""
    found = sorted((json.loads(line) for line in lines), key=lambda f: -f["ratio"])
    out = [f"{len(found)} comparisons; the largest shares of a bound:"]
    return out + [f"{100 * f['ratio']:5.1f} %  {f['what']}  {f['test']}" for f in found[:rows]]


def too_near(lines: list[str]) -> list[str]:
    """A sentence for each accepted comparison above ``LIMIT`` of its bound, from the lines that ``within`` wrote.

    Such a result is not wrong. But either the derivation of the bound lacks an operation, or a kernel loses more digits
    than it should. The limit shows this before another machine or another case exceeds the bound.
    """
    near = [found for found in map(json.loads, lines) if LIMIT < found["ratio"] <= 1]
    return [
        f"FAILED: {100 * f['ratio']:.1f} % of a bound, {100 * LIMIT:.0f} % is allowed: {f['what']} in {f['test']}"
        for f in near
    ]


@dataclass
class Judge:
    """The float64 truth and the bound of every result of one case."""

    truth: dict[str, Tensor]
    bounds: dict[str, float]

    def check(self, results: Tensors, label: str = "") -> None:
        """Raises AssertionError with the error and the bound of every result that is out of bounds."""
        assert set(results) == set(self.truth), f"{label}: results {sorted(results)}, expected {sorted(self.truth)}"
        wrong = []
        for name, value in results.items():
            expected = self.truth[name]
            assert value.shape == expected.shape, f"{label} {name}: shape {tuple(value.shape)}"
            if expected.numel() == 0:
                continue
            error, bound = largest_error(value, expected), self.bounds[name]
            if not within(error, bound, f"{name} ({value.dtype}) {label}"):
                wrong.append(
                    f"{name} ({value.dtype}): error {error:.3e} > bound {bound:.3e}; "
                    f"size {expected.abs().max().item():.3e}"
                )
        assert not wrong, f"{label}: " + "; ".join(wrong)


def largest_error(value: Tensor, expected: Tensor) -> float:
    """The largest absolute error. It is NaN if a number is NaN in only one of the two tensors."""
    if expected.numel() == 0:
        return 0.0
    return (value.detach().to(torch.float64) - expected).abs().max().item()


def to_float64(tensors: Tensors) -> dict[str, Tensor]:
    """Detached float64 copies. A tensor that occurs twice has one copy."""
    copies: dict[int, Tensor] = {}
    return {k: copies.setdefault(id(v), v.detach().to(torch.float64)) for k, v in tensors.items()}


def rounding(value: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of one rounding to ``dtype``: eps of the largest magnitude, at least the smallest subnormal."""
    info = torch.finfo(dtype)
    if value.numel() == 0:
        return 0.0
    return max(info.eps * value.abs().max().item(), info.eps * info.smallest_normal)


def judge(truth: Mapping[str, Tensor], inputs: Tensors, options: Mapping[str, Any]) -> Judge:
    """The bounds of a case.

    Args:
        truth: the float64 results by name. It contains "y" and may contain "d" + an input's name.
        inputs: the arguments of ``steam`` by name, in the dtypes that are judged, and "dy".
        options: the keyword arguments of ``steam``.
    """
    x = inputs["x"]
    spread = spread_of(truth, inputs, options)
    u = torch.finfo(config.accumulation_dtype(x.dtype)).eps / 2
    sides = 2 if x.dtype == torch.float64 else 1
    bounds = {}
    for name, value in truth.items():
        dtype = inputs["x" if name == "y" else name[1:]].dtype
        bounds[name] = sides * DEVIATIONS / math.sqrt(3) * u * spread[name] + rounding(value, dtype)
    if "dx" in truth and inputs.get("residual") is x:
        bounds["dx"] += rounding(truth["dx"] - masked(truth, inputs, options), x.dtype)
    return Judge(dict(truth), bounds)


def masked(truth: Tensors, inputs: Tensors, options: Mapping[str, Any]) -> Tensor:
    """dy after the mask of the ReLU, in float64 on the CPU."""
    dy = inputs["dy"].detach().cpu().to(torch.float64)
    return dy.where(truth["y"].cpu() > 0, 0) if options.get("activation") == "relu" else dy


# ---- rounded arithmetic ----------------------------------------------------------------------------------------------


class Exact:
    """Operations without roundings. The first axis of a tensor is the axis of draws."""

    def __call__(self, value: Tensor, roundings: float = 1) -> Tensor:
        """The result of ``roundings`` operations whose exact result is ``value``."""
        return self.near(value, value, roundings)

    def near(self, value: Tensor, size: Tensor, roundings: float = SUM) -> Tensor:
        """``value`` with ``roundings`` roundings of numbers of ``size``."""
        return value

    def sum(self, terms: Tensor, *dims: int) -> Tensor:
        total = terms.sum(dims)
        return self.near(total, (total.square() + terms.square().sum(dims)).sqrt())


class Rounded(Exact):
    """Operations that move each result by STEP of its size with a random sign, independently in each draw."""

    def __init__(self, draws: int, signs: Signs) -> None:
        self.draws, self.signs = draws, signs

    def near(self, value: Tensor, size: Tensor, roundings: float = SUM) -> Tensor:
        return value.addcmul(self.signs.take(self.draws, *value.shape[1:]), size, value=math.sqrt(roundings) * STEP)


class Signs:
    """Random signs. The sequence is the same on every machine."""

    def __init__(self) -> None:
        self.at = 0

    def take(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        signs = _signs(-(-count // CHUNK))
        if self.at + count > signs.numel():
            self.at = 0
        self.at += count
        return signs[self.at - count : self.at].view(shape)


@functools.lru_cache(maxsize=1)
def _signs(chunks: int) -> Tensor:
    """At least ``chunks`` CHUNKs of signs. Their period is a prime that is a factor of no shape."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1_000_003,), generator=generator).to(torch.float64) * 2 - 1
    return signs.repeat(3 * chunks)


# ---- a unit ----------------------------------------------------------------------------------------------------------


def spread_of(truth: Tensors, inputs: Tensors, options: Mapping[str, Any]) -> dict[str, float]:
    """R / u of every result."""
    x = inputs["x"]
    if x.numel() == 0:
        return dict.fromkeys(truth, 0.0)
    unit = Unit(truth, inputs, options)
    draws = DRAWS if unit.size <= LARGE else DRAWS_OF_LARGE
    exact, signs = unit.run(Exact()), Signs()
    squares = dict.fromkeys(truth, 0.0)
    at_once = min(draws, max(1, CHUNK // unit.size))
    for start in range(0, draws, at_once):
        run = unit.run(Rounded(min(at_once, draws - start), signs))
        moved = {name: value - exact[name] for name, value in run.items()}
        for name in truth:
            squares[name] += unit.largest(name, moved).square().sum().item()
    return {name: math.sqrt(total / draws) / STEP for name, total in squares.items()}


class Unit:
    """One case in float64: the sums of its maps over cells, and the operations from these sums to the results.

    The letters are those of docs/math.md. The results are "gate" and "rest", with y = gate * x and dx = gate * dy +
    rest, and the gradients of the weights.
    """

    def __init__(self, truth: Tensors, inputs: Tensors, options: Mapping[str, Any]) -> None:
        known = {field.name for field in dataclasses.fields(config.Options)} - {"inplace", "backend"}
        self.options = config.Options(**{k: v for k, v in options.items() if k in known})
        x = inputs["x"]
        weights = to_float64({k: inputs[k].cpu() for k in ("channel_weight", "spatial_weight")})
        self.channel_weight, self.spatial_weight = weights.values()
        self.grid = self.options.check(config.Inputs(x, inputs["channel_weight"], inputs["spatial_weight"]))
        samples, self.channels, height, width = x.shape
        self.pixels = height * width
        cpu = torch.device("cpu")
        self.ring = reference.ring(self.channels, self.options.channel_radius, self.options.self_loops, cpu)
        self.lattice = reference.lattice(self.grid, self.options.spatial_neighbors, self.options.self_loops, cpu)
        self.counts = reference.cell_counts((height, width), self.grid, self.channel_weight).flatten()
        edges = max(self.ring[0].numel(), self.lattice[0].numel()) * self.options.num_heads
        self.size = samples * max(edges, self.channels * self.counts.numel())
        # For each cell: the sums over its pixels, the roots of the sums of squares, and the extremes.
        self.parts: dict[str, Tensor] = {}
        found = [self._summarise(truth, inputs, options, slice(k, k + 1)) for k in range(samples)]
        for name in found[0]:
            self.parts[name] = torch.cat([part[name] for part in found])[None]

    def _summarise(
        self, truth: Tensors, inputs: Tensors, options: Mapping[str, Any], sample: slice
    ) -> dict[str, Tensor]:
        x = inputs["x"][sample].detach().cpu().to(torch.float64)
        maps = {"p": x}
        if "dy" in inputs:
            dy = masked({"y": truth["y"][sample]}, {"dy": inputs["dy"][sample]}, options)
            maps["r"] = dy * x
        out = {"x_size": by_cell(x.abs(), self.grid, "amax")}
        for name, values in maps.items():
            out[name] = by_cell(values, self.grid, "sum")
            out[name + "_size"] = (out[name].square() + by_cell(values.square(), self.grid, "sum")).sqrt()
        if "dy" in inputs:
            out |= {"dy_min": by_cell(dy, self.grid, "amin"), "dy_max": by_cell(dy, self.grid, "amax")}
        return out

    def largest(self, name: str, moved: Tensors) -> Tensor:
        """``(draws,)``: the largest change of a result's elements."""
        parts = self.parts
        if name == "y":
            change = moved["gate"].abs() * parts["x_size"]
        elif name == "dx":
            ends = [(moved["gate"] * parts[k] + moved["rest"]).abs() for k in ("dy_min", "dy_max")]
            change = torch.maximum(*ends)
        elif name == "dresidual":  # dresidual is dy or 0
            change = torch.zeros_like(moved["gate"])
        else:
            change = moved[name].abs()
        return change.flatten(1).amax(1)

    def run(self, r: Exact) -> dict[str, Tensor]:
        """The results with operations rounded by ``r``. Shapes are (draws, N, C, cells), or have fewer axes."""
        heads, scale = self.options.num_heads, self.options.scale
        p = r.near(self.parts["p"], self.parts["p_size"])
        z = r(r.sum(p, 3) / self.pixels)
        pooled = r(p / self.counts)
        channel = Transform(r, z, self.channel_weight, heads, self.ring)
        g_c, slope_c = gates(r, channel.o)
        u = r(r.sum(r(g_c[..., None] * pooled) if self.options.sequential else pooled, 2) / self.channels)
        spatial = Transform(r, u, self.spatial_weight, heads, self.lattice)
        g_s, slope_s = gates(r, spatial.o)
        # The gate takes two products, and a third one multiplies the pixel.
        out = {"gate": r(scale * g_c[..., None] * g_s[:, :, None], 3)}
        if "r" not in self.parts:
            return out
        products = r.near(self.parts["r"], self.parts["r_size"])
        d_u, out["dspatial_weight"] = spatial.backward(r(scale * r.sum(r(g_c[..., None] * products), 2) * slope_s, 2))
        d_g_c = scale * r.sum(r(g_s[:, :, None] * products), 3)
        if self.options.sequential:
            d_g_c = r(d_g_c + r(r.sum(r(d_u[:, :, None] * pooled), 3) / self.channels))
        d_z, out["dchannel_weight"] = channel.backward(r(d_g_c * slope_c, 2))
        share = r(d_u / (self.channels * self.counts), 2)[:, :, None]
        if self.options.sequential:
            share = r(share * g_c[..., None])
        out["rest"] = r(share + r(d_z / self.pixels)[..., None])
        return out


def gates(r: Exact, o: Tensor) -> tuple[Tensor, Tensor]:
    """sigma(o) and its derivative sigma(o) sigma(-o). Each sigma takes an exponential, a sum and a division."""
    open_, closed = r(torch.sigmoid(o), 3), r(torch.sigmoid(-o), 3)
    return open_, r(open_ * closed)


class Transform:
    """The collapsed graph transform of tokens (draws, N, n) by rows (4, d), and its gradients."""

    def __init__(self, r: Exact, t: Tensor, weight: Tensor, heads: int, graph: reference.Graph) -> None:
        self.r, self.t, self.weight = r, t, weight.unflatten(1, (heads, -1))
        self.neighbors, inside = graph
        self.outside = ~inside
        w_q, w_k, w_v, w_o = self.weight[:, None]
        self.root = math.sqrt(w_q.shape[-1])
        self.a = r(r.sum(r(w_q * w_k), 2) / self.root)[:, None, None]  # (draws, 1, 1, h)
        self.b = r.sum(r(w_v * w_o), 2)[:, None, None]
        t_j = t[:, :, self.neighbors]
        largest = t_j.masked_fill(self.outside, -math.inf).amax(-1, keepdim=True)
        smallest = t_j.masked_fill(self.outside, math.inf).amin(-1, keepdim=True)
        slope = r(self.a * t[..., None])  # (draws, N, n, h)
        origin = torch.where(slope > 0, largest, smallest)
        self.slope = slope[:, :, :, None]
        self.delta = self._existing(r(t_j[..., None] - origin[:, :, :, None]))  # (draws, N, n, K, h)
        e = self._existing(r(torch.exp(r(self.slope * self.delta)), 2))
        self.alpha = r(e / r.sum(e, 3)[:, :, :, None])
        self.mean = r.sum(r(self.alpha * self.delta), 3)
        self.m = r(origin + self.mean)
        self.o = r.sum(r(self.b * self.m), 3)

    def _existing(self, edges: Tensor) -> Tensor:
        return edges.masked_fill(self.outside[..., None], 0)

    def backward(self, d_o: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the tokens and of the rows, from the gradient of o."""
        r = self.r
        centred = r(self.delta - self.mean[:, :, :, None])
        variance = r.sum(r(self.alpha * centred.square(), 2), 3)
        d_m = r(self.b * d_o[..., None])
        own = r.sum(r(d_m * self.a * variance, 2), 3)
        through = r(d_m[:, :, :, None] * self.alpha * r(1 + r(self.slope * centred)), 2)
        through = r.sum(self._existing(through), 4).flatten(2)
        receivers = self.neighbors.flatten()
        d_t = own.index_add(2, receivers, through)
        squares = own.square().index_add(2, receivers, through.square())
        d_t = r.near(d_t, (d_t.square() + squares).sqrt())
        d_a = r(r.sum(r(d_m * self.t[..., None] * variance, 2), 1, 2) / self.root)[..., None]
        d_b = r.sum(r(d_o[..., None] * self.m), 1, 2)[..., None]
        w_q, w_k, w_v, w_o = self.weight
        return d_t, r(torch.stack((d_a * w_k, d_a * w_q, d_b * w_o, d_b * w_v), 1)).flatten(2)


def by_cell(t: Tensor, grid: tuple[int, int], how: str) -> Tensor:
    """(N, C, H, W) to (N, C, gh * gw): the "sum", the smallest ("amin") or the largest ("amax") number of each cell."""
    for dim, cells in ((3, grid[1]), (2, grid[0])):
        first, end = (ends.tolist() for ends in reference.cell_bounds(t.shape[dim], cells, t.device))
        parts = [getattr(t.narrow(dim, a, b - a), how)(dim) for a, b in zip(first, end, strict=True)]
        t = torch.stack(parts, dim)
    return t.flatten(2)
