"""The contenders: the ways to compute a unit, or another gate, that the benchmarks compare.

``fused``, ``triton`` and ``cuda`` are ``steam()``, and compute the tail in their one pass. At a shape with a tail,
every other contender computes two steps: first its own gate without a tail, then the addition of the residual and the
ReLU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gates import GATES
from benchmarks.shapes import LAYOUTS, Shape

#: Called with (x, channel_weight, spatial_weight[, residual], **options), or a gate with (x[, residual]); returns y.
Contender = Callable[..., Tensor]


@contextlib.contextmanager
def backends_that_ran() -> Iterator[set[str]]:
    """A set of the names of the backends on which calls of ``steam()`` run inside the block; ``steam()`` logs them."""
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
    logger.propagate = False  # a user's logging configuration would print each call
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def check_kernels(ran: set[str], asked: str | None = None) -> str:
    """The backend that ran.

    Raises:
        RuntimeError: the reference ran although it was not asked for, or not exactly one backend ran.
    """
    if "reference" in ran and asked != "reference":
        import steam_kernels

        why = "; ".join(f"{k}: {v}" for k, v in steam_kernels.available_backends().items() if v)
        raise RuntimeError(f"no kernel ran: the reference ran instead, and it is not fused ({why})")
    if len(ran) != 1:
        raise RuntimeError(f"one backend should have run, but these ran: {', '.join(sorted(ran)) or 'none'}")
    return next(iter(ran))


class Fused:
    """``steam()`` on the package's choice of backend or on a named one. ``ran`` is the backend of the first call.

    The first call raises RuntimeError if the reference runs without being named, because its time would be reported as
    the time of a fused kernel.
    """

    def __init__(self, backend: str | None = None) -> None:
        from steam_kernels import steam

        self.steam, self.backend, self.ran = steam, backend, ""

    def __call__(
        self, x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None = None, **options: Any
    ) -> Tensor:
        if not self.ran:
            with backends_that_ran() as ran:
                self.steam(x, channel_weight, spatial_weight, residual, backend=self.backend, **options)
            self.ran = check_kernels(ran, self.backend)
        if residual is not None:
            return self.steam(x, channel_weight, spatial_weight, residual, backend=self.backend, **options)
        return self.steam(x, channel_weight, spatial_weight, backend=self.backend, **options)


def eager() -> Contender:
    """The reference, eager."""
    from steam_kernels import reference

    return reference.steam


def plain() -> Contender:
    """The fastest form of the unit in plain PyTorch that we could write, eager."""
    from benchmarks.plain import steam

    return steam


def two_steps(contender: Contender) -> Contender:
    """The contender's unit without a tail, then the addition of the residual and the ReLU, both in place."""

    def call(
        x: Tensor,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        residual: Tensor,
        *,
        activation: str | None = None,
        **options: Any,
    ) -> Tensor:
        assert activation == "relu"
        return contender(x, channel_weight, spatial_weight, **options).add_(residual).relu_()

    return call


def _with_tail(contender: Contender, shape: Shape) -> Contender:
    return two_steps(contender) if shape.options.tail else contender


class GateThenTail(torch.nn.Module):
    """:func:`two_steps` of a gate with parameters of its own."""

    def __init__(self, gate: torch.nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.gate(x).add_(residual).relu_()


class Gate:
    """A gate of :mod:`benchmarks.gates` at a shape: ``y = gate(x)``, or with a tail ``y = gate(x, residual)``."""

    def __init__(self, name: str, shape: Shape) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = GATES[name](shape.c)
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.0  # constant running statistics, so that every call computes the same values
        if shape.options.tail:
            module = GateThenTail(module)
        self.module = module.to(shape.device, shape.torch_dtype).to(memory_format=LAYOUTS[shape.layout])

    def __call__(self, *maps: Tensor) -> Tensor:
        return self.module(*maps)


class Compiled:
    """``torch.compile`` of a contender."""

    def __init__(self, contender: Contender) -> None:
        self.module = module_of(contender)
        self.function = torch.compile(self.module or contender, fullgraph=True, dynamic=False)
        self.before: tuple[int, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.before is None:
            self.before = _compiled_so_far()
        return self.function(*args, **kwargs)

    def warmed(self) -> None:
        """Checks, after every path has run, that there are graphs, and kernels that Inductor generated from them.

        Raises:
            RuntimeError: there are none, so that eager PyTorch would be measured.
        """
        if self.before is None or _compiled_so_far()[0] <= self.before[0]:
            raise RuntimeError("torch.compile made no graph: the baseline would be eager PyTorch")
        if _compiled_so_far()[1] <= self.before[1]:
            raise RuntimeError("torch.compile made a graph without a single generated kernel")


def module_of(contender: Contender) -> torch.nn.Module | None:
    """The module of a gate, compiled or not; None for contenders that take STEAM's weights."""
    return getattr(contender, "module", None)


def set_training(contender: Contender, mode: bool) -> None:
    """Training or evaluation mode; gates with a batch norm differ in them."""
    module = module_of(contender)
    if module is not None:
        module.train(mode)


class Steady:
    """``check()`` raises RuntimeError if anything was compiled, or fell back to eager, since the object was made."""

    def __init__(self) -> None:
        self.graphs = _compiled_so_far()[0]

    def check(self) -> None:
        from torch._dynamo.utils import counters

        if _compiled_so_far()[0] != self.graphs:
            raise RuntimeError(
                "torch.compile compiled during the measurement: "
                f"{self.graphs} graphs before, {_compiled_so_far()[0]} after"
            )
        if counters["graph_break"]:
            raise RuntimeError(f"torch.compile broke a graph: {dict(counters['graph_break'])}")


def _compiled_so_far() -> tuple[int, int]:
    """Graphs captured and kernels generated since the last :func:`forget_compiled`."""
    import torch._inductor.metrics as metrics
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), metrics.generated_kernel_count


def forget_compiled() -> None:
    """Resets ``torch.compile``, so that it does not recompile the next shape as a dynamic one."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()


#: By name: a function from the shape to the contender.
CONTENDERS: dict[str, Callable[[Shape], Contender]] = {
    "fused": lambda shape: Fused(),
    "triton": lambda shape: Fused("triton"),
    "cuda": lambda shape: Fused("cuda"),
    "eager": lambda shape: _with_tail(eager(), shape),
    "compiled": lambda shape: Compiled(_with_tail(eager(), shape)),
    "plain": lambda shape: _with_tail(plain(), shape),
    "plain-compiled": lambda shape: Compiled(_with_tail(plain(), shape)),
}
CONTENDERS |= {name: functools.partial(Gate, name) for name in GATES}
CONTENDERS |= {f"{name}-compiled": lambda shape, name=name: Compiled(Gate(name, shape)) for name in GATES}  # type: ignore[misc]
#: The contenders of this package, which keep the tests' rule of tolerance.
OURS = ("fused", "triton", "cuda")
#: The other forms of the unit, over which a row has a speed-up.
BASELINES = ("eager", "compiled", "plain", "plain-compiled")


class Call(NamedTuple):
    """The arguments of a call: ``contender(*args, **keywords)`` returns y."""

    leaves: dict[str, Tensor]  # the tensors whose gradients are asked for, by name
    args: list[Tensor]
    keywords: dict[str, Any]


def call_of(contender: Contender, shape: Shape, tensors: Mapping[str, Tensor], record: bool) -> Call:
    """The arguments of a contender at a shape. With ``record`` the tensors are leaves of a graph."""
    module = module_of(contender)
    names = ["x"] if module else ["x", "channel_weight", "spatial_weight"]
    # Tensors of a shape with a tail may be given to the same shape without a tail, which must not read the residual.
    names += ["residual"] if shape.options.tail else []
    inputs = {k: tensors[k] for k in names}
    if record:
        inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    leaves = inputs | (dict(module.named_parameters()) if module else {})
    return Call(leaves, list(inputs.values()), {} if module else shape.options.keywords)
