"""Runs the Triton backend's operators on CPU tensors, each launch as the PTX that Triton emits for a GPU.

    python -m tests.support.ptx.triton

reads calls from standard input and writes answers to standard output, for :class:`tests.support.ptx.device.Device`.
The process must not have TRITON_INTERPRET, with which Triton has no compiler.

A launch goes through Triton's own binder and passes up to PTX. Memory of ``torch.empty`` is filled with NaN, and which
of its bytes were stored is kept from one launch of a call to the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steam_kernels.schemas import Backward, Forward
from tests.support.ptx import executor
from tests.support.ptx.executor import Launch, Memory, Result
from tests.support.ptx.parse import Kernel
from tests.support.triton_aot import TARGETS, Recorded, specialise

#: Changes a kernel before it runs: (name, PTX) -> PTX. It must be a function of a module, to reach this process.
Edit = Callable[[str, str], str]


@dataclass
class Call:
    """One call of an operator, and how its launches are run."""

    operator: str
    given: Forward | Backward
    target: str = "sm_80"
    whole: bool = True  # one launch for all stages of a sample that is small, as the launch table has it
    seed: int = 0
    first_wins: bool = False
    edit: Edit | None = None


class Answer(NamedTuple):
    """The operator's results, or an error; the arguments' maps after the call; and the launches."""

    results: tuple[Tensor, ...] = ()
    x: Tensor | None = None
    launches: tuple[Result, ...] = ()
    unstored: int = 0  # bytes of the results
    error: str = ""
    is_fault: bool = False


class Poison:
    """Fills memory of ``torch.empty`` with ones, and keeps which of its bytes a kernel has stored."""

    def __init__(self) -> None:
        self.written: dict[int, np.ndarray] = {}
        self._kept: list[Tensor] = []  # or another tensor could get the memory

    def fresh(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes():
            ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
            self.written[storage.data_ptr()] = np.zeros(storage.nbytes(), np.uint8)
            self._kept.append(t)
        return t

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]

        def poisoned(original: Any) -> Any:
            return lambda *args, **options: self.fresh(original(*args, **options))

        for owner, name, original in originals:
            setattr(owner, name, poisoned(original))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def memory(self, tensors: list[Tensor]) -> tuple[Memory, list[int]]:
        """The storages of these tensors, and where each tensor begins."""
        memory, begins, out = Memory(), dict[int, int](), []
        for t in tensors:
            storage = t.untyped_storage()
            host = storage.data_ptr()
            if host not in begins:
                shift = t.element_size().bit_length() - 1
                begins[host] = memory.add(host, storage.nbytes(), self.written.get(host), shift)
            out.append(begins[host] + t.data_ptr() - host)
        return memory, out

    def unstored(self, results: tuple[Tensor, ...]) -> int:
        found = [self.written.get(t.untyped_storage().data_ptr()) for t in results if t.numel()]
        return sum(int((written == 0).sum()) for written in found if written is not None)


_ALLOCATORS = (torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")


class Compiled(NamedTuple):
    ptx: str
    name: str
    shared: int
    num_warps: int


class Compiler:
    """Triton's passes for one target, up to PTX; each distinct kernel once."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.target = GPUTarget(*TARGETS[target][:3])
        self.backend = make_backend(self.target)
        self._compiled: dict[str, Compiled] = {}

    def __call__(self, launch: Recorded) -> tuple[Compiled, list[Any]]:
        """The kernel of a launch, and the arguments that are not constants."""
        found = specialise(launch, self.backend)
        if found.key not in self._compiled:
            self._compiled[found.key] = self._compile(found.source, found.options)
        return self._compiled[found.key], list(found.arguments.values())

    def _compile(self, source: Any, options: Any) -> Compiled:
        from triton._C.libtriton import ir

        options = self.backend.parse_options({**options.__dict__, **source.parse_options()})
        metadata = {"target": self.target, **options.__dict__}
        stages: dict[str, Any] = {}
        self.backend.add_stages(stages, options, source.language)
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions = self.backend.get_codegen_implementation(options), self.backend.get_module_map()
        module = source.make_ir(self.target, options, *functions, context)
        for name in ("ttir", "ttgir", "llir", "ptx"):
            module = stages[name](module, metadata)
        return Compiled(module, metadata["name"], metadata["shared"], metadata["num_warps"])


class Machine:
    """Runs calls; keeps what was compiled."""

    def __init__(self) -> None:
        self._compilers: dict[str, Compiler] = {}
        self._kernels: dict[tuple[str, str], Kernel] = {}

    def run(self, call: Call) -> Answer:
        from triton.runtime.jit import JITFunction

        from steam_kernels.backends.triton import launch, operators

        poison, launches = Poison(), list[Result]()
        originals = launch.SMALL, JITFunction.run
        launch.SMALL = launch.SMALL if call.whole else 0
        seeds = random.Random(call.seed)
        compiler = self._compilers.setdefault(call.target, Compiler(call.target))

        def run(fn: Any, *args: Any, grid: tuple[int, ...], warmup: bool = False, **kwargs: Any) -> None:
            compiled, values = compiler(Recorded(fn, args, kwargs, grid))
            ptx = compiled.ptx if call.edit is None else call.edit(fn.__name__, compiled.ptx)
            launches.append(self._launch(ptx, compiled, grid, values, poison, seeds.getrandbits(60), call.first_wins))
            launches[-1].kernel = fn.__name__

        JITFunction.run = run
        try:
            with poison():
                found = getattr(operators, call.operator)(call.given, TARGETS[call.target][3])
        except executor.Fault as fault:
            return Answer(launches=tuple(launches), error=str(fault), is_fault=True)
        finally:
            launch.SMALL, JITFunction.run = originals
        results = () if found is None else found
        return Answer(results, call.given.inputs.x, tuple(launches), poison.unstored(results))

    def _launch(
        self,
        ptx: str,
        compiled: Compiled,
        grid: tuple[int, ...],
        values: list[Any],
        poison: Poison,
        seed: int,
        first_wins: bool,
    ) -> Result:
        kernel = self._kernels.setdefault((ptx, compiled.name), Kernel(ptx, compiled.name))
        memory, addresses = poison.memory([value for value in values if isinstance(value, Tensor)])
        following = iter(addresses)
        parameters = [next(following) if isinstance(value, Tensor) else value for value in values]
        how = Launch(grid, (32 * compiled.num_warps,), parameters, compiled.shared, seed, first_wins)
        return executor.launch(kernel, how, memory)


def send(stream: IO[bytes], message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)  # which keeps what tensors share
    stream.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    data = stream.read(struct.unpack("<q", head)[0])
    return torch.load(io.BytesIO(data), weights_only=False)


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not come between answers
    machine = Machine()
    while True:
        try:
            call = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = machine.run(call)
        except Exception:
            answer = Answer(error=traceback.format_exc())
        send(answers, answer)


if __name__ == "__main__":
    # As a module of its own name, so that both processes know the same classes.
    from tests.support.ptx import triton

    triton.main()
