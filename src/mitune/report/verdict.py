"""The verdict of the report: headline, levels, tables and differences of base and tuned models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mitune.evaluation.comparison import MEASURES, POOLED, TITLES, Comparison, Measure
from mitune.evaluation.statistics import Interval
from mitune.pool.selection import CONTROLS
from mitune.report import plots
from mitune.report.words import Context, percent, points, span

BASELINE = "base"


def _pooled(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """Each variant's figure over everything, by the strictest metric that there is."""
    metric = min((c.metric for c in comparisons), key=MEASURES.index, default=None)
    return {c.variant: c for c in comparisons if (c.category, c.split, c.metric) == (POOLED, POOLED, metric)}


def headline_of(comparisons: Sequence[Comparison], first: str | None) -> Context | None:
    """The verdict on variant `first` in words, with what to hold it against; None without an evaluation of it."""
    pooled = _pooled(comparisons)
    tuned = pooled.get(first) if first else None
    if tuned is None or tuned.difference is None:
        return None
    size = f"{abs(100 * tuned.difference.value):.1f} points"
    of_tuned = [c for c in comparisons if (c.variant, c.category, c.metric) == (first, POOLED, tuned.metric)]
    swept = [c for c in pooled.values() if c.variant.startswith(BASELINE)]
    best = max(swept, key=lambda c: c.value.value)
    return {
        "verdict": {1: f"Better by {size}", 0: "No clear difference", -1: f"Worse by {size}"}[tuned.difference.sign],
        "metric": tuned.metric,
        "variant": first,
        "tuned": percent(tuned.value.value),
        "base": percent(pooled[BASELINE].value.value),
        "basis": tuned.basis,
        "difference": _difference(tuned.difference),
        "splits": [(c.split, _difference(c.difference)) for c in of_tuned if c.split != POOLED and c.difference],
        "controls": [(name, _difference(pooled[name].difference)) for name in CONTROLS if name in pooled],
        "best_base": (best.variant, percent(best.value.value)) if len(swept) > 1 else None,
        "beats_best_base": tuned.value.value > best.value.value,
    }


def _difference(difference: Interval | None) -> Context | None:
    """A difference to the base model, in words and as a tone."""
    if difference is None:
        return None
    tone = {1: "better", 0: "unclear", -1: "worse"}[difference.sign]
    span = f"{points(difference.low)} to {points(difference.high)}"
    return {"value": points(difference.value), "span": span, "tone": tone}


def levels(comparisons: Sequence[Comparison], colors: Mapping[str, str], first: str | None) -> Context | None:
    """Each variant's pooled figure on one scale of whole tens of percent: positions in percent of its width."""
    pooled = _pooled(comparisons)
    if not pooled:
        return None
    low = math.floor(10 * min(c.value.low for c in pooled.values())) / 10
    high = math.ceil(10 * max(c.value.high for c in pooled.values())) / 10
    ends = low, max(high, low + 0.1)
    order = sorted(pooled, key=lambda name: (name != BASELINE, name != first))
    rows = []
    for name in order:
        at = [100 * (x - ends[0]) / (ends[1] - ends[0]) for x in (pooled[name].value.low, pooled[name].value.high)]
        dot = 100 * (pooled[name].value.value - ends[0]) / (ends[1] - ends[0])
        figures = {"color": colors[name], "left": at[0], "width": at[1] - at[0], "dot": dot, "first": name == first}
        value = {"value": percent(pooled[name].value.value), "span": span(pooled[name].value)}
        rows.append({"name": name, **figures, **value, "difference": _difference(pooled[name].difference)})
    title = TITLES[next(iter(pooled.values())).metric]
    return {"title": title, "ends": [f"{100 * end:.0f} %" for end in ends], "rows": rows}


def _label(category: str) -> str:
    return category.replace("_", " ")


def _named(names: Sequence[str]) -> list[str]:
    """The names shown: each, and the pool of them where there are several."""
    distinct = [name for name in dict.fromkeys(names) if name != POOLED]
    return distinct if len(distinct) == 1 else [*distinct, POOLED]


def metric_table(comparisons: Sequence[Comparison], metric: Measure) -> Context:
    """One metric's table: a row a category, below it its splits; a cell a variant."""
    cells_of = {(c.category, c.split, c.variant): c for c in comparisons if c.metric == metric}
    variants = list(dict.fromkeys(c.variant for c in cells_of.values()))
    splits = _named([c.split for c in cells_of.values()])
    rows = []
    for category in _named([c.category for c in cells_of.values()]):
        for split in [POOLED, *splits[:-1]]:
            cells = [cells_of.get((category, split, variant)) for variant in variants]
            bases = list(dict.fromkeys(c.basis for c in cells if c))
            if bases:
                row_cells = [_cell(c) for c in cells]
                name = _label(category) if split == POOLED else f"{_label(category)}, {split}"
                rows.append({"name": name, "sub": split != POOLED, "basis": " or ".join(bases), "cells": row_cells})
    return {"metric": metric, "title": TITLES[metric], "variants": variants, "rows": rows, "splits": splits}


def _cell(comparison: Comparison | None) -> Context | None:
    if comparison is None:
        return None
    value = comparison.value
    return {"value": percent(value.value), "span": span(value), "difference": _difference(comparison.difference)}


def forest_of(comparisons: Sequence[Comparison], colors: Mapping[str, str]) -> Context | None:
    """Differences by category, with the variants that the colors stand for."""
    metric = min((c.metric for c in comparisons), key=MEASURES.index, default=None)
    pooled = [c for c in comparisons if c.metric == metric and c.split == POOLED and c.difference]
    rows = [
        (
            _label(category),
            [(colors[c.variant], c.difference) for c in pooled if c.category == category and c.difference],
        )
        for category in _named([c.category for c in pooled])
    ]
    if not pooled or metric is None:
        return None
    plot = plots.forest(rows, f"Differences to the base model in {TITLES[metric]}, by category")
    return {"plot": plot, "variants": list(dict.fromkeys(c.variant for c in pooled)), "title": TITLES[metric]}
