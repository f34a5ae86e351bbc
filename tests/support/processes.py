"""Runs Python code in a separate process, with this package or a copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import steam_kernels

PACKAGE = Path(steam_kernels.__file__).parent
SMOKE = """
import torch, steam_kernels
from steam_kernels import FusedSTEAM, reference
unit = FusedSTEAM(6, activation="relu")
x = torch.randn(2, 6, 9, 8, requires_grad=True)
y = unit(x, residual=x)
y.sum().backward()
plain = reference.STEAM(6, activation="relu")
plain.load_state_dict(unit.state_dict())
assert torch.allclose(y, plain(x, residual=x), rtol=1e-5, atol=1e-6)
assert x.grad.isfinite().all() and unit.channel_weight.grad.abs().max() > 0
with torch.no_grad():
    unit.inplace = True
    z = x.detach().clone()
    assert unit(z, x) is z and torch.allclose(z, y, rtol=1e-5, atol=1e-6)
"""


def python(code: str, *, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STEAM_KERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"],
        env=clean | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(code: str, **options: object) -> str:
    done = python(code, **options)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
