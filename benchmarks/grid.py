"""The shapes and contenders that a run of ``pytest benchmarks/`` measures: the defaults, and the choice by options."""

from __future__ import annotations

import pytest
import torch

from benchmarks import machine
from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.shapes import DETECTION, LAYOUTS, MOBILE, NAMED_OPTIONS, SHAPES, STAGES, Shape

#: The allowed values of the options that take a list.
ALLOWED: dict[str, list[str]] = {
    "--size": list(SHAPES),
    "--dtype": ["float32", "bfloat16", "float16"],
    "--layout": list(LAYOUTS),
    "--options": list(NAMED_OPTIONS),
    "--contender": list(CONTENDERS),
}
COMPILED = tuple(name for name in CONTENDERS if name.endswith("compiled"))
#: The shapes of the compiled contenders by default. A compilation takes longer than all other work at a shape.
COMPILED_AT = (Shape(8, *SHAPES["56"]), Shape(8, *SHAPES["14"], layout="channels_last"), Shape(8, *SHAPES["m14"]))


def default_grid() -> list[Shape]:
    """The shapes of ``make bench``: every stage at batch 8 and 1 in both dtypes and layouts; three stages at batch 32,
    the detector's shape and MobileNetV2's in float32 and both layouts; a finer grid, and a tail."""
    stages, dtypes = STAGES.values(), ("float32", "bfloat16")
    grid = [Shape(n, *s, dtype=d, layout=o) for n in (8, 1) for s in stages for d in dtypes for o in LAYOUTS]
    grid += [Shape(32, *STAGES[s], layout=o) for s in ("56", "14", "7") for o in LAYOUTS]
    grid += [Shape(2, *DETECTION["det"], layout=o) for o in LAYOUTS]
    grid += [Shape(8, *s, layout=o) for s in MOBILE.values() for o in LAYOUTS]
    grid += [Shape(2, *DETECTION["det"], layout=o, options=NAMED_OPTIONS["grid"]) for o in LAYOUTS]
    grid += [Shape(8, *STAGES[s], options=NAMED_OPTIONS["tail"]) for s in ("56", "14")]
    return grid


def quick_grid() -> list[Shape]:
    return [Shape(1, *SHAPES["14"]), Shape(1, *SHAPES["m7"], "bfloat16", "channels_last")]


def _choice(config: pytest.Config, option: str, default: list[str], allowed: list[str] | None = None) -> list[str]:
    given = [v.strip() for v in config.getoption(option).split(",") if v.strip()]
    allowed = allowed or ALLOWED[option]
    wrong = [v for v in given if v not in allowed]
    if wrong:
        raise pytest.UsageError(f"{option} {wrong[0]!r}: allowed are {', '.join(allowed)}")
    return given or default


def device(config: pytest.Config) -> str:
    name = _choice(config, "--device", ["cpu"], ["cpu", "cuda"])[0]
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no GPU")
    return name


def shapes(config: pytest.Config) -> list[Shape]:
    """The default grid, or every combination of the given options. The default batch of a detector's maps is 2."""
    on = device(config)
    chosen = [config.getoption(o) for o in ("--size", "--batch", "--dtype", "--layout", "--options", "--full")]
    if on == "cpu" and not any(chosen):
        return quick_grid() if config.getoption("--quick") else default_grid()
    every = list(SHAPES if config.getoption("--full") else STAGES)
    sizes = _choice(config, "--size", ["14", "7"] if config.getoption("--quick") else every)
    layouts = _choice(config, "--layout", list(LAYOUTS))
    dtypes = _choice(config, "--dtype", ["float32", "bfloat16"])
    options = _choice(config, "--options", ["default"])
    try:
        given = [int(b) for b in config.getoption("--batch").split(",") if b]
    except ValueError as error:
        raise pytest.UsageError(f"--batch {config.getoption('--batch')!r}: a comma list of numbers") from error
    default = [1] if config.getoption("--quick") else [1, 8, 32]
    return [
        Shape(n, *SHAPES[size], dtype=dtype, layout=layout, options=NAMED_OPTIONS[name], device=on)
        for size in sizes
        for n in given or ([2] if size in DETECTION else default)
        for dtype in dtypes
        for layout in layouts
        for name in options
    ]


def contenders(config: pytest.Config) -> list[str]:
    # On a GPU each of this package's backends is a contender of its own; on the CPU there is one.
    usable = {"fused"}
    if device(config) == "cuda":
        usable = {name for name, why in machine.facts()["backends"].items() if not why}
    default = [name for name in CONTENDERS if name not in OURS or name in usable]
    return _choice(config, "--contender", default)


def contenders_at(config: pytest.Config, shape: Shape) -> list[str]:
    """The contenders at one shape. In the default grid and in quick runs, compiled contenders run at few shapes."""
    names = contenders(config)
    if config.getoption("--contender"):
        return names
    if config.getoption("--quick"):
        return [n for n in names if n not in COMPILED or (n == "eca-compiled" and shape.name == "14")]
    if shape in default_grid() and shape not in COMPILED_AT and not config.getoption("--full"):
        return [n for n in names if n not in COMPILED]
    return names
