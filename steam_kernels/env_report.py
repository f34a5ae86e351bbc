"""``python -m steam_kernels.env_report`` reports versions, GPUs, backends and compiled kernels.

The report gives the reason for each backend that cannot run here.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import __version__, available_backends
from .backends import ENVIRONMENT, native

#: The environment variables that select backends and kernels.
VARIABLES = (ENVIRONMENT, native.ENVIRONMENT, native.CACHE_ENVIRONMENT)


def report() -> str:
    """The report as text, with one fact in each line."""
    hip, other = torch.version.hip, native.shadowed()
    cuda = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    lines = [
        f"steam_kernels  {__version__}",
        f"torch          {torch.__version__} ({cuda}, {torch.get_num_threads()} threads)",
        f"triton         {_triton()}",
        f"package        {native.PACKAGE}",
        *([f"  hides        {other} (run elsewhere than in {native.PACKAGE.parent})"] if other else []),
        f"Python         {platform.python_version()}, {platform.system()} {platform.machine()}",
        *(f"GPU {i}          {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
        "",
        "backends, in the order in which they are tried:",
    ]
    lines += [f"  {name:12} {reason or 'usable'}" for name, reason in available_backends().items()]
    cpu = native.CPU
    lines += ["", f"CPU kernels    {cpu.path if cpu.path.is_file() else 'not built'}"]
    if cpu.supported:
        lines += [f"  in use       {cpu.variant}", f"  supported    {', '.join(cpu.supported)}"]
    if cpu.cache:
        lines += [f"  cache        {cpu.cache}"]
    cuda_kernels = native.CUDA
    lines += [f"CUDA kernels   {cuda_kernels.path if cuda_kernels.path.is_file() else 'not built'}"]
    if cuda_kernels.supported:
        lines += [f"  built for    {', '.join(cuda_kernels.supported)}"]
    lines.append("")
    lines += [f"{name} = {os.environ.get(name, '(not set)')}" for name in VARIABLES]
    return "\n".join(lines)


def _triton() -> str:
    interpreted = " (interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    try:
        return metadata.version("triton") + interpreted
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
