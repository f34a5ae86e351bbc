"""Fused kernels for STEAM, a channel and spatial attention unit for CNNs (arXiv 2412.09023; a reconstruction)."""

from . import requirements  # noqa: F401  # isort: skip
from . import reference
from .backends import available_backends
from .flops import cost
from .functional import steam
from .models import insert_steam, remove_steam, steam_sites
from .module import FusedSTEAM

__all__ = [
    "FusedSTEAM",
    "available_backends",
    "cost",
    "insert_steam",
    "reference",
    "remove_steam",
    "steam",
    "steam_sites",
]
#: The version is stated only here. pyproject.toml and CMakeLists.txt read this line, so it must stay a plain string.
__version__ = "0.1.0"
