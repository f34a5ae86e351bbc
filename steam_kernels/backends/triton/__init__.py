"""The triton backend: which devices and sizes its kernels take; loads the kernels when it is first asked.

Importing Triton takes longer than importing this package, and may fail. It is imported when a call is on a GPU or names
the backend. :mod:`.operators` has the operators, and imports Triton.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from typing import Any, NamedTuple

import torch

from ...tracing import called_while_compiling
from ..base import Backend, Call, too_large

#: Compute capability that the kernels are compiled for at least; PyTorch's and Triton's own least is not below it.
LEAST_CAPABILITY = (7, 0)
#: The bits that index arithmetic inside a sample has, of sizes and without a sign; offsets are of 64.
BITS = 31
#: Channels that the tiles of one program may have, all steps of its walk together.
LARGEST_BLOCK = 2**15
#: Elements that a tile may have which holds a whole weight's row.
LARGEST_WEIGHT = 2**14


class Kernels(NamedTuple):
    """The module of the operators, or None and the reason."""

    module: Any
    reason: str = ""


@cache
def triton_kernels() -> Kernels:
    """Imports the operators, once."""
    try:
        from . import operators
    except Exception as error:  # a broken installation may raise anything
        lines = str(error).splitlines() or [""]
        return Kernels(None, f"Triton cannot be imported: {type(error).__name__}: {lines[0]}")
    return Kernels(operators)


@called_while_compiling
def why_not_device(kind: str, index: int | None) -> str:
    """ "" where the Triton kernels run on this device; None is any GPU of this machine, or the interpreter."""
    return _why_not_device(kind, index)


@cache
def _why_not_device(kind: str, index: int | None) -> str:
    if kind not in ("cuda", "cpu"):
        return f"the triton backend runs tensors on a GPU, and x is on {kind}"
    kernels = triton_kernels()
    if kernels.reason or kernels.module.INTERPRETED:
        return kernels.reason
    if kind == "cpu":
        return "the triton backend runs tensors on a GPU, and x is on the CPU; only Triton's interpreter runs there"
    if index is None:
        if not torch.cuda.is_available():
            return "the triton backend needs a GPU, and PyTorch sees none"
        reasons = [why_not_device(kind, i) for i in range(torch.cuda.device_count())]
        return "" if "" in reasons else reasons[0]
    if torch.version.hip:
        return _why_not_driver()
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return _why_not_driver()
    least, own = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
    return f"the triton backend needs compute capability {least}, and cuda:{index} has {own}"


@cache
def _why_not_driver() -> str:
    """ "" if Triton's driver can launch kernels, else the reason.

    The driver has a part in C, which Triton compiles unless its cache has it. Before 3.8, Triton also compiles a C file
    for each kernel. Without a compiler, the first launch would raise.
    """
    from triton.runtime import driver

    try:
        active = driver.active
        _ = active.utils
    except Exception as error:  # no compiler, a compiler that fails, or a driver that Triton does not find
        lines = str(error).splitlines() or [""]
        return f"Triton cannot start its driver: {type(error).__name__}: {lines[0]}"
    compiles = hasattr(sys.modules[type(active).__module__], "compile_module_from_src") and not torch.version.hip
    if compiles and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton before 3.8 needs a C compiler, gcc or clang on the PATH or the variable CC, and there is none"
    return ""


def why_not(call: Call | None) -> str:
    """ "" if the Triton kernels can run the call, else the reason."""
    if call is None:
        return why_not_device("cuda", None)
    device = call.x.device
    return why_not_device(device.type, device.index) or _why_not_sizes(call)


def _why_not_sizes(call: Call) -> str:
    _, channels, height, width = call.x.shape
    gh, gw = call.grid
    # the largest numbers that a kernel computes in 32 bits: the end of a group of 16 channels' pixels, what is divided
    # for the end of the last cell, and the farthest that a block, or a neighbour on the ring, reaches beyond all nodes
    radius = min(call.options.channel_radius, channels // 2)
    reach = radius + LARGEST_BLOCK
    for name, size in (
        ("16 H W", 16 * height * width),
        ("gh (H + 1)", gh * (height + 1)),
        ("gw (W + 1)", gw * (width + 1)),
        ("C + gh gw + channel_radius + 2^15", channels + gh * gw + reach),
        # the window of a block of channels on the ring in the backward pass
        ("4 channel_radius + 2^15", 4 * radius + LARGEST_BLOCK),
    ):
        if reason := too_large("triton", name, size, BITS):
            return reason
    if call.channel_weight.shape[1] > LARGEST_WEIGHT:
        return (
            f"the triton backend takes an embed_dim of {LARGEST_WEIGHT} at most, and it is "
            f"{call.channel_weight.shape[1]}"
        )
    return ""


@cache
def family(index: int) -> str:
    """The architecture family of a GPU, a key of the launch table."""
    if torch.version.hip:
        return "gfx9" if torch.cuda.get_device_properties(index).gcnArchName.startswith("gfx9") else "generic"
    major = torch.cuda.get_device_capability(index)[0]
    return {7: "sm70", 8: "sm80", 9: "sm90"}.get(major, "sm100")


BACKEND = Backend("triton", why_not, devices=("cuda",), prefix="triton_")
