"""STEAM units put into models."""

from .insert import insert_steam

__all__ = ["insert_steam"]
