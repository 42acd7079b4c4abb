"""The figure of a study of fine-tuning: exact accuracy against the guidance scale at use, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mitune.bench.tune_tables import Gain
from mitune.evaluation.variant import BASE
from mitune.report.style import MUTED, on_paper, png, sheet


def guidance_figure(gains: Sequence[Gain]) -> bytes:
    """A panel a model: the base in gray, and of each variant the share that is right, with its 95 % interval; PNG."""
    models = list(dict.fromkeys(gain.model for gain in gains))
    with on_paper():
        figure = sheet(1 + 4 * len(models), 3.4)
        panels: Any = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        variants = [name for name in dict.fromkeys(gain.variant for gain in gains) if name != BASE]
        colors = {BASE: MUTED, **{name: f"C{index}" for index, name in enumerate(variants)}}
        for axes, model in zip(panels, models, strict=True):
            for name, color in colors.items():
                points = sorted(
                    (gain for gain in gains if (gain.model, gain.variant) == (model, name)),
                    key=lambda gain: gain.guidance_scale,
                )
                scales = [gain.guidance_scale for gain in points]
                low, high = [gain.exact.low for gain in points], [gain.exact.high for gain in points]
                axes.fill_between(scales, low, high, color=color, alpha=0.12, linewidth=0)
                axes.plot(scales, [g.exact.value for g in points], "o-", color=color, markersize=3, label=name)
            axes.set_title(model)
            axes.set_xlabel("guidance scale at use")
            axes.grid(axis="y")
        panels[0].set_ylabel("exactly right")
        panels[-1].legend(fontsize=7)
        return png(figure)
