"""The check that torch is new enough. It runs first, because other imports fail on an old torch with unclear errors."""

from __future__ import annotations

import torch

#: The oldest torch with the stable ABI of the compiled kernels and the functions that ``steam()`` calls.
TORCH = (2, 10)

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
    raise ImportError(
        f"steam_kernels needs torch {'.'.join(map(str, TORCH))} or newer, and this is torch {torch.__version__}: "
        "python -m pip install --upgrade torch"
    )
