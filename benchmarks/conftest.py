"""pytest's side of the benchmarks: options, the malloc setting, the closing table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import core

DIRECTIONS = ("forward", "backward", "both")
COMPILED = tuple(name for name in core.CONTENDERS if name.endswith("compiled"))
#: Where the compiled contenders run by default: a compilation takes longer than all else at a shape.
COMPILED_AT = (
    core.Problem(8, *core.SHAPES["56"]),
    core.Problem(8, *core.SHAPES["14"], layout="channels_last"),
    core.Problem(8, *core.SHAPES["m14"]),
)


def default_grid() -> list[core.Problem]:
    """What ``make bench`` measures, chosen to fit into half an hour on two cores: all stages in both dtypes and layouts
    at batch 8; batch 1 and 32, the detection shape and MobileNetV2's in float32."""
    P, stages = core.Problem, core.STAGES.values()
    grid = [P(8, *s, dtype=d, layout=o) for s in stages for d in ("float32", "bfloat16") for o in core.LAYOUTS]
    grid += [P(1, *s) for s in stages]
    grid += [P(32, *core.STAGES[s]) for s in ("56", "14", "7")]
    grid += [P(2, *core.DETECTION["det"], layout=o) for o in core.LAYOUTS]
    grid += [P(8, *s, layout=o) for s in core.MOBILE.values() for o in core.LAYOUTS]
    return grid


def quick_grid() -> list[core.Problem]:
    return [core.Problem(1, *core.SHAPES["14"]), core.Problem(1, *core.SHAPES["m7"], "bfloat16", "channels_last")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("steam_kernels benchmarks")
    group.addoption(
        "--quick", action="store_true", help="two shapes at batch 1, few rounds: that it runs, not what it takes"
    )
    group.addoption("--full", action="store_true", help="every shape, batch, dtype, layout and contender: hours")
    group.addoption("--device", default="cpu", help="cpu or cuda (cpu)")
    group.addoption("--size", default="", help=f"comma list of shapes: {', '.join(core.SHAPES)}")
    group.addoption("--batch", default="", help="comma list of batch sizes")
    group.addoption("--dtype", default="", help="comma list: float32, bfloat16, float16")
    group.addoption("--layout", default="", help="comma list: nchw, channels_last")
    group.addoption("--contender", default="", help=f"comma list: {', '.join(core.CONTENDERS)}")
    group.addoption("--backend", default="", help="the backend that the contender fused runs on (the package's choice)")
    group.addoption("--json", default="", metavar="PATH", help="write the rows of the closing table as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run in a child that has the malloc setting, which glibc reads once, before main: the user need not set it."""
    if core.malloc_is_set() or hasattr(config, "workerinput"):
        return None
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)  # or the child would write into this process's capture file
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    return subprocess.call(command, cwd=config.invocation_params.dir, env=core.malloc_environment())


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = ["steam_kernels benchmarks: " + core.describe(core.machine())]
    if _device(config) == "cuda":
        lines.append("on the GPU: " + ", ".join(f"{k} {v}" for k, v in core.cuda.facts().items()))
    return lines


def _choice(config: pytest.Config, option: str, allowed: list[str], default: list[str]) -> list[str]:
    given = [v.strip() for v in config.getoption(option).split(",") if v.strip()]
    wrong = [v for v in given if v not in allowed]
    if wrong:
        raise pytest.UsageError(f"{option} {wrong[0]!r}: allowed are {', '.join(allowed)}")
    return given or default


def _device(config: pytest.Config) -> str:
    device = _choice(config, "--device", ["cpu", "cuda"], ["cpu"])[0]
    if device == "cuda" and not core.torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no GPU")
    return device


def problems(config: pytest.Config) -> list[core.Problem]:
    """The default grid, or every combination of what was asked for; a detector's maps come in batches of 2."""
    device = _device(config)
    chosen = [config.getoption(o) for o in ("--size", "--batch", "--dtype", "--layout", "--full")]
    if device == "cpu" and not any(chosen):
        return quick_grid() if config.getoption("--quick") else default_grid()
    every = list(core.SHAPES if config.getoption("--full") else core.STAGES)
    sizes = _choice(config, "--size", list(core.SHAPES), ["14", "7"] if config.getoption("--quick") else every)
    layouts = _choice(config, "--layout", list(core.LAYOUTS), list(core.LAYOUTS))
    dtypes = _choice(config, "--dtype", ["float32", "bfloat16", "float16"], ["float32", "bfloat16"])
    try:
        given = [int(b) for b in config.getoption("--batch").split(",") if b]
    except ValueError as error:
        raise pytest.UsageError(f"--batch {config.getoption('--batch')!r}: a comma list of numbers") from error
    default = [1] if config.getoption("--quick") else [1, 8, 32]
    return [
        core.Problem(n, *core.SHAPES[size], dtype=dtype, layout=layout, device=device)
        for size in sizes
        for n in given or ([2] if size in core.DETECTION else default)
        for dtype in dtypes
        for layout in layouts
    ]


def contenders(config: pytest.Config) -> list[str]:
    # On a GPU each backend of ours has its own row; on the CPU there is one.
    usable = {"fused"}
    if _device(config) == "cuda":
        usable = {name for name, why in core.machine()["backends"].items() if not why}
    default = [name for name in core.CONTENDERS if name not in core.OURS or name in usable]
    return _choice(config, "--contender", list(core.CONTENDERS), default)


def contenders_at(config: pytest.Config, problem: core.Problem) -> list[str]:
    """Those that run at one problem: in the default grid and in quick runs, the compiled ones at few."""
    names = contenders(config)
    if config.getoption("--contender"):
        return names
    if config.getoption("--quick"):
        return [n for n in names if n not in COMPILED or (n == "eca-compiled" and problem.name == "14")]
    if problem in default_grid() and problem not in COMPILED_AT and not config.getoption("--full"):
        return [n for n in names if n not in COMPILED]
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "problem" in metafunc.fixturenames:
        cases = [
            pytest.param(problem, contender, direction, id=f"{problem.label}-{direction}-{contender}")
            for problem in problems(metafunc.config)
            for direction in DIRECTIONS
            for contender in contenders_at(metafunc.config, problem)
        ]
        metafunc.parametrize(("problem", "contender", "direction"), cases)


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[dict]:
    """The measured rows of this run, by problem; the closing table is made of them."""
    yield request.config.stash.setdefault(ROWS, {})


ROWS: pytest.StashKey[dict] = pytest.StashKey()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash.get(ROWS, {})
    rows = [line for row in measured.values() for line in row.lines()]
    if not rows:
        return
    head = ["latency", "spread", "GFLOP/s", "GB/s", "over floor", "x eager", "x compiled", "x plain-compiled"]
    head += ["extra MB", "parameters"]
    keys = ["gflops", "gbytes", "over_floor", "speedup_eager", "speedup_compiled", "speedup_plain_compiled"]
    if _device(config) == "cuda":
        head.append("of copy")
    for direction in DIRECTIONS:
        body = [
            (
                f"{r['problem']}  {r['contender']}",
                core.micro(r["seconds"]),
                f"{100 * r['spread']:.0f}%",
                *(r[k] for k in keys),
                None if r["extra_bytes"] is None else r["extra_bytes"] / 1e6,
                r["parameters"],
                *([r["of_copy"]] if _device(config) == "cuda" else []),
            )
            for r in rows
            if r["direction"] == direction
        ]
        if body:
            title = {"both": "forward + backward (autograd)", "backward": "backward (autograd)"}.get(
                direction, "forward (no grad)"
            )
            terminalreporter.write_line("")
            terminalreporter.write_line(
                core.table(f"== {title}: medians of interleaved rounds ==", ("unit", *head), body)
            )
    terminalreporter.write_line(
        "\nSpread: distance of the quartiles over the median.\n"
        "GFLOP/s and GB/s: least operations (STEAM's) and bytes over the time.\n"
        "Floor: torch.mul(x, 0.5, out=y) forward, torch.add(x, dy, out=dx) backward.\n"
        "x eager, x compiled: speed-up over the reference, eager and by torch.compile; x plain-compiled: over "
        "torch.compile of benchmarks/plain.py.\n"
        "Extra MB: the most that is allocated at once beyond x, y and the gradients."
    )
    facts = core.machine()
    if _device(config) == "cuda":
        facts |= core.cuda.facts()
        terminalreporter.write_line("of copy: GB/s over this GPU's own copy of a large buffer, measured in this run.")
    if config.getoption("--json"):
        core.write_json(Path(config.getoption("--json")), "unit", rows, facts, config.getoption("--quick"))
