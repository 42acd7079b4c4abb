"""The figures of the study of scores, as PNG."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mitune.bench.select_summary import Result, by_share_closed
from mitune.evaluation.comparison import POOLED
from mitune.report.style import MUTED, on_paper, png, sheet


def tau_figure(result: Result) -> bytes:
    """Kendall's τ by score and category, a heat map for each setting; PNG."""
    with on_paper():
        settings = list(dict.fromkeys(q.setting for q in result.qualities))
        scores = by_share_closed(result)
        figure = sheet(3.2 + 3.4 * len(settings), 1.2 + 0.19 * len(scores))
        panels: Any = figure.subplots(1, len(settings), squeeze=False)[0]
        for axes, setting in zip(panels, settings, strict=True):
            qualities = [q for q in result.qualities if q.setting == setting]
            categories = list(dict.fromkeys(q.category for q in qualities))
            at = {(q.score, q.category): q.tau.value for q in qualities}
            values = np.array([[at[score, category] for category in categories] for score in scores])
            picture = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                if math.isfinite(value):
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6)
            axes.set_xticks(range(len(categories)), categories, rotation=45, ha="right", fontsize=7)
            axes.set_yticks(range(len(scores)), scores if axes is panels[0] else [""] * len(scores), fontsize=7)
            axes.set_title(str(setting))
        figure.colorbar(picture, ax=list(panels), label="Kendall's τ with the judge", shrink=0.3)
        return png(figure)


def gap_figure(result: Result) -> bytes:
    """Share of the gap from random to oracle that each score closes over all categories, with 95 % intervals; PNG."""
    with on_paper():
        settings = list(dict.fromkeys(q.setting for q in result.qualities))
        scores = by_share_closed(result)
        figure = sheet(7, 1 + 0.19 * len(scores))
        axes = figure.subplots()
        for index, setting in enumerate(settings):
            at = {q.score: q.closed for q in result.qualities if q.setting == setting and q.category == POOLED}
            offset = (index - (len(settings) - 1) / 2) * 0.6 / len(settings)
            places = [row + offset for row in range(len(scores))]
            low, high = [at[s].low for s in scores], [at[s].high for s in scores]
            axes.hlines(places, low, high, color=f"C{index}", linewidth=1.5, alpha=0.6, label=str(setting))
            axes.plot([at[s].value for s in scores], places, "o", color=f"C{index}", markersize=3.5)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(scores)), scores, fontsize=7)
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlabel("share of the gap from random to oracle that is closed")
        axes.legend(fontsize=7, loc="upper left")
        axes.grid(axis="x")
        return png(figure)
