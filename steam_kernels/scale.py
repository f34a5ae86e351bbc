"""The scale of a layer: a buffer to every tool that walks over tensors, a float to the layer's own call.

Tools move, save, average, broadcast and shard what a module has as parameters and buffers, so the scale is a buffer.
The operators take it as a Python float. On the CPU the float is read at each call. On a GPU reading would make the host
wait, so the buffer is read where it has changed: where another tensor is in its place, or its version counter says that
it was written. Three things follow there, and in compiled code on any device:

* Code that ``torch.compile`` made finds a buffer that was written in place after the next eager call of the unit, or of
  :meth:`ScaledModule.host_scale`. ``load_state_dict`` and ``unit.scale = ...`` need neither.
* A write that the version counter does not see (``unit.scale.data``, another process) is not seen on a GPU.
* Under DistributedDataParallel on GPUs a change must be made on every rank, once the first call has been made.

What is exported, traced or under a function transform takes the buffer itself, as a tensor.
"""

from __future__ import annotations

import struct
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
        self._set(1.0, device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale" and not isinstance(value, Tensor):
            number = not isinstance(value, bool) and isinstance(value, (int, float))
            if not number or not abs(value) <= torch.finfo(torch.float32).max:
                raise TypeError(f"scale must be a finite number in float32's range, got {value!r}")
            self._set(value, self.scale.device)
        else:
            super().__setattr__(name, value)

    def _set(self, value: float, device: torch.device | str | int | None) -> None:
        # A buffer made in inference mode could not be written outside it, and has no version counter.
        with torch.inference_mode(False):
            # The buffer holds float32: so does the float, lest a saved unit differ from the one that goes on.
            (self._value,) = struct.unpack("f", struct.pack("f", value))
            self.register_buffer("scale", torch.full((), self._value, dtype=torch.float32, device=device))
        self._keep()

    def _keep(self) -> None:
        """Notes that the float is the value of the buffer as it is now."""
        self._seen: Tensor | None = self.scale
        self._seen_version = _version(self.scale)

    def host_scale(self) -> float:
        """The scale as a float."""
        if torch.compiler.is_compiling():
            # The compiler puts guards on the float, and on whether the two are one tensor.
            if self._buffers["scale"] is not self._seen:
                _read_while_compiling(self)
        elif not torch.jit.is_tracing():
            self._refresh()
        return self._value

    def _refresh(self) -> None:
        """Reads the buffer, where it may hold another number than the float."""
        buffer = self._buffers["scale"]
        assert buffer is not None
        if _on_host(buffer):
            # At each call, so no attribute is set that stays as it is.
            if _has_value(buffer) and (buffer is not self._seen or _read(buffer) != self._value):
                self._value = _read(buffer)
                self._keep()
            return
        if self._seen is buffer and self._seen_version == _version(buffer):
            return
        if _has_value(buffer):
            broadcast = self._seen is buffer and self._seen_version + 1 == _version(buffer) and _in_ddp_broadcast()
            if not broadcast:
                self._value = _read(buffer)
            self._keep()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledModule:
        self._refresh()
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale is not before:
            # In another dtype, or without a value, as after to_empty().
            self._set(self._value, self.scale.device)
        return self

    def _replicate_for_data_parallel(self) -> ScaledModule:
        self._refresh()
        replica: ScaledModule = super()._replicate_for_data_parallel()
        replica._refresh = lambda: None  # type: ignore[method-assign]  # its buffer is a copy of this one's for one call
        return replica

    def __getstate__(self) -> dict[str, Any]:
        self._refresh()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules that an older version pickled whole have the scale as a plain number.
        number = state.pop("scale", None)
        super().__setstate__(state)
        if "scale" not in self._buffers:
            self._set(number, next((p.device for p in self._parameters.values() if p is not None), None))
        self._keep()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "scale"
        if key not in state_dict:
            trained = any(prefix + name in state_dict for name in self._parameters)
            state_dict = {**state_dict, key: torch.ones((), dtype=torch.float32) if trained else self.scale}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if _has_value(self.scale):
            self._value = _read(self.scale)
        self._keep()


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def _read_while_compiling(module: ScaledModule) -> None:
    if _has_value(module.scale):
        module._value = _read(module.scale)


# What torch.compiler.assume_constant_result does, which would import the compiler with this package: the compiler calls
# the function while it traces, and finds the float as it is from then on.
_read_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_value(buffer: Tensor) -> bool:
    """Whether there is a number in it, which meta tensors and those of tracers and function transforms have not."""
    if torch._C._are_functorch_transforms_active():
        return False
    if type(buffer) is Tensor:
        return not buffer.is_meta
    from torch._subclasses.fake_tensor import is_fake

    return not (buffer.is_meta or is_fake(buffer))


def _in_ddp_broadcast() -> bool:
    """Whether DistributedDataParallel, in whose call this is, has sent the first rank's buffers to all.

    It does so at each call. It has done so when it was made, and that was read; reading it from a GPU again would cost
    a synchronisation a step.
    """
    if not torch.distributed.is_available():
        return False
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return ddp is not None and ddp.will_sync_module_buffers()


def _read(buffer: Tensor) -> float:
    return buffer.item()


def _on_host(buffer: Tensor) -> bool:
    return buffer.is_cpu
