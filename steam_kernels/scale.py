"""The scale of a layer: a buffer to every tool that walks over tensors, a float to the layer's own call.

Tools move, save, average, broadcast and shard what a module has as parameters and buffers, so that the scale is a
buffer. A call takes it as a Python float, since reading a number from a GPU would make the host wait for it. The float
is read again only where the buffer has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ScaledModule(nn.Module):
    """A module with a persistent float32 buffer ``scale`` of shape (), whose value is also at hand as a float.

    ``scale`` may be set to a number, and is 1 at first. It is kept through ``.half()`` and ``to_empty()``. A state_dict
    need not have it: weights that come without a scale were trained without one, so that loading them sets it to 1, and
    where there are none of this module's it stays.
    """

    scale: Tensor

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        super().__init__()
        self._value = 1.0
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
        self._keep()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale" and not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TypeError(f"scale must be a finite number, got {value!r}")
            # The buffer holds float32: so does the float, lest a saved unit differ from the one that goes on.
            self._value = torch.tensor(value, dtype=torch.float32, device="cpu").item()
            value = torch.full((), self._value, dtype=torch.float32, device=self.scale.device)
            super().__setattr__(name, value)
            self._keep()
        else:
            super().__setattr__(name, value)

    def _keep(self) -> None:
        """Notes that the float is the value of the buffer as it is now."""
        buffer = self._buffers["scale"]
        self._seen: tuple[Tensor | None, int] | None = (buffer, _version(buffer))

    def host_scale(self) -> float:
        """The scale as a float; a buffer that was replaced or written is read once."""
        _refresh(self)
        return self._value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledModule:
        _refresh(self)
        before = self._buffers["scale"]
        super()._apply(fn, recurse)
        if self._buffers["scale"] is not before:
            # In another dtype, or without a value, as after to_empty().
            self.scale = self._value  # type: ignore[assignment]
        return self

    def _replicate_for_data_parallel(self) -> ScaledModule:
        _refresh(self)
        replica: ScaledModule = super()._replicate_for_data_parallel()
        replica._seen = None  # its buffer is a copy of this one's, made anew for each call
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules that were pickled whole by versions before 0.2 have the scale as a plain number.
        number = state.pop("scale", None)
        super().__setstate__(state)
        if "scale" not in self._buffers:
            device = next((p.device for p in self._parameters.values() if p is not None), None)
            self._value = 1.0
            self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
            self.scale = number
        self._keep()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "scale"
        if key not in state_dict:
            trained = any(prefix + name in state_dict for name in self._parameters)
            state_dict = {**state_dict, key: torch.ones((), dtype=torch.float32) if trained else self.scale}
        super()._load_from_state_dict(state_dict, prefix, *args)
        _refresh(self)


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def _refresh(module: ScaledModule) -> None:
    """Reads the buffer of ``module`` where it is not what was read last."""
    if module._seen is None:
        return
    buffer = module._buffers["scale"]
    seen, version = module._seen
    if buffer is seen and _version(buffer) == version:
        return
    if buffer is None or not _readable(buffer):
        return
    if not (buffer is seen and _version(buffer) == version + 1 and _broadcast(buffer)):
        module._value = _read(buffer)
    module._keep()


# What torch.compiler.assume_constant_result does, which would import the compiler with this package: a compiler calls
# the function while it traces, and finds the float as it is from then on, on which it puts a guard.
_refresh._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _readable(buffer: Tensor) -> bool:
    """Whether there is a number in it: tracers, function transforms and meta tensors have none."""
    from torch._subclasses.fake_tensor import is_fake

    return not (
        buffer.is_meta
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or is_fake(buffer)
    )


def _broadcast(buffer: Tensor) -> bool:
    """Whether the buffer's last change was DistributedDataParallel's, which sends the first rank's at each call.

    It sent them when it was made too, outside a call, which was read: what it sends now is no news, and reading it from
    a GPU would cost a synchronisation a step.
    """
    if _on_host(buffer) or not torch.distributed.is_available():
        return False
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return ddp is not None and ddp.will_sync_module_buffers()


def _read(buffer: Tensor) -> float:
    return buffer.item()


def _on_host(buffer: Tensor) -> bool:
    return buffer.is_cpu
