"""The memory layout of a call's tensors: the strides that kernels read, and the checks of a call in place.

Kernels know two memory formats, NCHW and channels_last, and take every map of a call in the strides of x. The operators
take any strides. Operators written in Python copy other strides by the functions of this module. The compiled operators
follow the same rules in ``csrc/common/bindings.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """``x`` itself if it is dense in NCHW or channels_last, else an NCHW copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def match_strides(t: Tensor, x: Tensor) -> Tensor:
    """``t`` itself if it has the strides of the dense ``x``, else a copy with these strides."""
    return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def recording(*tensors: Tensor | None) -> bool:
    """Whether autograd is recording an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_inplace(x: Tensor, channel_weight: Tensor, spatial_weight: Tensor, residual: Tensor | None) -> None:
    """Raises RuntimeError or ValueError if writing y into x would corrupt a gradient, the result or elements of x."""
    if recording(x, channel_weight, spatial_weight, residual):
        raise RuntimeError(
            "inplace=True overwrites x, which the backward pass needs: call it under torch.no_grad() or "
            "torch.inference_mode(), or with inplace=False"
        )
    # The compiler cannot trace is_neg(), and its inputs have no negative bit.
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError("x must not be a negative view if inplace=True: give x.resolve_neg(), or use inplace=False")
    check_overlaps(x, residual)


def check_overlaps(x: Tensor, residual: Tensor | None) -> None:
    """Raises ValueError if x overlaps itself or ``residual`` in memory, because y cannot be written into such an x."""
    if residual is not None and _share(x, residual):
        raise ValueError("residual must not share memory with x if inplace=True: give a copy, or use inplace=False")
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)) and _overlaps_itself(x):
        raise ValueError(
            f"x must not overlap itself in memory if inplace=True, got shape {tuple(x.shape)} with strides {x.stride()}"
        )


def _share(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False  # storages cannot be read there, and functionalisation keeps the values right
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    ends = [t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (a, b)]
    return bool(a.numel() > 0 and max(a.storage_offset(), b.storage_offset()) <= min(ends))


def _overlaps_itself(x: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
