"""Blocks of the passes that are timed: forward, training, the backward operator, and the floor.

The floor is the least memory traffic of a pass, in the same run, memory format and dtype, on allocated tensors:
``torch.mul(x, 0.5, out=y)`` forward and ``torch.add(x, dy, out=dx)`` backward.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks import cuda, memory
from benchmarks.contenders import Contender, call_of, set_training
from benchmarks.shapes import Shape
from benchmarks.timing import Block, Sample, timed


def forward_block(contender: Contender, shape: Shape, tensors: Mapping[str, Tensor]) -> Block:
    """Forward without gradients."""
    _, args, keywords = call_of(contender, shape, tensors, False)
    prepare = functools.partial(set_training, contender, False)
    if shape.device == "cuda":
        return cuda.timed("forward", torch.no_grad()(lambda: contender(*args, **keywords)), prepare)

    def block(calls: int) -> Sample:
        prepare()
        with torch.no_grad():
            contender(*args, **keywords)
            start = time.perf_counter()
            for _ in range(calls):
                contender(*args, **keywords)
            return {"forward": (time.perf_counter() - start) / calls}

    return block


def training_block(contender: Contender, shape: Shape, tensors: Mapping[str, Tensor]) -> Block:
    """Forward with a graph, and ``autograd.grad`` through it to all inputs; also the second part alone."""
    named, args, keywords = call_of(contender, shape, tensors, True)
    leaves, dy, clock, grad = list(named.values()), tensors["dy"], time.perf_counter, torch.autograd.grad
    prepare = functools.partial(set_training, contender, True)
    if shape.device == "cuda":
        return cuda.timed_pair(lambda: contender(*args, **keywords), lambda y: grad(y, leaves, dy), prepare)

    def block(calls: int) -> Sample:
        prepare()
        grad(contender(*args, **keywords), leaves, dy)
        forward = backward = 0.0
        for _ in range(calls):
            start = clock()
            y = contender(*args, **keywords)
            middle = clock()
            grads = grad(y, leaves, dy)
            end = clock()
            forward += middle - start
            backward += end - middle
            del y, grads
        return {"both": (forward + backward) / calls, "backward": backward / calls}

    return block


def floor_blocks(shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
    """The floors of a forward and of a backward pass. With a tail forward is ``torch.add(x, residual, out=y)``, and
    backward has ``torch.mul(y, 0.5, out=dresidual)`` in addition: three reads and two writes."""
    x, dy = tensors["x"], tensors["dy"]
    y, dx = torch.empty_like(x), torch.empty_like(x)
    clock: Callable[..., Block] = cuda.timed if shape.device == "cuda" else timed
    if not shape.options.tail:
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


def backward_operator_block(shape: Shape, tensors: Mapping[str, Tensor]) -> Block:
    """The backward operator alone on ready tensors, for all gradients; it allocates its outputs."""
    import steam_kernels  # noqa: F401  (defines the operators)

    x, dy, cw, sw = (tensors[k] for k in ("x", "dy", "channel_weight", "spatial_weight"))
    tail, arguments = shape.options.tail, shape.op_arguments
    ops = torch.ops.steam_kernels
    with torch.no_grad():
        y, saved = ops.forward.default(x, cw, sw, tensors["residual"] if tail else None, True, *arguments)
    given = dy, x, y if tail else None, cw, sw, saved, (True, True, True, tail), *arguments
    call = ops.backward.default

    def block(calls: int) -> Sample:
        with torch.no_grad():
            call(*given)
            start = time.perf_counter()
            for _ in range(calls):
                call(*given)
            return {"backward": (time.perf_counter() - start) / calls}

    return block


def memory_of(contender: Contender, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes besides x, y and the gradients, and the number of parameters.

    ``kept_bytes`` is kept from forward for backward. ``both`` and ``forward`` are the largest sums that are allocated
    at one time, in training and without gradients.
    """
    named, args, keywords = call_of(contender, shape, tensors, True)
    leaves = list(named.values())

    def step() -> object:
        y = contender(*args, **keywords)
        return y, torch.autograd.grad(y, leaves, tensors["dy"])

    set_training(contender, True)
    step()  # a first call also allocates what later calls reuse
    returned = sum(v.numel() * v.element_size() for v in leaves)
    kept = memory.traced(lambda: contender(*args, **keywords))[1].kept - shape.map_bytes
    both = memory.traced(step)[1].peak - shape.map_bytes - returned
    set_training(contender, False)
    with torch.no_grad():
        contender(*args, **keywords)
        forward = memory.traced(lambda: contender(*args, **keywords))[1].peak - shape.map_bytes
    parameters = sum(v.numel() for k, v in named.items() if k not in ("x", "residual"))
    return {"kept_bytes": kept, "both": both, "forward": forward, "parameters": parameters}
