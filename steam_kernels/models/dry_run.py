"""Finds the stages of a network of unknown blocks by a dry run: a forward pass of a copy on the meta device.

A stage is the part of a network between two falls of the resolution. The dry run shows which modules return one map
``(N, C, H, W)``, the sizes and the order of the maps, and how the maps depend on each other. It computes no numbers and
does not change the model.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import Place

#: The image sides that are tried, in this order. A network with a layer of a fixed size runs with one side only.
SIDES = (224, 256, 288, 299, 320, 384, 448, 512, 600, 160, 128, 96, 64, 48, 40, 32, 28)

#: A map begins a new stage if a side is below this share of the side of the stage's first map. Convolutions without
#: padding shrink a map less.
FALL = 2 / 3

#: Modules whose outputs are NCHW maps. The outputs of other modules may be tokens or NHWC maps: a height and a width
#: that are equal, or occur in an NCHW map, tell the difference.
_MAPS = {f"torch.nn.modules.{kind}" for kind in ("batchnorm", "conv", "pooling")}

_ELEMENTWISE = {f"torch.nn.modules.{kind}" for kind in ("activation", "batchnorm", "instancenorm", "normalization")}


class Call(NamedTuple):
    """A call of a module that returned one tensor.

    Attributes:
        start: the number of calls that had ended when this call began.
        shape: the shape of the returned tensor.
        node: the autograd node that computed the tensor.
        parts: the number of convolutions in the module.
    """

    name: str
    module: nn.Module
    start: int
    shape: torch.Size
    node: Any
    parts: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a map (N, C, H, W). Any other tensor, a single line or a single pixel gives (0, 0)."""
        height, width = self.shape[2:] if len(self.shape) == 4 else (0, 0)
        return (height, width) if min(height, width) > 1 else (0, 0)


class Pass(NamedTuple):
    """A forward pass of the copy, which may have failed.

    Attributes:
        calls: the calls that returned one tensor, in the order in which they ended.
        times: how often each module was called.
        outputs: the returned tensors that depend on the image; empty if the pass failed.
        opened: the modules whose calls had not ended when the pass failed, from the outermost to the innermost.
        error: the exception with which the pass failed, or None.
        channels: the channels of the image.
    """

    calls: list[Call]
    times: Counter[nn.Module]
    outputs: list[Tensor]
    opened: list[nn.Module]
    error: Exception | None
    channels: int

    def head(self, twin: nn.Module) -> nn.Module | None:
        """The innermost module that contains all layers that a failed pass did not reach; None if it reached all.

        A layer without a call does not count if it lies in a module whose call ended: that module does not use it.
        """
        opened = set(self.opened)
        left: list[nn.Module] = []
        stack = [twin] if self.error else []
        while stack:
            module = stack.pop()
            if module in opened or module not in self.times:
                stack += module.children()
                if module not in opened and module._parameters:
                    left.append(module)
        holders = [module for module in self.opened if set(left) <= set(module.modules())]
        return holders[-1] if left else None

    def ends(self) -> list[Any]:
        """The nodes that computed the outputs. If no output is known: the nodes of maps that no later node used."""
        if self.outputs:
            return [output.grad_fn for output in self.outputs]
        used: set[Any] = set()
        stack = [call.node for call in self.calls]
        while stack:
            before = {source for source, _ in stack.pop().next_functions if source is not None} - used
            used |= before
            stack += before
        return [call.node for call in self.calls if call.node not in used]


def stage_ends(model: nn.Module, host: Callable[[Place], Place | None]) -> list[Place]:
    """The last place of each stage that can have a unit; empty if the network has fewer than two stages.

    A place is a module that every path from its stage to smaller maps passes. If the stage leads to no smaller maps,
    every path from the stage to the outputs passes the place. Every path from the image to the places of later stages
    passes it too. In a classifier, every path from the image to the smaller maps and to the logits passes it. A map of
    a neck that went up in resolution is not a place, because other paths reach the outputs.

    Each stage has one place, chosen in these steps:

    1. Candidates have more than half of the largest number of convolutions that a place of the stage has.
    2. Of the candidates, the last of the outermost modules is taken.
    3. The place moves to the norms and activations that follow it in its container. Unless the network returns logits,
       it also moves to following modules with as many channels.
    4. If it cannot have a unit, the next place that can replaces it. In a DenseNet this is the norm behind a block.

    The pass may fail in a head. The modules of that head are left out. If the output is not a map, the last layer with
    weights is left out too.

    Args:
        model: the network.
        host: gives the module that has the unit of a place, or None if the place cannot have a unit.

    Raises:
        ValueError: the model cannot be copied, or no image of the tried sides shows stages; the message gives the
            reason.
    """
    with torch.inference_mode(False):
        twin = _copy(model)
        ran = _furthest_pass(twin)
        places = _stage_ends(model, twin, ran, host)
    if len(places) > 1:
        return places
    if ran.error:
        raise ValueError(
            f"no image of {ran.channels} channels passes through it on the meta device ({_said(ran.error)})"
        )
    return []


def _stage_ends(model: nn.Module, twin: nn.Module, ran: Pass, host: Callable[[Place], Place | None]) -> list[Place]:
    logits = bool(ran.outputs) and ran.outputs[0].dim() == 2
    head = ran.head(twin)
    inside = set(head.modules()) if head else set()
    before = len(ran.calls)
    if not head and not (ran.outputs and ran.outputs[0].dim() == 4):
        leaves = (c.start for c in ran.calls if c.module._parameters and not list(c.module.children()))
        before = max(leaves, default=0)
    calls = [c for c in ran.calls[:before] if c.module not in inside]

    def fits(place: Place) -> bool:
        found = host(place)
        return found is not None and ran.times[twin.get_submodule(found.name)] == 1

    places: list[Place] = []
    ends = ran.ends()
    last: Any = None
    of_maps = {call.size for call in calls if type(call.module).__module__ in _MAPS or call.size[0] == call.size[1]}
    stages = _groups({call.size for call in calls if call.parts and call.size in of_maps} - {(0, 0)})
    for number, sizes in enumerate(stages):
        later = {size for stage in stages[number + 1 :] for size in stage}
        smaller = [call.node for call in ran.calls if call.size in later]
        stage = [call.node for call in ran.calls if call.size in sizes]
        nodes = _through(stage, smaller, ends, logits)
        if last is not None:
            behind = _ways(stage, [last], from_image=True)
            nodes = {node for node in nodes if behind[node]}
        through = [c for c in calls if c.size in sizes and c.name and ran.times[c.module] == 1 and c.node in nodes]
        place = _end(through, model, fits, keeps=not logits)
        if place is not None:
            places.append(place)
            last = next(call.node for call in through if call.name == place.name)
    return places


def _end(through: list[Call], model: nn.Module, fits: Callable[[Place], bool], keeps: bool) -> Place | None:
    most = max((call.parts for call in through), default=0)
    if not most:
        return None
    large = [call for call in through if 2 * call.parts > most]
    depth = min(call.name.count(".") for call in large)
    end = next(call for call in reversed(large) if call.name.count(".") == depth)
    container = end.name.rpartition(".")[0]
    after = through[through.index(end) + 1 :]
    for call in (call for call in after if call.name.rpartition(".")[0] == container):
        if type(call.module).__module__ in _ELEMENTWISE or (keeps and call.shape[1] == end.shape[1]):
            end = call
        elif keeps:
            break
    for call in (end, *through[through.index(end) + 1 :]):
        # Of the modules that return this map, the outermost is tried first.
        around = [c for c in through if c.node is call.node and f"{call.name}.".startswith(f"{c.name}.")]
        for c in reversed(around):
            place = Place(c.name, model.get_submodule(c.name), c.shape[1])
            if fits(place):
                return place
    return None


def _through(stage: list[Any], smaller: list[Any], ends: list[Any], logits: bool) -> set[Any]:
    """The nodes of a stage that every path from the stage to ``smaller`` passes.

    If no path leads to ``smaller``, the paths to ``ends`` count. If the network returns logits, the paths are those
    from the image to both.
    """
    ways = _ways([*smaller, *ends], stage, from_image=logits)
    reached = [node for node in smaller if ways[node] != -1]
    if logits or not reached:
        reached += [node for node in ends if ways[node] != -1]
    common = functools.reduce(int.__and__, (ways[node] for node in reached), -1 if reached else 0)
    return {node for number, node in enumerate(stage) if common >> number & 1}


def _ways(ends: list[Any], among: list[Any], from_image: bool) -> dict[Any, int]:
    """For each node that led to ``ends``: the nodes of ``among`` that all paths to it pass, one bit each.

    -1 means that no path leads to the node. The paths begin at the image if ``from_image``, else at the first node of
    ``among`` on the way.
    """
    bits: dict[Any, int] = {}
    for number, node in enumerate(among):
        bits[node] = bits.get(node, 0) | 1 << number
    found: dict[Any, int] = {}
    stack = list(ends)
    while stack:
        node = stack[-1]
        before = [source for source, _ in node.next_functions if source is not None]
        missing = [source for source in before if source not in found]
        if missing:
            stack += missing
            continue
        stack.pop()
        ways = functools.reduce(int.__and__, (found[source] for source in before), -1)
        if ways == -1 and ((from_image and not before) or node in bits):
            ways = 0
        found[node] = ways if ways == -1 else ways | bits.get(node, 0)
    return found


def _copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode on the meta device, without hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                on_meta = torch.empty_like(tensor, device="meta", requires_grad=False)
                memo[id(tensor)] = nn.Parameter(on_meta, False) if isinstance(tensor, nn.Parameter) else on_meta
        # Hooks may refer to any object, such as a file or a trainer, so they are not copied.
        memo.update({id(hooks): type(hooks)() for name, hooks in vars(module).items() if name.endswith("_hooks")})
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"it cannot be copied ({_said(error)})") from error
    own = set(map(id, model.modules()))
    if any(id(module) in own for module in twin.modules()):
        raise ValueError("it cannot be copied (a copy shares modules with it)")
    return twin.eval()


def _furthest_pass(twin: nn.Module) -> Pass:
    """The first pass that does not fail. If all passes fail: the one with the most calls."""
    first = next((m for m in twin.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError("it has no convolution")
    furthest: Pass | None = None
    for channels in dict.fromkeys((first.in_channels, 3)):
        for side in SIDES:
            ran = _run(twin, torch.empty(1, channels, side, side, device="meta", dtype=first.weight.dtype))
            if ran.error is None:
                return ran
            if furthest is None or len(ran.calls) > len(furthest.calls):
                furthest = ran
    assert furthest is not None
    return furthest


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _run(twin: nn.Module, image: Tensor) -> Pass:
    """One pass. Only the image requires a gradient, so autograd's graph contains the tensors that depend on it."""
    calls: list[Call] = []
    times: Counter[nn.Module] = Counter()
    opened: list[tuple[nn.Module, int]] = []
    outputs: list[Tensor] = []
    failed: Exception | None = None

    def begin(module: nn.Module, args: Any) -> None:
        times[module] += 1
        opened.append((module, len(calls)))

    def end(name: str, parts: int, module: nn.Module, output: Any) -> None:
        while opened[-1][0] is not module:  # the calls of these raised, and ``module`` caught the exception
            opened.pop()
        start = opened.pop()[1]
        if isinstance(output, Tensor) and output.grad_fn is not None:
            calls.append(Call(name, module, start, output.shape, output.grad_fn, parts))

    handles = []
    for name, module in twin.named_modules():
        parts = sum(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(lambda m, args, y, name=name, parts=parts: end(name, parts, m, y)))
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            outputs = [y for y in _tensors(twin(image.requires_grad_().clone())) if y.grad_fn is not None]
        if not calls:
            raise ValueError("its output does not depend on the image")
    except Exception as error:
        failed = error
    finally:
        for handle in handles:
            handle.remove()
    return Pass(calls, times, outputs, [module for module, _ in opened], failed, image.shape[1])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _groups(sizes: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """``sizes`` grouped by stage, the largest first."""
    groups: list[list[tuple[int, int]]] = []
    for height, width in sorted(sizes, key=lambda size: (-size[0] * size[1], size)):
        if not groups or height < FALL * groups[-1][0][0] or width < FALL * groups[-1][0][1]:
            groups.append([])
        groups[-1].append((height, width))
    return groups
