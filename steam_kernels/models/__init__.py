"""Functions that put STEAM units into a model, and ready models with STEAM units."""

from .insert import insert_steam, reattach_steam, remove_steam, steam_sites
from .ready import (
    steam_mobilenet_v2,
    steam_resnet18,
    steam_resnet34,
    steam_resnet50,
    steam_resnet101,
    steam_shufflenet_v2_x1_0,
)

__all__ = [
    "insert_steam",
    "reattach_steam",
    "remove_steam",
    "steam_mobilenet_v2",
    "steam_resnet18",
    "steam_resnet34",
    "steam_resnet50",
    "steam_resnet101",
    "steam_shufflenet_v2_x1_0",
    "steam_sites",
]
