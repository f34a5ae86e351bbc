"""What the package needs of torch; imported before anything else, whose errors on an older torch say nothing."""

from __future__ import annotations

import torch

#: The oldest torch that has the stable ABI which the compiled kernels are built on, and what ``steam()`` asks of it.
TORCH = (2, 10)

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
    raise ImportError(
        f"steam_kernels needs torch {'.'.join(map(str, TORCH))} or newer, and this is torch {torch.__version__}: "
        "python -m pip install --upgrade torch"
    )
