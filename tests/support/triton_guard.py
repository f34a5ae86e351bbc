"""A guard around Triton's interpreter. The interpreter alone checks no address and runs programs in order.

    with Guard(seed=1) as guard:
        kernel[grid](...)
    guard.traffic(x).loaded.bytes

Under the guard, every launch runs its programs in a random order, and each of these raises :class:`GuardError`:

* an active lane of a load or store that is outside the tensor of its pointer (a neighbouring tensor is outside too), or
  that is not aligned to its element;
* a byte that one program stores and another program of the same launch loads or stores;
* a byte that the program that stored it loads or stores again without a barrier: its threads are not ordered;
* two lanes of one store with different values for one address;
* an atomic, which no kernel here needs;
* a hint ``tl.multiple_of``, ``tl.max_contiguous`` or ``tl.max_constancy`` that is not true;
* a grid that CUDA cannot launch.

Under the guard ``torch.empty`` and related functions return NaN, so that an element that no program writes shows in the
results. :meth:`Guard.unwritten` counts such elements. The guard counts traffic by launch and parameter: the bytes of
the active lanes, and the 32-byte sectors of each load or store.

The guard replaces private names of one version of Triton, and skips its tests under another one. Tests have planted
bugs that it must catch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests.support.triton_version import needs_known_triton

SECTOR = 32
_PACKAGE = Path(triton.__file__).parent
_TAG = 48  # an address has 47 bits; the bits above them hold the number of the parameter of a pointer
_ADDRESS = np.uint64((1 << _TAG) - 1)
_BARRIERS = 10  # the bits of an epoch that count the barriers of a program; the other bits count programs
_SEVERAL = -1
_EMPTY = ("empty", "empty_like", "empty_strided")
_NEW_EMPTY = ("new_empty", "new_empty_strided")


class GuardError(AssertionError):
    """A kernel broke a rule of the guard."""


@dataclass
class Traffic:
    """The bytes and sectors of the loads, or of the stores, of one tensor."""

    bytes: int = 0
    sectors: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.sectors + other.sectors)


class Moved(NamedTuple):
    loaded: Traffic
    stored: Traffic


class _Span:
    """A range of memory that parameters of one launch share, and the last epoch of access of each granule."""

    def __init__(self, start: int, end: int, granule: int) -> None:
        self.start, self.end, self.granule = start, end, granule
        self.stored = np.zeros(-(-(end - start) // granule), np.int32)
        self.loaded = np.zeros_like(self.stored)

    def granules(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        first = (addresses - np.uint64(self.start)).astype(np.int64) // self.granule
        many = itemsize // self.granule
        return first if many == 1 else (first[:, None] + np.arange(many)).ravel()


@dataclass
class _Parameter:
    name: str
    tensor: Tensor
    start: int
    end: int
    span: _Span | None = None
    inside: np.ndarray | None = None  # the elements of the extent that belong to the view; None: all


@dataclass
class Launch:
    """One launch: the kernel, the grid, and by parameter name the tensors and the traffic."""

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, Tensor]
    loads: dict[str, Traffic] = field(default_factory=dict)
    stores: dict[str, Traffic] = field(default_factory=dict)
    #: The last element of each tensor that was loaded or stored.
    highest: dict[str, int] = field(default_factory=dict)
    #: For each range of memory: the start, the bytes of a granule, and the granules that were stored to.
    written: list[tuple[int, int, np.ndarray]] = field(default_factory=list)


def _extent(t: Tensor) -> tuple[int, int]:
    start = t.data_ptr()
    if t.numel() == 0:
        return start, start
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return start, start + (reach + 1) * t.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    return a0 < b1 and b0 < a1


def _parameter(name: str, tensor: Tensor) -> _Parameter:
    start, end = _extent(tensor)
    elements = (end - start) // tensor.element_size()
    if elements == tensor.numel():
        return _Parameter(name, tensor, start, end)
    inside = np.zeros(elements, bool)
    torch.from_numpy(inside).as_strided(tensor.shape, tensor.stride()).fill_(True)
    return _Parameter(name, tensor, start, end, inside=inside)


def _spans(parameters: list[_Parameter]) -> list[_Span]:
    """Gives each parameter its span; parameters that overlap share a span."""
    spans: list[_Span] = []
    groups: list[list[_Parameter]] = []
    for p in sorted((p for p in parameters if p.end > p.start), key=lambda p: p.start):
        if groups and p.start < max(q.end for q in groups[-1]):
            groups[-1].append(p)
        else:
            groups.append([p])
    for group in groups:
        span = _Span(group[0].start, max(p.end for p in group), min(p.tensor.element_size() for p in group))
        for p in group:
            p.span = span
        spans.append(span)
    return spans


class Guard:
    """The context manager.

    Args:
        seed: the seed of the order of programs; None keeps the interpreter's own order.
        last: the number of the first and of the last programs of each launch that run, with checks of bounds and
            alignment alone. No other memory is accessed, so that a tensor of more than 2**31 elements costs nothing.
    """

    def __init__(self, seed: int | None = 0, last: int | None = None) -> None:
        self.seed, self.last = seed, last
        self.launches: list[Launch] = []
        self._random = np.random.default_rng(seed)
        self._patch = pytest.MonkeyPatch()
        self._parameters: list[_Parameter] = []
        self._unseen: list[_Parameter] = []
        self._order: np.ndarray = np.zeros(0, np.int64)
        self._program = 0
        self._epoch = 0
        self._patched: set[frozenset[int]] = set()

    # ---- results

    def traffic(self, tensor: Tensor) -> Moved:
        """The traffic of all launches in the memory of ``tensor``, under any parameter name."""
        moved = Moved(Traffic(), Traffic())
        for launch in self.launches:
            for name, t in launch.tensors.items():
                if _overlap(t, tensor):
                    none = Traffic()
                    moved = Moved(
                        moved.loaded + launch.loads.get(name, none), moved.stored + launch.stores.get(name, none)
                    )
        return moved

    def others(self, *tensors: Tensor) -> Moved:
        """The traffic of all launches in other tensors."""
        moved = Moved(Traffic(), Traffic())
        for launch in self.launches:
            for name, t in launch.tensors.items():
                if not any(_overlap(t, known) for known in tensors):
                    none = Traffic()
                    moved = Moved(
                        moved.loaded + launch.loads.get(name, none), moved.stored + launch.stores.get(name, none)
                    )
        return moved

    def unwritten(self, tensor: Tensor) -> int:
        """The number of elements of a dense tensor that no launch has stored to."""
        start, end = _extent(tensor)
        missing = np.ones(end - start, bool)
        for launch in self.launches:
            for first, granule, stored in launch.written:
                bytes_ = np.repeat(stored, granule)
                low, high = max(start, first), min(end, first + bytes_.size)
                if low < high:
                    missing[low - start : high - start] &= ~bytes_[low - first : high - first]
        return int(missing.reshape(-1, tensor.element_size()).any(1).sum())

    # ---- the patches

    def __enter__(self) -> Guard:
        needs_known_triton("the guard replaces private names")
        builder, patch = interpreter.InterpreterBuilder, self._patch.setattr
        patch(interpreter.GridExecutor, "__call__", self._launching(interpreter.GridExecutor.__call__))
        patch(interpreter, "_implicit_cvt", self._tagging(interpreter._implicit_cvt))
        patch(interpreter, "_patch_lang", self._patching(interpreter._patch_lang))
        patch(interpreter.TensorHandle, "set_attr", self._hinting(interpreter.TensorHandle.set_attr))
        patch(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)  # CPU tensors are their own copies
        patch(builder, "set_grid_dim", self._sizing(builder.set_grid_dim))
        patch(builder, "set_grid_idx", self._starting(builder.set_grid_idx))
        patch(builder, "create_masked_load", self._loading(builder.create_masked_load))
        patch(builder, "create_masked_store", self._storing(builder.create_masked_store))
        patch(builder, "create_barrier", lambda _: self._barrier())
        for name in ("create_atomic_rmw", "create_atomic_cas"):
            patch(builder, name, lambda *args: self._fail("an atomic: results would depend on the order of programs"))
        if self.last is None:
            for owner, names in ((torch, _EMPTY), (Tensor, _NEW_EMPTY)):
                for name in names:
                    patch(owner, name, _poisoned(getattr(owner, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.undo()

    def _launching(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            names = inspect.getfullargspec(executor.fn).args
            given = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
            parameters = []
            for name, value in given.items():
                if name not in executor.constexprs:
                    for i, t in enumerate(value if isinstance(value, tuple) else (value,)):
                        if hasattr(t, "data_ptr"):
                            label = f"{name}[{i}]" if isinstance(value, tuple) else name
                            parameters.append(_parameter(label, interpreter._unwrap_tensor(t)))
            grid = tuple(executor.grid(given) if callable(executor.grid) else executor.grid)
            self.launches.append(Launch(executor.fn.__name__, grid, {p.name: p.tensor for p in parameters}))
            if any(n > 65535 for n in grid[1:]) or grid[0] >= 2**31:
                self._fail(f"a grid of {grid}, and CUDA's limits are (2**31 - 1, 65535, 65535)")
            self._parameters, self._unseen, self._patched = parameters, list(parameters), set()
            spans = _spans(parameters) if self.last is None else []
            if self.last is not None:
                executor.grid = (min(2 * self.last, int(np.prod(grid))),)
            try:
                original(executor, *args, **kwargs)
            except interpreter.InterpreterError as error:
                cause: BaseException | None = error
                while cause is not None:
                    if isinstance(cause, GuardError):
                        raise cause from None
                    cause = cause.__cause__
                raise
            self.launches[-1].written = [(s.start, s.granule, s.stored > 0) for s in spans]

        return call

    def _tagging(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def convert(arg: Any) -> Any:
            out = original(arg)
            if hasattr(arg, "data_ptr"):
                self._unseen.pop(0)  # tensors are converted in the order of the parameters
                number = len(self._parameters) - len(self._unseen)
                out.handle.data = out.handle.data | np.uint64(number << _TAG)
            return out

        return convert

    def _patching(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def patch_lang(fn: Any) -> Any:
            # The interpreter patches again at every call of a device function, which takes longer than the call.
            seen = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
            if seen in self._patched:
                return interpreter._LangPatchScope()
            self._patched.add(seen)
            return original(fn)

        return patch_lang

    def _sizing(self, original: Callable[..., None]) -> Callable[..., None]:
        def set_dims(builder: Any, *dims: int) -> None:
            grid = self.launches[-1].grid
            true = grid + (1,) * (3 - len(grid))
            count, run = int(np.prod(true)), int(np.prod(dims))  # run is less than count if only the ends run
            programs = np.arange(run)
            programs[run // 2 :] += count - run
            self._order = programs if self.seed is None else self._random.permutation(programs)
            original(builder, *true)

        return set_dims

    def _starting(self, original: Callable[..., None]) -> Callable[..., None]:
        def start(builder: Any, x: int, y: int, z: int) -> None:
            dims = builder.grid_dim
            number = (x * dims[1] + y) * dims[2] + z if self.last is None else x
            self._program = int(self._order[number])
            self._epoch = (number + 1) << _BARRIERS
            original(builder, *(int(i) for i in np.unravel_index(self._program, dims)))

        return start

    def _barrier(self) -> None:
        self._epoch += 1
        if self._epoch % (1 << _BARRIERS) == 0:
            self._fail(f"more than {(1 << _BARRIERS) - 1} barriers in one program, which the guard cannot count")

    def _loading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load(builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            for p, addresses, _ in self._lanes(ptrs, mask, None):
                self._load(p, addresses, _itemsize(ptrs))
            return original(builder, _untagged(ptrs), mask, *rest, **named)

        return load

    def _storing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            for p, addresses, values in self._lanes(ptrs, mask, value):
                self._store(p, addresses, values, _itemsize(ptrs))
            return original(builder, _untagged(ptrs), value, mask, *rest, **named)

        return store

    # ---- the checks

    def _fail(self, what: str) -> NoReturn:
        frame, where = sys._getframe(1), ""
        while frame is not None and not where:
            path = Path(frame.f_code.co_filename)
            if path != Path(__file__) and _PACKAGE not in path.parents:
                where = f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        launch = self.launches[-1]
        program = np.unravel_index(self._program, launch.grid) if launch.grid else ()
        raise GuardError(f"{launch.kernel}, program {tuple(int(i) for i in program)}, {where}: {what}")

    def _lanes(self, ptrs: Any, mask: Any, value: Any) -> list[tuple[_Parameter, np.ndarray, np.ndarray]]:
        """The parameter, addresses and values (of a store) of the active lanes, checked for bounds and alignment."""
        kind = "loads" if value is None else "stores"
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        pointers = ptrs.data[active]
        values = np.broadcast_to(value.data, ptrs.data.shape)[active] if value is not None else pointers
        itemsize, out = _itemsize(ptrs), []
        for tag in np.unique(pointers >> np.uint64(_TAG)):
            chosen = pointers >> np.uint64(_TAG) == tag
            addresses = pointers[chosen] & _ADDRESS
            if not 1 <= tag <= len(self._parameters):
                self._fail(f"{kind} at {addresses[0]:#x}, which no parameter points to")
            p = self._parameters[int(tag) - 1]
            bad = (addresses < p.start) | (addresses + np.uint64(itemsize) > p.end)
            if p.inside is not None and not bad.any():
                bad = ~p.inside[(addresses - np.uint64(p.start)).astype(np.int64) // p.tensor.element_size()]
            if bad.any():
                offset = (int(addresses[bad][0]) - p.start) / p.tensor.element_size()
                self._fail(
                    f"{kind} {p.name} out of bounds in {bad.sum()} of {bad.size} lanes, the first at element "
                    f"{offset:g} of {p.tensor.numel()}"
                )
            crooked = addresses % np.uint64(itemsize) != 0
            if crooked.any():
                self._fail(f"{kind} {p.name} misaligned: {itemsize} bytes at {addresses[crooked][0]:#x}")
            highest = self.launches[-1].highest
            element = (int(addresses.max()) - p.start) // p.tensor.element_size()
            highest[p.name] = max(highest.get(p.name, 0), element)
            if self.last is None:
                out.append((p, addresses, values[chosen]))
        return out

    def _count(self, moved: dict[str, Traffic], p: _Parameter, addresses: np.ndarray, itemsize: int) -> None:
        sectors = np.unique(addresses // np.uint64(SECTOR)).size
        moved[p.name] = moved.get(p.name, Traffic()) + Traffic(addresses.size * itemsize, sectors)

    def _foreign(self, epochs: np.ndarray) -> np.ndarray:
        return (epochs != 0) & (epochs >> _BARRIERS != self._epoch >> _BARRIERS)

    def _name(self, epoch: int) -> str:
        if epoch == _SEVERAL:
            return "several programs"
        number = int(self._order[(epoch >> _BARRIERS) - 1])
        return f"program {tuple(int(i) for i in np.unravel_index(number, self.launches[-1].grid))}"

    def _load(self, p: _Parameter, addresses: np.ndarray, itemsize: int) -> None:
        self._count(self.launches[-1].loads, p, addresses, itemsize)
        assert p.span is not None
        where = p.span.granules(addresses, itemsize)
        stored = p.span.stored[where]
        others = self._foreign(stored)
        if others.any():
            self._fail(f"race: loads of {p.name} what {self._name(stored[others][0])} stores in the same launch")
        if (stored == self._epoch).any():
            self._fail(f"loads of {p.name} what it stored itself, without a barrier between")
        loaded = p.span.loaded[where]
        p.span.loaded[where] = np.where(self._foreign(loaded), _SEVERAL, self._epoch)

    def _store(self, p: _Parameter, addresses: np.ndarray, values: np.ndarray, itemsize: int) -> None:
        self._count(self.launches[-1].stores, p, addresses, itemsize)
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        if same.any():
            bits = np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
            if (bits[1:] != bits[:-1])[same].any():
                self._fail(f"two lanes store different values to one element of {p.name}")
        assert p.span is not None
        where = p.span.granules(addresses, itemsize)
        stored, loaded = p.span.stored[where], p.span.loaded[where]
        others = self._foreign(stored)
        if others.any():
            self._fail(f"race: stores to {p.name} where {self._name(stored[others][0])} stores in the same launch")
        others = self._foreign(loaded)
        if others.any():
            self._fail(f"race: stores to {p.name} where {self._name(loaded[others][0])} loads in the same launch")
        if (stored == self._epoch).any():
            self._fail(f"stores to {p.name} again where it stored before, without a barrier between")
        p.span.stored[where] = self._epoch

    def _hinting(self, original: Callable[..., None]) -> Callable[..., None]:
        def set_attr(handle: Any, key: str, values: list[int]) -> None:
            if not _true(handle, key, values):
                self._fail(f"the hint {key} = {values} is false")
            original(handle, key, values)

        return set_attr


def _itemsize(ptrs: Any) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _untagged(ptrs: Any) -> Any:
    return interpreter.TensorHandle(ptrs.data & _ADDRESS, ptrs.dtype)


def _true(handle: Any, key: str, values: list[int]) -> bool:
    """Whether a hint to the compiler is true on every axis.

    For pointers, the step between neighbours is the size of the element, and divisors divide bytes.
    """
    pointer = isinstance(handle.dtype, tl.pointer_type)
    data = handle.data if pointer else handle.data.astype(np.int64)
    unit = _itemsize(handle) if pointer else 1
    for axis, n in enumerate(values):
        lanes = np.moveaxis(data, axis, -1)
        step = np.diff(lanes, axis=-1)
        within = np.arange(1, lanes.shape[-1]) % n != 0  # all but the first of each group of n
        if key == "tt.constancy" and (step[..., within] != 0).any():
            return False
        if key == "tt.contiguity" and (step[..., within] != unit).any():
            return False
        if key == "tt.divisibility":
            first = np.ones(lanes.shape, bool)  # the hint is about the first value of each run of consecutive values
            first[..., 1:] = step != unit
            if (lanes[first] % lanes.dtype.type(n) != 0).any():
                return False
    return True


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.device.type == "cpu" else out

    return call
