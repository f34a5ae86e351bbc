"""What all benchmarks share: problems, contenders, floors, the correctness gate, interleaved measurement, tables.

* A *problem* is a shape, dtype, memory format and unit; it makes the tensors.
* A *contender* is a way to compute it. It is judged (output and every gradient, by the rule of
  ``tests/support/tolerances.py``) before it is timed.
* The *floor* is the least memory traffic that a pass can have: ``torch.mul(x, 0.5, out=y)`` forward and
  ``torch.add(x, dy, out=dx)`` backward, in the same run, memory format and dtype, on preallocated tensors.
* Rounds of everything that is compared are interleaved and medians are taken, so that a drift of the machine hits all
  alike.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib.util
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Without these a fresh large output costs page faults that exceed the kernel: glibc maps and unmaps it on every call.
MALLOC = {
    "glibc.malloc.mmap_threshold": "4294967296",
    "glibc.malloc.trim_threshold": "8589934592",
    "glibc.malloc.top_pad": "536870912",
}
TUNABLES = ":".join(f"{key}={value}" for key, value in MALLOC.items())


def malloc_is_set(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started with the malloc setting of the benchmarks."""
    return all(f"{key}={value}" in environ.get("GLIBC_TUNABLES", "") for key, value in MALLOC.items())


def malloc_environment(stock: bool = False) -> dict[str, str]:
    """This process's environment with the malloc setting of the benchmarks, or (``stock``) without it."""
    env = dict(os.environ)
    others = [t for t in env.get("GLIBC_TUNABLES", "").split(":") if t and t.split("=")[0] not in MALLOC]
    tunables = ":".join(others + ([] if stock else [TUNABLES]))
    env.pop("GLIBC_TUNABLES", None)
    return env | ({"GLIBC_TUNABLES": tunables} if tunables else {})


def restart_with_malloc() -> None:
    """Start this program again with the malloc setting, if it lacks it; glibc reads it once, before main."""
    if not malloc_is_set():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], malloc_environment())


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of each start and stop

import torch  # noqa: E402  (after the environment helpers, which a parent process uses without torch's start-up cost)
from torch import Tensor  # noqa: E402

from benchmarks import cuda, memory  # noqa: E402
from benchmarks.gates import GATES  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
#: Outputs of ResNet-50's stages; of a detector's first stage; of blocks of a MobileNetV2.
STAGES = {"56": (256, 56, 56), "28": (512, 28, 28), "14": (1024, 14, 14), "7": (2048, 7, 7)}
DETECTION = {"det": (256, 200, 334)}
MOBILE = {"m56": (24, 56, 56), "m28": (32, 28, 28), "m14": (96, 14, 14), "m7": (320, 7, 7)}
SHAPES = STAGES | DETECTION | MOBILE


def say(text: str = "") -> None:
    """A progress line, at once."""
    print(text, flush=True)


def tolerances() -> Any:
    """The tests' rule of tolerance; the one place where it is written."""
    name = "steam_benchmarks_tolerances"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "support" / "tolerances.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One unit at one shape. ``grid`` is the resolved (gh, gw); ``order`` and the rest as in ``steam()``."""

    n: int
    c: int
    h: int
    w: int
    dtype: str = "float32"
    layout: str = "nchw"
    grid_size: tuple[int, int] = (7, 7)
    embed_dim: int = 8
    num_heads: int = 4
    channel_radius: int = 1
    spatial_neighbors: int = 4
    self_loops: bool = True
    order: str = "sequential"
    tail: bool = False
    device: str = "cpu"

    @property
    def grid(self) -> tuple[int, int]:
        return min(self.grid_size[0], self.h), min(self.grid_size[1], self.w)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def unit(self) -> dict[str, Any]:
        """Keyword arguments of ``steam()``."""
        return {
            "num_heads": self.num_heads,
            "grid_size": self.grid_size,
            "channel_radius": self.channel_radius,
            "spatial_neighbors": self.spatial_neighbors,
            "self_loops": self.self_loops,
            "order": self.order,
        } | ({"activation": "relu"} if self.tail else {})

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """What the operators take after the tensors: grid, heads, radius, neighbours, self loops, sequential, scale."""
        return (
            list(self.grid), self.num_heads, self.channel_radius, self.spatial_neighbors, self.self_loops,
            self.order == "sequential", 1.0,
        )  # fmt: skip

    @property
    def numel(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def map_bytes(self) -> int:
        """Bytes of x."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}"

    @property
    def name(self) -> str:
        """Its shape by the name in :data:`SHAPES`, else C x H x W."""
        shape = (self.c, self.h, self.w)
        return next((name for name, chw in SHAPES.items() if chw == shape), "x".join(map(str, shape)))

    @property
    def label(self) -> str:
        grid = "" if self.grid_size == (7, 7) else f"-grid{self.grid[0]}x{self.grid[1]}"
        device = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.shape}{grid}-{self.dtype}-{self.layout}{device}"

    def flops(self, direction: str) -> int:
        """Floating-point operations of ``forward``, ``backward`` or ``both``."""
        from steam_kernels import cost

        report = cost(self.c, self.h, self.w, embed_dim=self.embed_dim, residual=self.tail, **self.unit)
        each = {"forward": report.flops, "backward": report.backward_flops}
        return self.n * sum(each[d] for d in DIRECTIONS[direction])

    def ideal_bytes(self, direction: str) -> int:
        """Bytes that the direction must move: forward reads x and writes y, backward reads x and dy and writes dx; the
        tail adds one read forward (residual), one read (y) and one write (the residual's gradient) backward."""
        maps = {"forward": 2 + self.tail, "backward": 3 + 2 * self.tail}
        return self.map_bytes * sum(maps[d] for d in DIRECTIONS[direction])

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """x, dy, both weights (and residual with a tail), without gradients recorded."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.n, self.c, self.h, self.w)

        def feature_map() -> Tensor:
            value = torch.randn(shape, generator=generator).to(self.torch_dtype)
            return value.contiguous(memory_format=LAYOUTS[self.layout])

        def weight() -> Tensor:
            rows = torch.rand(4, self.embed_dim, generator=generator) * 2 - 1
            rows[3] /= math.sqrt(self.embed_dim)
            return rows.double() if self.dtype == "float64" else rows

        out = {"x": feature_map(), "dy": feature_map(), "channel_weight": weight(), "spatial_weight": weight()}
        if self.tail:
            # Larger than what is added to it, or a rounding would decide what the ReLU lets through.
            noise = feature_map()
            out["residual"] = torch.sign(noise) * (0.5 + noise.abs() + self.unit.get("scale", 1.0) * out["x"].abs())
        return {k: v.to(self.device) for k, v in out.items()}


DIRECTIONS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
}


# --- contenders -------------------------------------------------------------------------------------------------------

Unit = Callable[..., Tensor]  # (x, channel_weight, spatial_weight, residual, **unit) -> y


@contextlib.contextmanager
def backends_that_ran() -> Iterator[set[str]]:
    """A set that fills with the names of the backends that calls of ``steam()`` run on meanwhile, as it logs them."""
    names: set[str] = set()

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == logger.name and record.msg == "%s %s on %s: %s":
                assert isinstance(record.args, tuple)
                names.add(str(record.args[3]))

    logger, handler = logging.getLogger("steam_kernels"), Names()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # or each call would be printed where the user has logging set up
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def check_kernels(ran: set[str], asked: str | None = None) -> str:
    """The backend that ran; ``RuntimeError`` where it is plain PyTorch that nobody asked for."""
    if "reference" in ran and asked != "reference":
        import steam_kernels

        why = "; ".join(f"{k}: {v}" for k, v in steam_kernels.available_backends().items() if v)
        raise RuntimeError(f"no kernel ran, but the reference, in plain PyTorch, which is not fused ({why})")
    if len(ran) != 1:
        raise RuntimeError(f"one backend was to run, and there ran {', '.join(sorted(ran)) or 'none'}")
    return next(iter(ran))


class Fused:
    """``steam()`` itself, on the package's choice of backend or a named one. ``ran`` is the backend of the first call,
    which raises if that is the reference and was not named: it would be called fused, and is not."""

    def __init__(self, backend: str | None = None) -> None:
        from steam_kernels import steam

        self.steam, self.backend, self.ran = steam, backend, ""

    def __call__(
        self, x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None = None, **unit: Any
    ) -> Tensor:
        if not self.ran:
            with backends_that_ran() as ran:
                self.steam(x, channel_weight, spatial_weight, residual, backend=self.backend, **unit)
            self.ran = check_kernels(ran, self.backend)
        if residual is not None:
            return self.steam(x, channel_weight, spatial_weight, residual, backend=self.backend, **unit)
        return self.steam(x, channel_weight, spatial_weight, backend=self.backend, **unit)


def fused(backend: str | None = None) -> Fused:
    """``steam()`` as a contender."""
    return Fused(backend)


def eager() -> Unit:
    """The reference, eager."""
    from steam_kernels import reference

    return reference.steam


def plain() -> Unit:
    """The fastest plain PyTorch form of the unit that we could write, eager."""
    from benchmarks.plain import steam

    return steam


class Gate:
    """A gate of :mod:`benchmarks.gates` for a problem: ``y = gate(x)``, with parameters of its own."""

    def __init__(self, name: str, problem: Problem) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = GATES[name](problem.c)
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.0  # its running statistics stay, so that every call computes the same
        self.module = module.to(problem.device, problem.torch_dtype).to(memory_format=LAYOUTS[problem.layout])

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


class Compiled:
    """``torch.compile`` of a contender, which raises if what ran was not a compiled graph."""

    def __init__(self, unit: Unit) -> None:
        self.module = module_of(unit)
        self.function = torch.compile(self.module or unit, fullgraph=True, dynamic=False)
        self.before: tuple[int, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.before is None:
            self.before = _compiled_so_far()
        return self.function(*args, **kwargs)

    def warmed(self) -> None:
        """To be called when every path has run: there are graphs, and kernels that Inductor made of them."""
        if self.before is None or _compiled_so_far()[0] <= self.before[0]:
            raise RuntimeError("torch.compile made no graph: the baseline would be eager PyTorch")
        if _compiled_so_far()[1] <= self.before[1]:
            raise RuntimeError("torch.compile made a graph without a single generated kernel")


def module_of(unit: Unit) -> torch.nn.Module | None:
    """A gate's module, compiled or not; None for what takes STEAM's weights."""
    return getattr(unit, "module", None)


def set_training(unit: Unit, mode: bool) -> None:
    """Training or evaluation mode, for gates with a batch norm."""
    module = module_of(unit)
    if module is not None:
        module.train(mode)


class Steady:
    """Raises at ``check()`` if anything was compiled, or fell back to eager, since it was made."""

    def __init__(self) -> None:
        self.graphs = _compiled_so_far()[0]

    def check(self) -> None:
        from torch._dynamo.utils import counters

        if _compiled_so_far()[0] != self.graphs:
            raise RuntimeError(
                f"torch.compile compiled in the measurement: {self.graphs} graphs before, {_compiled_so_far()[0]} after"
            )
        if counters["graph_break"]:
            raise RuntimeError(f"torch.compile broke a graph: {dict(counters['graph_break'])}")


def _compiled_so_far() -> tuple[int, int]:
    """Graphs captured and kernels generated since the last :func:`forget_compiled`."""
    import torch._inductor.metrics as metrics
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), metrics.generated_kernel_count


def forget_compiled() -> None:
    """A fresh start for ``torch.compile``, so that a shape is compiled as the first one, not as a dynamic
    recompilation."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()


#: By name: a problem -> the contender.
CONTENDERS: dict[str, Callable[[Problem], Unit]] = {
    "fused": lambda problem: fused(),
    "triton": lambda problem: fused("triton"),
    "cuda": lambda problem: fused("cuda"),
    "eager": lambda problem: eager(),
    "compiled": lambda problem: Compiled(eager()),
    "plain": lambda problem: plain(),
    "plain-compiled": lambda problem: Compiled(plain()),
}
CONTENDERS |= {name: functools.partial(Gate, name) for name in GATES}
CONTENDERS |= {f"{name}-compiled": lambda problem, name=name: Compiled(Gate(name, problem)) for name in GATES}  # type: ignore[misc]
#: Ours, which keep the tests' rule of tolerance.
OURS = ("fused", "triton", "cuda")


# --- correctness ------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """A contender and a problem's tensors: ``call(*args, **options)`` gives y."""

    leaves: dict[str, Tensor]  # what gradients are for, by name; requires grad where it is recorded
    args: list[Tensor]
    options: dict[str, Any]


def bind(unit: Unit, problem: Problem, tensors: Mapping[str, Tensor], record: bool) -> Bound:
    """The arguments of a contender, as leaves of a graph (``record``) or plain."""
    module = module_of(unit)
    names = ["x"] if module else ["x", "channel_weight", "spatial_weight", "residual"]
    inputs = {k: tensors[k] for k in names if k in tensors}
    if record:
        inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    leaves = inputs | (dict(module.named_parameters()) if module else {})
    return Bound(leaves, list(inputs.values()), {} if module else problem.unit)


def outputs(unit: Unit, problem: Problem, tensors: Mapping[str, Tensor], inference: bool = True) -> dict[str, Tensor]:
    """y and every gradient, by autograd through ``unit``, and y without gradients; on the CPU, to be judged."""
    leaves, args, options = bind(unit, problem, tensors, True)
    set_training(unit, True)
    y = unit(*args, **options)
    strides = zip(y.shape, y.stride(), torch.empty_like(args[0]).stride(), strict=True)
    if any(size > 1 and a != b for size, a, b in strides):  # where there is one element, a stride says nothing
        raise AssertionError(f"y has strides {y.stride()}, x {args[0].stride()}")
    grads = torch.autograd.grad(y, list(leaves.values()), tensors["dy"])
    out = {"y": y.detach().cpu(), **{f"d{k}": g.cpu() for k, g in zip(leaves, grads, strict=True)}}
    if inference:
        set_training(unit, False)
        with torch.no_grad():
            out["inference"] = unit(*args, **options).cpu()
    return out


def judge(problem: Problem, tensors: Mapping[str, Tensor]) -> Any:
    """The float64 truth and the bound of every result of a problem."""
    rule = tolerances()
    truth = outputs(eager(), problem, rule.to_float64(tensors), inference=False)
    found = rule.judge(truth, tensors, problem.unit)
    return rule.Judge(truth | {"inference": truth["y"]}, found.bounds | {"inference": found.bounds["y"]})


def peers(judge: Any) -> Any:
    """The same for peers: the rule is our promise; they need only compute the unit, and their sums may cost more."""
    return replace(judge, bounds={name: 5 * bound for name, bound in judge.bounds.items()})


def judge_gate(name: str, problem: Problem, tensors: Mapping[str, Tensor]) -> Any:
    """A gate judged by itself in float64: four times what its results change by where every input and parameter is
    moved by 4 eps of the problem's dtype (in which it computes throughout) with random signs, and one rounding. The
    gradient of a parameter is a running sum of up to m = N max(C, H W) numbers in float32, in whichever order: it may
    be off by sqrt(m) roundings of its size more."""
    rule = tolerances()
    gate = Gate(name, replace(problem, device="cpu"))
    inputs = {k: tensors[k].cpu() for k in ("x", "dy")}
    parameters = {k: v.detach() for k, v in gate.module.named_parameters()}

    def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        exact = Gate(name, replace(problem, device="cpu", dtype="float64"))
        with torch.no_grad():
            for k, parameter in exact.module.named_parameters():
                parameter.copy_(values[k])
        return outputs(exact, problem, {k: values[k] for k in ("x", "dy")})

    truth = run(rule.to_float64(inputs | parameters))
    bounds = {k: rule.rounding(v, problem.torch_dtype) for k, v in truth.items()}
    eps = torch.finfo(problem.torch_dtype).eps
    changes = [run(perturbed(inputs | parameters, 4 * eps, seed)) for seed in range(4)]
    for k in truth:
        bounds[k] += 4 * max(rule.largest_error(c[k], truth[k]) for c in changes)
    terms = problem.n * max(problem.c, problem.h * problem.w)
    for k in parameters:
        bounds[f"d{k}"] += math.sqrt(terms) * torch.finfo(torch.float32).eps * truth[f"d{k}"].abs().max().item()
    return rule.Judge(truth, bounds)


def perturbed(inputs: Mapping[str, Tensor], step: float, seed: int) -> dict[str, Tensor]:
    """Float64 inputs moved by ``step`` of themselves with random signs: maps with one for each channel and one for each
    pixel, so that no sum averages them away."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).to(torch.float64) * 2 - 1

    out = {}
    for name, value in inputs.items():
        n, c, *space = value.shape if value.dim() == 4 else (0, 0)
        sign = signs(n, c, 1, 1) + signs(n, 1, *space) if space else signs(*value.shape)
        out[name] = value.detach().to(torch.float64) * (1 + step * sign)
    return out


# --- measurement ------------------------------------------------------------------------------------------------------

Sample = dict[str, float]  # direction -> seconds per call
Block = Callable[[int], Sample]  # number of calls -> the mean of each direction


def timed(direction: str, call: Callable[[], object], warm: bool = True) -> Block:
    """A block of calls, timed together; one untimed call before, which brings back what the neighbours evicted from
    the caches."""

    def block(calls: int) -> Sample:
        if warm:
            call()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return {direction: (time.perf_counter() - start) / calls}

    return block


def forward_block(unit: Unit, problem: Problem, tensors: Mapping[str, Tensor]) -> Block:
    """Forward without gradients."""
    _, args, options = bind(unit, problem, tensors, False)
    if problem.device == "cuda":
        on_gpu = cuda.timed("forward", torch.no_grad()(lambda: unit(*args, **options)))

    def block(calls: int) -> Sample:
        set_training(unit, False)
        if problem.device == "cuda":
            return on_gpu(calls)
        with torch.no_grad():
            unit(*args, **options)
            start = time.perf_counter()
            for _ in range(calls):
                unit(*args, **options)
            return {"forward": (time.perf_counter() - start) / calls}

    return block


def training_block(unit: Unit, problem: Problem, tensors: Mapping[str, Tensor]) -> Block:
    """Forward with a graph and the backward through it, ``autograd.grad`` to all inputs; also the two parts."""
    named, args, options = bind(unit, problem, tensors, True)
    leaves, dy, clock, grad = list(named.values()), tensors["dy"], time.perf_counter, torch.autograd.grad
    if problem.device == "cuda":
        on_gpu = cuda.timed_pair(lambda: unit(*args, **options), lambda y: grad(y, leaves, dy))

    def block(calls: int) -> Sample:
        set_training(unit, True)
        if problem.device == "cuda":
            return on_gpu(calls)
        grad(unit(*args, **options), leaves, dy)
        forward = backward = 0.0
        for _ in range(calls):
            start = clock()
            y = unit(*args, **options)
            middle = clock()
            grads = grad(y, leaves, dy)
            end = clock()
            forward += middle - start
            backward += end - middle
            del y, grads
        return {"both": (forward + backward) / calls, "backward": backward / calls}

    return block


def memory_of(unit: Unit, problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes beyond x, y and the gradients: ``kept_bytes`` from forward for backward, and the most at once in training
    (``both``) and without gradients (``forward``); and the number of parameters."""
    named, args, options = bind(unit, problem, tensors, True)
    leaves = list(named.values())

    def step() -> object:
        y = unit(*args, **options)
        return y, torch.autograd.grad(y, leaves, tensors["dy"])

    set_training(unit, True)
    step()  # what is allocated once is not a call's
    returned = sum(v.numel() * v.element_size() for v in leaves)
    kept = memory.traced(lambda: unit(*args, **options))[1].kept - problem.map_bytes
    both = memory.traced(step)[1].peak - problem.map_bytes - returned
    set_training(unit, False)
    with torch.no_grad():
        unit(*args, **options)
        forward = memory.traced(lambda: unit(*args, **options))[1].peak - problem.map_bytes
    parameters = sum(v.numel() for k, v in named.items() if k not in ("x", "residual"))
    return {"kept_bytes": kept, "both": both, "forward": forward, "parameters": parameters}


def floor_blocks(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
    """The least traffic of a forward and of a backward pass; with a tail, its own."""
    x, dy = tensors["x"], tensors["dy"]
    y, dx = torch.empty_like(x), torch.empty_like(x)
    clock = cuda.timed if problem.device == "cuda" else timed
    if not problem.tail:
        return {
            "floor-forward": clock("forward", lambda: torch.mul(x, 0.5, out=y)),
            "floor-backward": clock("backward", lambda: torch.add(x, dy, out=dx)),
        }
    residual, dresidual = tensors["residual"], torch.empty_like(x)

    def backward() -> None:
        torch.add(x, dy, out=dx)
        torch.mul(y, 0.5, out=dresidual)

    return {
        "floor-forward": clock("forward", lambda: torch.add(x, residual, out=y)),
        "floor-backward": clock("backward", backward),
    }


def op_backward_block(problem: Problem, tensors: Mapping[str, Tensor]) -> Block:
    """The backward operator alone on ready tensors, all gradients asked for, its outputs allocated by it."""
    import steam_kernels  # noqa: F401  (defines the operators)

    x, dy, cw, sw = (tensors[k] for k in ("x", "dy", "channel_weight", "spatial_weight"))
    ops = torch.ops.steam_kernels
    arguments = problem.op_arguments
    with torch.no_grad():
        y, saved = ops.forward.default(x, cw, sw, tensors.get("residual"), *arguments, problem.tail, True)
    masked = y if problem.tail else None
    call = ops.backward.default

    def block(calls: int) -> Sample:
        with torch.no_grad():
            call(dy, x, masked, cw, sw, saved, *arguments, True, True, True, problem.tail)
            start = time.perf_counter()
            for _ in range(calls):
                call(dy, x, masked, cw, sw, saved, *arguments, True, True, True, problem.tail)
            return {"backward": (time.perf_counter() - start) / calls}

    return block


def op_forward_block(problem: Problem, tensors: Mapping[str, Tensor]) -> Block:
    """The forward operator alone, nothing saved, its output allocated by it."""
    import steam_kernels  # noqa: F401  (defines the operators)

    x, cw, sw = (tensors[k] for k in ("x", "channel_weight", "spatial_weight"))
    call = torch.ops.steam_kernels.forward.default
    arguments = (x, cw, sw, tensors.get("residual"), *problem.op_arguments, problem.tail, False)

    def block(calls: int) -> Sample:
        with torch.no_grad():
            call(*arguments)
            start = time.perf_counter()
            for _ in range(calls):
                call(*arguments)
            return {"forward": (time.perf_counter() - start) / calls}

    return block


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``seconds`` for each block's share of a comparison, in ``least`` to ``most`` rounds of at
    least ``block`` s."""

    seconds: float = 0.5
    least: int = 7
    most: int = 60
    block: float = 1e-3

    @staticmethod
    def quick() -> Effort:
        return Effort(seconds=0.05, least=3, most=5, block=2e-4)


@dataclass
class Measured:
    """Samples of every block, round by round."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def median(self, block: str, direction: str) -> float:
        return statistics.median(s[direction] for s in self.samples[block])

    def rounds(self, block: str, direction: str) -> list[float]:
        return [s[direction] for s in self.samples[block]]

    def spread(self, block: str, direction: str) -> float:
        """The distance of the quartiles over the median."""
        values = self.rounds(block, direction)
        if len(values) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / middle


def interleaved(blocks: Mapping[str, Block], effort: Effort) -> Measured:
    """Rounds of all blocks in turn; a slow block runs in fewer rounds than a quick one, spread evenly over the
    whole."""
    calls, rounds = {}, {}
    for name, block in blocks.items():
        block(1)
        once = max(block(1).values())
        calls[name] = max(1, min(1000, math.ceil(effort.block / once)))
        rounds[name] = max(effort.least, min(effort.most, int(effort.seconds / (once * (calls[name] + 1)))))
    measured = Measured({name: [] for name in blocks})
    longest = max(rounds.values(), default=0)
    for i in range(longest):
        for name, block in blocks.items():
            if (i * rounds[name]) // longest != ((i + 1) * rounds[name]) // longest:
                measured.samples[name].append(block(calls[name]))
    return measured


# --- reports ----------------------------------------------------------------------------------------------------------


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Plain text, columns aligned; numbers to the right."""
    cells = [[c if isinstance(c, str) else number(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(head)]
    lines = [
        title,
        "  ".join(h.ljust(w) if i == 0 else h.rjust(w) for i, (h, w) in enumerate(zip(head, widths, strict=True))),
    ]
    lines.append("  ".join("-" * w for w in widths))
    for row in cells:
        lines.append(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table, and an empty one; columns but the first to the right."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return [line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows), ""]


def number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)


def micro(seconds: float) -> str:
    """Seconds as microseconds or milliseconds."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, backends, CPU variant, malloc setting, date, commit."""
    import steam_kernels

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steam_kernels": getattr(steam_kernels, "__version__", "unknown"),
        "backends": steam_kernels.available_backends(),
        "cpu_variant": cpu_variant(),
        "malloc": "benchmark setting" if malloc_is_set() else "stock",
        "commit": commit_of(ROOT),
    }


def cpu_variant() -> str:
    """The instruction-set variant of the CPU kernels in use, or why there is none."""
    import steam_kernels
    from steam_kernels.backends import native

    reason = steam_kernels.available_backends()["cpu"]
    return f"none ({reason})" if reason else native.CPU.variant


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


#: What a figure depends on; a run rewrites the rest, its own results, page and pictures.
CODE = (
    "steam_kernels", "csrc", "include", "cmake", "CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile",
    "tests/support/tolerances.py", "benchmarks", ":(exclude)benchmarks/results",
)  # fmt: skip


def commit_of(root: Path) -> str:
    """The commit that is checked out at ``root``, with ``-dirty`` where the code differs from it; "" where there is
    none."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "--verify", "HEAD")
        return commit + ("-dirty" if commit and git("status", "--porcelain", "--", *CODE) else "")
    except OSError:
        return ""


def describe(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['processor']}, torch sees {facts['cpu_capability']}; {facts['threads']} threads; "
        f"torch {facts['torch']}; "
        f"steam_kernels {facts['steam_kernels']}, cpu variant {facts['cpu_variant']}; malloc: {facts['malloc']}"
    )


def write_json(
    path: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> None:
    """One file: what was measured, on what, whether in a quick run, the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": quick, "machine": facts or machine(), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    say(f"wrote {path}")
