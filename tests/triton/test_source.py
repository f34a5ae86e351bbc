"""The barriers of the compiled stages, and the names that the backend's source may not use."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import steam_kernels
from tests.support import triton_aot

pytest.importorskip("triton")

#: Run by a process without TRITON_INTERPRET.
BARRIERS = """
import json, os, re, sys, torch
from tests.support import triton_aot

class Texts(triton_aot.Compiler):
    def _read(self, compiled, *_):
        return compiled.asm

found = []
for target in ("sm_80", "gfx942"):
    compiler = Texts(target)
    few = triton_aot.Compiled("", (2, 400, 7, 7), torch.float32, "nhwc")
    many = triton_aot.Compiled("", (2, 400, 12, 12), torch.float32, "nhwc", grid=(12, 12))
    both = [(case, each) for case in (few, many) for each in triton_aot.launches(case, triton_aot.TARGETS[target][3])]
    for case, (_, launch, _) in both:
        if case is many and not launch.kernel.__name__.startswith("lattice"):
            continue
        asm = compiler(launch)
        full = [l for l in asm["ttgir"].splitlines() if "ttg.barrier" in l and "local" not in l]
        if target == "gfx942":
            fences = [l for l in asm["llir"].splitlines() if "fence syncscope" in l and "mmra" not in l]
            kept = [sum(kind in l for l in fences) for kind in ("release", "acquire")]
        else:
            # The position of a barrier in the source distinguishes the kernel's own barriers from those that the
            # compiler adds.
            named = dict(re.findall(r'\\.file\\s+(\\d+) "([^"]+)"', asm["ptx"]))
            texts = {number: open(path).read().splitlines() for number, path in named.items() if os.path.exists(path)}
            at, kept = None, set()
            for l in asm["ptx"].splitlines():
                if m := re.match(r"\\s*\\.loc\\s+(\\d+) (\\d+)", l):
                    at = m[1], int(m[2])
                elif "bar.sync" in l and at and "debug_barrier" in texts.get(at[0], {at[1] - 1: ""})[at[1] - 1]:
                    kept.add(at)
            kept = [len(kept)] * 2
        found.append([target, launch.kernel.__name__, len(full), kept])
print(json.dumps(found))
"""


def test_barriers_order_global_memory() -> None:
    """Each barrier of the kernels is a barrier of all memory in Triton's IR, and exists in the compiled code.

    On AMD it is fences of the workgroup that no annotation restricts to local memory. The barriers that Triton adds
    have such an annotation.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(triton_aot.ROOT)
    done = subprocess.run(
        [sys.executable, "-c", BARRIERS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    # A barrier is before each transform whose tokens or flows the program has computed, and before the lattice's gates
    # or shares are read.
    barriers = {
        "graph": 1, "gate": 2, "graph_backward_cells": 0, "graph_backward_ring": 3, "gate_backward": 0,
        "lattice": 1, "lattice_backward": 2,
    }  # fmt: skip
    assert [(target, kernel) for target, kernel, *_ in found] == [
        (target, kernel) for target in ("sm_80", "gfx942") for kernel in barriers
    ]
    for target, kernel, full, kept in found:
        assert full == barriers[kernel] and min(kept) >= full, (target, kernel, full, kept)


#: Names that the kernels and their callers do not use: they do not look at the device, and the rest is not portable.
FORBIDDEN = (
    "torch.cuda",
    "is_cuda",
    "device.type",
    "synchronize",
    "libdevice",
    "inline_asm",
    "tl.dot",
    "atomic_",
    "autotune(",
)


def forbidden(source: str) -> set[str]:
    """The forbidden names in the code of a module, without its docstrings and comments."""
    code = ast.unparse(ast.fix_missing_locations(_WithoutDocstrings().visit(ast.parse(source))))
    return {name for name in FORBIDDEN if name in code}


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Expr(ast.Constant(None)) if isinstance(node.value, ast.Constant) else node


@pytest.mark.parametrize(
    "name",
    [
        "arguments", "calls", "gate", "graph", "graph_backward", "launch", "operators", "pool", "transform", "weights",
        "whole",
    ],
)  # fmt: skip
def test_knows_no_device_and_uses_nothing_special(name: str) -> None:
    package = Path(steam_kernels.__file__).parent / "backends" / "triton"
    assert forbidden((package / f"{name}.py").read_text()) == set()


def test_what_is_forbidden_is_found() -> None:
    assert forbidden("def f(x):\n    'no tl.dot'\n    return tl.dot(x, x) if x.is_cuda else tl.atomic_add(x, 1)\n") == {
        "tl.dot",
        "is_cuda",
        "atomic_",
    }
