"""Pictures whose bytes depend on the plotted numbers alone: no date, fixed ids, text as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

STYLE = {
    "svg.hashsalt": "steam_kernels",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.facecolor": "white",
}
plt.rcParams.update(STYLE)


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of ``size`` inches and its axes."""
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def save_figure(figure: Any, path: Path) -> None:
    """Saves as SVG or PNG, by the suffix of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An SVG names its version of matplotlib, because another version may place things differently.
    named = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=110, metadata=named)
    plt.close(figure)
