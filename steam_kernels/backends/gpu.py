"""What the GPU backends need to know of a machine and a call; loads the Triton kernels when first asked.

Importing Triton takes longer than importing this package, and may fail: neither happens before a call is on a GPU or
names the backend.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from . import Call

#: Compute capability that the kernels are compiled for at least; PyTorch's and Triton's own least is not below it.
LEAST_CAPABILITY = (7, 0)
#: The bits that index arithmetic inside a sample has, of sizes and without a sign; offsets are of 64.
BITS = 31
#: Channels that the tiles of one program may have, all steps of its walk together.
LARGEST_BLOCK = 2**15
#: Elements that a tile may have which holds a whole weight's row.
LARGEST_WEIGHT = 2**14


class Kernels(NamedTuple):
    """The Triton kernels' module, or None and the reason."""

    module: Any
    reason: str = ""


@cache
def triton_kernels() -> Kernels:
    """Imports ``backends.triton``, once."""
    try:
        from . import triton
    except Exception as error:  # what a broken installation raises is anybody's guess
        lines = str(error).splitlines() or [""]
        return Kernels(None, f"Triton cannot be imported: {type(error).__name__}: {lines[0]}")
    return Kernels(triton)


def why_not_device(kind: str, index: int | None) -> str:
    """ "" where the Triton kernels run on this device; None is any GPU of this machine, or the interpreter."""
    return _why_not_device(kind, index)


# What torch.compiler.assume_constant_result does, which would import the compiler with this package.
why_not_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        return ""
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return ""
    least, own = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
    return f"the triton backend needs compute capability {least}, and cuda:{index} has {own}"


def why_not_triton(call: Call | None) -> str:
    """The triton backend's ``why_not``."""
    if call is None:
        return why_not_device("cuda", None)
    device = call.x.device
    return why_not_device(device.type, device.index) or _why_not_sizes(call)


def _too_large(backend: str, name: str, size: int, bits: int = BITS) -> str:
    return f"the {backend} backend needs {name} below 2^{bits}, and it is {size}" if size >= 2**bits else ""


def why_not_cuda_sizes(call: Call) -> str:
    """ "" where the cuda kernels' arithmetic and grids have room for the call's sizes."""
    samples, channels, height, width = call.x.shape
    # a row's end and a warp's step beyond it; 64 times a grid's blocks, of 64 elements at least but for a sample's last
    return _too_large("cuda", "W + 32", width + 32) or _too_large(
        "cuda", "N (C H W + 64)", samples * (channels * height * width + 64), BITS + 6
    )


def _why_not_sizes(call: Call) -> str:
    _, channels, height, width = call.x.shape
    gh, gw = call.grid
    # the largest numbers that a kernel computes in 32 bits: the end of a group of 16 channels' pixels, what is divided
    # for the end of the last cell, and the farthest that a block, or a neighbour on the ring, reaches beyond all nodes
    radius = min(call.unit.channel_radius, channels // 2)
    reach = radius + LARGEST_BLOCK
    for name, size in (
        ("16 H W", 16 * height * width),
        ("gh (H + 1)", gh * (height + 1)),
        ("gw (W + 1)", gw * (width + 1)),
        ("C + gh gw + channel_radius + 2^15", channels + gh * gw + reach),
        # a block's window of the ring, backward
        ("4 channel_radius + 2^15", 4 * radius + LARGEST_BLOCK),
    ):
        if reason := _too_large("triton", name, size):
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
