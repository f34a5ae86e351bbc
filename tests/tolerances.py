"""The one rule by which results are judged.

    error <= 2 * error of the reference run in the same dtype + rounding floor        (both errors against float64)

The first term says: no worse than plain PyTorch in that precision, with a factor of two for luck. Where the reference
happens to be exact the floor decides. It has two parts, both derived from eps and from the size of the quantities:

* *The result is rounded once* to its dtype: at most eps/2 of the largest magnitude (the reference's own
  rounding doubles it), or half of the smallest subnormal number.
* *Everything before is rounded in the accumulation dtype* (float32; float64 for float64 x). A value on its way
  from x to a gradient goes through about eight dependent roundings of eps/2 (pooling, token, score,
  exponential, softmax sum, message, gate, product): together 4 eps of relative error in a pooled value, a
  token, a gate or a parameter. What that does to a result depends on how much the problem amplifies it, so it
  is measured, not guessed: the inputs are perturbed by 4 eps with random signs (one sign per channel and one
  per cell, so that no sum averages them away), and the change of the float64 result is the floor. A
  backward-stable computation stays within it; one that subtracts near-equal numbers does not.

Where x is float64 the truth is itself a float64 run with such an error, so that part counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = 8
Tensors = Mapping[str, Tensor]
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_float64(tensors: Tensors) -> dict[str, Tensor]:
    return {k: v.detach().to(torch.float64) for k, v in tensors.items()}


def perturbed(inputs: Tensors, grid: tuple[int, int], eps: float, seed: int) -> dict[str, Tensor]:
    """Float64 inputs, each parameter moved by ROUNDINGS * eps / 2 of itself, each map so by channel and by cell."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).to(torch.float64) * 2 - 1

    out = {}
    for name, value in inputs.items():
        v = value.detach().to(torch.float64)
        if v.dim() == 4:
            n, c, h, w = v.shape
            gh, gw = grid
            rows, cols = torch.arange(h) * gh // h, torch.arange(w) * gw // w
            by_cell = signs(n, gh, gw)[:, rows][:, :, cols]
            sign = signs(n, c)[:, :, None, None] + by_cell[:, None]
        else:
            sign = signs(*v.shape)
        out[name] = v * (1 + sign * (ROUNDINGS * eps / 2))
    return out


@dataclass
class Judge:
    """Float64 truth, error of the same-dtype reference and rounding floor of every result of one case."""

    truth: dict[str, Tensor]
    reference_error: dict[str, float]
    floor: dict[str, float]

    def bound(self, name: str) -> float:
        return 2 * self.reference_error[name] + self.floor[name]

    def check(self, results: Tensors, label: str = "") -> None:
        """Fail with every result that is out of bounds, its error and its bound."""
        assert set(results) == set(self.truth), f"{label}: results {sorted(results)}, expected {sorted(self.truth)}"
        wrong = []
        for name, value in results.items():
            expected = self.truth[name]
            assert value.shape == expected.shape, f"{label} {name}: shape {tuple(value.shape)}"
            if expected.numel() == 0:
                continue
            error = largest_error(value, expected)
            if not error <= self.bound(name):
                wrong.append(
                    f"{name} ({value.dtype}): error {error:.3e} > bound {self.bound(name):.3e} = 2 x "
                    f"{self.reference_error[name]:.3e} + {self.floor[name]:.3e}; size {expected.abs().max().item():.3e}"
                )
        assert not wrong, f"{label}: " + "; ".join(wrong)


def largest_error(value: Tensor, expected: Tensor) -> float:
    """Largest absolute error; NaN where only one of the two is NaN."""
    if expected.numel() == 0:
        return 0.0
    return (value.detach().to(torch.float64) - expected).abs().max().item()


def judge(
    run: Run,
    inputs: Tensors,
    dtypes: Mapping[str, torch.dtype],
    grid: tuple[int, int],
    *,
    truth: dict[str, Tensor] | None = None,
    perturbations: int = 2,
) -> Judge:
    """The bounds of a case.

    ``run`` maps inputs by name to results by name, with the reference, in whatever dtype the inputs have.
    ``dtypes`` are those of the results; x's accumulation dtype is taken from ``inputs["x"]``. ``truth``
    replaces the float64 run of the reference (the oracle's, say).
    """
    x_dtype = inputs["x"].dtype
    eps = torch.finfo(accumulation_dtype(x_dtype)).eps
    exact = run(to_float64(inputs))
    if truth is None:
        truth = exact
    same = exact if x_dtype == torch.float64 else run(dict(inputs))
    floor = {name: rounding(value, dtypes[name]) for name, value in truth.items()}
    sides = 2 if x_dtype == torch.float64 else 1
    moved = [run(perturbed(inputs, grid, eps, seed)) for seed in range(perturbations)]
    for name in truth:
        floor[name] += sides * max((largest_error(m[name], exact[name]) for m in moved), default=0.0)
    return Judge(truth, {name: largest_error(same[name], truth[name]) for name in truth}, floor)


def rounding(value: Tensor, dtype: torch.dtype) -> float:
    """One rounding to ``dtype`` on either side: eps of the largest magnitude, not less than the smallest subnormal."""
    info = torch.finfo(dtype)
    if value.numel() == 0:
        return 0.0
    return max(info.eps * value.abs().max().item(), info.eps * info.smallest_normal)
