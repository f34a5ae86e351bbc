"""The cuda backend: compiled CUDA C++ kernels. They are the fallback on GPUs where the Triton kernels do not run."""

from __future__ import annotations

import torch

from . import native
from .base import Backend, Call, too_large

#: The number of bits of the kernels' index arithmetic inside a sample.
BITS = 31


def why_not(call: Call | None) -> str:
    """ "" if the CUDA kernels can run the call, else the reason."""
    if native.CUDA.reason:
        return native.CUDA.reason
    if call is not None and call.x.device.type != "cuda":
        return f"the cuda backend runs tensors on a GPU, and x is on {call.x.device}"
    if not torch.cuda.is_available():
        return "there is no GPU that CUDA can use (torch.cuda.is_available() is False)"
    reason = native.why_not_gpu(torch.cuda.current_device() if call is None else call.x.device.index)
    return reason or ("" if call is None else why_not_sizes(call))


def why_not_sizes(call: Call) -> str:
    """ "" if the call's sizes fit the kernels' arithmetic and grids, else the reason."""
    samples, channels, height, width = call.x.shape
    # Two numbers must fit. A warp's last step reaches at most column W + 32. The blocks of a grid have at least 64
    # elements each, except the last block of a sample, so their number times 64 is at most N (C H W + 64).
    return too_large("cuda", "W + 32", width + 32, BITS) or too_large(
        "cuda", "N (C H W + 64)", samples * (channels * height * width + 64), BITS + 6
    )


BACKEND = Backend("cuda", why_not, devices=("cuda",), prefix="cuda_")
