"""What the rounds of a run came to, one after the other: curves over the rounds of training done."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from mitune.evaluation.comparison import POOLED, Comparison
from mitune.evaluation.rows import numbers, right
from mitune.evaluation.statistics import Array
from mitune.pool.selection import CONTROLS, Rule
from mitune.report import plots
from mitune.report.files import pool_of, read_table
from mitune.report.verdict import BASELINE
from mitune.report.words import Context

Points = Mapping[int, float]  # by the number of rounds of training done
RIGHT, HELD_OUT = "candidates that are right, %", "held-out images that are right, %"
SCORE, RESPONSE = "mean score of the candidates", "‖Δε‖ ÷ that of the base"
_INFORMATION = "score.mi-tune"  # ½ ∫ ‖Δε‖² dλ along the trajectory


def progress(
    folders: Sequence[Path], rules: Sequence[Rule], comparisons: Sequence[Comparison], colors: Mapping[str, str]
) -> Context | None:
    """The curves of a run with several rounds, a line for each selection; None of a run with one."""
    if len(folders) < 2:
        return None
    charts = []
    for name, lines in quantities(folders, rules, comparisons).items():
        curves = [_curve(points, colors[slug]) for slug, points in lines.items() if len(points) > 1]
        if curves:
            charts.append(plots.by_round(curves, name, f"Over the rounds: {name}"))
    return {"plots": charts, "variants": [rule.slug for rule in rules]} if charts else None


def quantities(
    folders: Sequence[Path], rules: Sequence[Rule], comparisons: Sequence[Comparison]
) -> dict[str, dict[str, Points]]:
    """What is known of each selection, by quantity and the selection's slug. A round's pool was made by the adapter of
    the round before."""
    figures: dict[str, dict[str, Points]] = {name: {} for name in (RIGHT, SCORE, RESPONSE, HELD_OUT)}
    for rule in rules:
        pools = [_pool(pool_of(folder, rule.slug)) for folder in folders]
        figures[RIGHT][rule.slug] = _over_rounds(pools, lambda pool: 100 * _mean(right(pool)))
        if rule.by not in CONTROLS:
            figures[SCORE][rule.slug] = _over_rounds(pools, partial(_mean_of, column=f"score.{rule.by}"))
        information = _over_rounds(pools, partial(_mean_of, column=_INFORMATION))
        base = information.get(0, math.nan)
        figures[RESPONSE][rule.slug] = {d: math.sqrt(value / base) for d, value in information.items() if base > 0}
        figures[HELD_OUT][rule.slug] = _held_out(comparisons, rule, len(folders))
    return figures


def _pool(folder: Path) -> pa.Table | None:
    return read_table(folder / "candidates.parquet", optional={"exact": pa.bool_(), "malformed": pa.bool_()})


def _over_rounds(pools: Sequence[pa.Table | None], figure: Callable[[pa.Table], float]) -> Points:
    values = {done: figure(pool) for done, pool in enumerate(pools) if pool is not None}
    return {done: value for done, value in values.items() if math.isfinite(value)}


def _mean_of(pool: pa.Table, column: str) -> float:
    return _mean(numbers(pool, column)) if column in pool.column_names else math.nan


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _held_out(comparisons: Sequence[Comparison], rule: Rule, rounds: int) -> Points:
    """The verdict on the base, after each round that was judged, and after the last."""
    points = {}
    for comparison in comparisons:
        if (comparison.metric, comparison.category, comparison.split) != ("exact", POOLED, POOLED):
            continue
        earlier = re.fullmatch(re.escape(rule.slug) + r", round (\d+)", comparison.variant)
        done = {BASELINE: 0, rule.slug: rounds}.get(comparison.variant, int(earlier[1]) if earlier else None)
        if done is not None:
            points[done] = 100 * comparison.value.value
    return points


def _curve(points: Points, color: str) -> plots.Curve:
    return plots.Curve(color, np.array(sorted(points), np.float64), np.array([points[done] for done in sorted(points)]))
