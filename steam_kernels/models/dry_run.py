"""The stages of a network of unknown blocks, by a forward pass of a copy on the meta device.

A stage is what lies between two falls of the resolution. The pass says which modules return one map ``(N, C, H, W)``,
of which size, in which order, and on what each depends; nothing is computed, and the model is left as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import Place

#: Sides of the images that are tried, in this order: networks with a layer of a fixed size take their own alone.
SIDES = (224, 256, 288, 299, 320, 384, 448, 512, 600, 160, 128, 96, 64, 48, 40, 32, 28)

#: A map smaller than this share of a stage's first is of the next one: convolutions without padding take off less.
FALL = 2 / 3

_ELEMENTWISE = {f"torch.nn.modules.{kind}" for kind in ("activation", "batchnorm", "instancenorm", "normalization")}


class Call(NamedTuple):
    """A call of a module: of how many calls it saw the end when it began, its map's shape, and what computed the map.

    ``parts`` is the number of convolutions in the module.
    """

    name: str
    module: nn.Module
    start: int
    shape: torch.Size
    node: Any
    parts: int

    @property
    def side(self) -> int:
        """Of a square map (N, C, H, W) of more than one pixel; else 0."""
        height, width = self.shape[2:] if len(self.shape) == 4 else (0, 0)
        return height if height == width > 1 else 0


def stage_ends(model: nn.Module, fits: Callable[[Place], bool]) -> list[Place]:
    """The last place of each stage, at which ``fits`` says a unit can be; empty where the network has not two stages.

    A place is a module on whose map all smaller maps (and the logits, if the output is that) depend, and by nothing
    beside it. Of those in a stage it is one with many convolutions, more than half as many as any has; the outermost
    of these, and the last; then the norms and activations that follow it in its container. Where it cannot have a unit,
    the next that can takes its place, as the norm behind a block of a DenseNet does.

    Raises:
        ValueError: the model cannot be copied, or no image of the sides that are tried passes; the message says why.
    """
    twin = _copy(model)
    calls, output = _pass_that_runs(twin)
    counts = Counter(id(call.module) for call in calls)
    dominators = _dominators([call.node for call in calls] + [output.grad_fn])
    logits = output.dim() == 2
    # What gives the logits, the last layer with weights, is no stage.
    leaves = [c.start for c in calls if c.module._parameters and not list(c.module.children())]
    before = max(leaves, default=0) if logits else len(calls)

    places = []
    stages = _groups(sorted({call.side for call in calls} - {0}, reverse=True))
    for number, sides in enumerate(stages):
        smaller = {side for stage in stages[number + 1 :] for side in stage}
        behind = [call.node for call in calls if call.side in smaller] + [output.grad_fn] * logits
        through = [
            call
            for call in calls[:before]
            if call.side in sides
            and call.name
            and counts[id(call.module)] == 1
            and all(call.node in dominators[node] for node in behind)
        ]
        place = _end(through, model, fits)
        if place is not None:
            places.append(place)
    return places if len(places) > 1 else []


def _end(through: list[Call], model: nn.Module, fits: Callable[[Place], bool]) -> Place | None:
    most = max((call.parts for call in through), default=0)
    if not most:
        return None
    large = [call for call in through if 2 * call.parts > most]
    depth = min(call.name.count(".") for call in large)
    end = next(call for call in reversed(large) if call.name.count(".") == depth)
    container = end.name.rpartition(".")[0]
    after = through[through.index(end) + 1 :]
    for call in after:
        if call.name.rpartition(".")[0] == container and type(call.module).__module__ in _ELEMENTWISE:
            end = call
    for call in (end, *through[through.index(end) + 1 :]):
        # The outermost of the modules whose map this is.
        around = [c for c in through if c.node is call.node and f"{call.name}.".startswith(f"{c.name}.")]
        for c in reversed(around):
            place = Place(c.name, model.get_submodule(c.name), c.shape[1])
            if fits(place):
                return place
    return None


def _dominators(ends: list[Any]) -> dict[Any, set[Any]]:
    """For each node of the graph that led to ``ends``, the nodes through which all ways to it go."""
    found: dict[Any, set[Any]] = {}
    stack = list(ends)
    while stack:
        node = stack[-1]
        before = [source for source, _ in node.next_functions if source is not None]
        missing = [source for source in before if source not in found]
        if missing:
            stack += missing
            continue
        stack.pop()
        found[node] = {node}.union(set.intersection(*(found[source] for source in before)) if before else ())
    return found


def _copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the meta device, without the model's hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                on_meta = torch.empty_like(tensor, device="meta", requires_grad=False)
                memo[id(tensor)] = nn.Parameter(on_meta, False) if isinstance(tensor, nn.Parameter) else on_meta
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"it cannot be copied ({_said(error)})") from error
    own = set(map(id, model.modules()))
    if any(id(module) in own for module in twin.modules()):
        raise ValueError("it cannot be copied (a copy shares modules with it)")
    for module in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    return twin.eval()


def _pass_that_runs(twin: nn.Module) -> tuple[list[Call], Tensor]:
    first = next((m for m in twin.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError("it has no convolution")
    said = ""
    for channels in dict.fromkeys((first.in_channels, 3)):
        for side in SIDES:
            image = torch.empty(1, channels, side, side, device="meta", dtype=first.weight.dtype)
            try:
                return _run(twin, image)
            except Exception as error:
                said = said or _said(error)
    raise ValueError(f"no image of {first.in_channels} channels passes through it on the meta device ({said})")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _run(twin: nn.Module, image: Tensor) -> tuple[list[Call], Tensor]:
    """One pass: the calls that return a tensor, in the order in which they end, and the first tensor of the output.

    The image alone requires a gradient, so that autograd's graph holds what depends on it.
    """
    calls: list[Call] = []
    starts: list[int] = []

    def begin(module: nn.Module, args: Any) -> None:
        starts.append(len(calls))

    def end(name: str, parts: int, module: nn.Module, output: Any) -> None:
        start = starts.pop()
        if isinstance(output, Tensor) and output.grad_fn is not None:
            calls.append(Call(name, module, start, output.shape, output.grad_fn, parts))

    handles = []
    for name, module in twin.named_modules():
        parts = sum(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(lambda m, args, y, name=name, parts=parts: end(name, parts, m, y)))
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            output = next(_tensors(twin(image.requires_grad_().clone())))
    finally:
        for handle in handles:
            handle.remove()
    if output.grad_fn is None:
        raise ValueError("its output does not depend on the image")
    return calls, output


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _groups(sides: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for side in sides:
        if not groups or side < FALL * groups[-1][0]:
            groups.append([])
        groups[-1].append(side)
    return groups
