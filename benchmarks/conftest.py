"""The benchmarks' part of pytest: options, the malloc setting, and the closing table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cuda, machine, malloc, runs
from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.shapes import DETECTION, DIRECTIONS, LAYOUTS, MOBILE, NAMED_OPTIONS, SHAPES, STAGES, Shape
from benchmarks.tables import micro, table

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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("steam_kernels benchmarks")
    group.addoption(
        "--quick", action="store_true", help="two shapes at batch 1, few rounds; the times of a quick run mean nothing"
    )
    group.addoption("--full", action="store_true", help="every shape, batch, dtype, layout and contender: hours")
    group.addoption("--device", default="cpu", help="cpu or cuda (cpu)")
    group.addoption("--size", default="", help=f"comma list of shapes: {', '.join(SHAPES)}")
    group.addoption("--batch", default="", help="comma list of batch sizes")
    group.addoption("--dtype", default="", help="comma list: float32, bfloat16, float16")
    group.addoption("--layout", default="", help="comma list: nchw, channels_last")
    group.addoption("--options", default="", help=f"comma list of options of the unit: {', '.join(NAMED_OPTIONS)}")
    group.addoption("--contender", default="", help=f"comma list: {', '.join(CONTENDERS)}")
    group.addoption("--backend", default="", help="the backend of the contender fused (the package's choice)")
    group.addoption("--json", default="", metavar="PATH", help="write the rows of the closing table as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Runs pytest again in a child process that has the malloc setting, so that the user need not set it."""
    if malloc.is_set() or hasattr(config, "workerinput"):
        return None
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)  # otherwise the child writes into this process's capture file
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    return subprocess.call(command, cwd=config.invocation_params.dir, env=malloc.environment())


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = ["steam_kernels benchmarks: " + machine.describe(machine.facts())]
    if _device(config) == "cuda":
        lines.append("on the GPU: " + ", ".join(f"{k} {v}" for k, v in cuda.facts().items()))
    return lines


def _choice(config: pytest.Config, option: str, allowed: list[str], default: list[str]) -> list[str]:
    given = [v.strip() for v in config.getoption(option).split(",") if v.strip()]
    wrong = [v for v in given if v not in allowed]
    if wrong:
        raise pytest.UsageError(f"{option} {wrong[0]!r}: allowed are {', '.join(allowed)}")
    return given or default


def _device(config: pytest.Config) -> str:
    device = _choice(config, "--device", ["cpu", "cuda"], ["cpu"])[0]
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no GPU")
    return device


def shapes(config: pytest.Config) -> list[Shape]:
    """The default grid, or every combination of the given options. The default batch of a detector's maps is 2."""
    device = _device(config)
    chosen = [config.getoption(o) for o in ("--size", "--batch", "--dtype", "--layout", "--options", "--full")]
    if device == "cpu" and not any(chosen):
        return quick_grid() if config.getoption("--quick") else default_grid()
    every = list(SHAPES if config.getoption("--full") else STAGES)
    sizes = _choice(config, "--size", list(SHAPES), ["14", "7"] if config.getoption("--quick") else every)
    layouts = _choice(config, "--layout", list(LAYOUTS), list(LAYOUTS))
    dtypes = _choice(config, "--dtype", ["float32", "bfloat16", "float16"], ["float32", "bfloat16"])
    options = _choice(config, "--options", list(NAMED_OPTIONS), ["default"])
    try:
        given = [int(b) for b in config.getoption("--batch").split(",") if b]
    except ValueError as error:
        raise pytest.UsageError(f"--batch {config.getoption('--batch')!r}: a comma list of numbers") from error
    default = [1] if config.getoption("--quick") else [1, 8, 32]
    return [
        Shape(n, *SHAPES[size], dtype=dtype, layout=layout, options=NAMED_OPTIONS[name], device=device)
        for size in sizes
        for n in given or ([2] if size in DETECTION else default)
        for dtype in dtypes
        for layout in layouts
        for name in options
    ]


def contenders(config: pytest.Config) -> list[str]:
    # On a GPU each of this package's backends is a contender of its own; on the CPU there is one.
    usable = {"fused"}
    if _device(config) == "cuda":
        usable = {name for name, why in machine.facts()["backends"].items() if not why}
    default = [name for name in CONTENDERS if name not in OURS or name in usable]
    return _choice(config, "--contender", list(CONTENDERS), default)


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        cases = [
            pytest.param(shape, contender, direction, id=f"{shape.label}-{direction}-{contender}")
            for shape in shapes(metafunc.config)
            for direction in DIRECTIONS
            for contender in contenders_at(metafunc.config, shape)
        ]
        metafunc.parametrize(("shape", "contender", "direction"), cases)


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[dict]:
    """The measured rows of this run, by shape. The closing table shows them."""
    yield request.config.stash.setdefault(ROWS, {})


ROWS: pytest.StashKey[dict] = pytest.StashKey()
TITLES = {
    "forward": "forward (no grad)",
    "backward": "backward (autograd)",
    "both": "forward + backward (autograd)",
}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash.get(ROWS, {})
    found = [line for row in measured.values() for line in row.lines()]
    if not found:
        return
    head = ["latency", "spread", "GFLOP/s", "GB/s", "over floor", "x eager", "x compiled", "x plain"]
    head += ["x plain-compiled", "extra MB", "parameters"]
    keys = ["gflops", "gbytes", "over_floor", "speedup_eager", "speedup_compiled", "speedup_plain"]
    keys.append("speedup_plain_compiled")
    on_gpu = ["of_copy", "timed_by"] if _device(config) == "cuda" else []
    head += [key.replace("_", " ") for key in on_gpu]
    for direction, title in TITLES.items():
        body = [
            (
                f"{r['problem']}  {r['contender']}",
                micro(r["seconds"]),
                f"{100 * r['spread']:.0f}%",
                *(r[k] for k in keys),
                None if r["extra_bytes"] is None else r["extra_bytes"] / 1e6,
                r["parameters"],
                *(r[k] for k in on_gpu),
            )
            for r in found
            if r["direction"] == direction
        ]
        if body:
            terminalreporter.write_line("")
            title = f"== {title}: medians of interleaved rounds =="
            terminalreporter.write_line(table(title, ("shape, contender", *head), body))
    terminalreporter.write_line(
        "\nSpread: distance of the quartiles over the median.\n"
        "GFLOP/s and GB/s: least operations (STEAM's) and bytes over the time.\n"
        "Floor: torch.mul(x, 0.5, out=y) forward, torch.add(x, dy, out=dx) backward; with a tail it has more reads and "
        "writes.\n"
        "x eager, x compiled: speed-up over the reference, eager and by torch.compile; x plain, x plain-compiled: over "
        "benchmarks/plain.py.\n"
        "Extra MB: the peak of allocated memory besides x, y and the gradients."
    )
    facts = machine.facts()
    if _device(config) == "cuda":
        facts |= cuda.facts()
        terminalreporter.write_line(
            "of copy: GB/s over this GPU's own copy of a large buffer, measured in this run.\n"
            "timed by: the replay of a CUDA graph, or events around a call that cannot be captured."
        )
        for line in cuda.not_captured(found):
            terminalreporter.write_line(line)
    if config.getoption("--json"):
        runs.write(Path(config.getoption("--json")), "unit", found, facts, config.getoption("--quick"))
