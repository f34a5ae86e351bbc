"""The malloc setting that all benchmarks share. glibc reads it once, before ``main``.

With glibc's defaults, each call maps and unmaps a large output, and the page faults cost more than the kernel. This
module does not import torch: a process that only starts another one need not wait for that import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType

SETTING = {
    "glibc.malloc.mmap_threshold": "4294967296",
    "glibc.malloc.trim_threshold": "8589934592",
    "glibc.malloc.top_pad": "536870912",
}
TUNABLES = ":".join(f"{key}={value}" for key, value in SETTING.items())


def is_set(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started with the setting."""
    return all(f"{key}={value}" in environ.get("GLIBC_TUNABLES", "") for key, value in SETTING.items())


def environment(stock: bool = False, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """This process's environment with the setting, or (``stock``) without it; ``more`` are other tunables of glibc."""
    env = dict(os.environ)
    named = {*SETTING, *more}
    others = [t for t in env.get("GLIBC_TUNABLES", "").split(":") if t and t.split("=")[0] not in named]
    others += [f"{key}={value}" for key, value in more.items()]
    tunables = ":".join(others + ([] if stock else [TUNABLES]))
    env.pop("GLIBC_TUNABLES", None)
    return env | ({"GLIBC_TUNABLES": tunables} if tunables else {})


def restart(more: Mapping[str, str] = MappingProxyType({})) -> None:
    """Starts this program again with the setting and with ``more`` tunables of glibc, if the process lacks them."""
    present = os.environ.get("GLIBC_TUNABLES", "").split(":")
    if not is_set() or any(f"{key}={value}" not in present for key, value in more.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(more=more))
