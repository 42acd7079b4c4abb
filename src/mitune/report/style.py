"""The one style of all figures: those of the report, which take the colors of the page, and the PNGs of the docs."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": "medium",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
INK, MUTED, LINE = "#212529", "#868e96", "#dee2e6"
_ON_PAPER: dict[Any, Any] = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
}


def on_paper() -> AbstractContextManager[None]:
    """Figures that are made within have the style, on white."""
    return mpl.rc_context(STYLE | _ON_PAPER)


def sheet(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
