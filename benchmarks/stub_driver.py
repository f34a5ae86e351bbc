"""A stand-in for Triton's driver, with which a machine without a GPU compiles the kernels and prepares their launches.

Triton asks its driver for the target, loads machine code by it, and launches through it. This driver names a target,
loads nothing and launches nothing. All before the launch is Triton's own code: binding, specialisation, compilation and
the look-up of compiled kernels. Maps are on the CPU, and no kernel reads or writes them.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

#: The target of the machine code, and its key in the launch table.
CAPABILITY, FAMILY = 90, "sm90"
#: The shared memory of a block on an H100 in bytes, and the threads of a block.
SHARED, THREADS = 232448, 1024


class Utilities:
    """The driver's functions for machine code."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        """The module, the function, its registers and spills, and the largest number of threads."""
        return name, name, 0, 0, THREADS

    def unload_module(self, module: str) -> None:
        pass


class StubDriver:
    """Triton's active driver after :func:`install`. ``launches`` counts the launches that it was asked for."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.utils, self.launches = GPUTarget("cuda", CAPABILITY, 32), Utilities(), 0

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The launcher of one compiled kernel."""

        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def install() -> StubDriver:
    """Makes a stand-in Triton's active driver, and lets the triton backend take tensors on the CPU.

    Raises:
        RuntimeError: Triton's interpreter runs the kernels in this process, which compiles nothing.
    """
    from triton.runtime import driver

    from steam_kernels.backends import triton as backend

    kernels = backend.triton_kernels()
    if kernels.reason or kernels.module.INTERPRETED:
        raise RuntimeError(kernels.reason or "TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    stub = StubDriver()
    driver.set_active(stub)
    names = "forward", "backward", "forward_"
    operators = {name: functools.partial(getattr(kernels.module, name), family=FAMILY) for name in names}
    # The backend takes tensors on the CPU only from Triton's interpreter.
    module = SimpleNamespace(INTERPRETED=True, **operators)
    backend.triton_kernels = lambda: backend.Kernels(module)  # type: ignore[assignment]
    backend._why_not_device.cache_clear()
    return stub
