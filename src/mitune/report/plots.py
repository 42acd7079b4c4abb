"""The report's plots: matplotlib to inline SVG, in the colors and fonts of the page around it.

Each function returns `<svg>…</svg>`. Colors are names of the page's CSS variables, so a plot follows light and dark
mode; text stays text, in the page's own font. The same data give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mitune.evaluation.statistics import Array, Interval
from mitune.report.style import STYLE, sheet

# Colors that no plot would use by itself stand for CSS variables until the SVG is written.
SERIES = tuple(f"series-{index}" for index in range(7))
_NAMES = ("ink", "muted", "line", "good", "bad", "base", *SERIES)
_PLACEHOLDER = {name: f"#fe01{index:02x}" for index, name in enumerate(_NAMES)}
_STYLE: dict[Any, Any] = STYLE | {
    "svg.fonttype": "none",
    "axes.edgecolor": _PLACEHOLDER["line"],
    "axes.labelcolor": _PLACEHOLDER["muted"],
    "xtick.color": _PLACEHOLDER["line"],
    "ytick.color": _PLACEHOLDER["line"],
    "xtick.labelcolor": _PLACEHOLDER["muted"],
    "ytick.labelcolor": _PLACEHOLDER["muted"],
    "text.color": _PLACEHOLDER["ink"],
    "grid.color": _PLACEHOLDER["line"],
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot, in the CSS color `color`."""

    color: str
    x: Array
    y: Array


def forest(rows: Sequence[tuple[str, Sequence[tuple[str, Interval]]]], label: str) -> str:
    """Differences with their intervals in percent points, a row per name; each interval has its CSS color."""
    count = max(len(intervals) for _, intervals in rows)
    height = 0.5 + len(rows) * (0.12 + 0.085 * count)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(8.2, height)
        for row, (_, intervals) in enumerate(rows):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color=_PLACEHOLDER["line"], alpha=0.25, linewidth=0)
            for index, (color, interval) in enumerate(intervals):
                y = row + (index - (len(intervals) - 1) / 2) * 0.72 / count
                ends, paint = (100 * interval.low, 100 * interval.high), _PLACEHOLDER[color]
                axes.plot(ends, (y, y), color=paint, linewidth=1.8, alpha=0.5, solid_capstyle="round")
                axes.plot(100 * interval.value, y, "o", color=paint, markersize=4.5)
        axes.axvline(0, color=_PLACEHOLDER["muted"], linewidth=0.8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.tick_params(axis="y", labelcolor=_PLACEHOLDER["ink"])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("points")
        return _svg(figure, label)


def histogram(groups: Sequence[tuple[str, Array]], label: str) -> str:
    """How often each value comes up, a filled outline for each (CSS color, values); the outer 1 % is cut off."""
    pooled = np.concatenate([values for _, values in groups])
    low, high = np.quantile(pooled, (0.005, 0.995))
    edges = np.linspace(low, high if high > low else low + 1, 33)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.75, 1.75)
        for color, values in groups:
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, fill=True, color=_PLACEHOLDER[color], alpha=0.28, linewidth=0)
            axes.stairs(counts, edges, color=_PLACEHOLDER[color], linewidth=1.1)
        axes.axvline(0, color=_PLACEHOLDER["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("score − its prompt’s mean")
        return _svg(figure, label)


def by_rank(shares: Array, average: float, label: str) -> str:
    """Exact share (bins,) of the candidates from the best to the worst by a score, with the share of all of them."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.75, 1.75)
        places = 100 * (np.arange(len(shares)) + 0.5) / len(shares)
        axes.axhline(100 * average, color=_PLACEHOLDER["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
        axes.plot(places, 100 * shares, "o-", color=_PLACEHOLDER["series-0"], markersize=3, linewidth=1.4)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xticks([0, 50, 100], ["best", "rank by score", "worst"])
        sides: tuple[Literal["left", "center", "right"], ...] = ("left", "center", "right")
        for side, text in zip(sides, axes.get_xticklabels(), strict=True):
            text.set_horizontalalignment(side)
        axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        return _svg(figure, label)


def curves(lines: Sequence[Curve], name: str, label: str) -> str:
    """A quantity over the iterations: each curve faint, and its running mean over a tenth of its length clear."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.9, 2.3)
        for line in lines:
            paint = _PLACEHOLDER[line.color]
            axes.plot(line.x, line.y, color=paint, linewidth=0.7, alpha=0.25)
            axes.plot(line.x, _running_mean(line.y, len(line.y) // 20), color=paint, linewidth=1.5)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="y", nbins=5)
        axes.set_xlabel("iteration")
        axes.set_ylabel(name)
        return _svg(figure, label)


def by_round(lines: Sequence[Curve], name: str, label: str) -> str:
    """A quantity after each round of training."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.75, 1.9)
        for line in lines:
            axes.plot(line.x, line.y, "o-", color=_PLACEHOLDER[line.color], markersize=3, linewidth=1.4)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlabel("rounds of training done")
        axes.set_title(name, fontsize="small", loc="left")
        return _svg(figure, label)


def _running_mean(values: Array, width: int) -> Array:
    """Mean over the `width` values on either side and the value itself; fewer at the ends and where some are NaN."""
    kernel, finite = np.ones(2 * width + 1), np.isfinite(values)
    counts = np.convolve(finite.astype(np.float64), kernel, "same")
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    means: Array = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)
    return means


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = sheet(width, height)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an inline element that takes its color, font and width from the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label}):  # names of parts must differ between the plots of a page
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Its metadata, its style (which would hold for the whole page), its fonts, and ids that every plot repeats.
    text = re.sub(r"<(metadata|style)[^>]*>.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", lambda match: _opening(match[1], label), text, count=1)
    for name, placeholder in _PLACEHOLDER.items():
        text = text.replace(placeholder, f"var(--{name})")
    return text


def _opening(view_box: str, label: str) -> str:
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return (
        f'<svg viewBox="{view_box}" role="img" aria-label="{escaped}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
