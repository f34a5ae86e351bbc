"""Correctness: every contender is judged against float64, in output and every gradient, before it is timed."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Gate, call_of, eager, set_training
from benchmarks.machine import ROOT, RULE
from benchmarks.shapes import Shape


def tolerances() -> Any:
    """The module with the tests' rule of tolerance, which is written in no other place."""
    name = "steam_benchmarks_tolerances"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / RULE)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def outputs(
    contender: Contender, shape: Shape, tensors: Mapping[str, Tensor], inference: bool = True
) -> dict[str, Tensor]:
    """y, every gradient, and with ``inference`` y without recorded gradients; on the CPU.

    Raises:
        AssertionError: y has other strides than x.
    """
    leaves, args, keywords = call_of(contender, shape, tensors, True)
    set_training(contender, True)
    y = contender(*args, **keywords)
    strides = zip(y.shape, y.stride(), torch.empty_like(args[0]).stride(), strict=True)
    if any(size > 1 and a != b for size, a, b in strides):  # the stride of a dimension of one element has no meaning
        raise AssertionError(f"y has strides {y.stride()}, x {args[0].stride()}")
    grads = torch.autograd.grad(y, list(leaves.values()), tensors["dy"])
    out = {"y": y.detach().cpu(), **{f"d{k}": g.cpu() for k, g in zip(leaves, grads, strict=True)}}
    if inference:
        set_training(contender, False)
        with torch.no_grad():
            out["inference"] = contender(*args, **keywords).cpu()
    return out


def judge(shape: Shape, tensors: Mapping[str, Tensor]) -> Any:
    """The judge of the unit at a shape: the float64 value and the bound of every result."""
    rule = tolerances()
    truth = outputs(eager(), shape, rule.to_float64(tensors), inference=False)
    found = rule.judge(truth, tensors, shape.options.keywords)
    return rule.Judge(truth | {"inference": truth["y"]}, found.bounds | {"inference": found.bounds["y"]})


def peers(judge: Any) -> Any:
    """The judge of other implementations of the unit, with bounds five times as wide. The rule is a promise of this
    package alone, and the sums of the others may be less exact."""
    return replace(judge, bounds={name: 5 * bound for name, bound in judge.bounds.items()})


def judge_gate(name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Any:
    """The judge of a gate, from the gate's own float64 results.

    The bound is four times the change of the results if every input and parameter moves by 4 eps with random signs,
    plus one rounding. The eps is the eps of the shape's dtype, because a gate computes in that dtype throughout. The
    gradient of a parameter is a running float32 sum of up to m = N max(C, H W) numbers in any order, and its bound has
    sqrt(m) roundings of its size more.
    """
    rule = tolerances()
    gate = Gate(name, replace(shape, device="cpu"))
    inputs = {k: tensors[k].cpu() for k in ("x", "dy", "residual") if k in tensors}
    parameters = {k: v.detach() for k, v in gate.module.named_parameters()}

    def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        in_float64 = replace(shape, device="cpu", dtype="float64")
        exact = Gate(name, in_float64)
        with torch.no_grad():
            for k, parameter in exact.module.named_parameters():
                parameter.copy_(values[k])
        return outputs(exact, in_float64, {k: values[k] for k in inputs})

    truth = run(rule.to_float64(inputs | parameters))
    bounds = {k: rule.rounding(v, shape.torch_dtype) for k, v in truth.items()}
    eps = torch.finfo(shape.torch_dtype).eps
    changes = [run(perturbed(inputs | parameters, 4 * eps, seed)) for seed in range(4)]
    for k in truth:
        bounds[k] += 4 * max(rule.largest_error(c[k], truth[k]) for c in changes)
    terms = shape.n * max(shape.c, shape.h * shape.w)
    for k in parameters:
        bounds[f"d{k}"] += math.sqrt(terms) * torch.finfo(torch.float32).eps * truth[f"d{k}"].abs().max().item()
    return rule.Judge(truth, bounds)


def perturbed(inputs: Mapping[str, Tensor], step: float, seed: int) -> dict[str, Tensor]:
    """Float64 copies of the inputs, moved by the fraction ``step`` with random signs. A map has one sign for each
    channel and one for each pixel, because independent signs of the elements would cancel in every sum."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*size: int) -> Tensor:
        return torch.randint(0, 2, size, generator=generator).to(torch.float64) * 2 - 1

    out = {}
    for name, value in inputs.items():
        n, c, *space = value.shape if value.dim() == 4 else (0, 0)
        sign = signs(n, c, 1, 1) + signs(n, 1, *space) if space else signs(*value.shape)
        out[name] = value.detach().to(torch.float64) * (1 + step * sign)
    return out
