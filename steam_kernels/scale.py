"""The scale of a layer. It is a buffer for tools, and a float for the layer's own call.

Tools move, save, average, broadcast and shard parameters and buffers, so the scale is a buffer. The operators take it
as a Python float. On the CPU a call reads the float from the buffer each time. On a GPU this read would make the host
wait. There a call reads the buffer only after a change: another tensor has replaced it, or its version counter has
increased. This has three consequences on GPUs, and in compiled code on any device:

* After a write in place into the buffer, code from ``torch.compile`` uses the new value only after the next eager call
  of the unit or of :meth:`ScaledModule.host_scale`. ``load_state_dict`` and ``unit.scale = ...`` need no such call.
* A call on a GPU does not see a write that leaves the version counter as it is (``unit.scale.data``, another process).
* Under DistributedDataParallel on GPUs, a change after the first call must be made on every rank.

Exports, traces and function transforms take the buffer itself, as a tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tracing import called_while_compiling


class ScaledModule(nn.Module):
    """A module with a persistent float32 buffer ``scale`` of shape (). Its value is also available as a float.

    ``scale`` starts at 1 and can be set to a number. ``.half()`` and ``to_empty()`` keep its dtype and value. A
    state_dict may lack it. If it has other weights of this module, they were trained without a scale, and loading sets
    the scale to 1. If it has no weights of this module, the scale stays.
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
        # A buffer that is made in inference mode has no version counter and could not be written outside that mode.
        with torch.inference_mode(False):
            # The float is rounded to float32 like the buffer. Otherwise a saved and reloaded unit would give other
            # results.
            (self._value,) = struct.unpack("f", struct.pack("f", value))
            self.register_buffer("scale", torch.full((), self._value, dtype=torch.float32, device=device))
        self._keep()

    def _keep(self) -> None:
        """Records that the float equals the current value of the buffer."""
        self._seen: Tensor | None = self.scale
        self._seen_version = _version(self.scale)

    def host_scale(self) -> float:
        """The scale as a float."""
        if torch.compiler.is_compiling():
            # The compiler guards the float, and whether the buffer is the tensor that was read last.
            if self._buffers["scale"] is not self._seen:
                _read_while_compiling(self)
        elif not torch.jit.is_tracing():
            self._refresh()
        return self._value

    def _refresh(self) -> None:
        """Reads the buffer if its value may differ from the float."""
        buffer = self._buffers["scale"]
        assert buffer is not None
        if _on_host(buffer):
            # This runs at each call, so attributes are set only if they change.
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
            # The new buffer may have another dtype, or no value after to_empty().
            self._set(self._value, self.scale.device)
        return self

    def _replicate_for_data_parallel(self) -> ScaledModule:
        self._refresh()
        replica: ScaledModule = super()._replicate_for_data_parallel()
        replica._refresh = lambda: None  # type: ignore[method-assign]  # its buffer is a copy of this buffer for one call
        return replica

    def __getstate__(self) -> dict[str, Any]:
        self._refresh()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In modules that an older version pickled, the scale is a plain number.
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


@called_while_compiling
def _read_while_compiling(module: ScaledModule) -> None:
    if _has_value(module.scale):
        module._value = _read(module.scale)


def _has_value(buffer: Tensor) -> bool:
    """Whether the buffer has a value. Meta tensors and the tensors of tracers and function transforms have none."""
    if torch._C._are_functorch_transforms_active():
        return False
    if type(buffer) is Tensor:
        return not buffer.is_meta
    from torch._subclasses.fake_tensor import is_fake

    return not (buffer.is_meta or is_fake(buffer))


def _in_ddp_broadcast() -> bool:
    """Whether DistributedDataParallel is running this call and has sent the first rank's buffers to all ranks.

    DistributedDataParallel sends them at each call, and each time raises the version counter. It first sent them when
    it was made, and that value was read. Reading the buffer again would cost a GPU synchronisation in each step.
    """
    if not torch.distributed.is_available():
        return False
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return ddp is not None and ddp.will_sync_module_buffers()


def _read(buffer: Tensor) -> float:
    return buffer.item()


def _on_host(buffer: Tensor) -> bool:
    return buffer.is_cpu
