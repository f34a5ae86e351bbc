"""A copy of the sources to build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.build import ROOT, write_torch


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the files that the build reads, next to a stub of torch that can be found."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("cmake", "csrc", "include"):
        shutil.copytree(ROOT / name, copy / name)
    (copy / "steam_kernels").mkdir()
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "steam_kernels" / name, copy / "steam_kernels")
    write_torch(copy, '__version__ = "2.14.1"')
    return copy
