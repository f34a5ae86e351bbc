"""The launches that Inductor emits for ``benchmarks/plain.py``, for the model in ``benchmarks/gpu_model``.

    python -m tests.support.inductor_counts     # prints the tensors of each launch as JSON

needs torch with CUDA and Triton, and no GPU. The unit is traced on fake tensors. The devices of the graph are then
changed to a GPU, which a few replaced functions of ``torch.cuda`` describe. Inductor generates code for this graph, and
stops before it would load the code. The code has a line for each launch, with the names of its buffers, and the sizes
of the arguments of each kernel. The shape of the blocks is not known: Inductor measures some of them on the GPU and
takes the fastest.

Each launch gets the bytes of its tensors, read once and written once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.gpu_model.gpus import GPUS
from benchmarks.gpu_model.launches import CALLS, add_calls, name_of

GPU, DEVICE = GPUS["h100"], torch.device("cuda:0")
PROPERTIES = SimpleNamespace(
    name=GPU.name,
    major=9,
    minor=0,
    multi_processor_count=GPU.multiprocessors,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=GPU.warp,
    regs_per_multiprocessor=4 * GPU.limits.registers,
    max_threads_per_multi_processor=GPU.limits.warps * GPU.warp,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=GPU.limits.shared,
    gcnArchName="",
)
#: Functions of torch.cuda that Inductor calls while it generates code.
REPLACED = {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_properties": lambda *_: PROPERTIES,
    "_get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "_exchange_device": lambda *_: 0,
    "_maybe_exchange_device": lambda *_: 0,
}
SIZES = {"torch.float32": 4, "torch.int64": 8, "torch.bool": 1}


class Generated(Exception):
    """The code was generated."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """torch.cuda and Triton's driver as on a machine with a GPU, for the generation of code.

    The driver stays, because Triton has no other one without a GPU. So this needs a process of its own.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, GPU.warp),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: DEVICE,
        get_device_interface=lambda: torch.cuda,
    )
    triton.runtime.driver.set_active(driver)
    with contextlib.ExitStack() as stack:
        for name, function in REPLACED.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function, create=True))
        yield


def generated(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> str:
    """Inductor's code for a graph on the GPU that is not there."""
    import torch.utils._pytree as pytree
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, found = FakeTensorMode(allow_non_fake_inputs=True), list[str]()

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)

    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.meta = {k: pytree.tree_map(moved, v) for k, v in node.meta.items() if k != "tensor_meta"}
        node.kwargs = {k: DEVICE if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
    original = GraphLowering.codegen

    def codegen(self: Any) -> Any:
        text, *_ = original(self)
        found.append(getattr(text, "value", text))
        raise Generated

    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended_gpu())
        stack.enter_context(mock.patch.object(GraphLowering, "codegen", codegen))
        stack.enter_context(tracing(TracingContext(mode)))
        # benchmark_kernel puts the sizes of the arguments into the code of each kernel.
        stack.enter_context(torch._inductor.config.patch(compile_threads=1, benchmark_kernel=True))
        try:
            compile_fx.compile_fx_inner(graph, [moved(t) for t in inputs])
        except Exception:  # Inductor wraps what its functions raise
            if not found:
                raise
    return found[0]


def codes(call: str, train: bool) -> list[str]:
    """Inductor's code for a call: forward, and backward if it is trained."""
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    out: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        out.append(generated(graph, inputs))
        return make_boxed_func(graph.forward)

    (n, c, h, w), layout = CALLS[call]
    with FakeTensorMode():
        x = torch.empty(n, c, h, w)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        inputs = [t.detach().requires_grad_(train) for t in (x, torch.empty(4, 8), torch.empty(4, 8))]
        compiled = aot_function(
            plain.steam, compiler, compiler, min_cut_rematerialization_partition, decompositions=select_decomp_table()
        )
        y = compiled(*inputs)
        if train:
            y.backward(torch.empty_like(y))
    return out


def launches(code: str) -> list[dict[str, Any]]:
    """The launches of generated code, in their order, and the bytes of their tensors."""
    signatures: dict[str, list[tuple[str, int]]] = {}
    for part in re.split(r"\n(?=\w+ = async_compile\.triton\()", code)[1:]:
        name = part.split(" = ", 1)[0]
        parameters = re.search(rf"def {name}\(([^)]*)\)", part)
        assert parameters is not None, name
        pointers = [p.strip() for p in parameters[1].split(",") if re.match(r"\s*(?:in|out|in_out)_ptr\d", p)]
        sizes = re.findall(r"arg_\d+ = rand_strided\(\(([^)]*)\), .*?dtype=(torch\.\w+)\)", part)
        assert len(sizes) == len(pointers), name
        numbers = [SIZES[dtype] * _product(shape) for shape, dtype in sizes]
        signatures[name] = list(zip(pointers, numbers, strict=True))
    out: list[dict[str, Any]] = []
    for line in code[code.rindex("def call(") :].splitlines():
        launch = re.match(r"\s*(\w+)\.run\((.*), stream=", line)
        if launch is None or launch[1] not in signatures:
            continue
        given = _arguments(launch[2])
        tensors: dict[str, list[int]] = {}
        for (parameter, size), argument in zip(signatures[launch[1]], given, strict=False):
            name = argument.removeprefix("reinterpret_tensor(").split(",")[0]
            kind = parameter.split("_ptr")[0]
            old = tensors.get(name, [0, 0, 0])
            read, written = size * (kind != "out"), size * (kind != "in")
            tensors[name] = [max(old[0], size), max(old[1], read), max(old[2], written)]
        # The kind of a kernel (pointwise, reduction, persistent reduction) and its number.
        out.append({"kernel": re.sub(r"triton_([a-z]+)_.*_(\d+)$", r"\1_\2", launch[1]), "tensors": tensors})
    return out


def _product(shape: str) -> int:
    out = 1
    for size in shape.split(","):
        out *= int(size) if size.strip() else 1
    return out


def _arguments(text: str) -> list[str]:
    """The arguments of a call, each with the commas within its own brackets."""
    out, depth, begin = [], 0, 0
    for i, letter in enumerate(text + ","):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            out.append(text[begin:i].strip())
            begin = i + 1
    return out


def counted(calls: list[str]) -> dict[str, list[dict[str, Any]]]:
    out = {}
    for call in calls:
        out[name_of(call, "forward")] = launches(codes(call, False)[0])
        out[name_of(call, "backward")] = launches(codes(call, True)[1])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_calls(parser)
    json.dump(counted(parser.parse_args().calls or list(CALLS)), sys.stdout)


if __name__ == "__main__":
    main()
