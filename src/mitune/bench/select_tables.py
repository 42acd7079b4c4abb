"""The tables of the study of scores, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from mitune.bench.select_summary import Condition, Discernment, Quality, Result, Setting
from mitune.evaluation.comparison import POOLED
from mitune.evaluation.statistics import kendall_tau
from mitune.evaluation.tables import DASH, interval, number, table

# One of each kind, for a summary.
SHOWN = (
    "mi-tune", "mi-tune-release", "rfmi", "rfmi-squared", "rfmi-release", "early", "late", "log-likelihood-ratio",
    "self-confidence", "self-confidence-late", "online-normalized", "online-ranks", "standard", "orthogonal",
    "confidence", "confidence-below-0", "confidence-solace", "information-others", "normalized-words",
    "margin-negatives", "normalized-negatives", "standardized-negatives", "information-negatives", "margin-wide",
    "normalized-wide", "standardized-wide", "information-wide", "normalized-negatives-early",
    "normalized-negatives-middle", "normalized-negatives-single", "ranks-normalized-negatives",
    "ranks-normalized-wide", "ranks-information-wide", "contrast", "stages-normalized-wide",
    "stages-standardized-negatives", "fits-negatives", "fits-negatives-below-0", "fits-negatives-single", "fits-wide",
)  # fmt: skip
_number = partial(number, digits=2)
_interval = partial(interval, digits=2)


def tables_of(result: Result) -> str:
    """All tables in Markdown, a section for each setting; scores from the one that closes most of the gap down."""
    sections = []
    for setting in dict.fromkeys(quality.setting for quality in result.qualities):
        pooled = _best_first(q for q in result.qualities if q.setting == setting and q.category == POOLED)
        sections += [
            f"## {setting}",
            f"### What there is to gain, with {result.candidates} candidates a prompt",
            _conditions_table([c for c in result.conditions if c.setting == setting]),
            "### Every score, over all categories",
            _scores_table(setting, pooled),
            "### Share of the gap closed, by category",
            _categories_table([q.score for q in pooled], [q for q in result.qualities if q.setting == setting]),
            "### Right above wrong, by kind of failure",
            _failures_table([q.score for q in pooled], [d for d in result.discernments if d.setting == setting]),
            f"### Exactly right at rank 1, {math.ceil(result.candidates / 2)} and {result.candidates} by the score",
            table(
                ["score", "first", "middle", "last"],
                [[q.score, *map(interval, (q.top, q.middle, q.last))] for q in pooled],
            ),
        ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def prediction_of(result: Result, score: str) -> str:
    """Does what a model recognizes predict what a score gains? A Markdown table and Kendall's τ over its rows.

    A row is a category in a setting. Promised is the share of own wrong candidates that the model recognizes, times
    the gap from random to oracle; gained is what the top-1 of the score adds to a random choice.
    """
    gained = {
        (q.setting, q.category): q.top.value for q in result.qualities if q.score == score and q.category != POOLED
    }
    rows = []
    for c in result.conditions:
        if c.category != POOLED and c.wrong_known.trials:
            gap = c.oracle.value - c.drawn.value
            gain = gained[c.setting, c.category] - c.drawn.value
            rows.append((c, gap, c.wrong_known.value * gap, gain))
    figures = np.array([(c.wrong_known.value, gap, promised, gain) for c, gap, promised, gain in rows])
    taus = [_number(kendall_tau(column, figures[:, 3])) for column in figures[:, :3].T] if len(rows) > 1 else [DASH] * 3
    head = ["setting", "category", "own wrong recognized", "gap to close", "promised", f"gained by {score}"]
    lines = [
        [str(c.setting), c.category, *map(_number, (c.wrong_known.value, gap, promised, gain))]
        for c, gap, promised, gain in rows
    ]
    lines.append(["τ with what is gained", "", *taus, ""])
    return table(head, lines)


def _best_first(qualities: Iterable[Quality]) -> list[Quality]:
    return sorted(qualities, key=lambda q: -np.nan_to_num(q.closed.value, nan=-np.inf))


def _conditions_table(conditions: Sequence[Condition]) -> str:
    head = ["category", "prompts", "random", "oracle", "own right recognized", "own wrong recognized"]
    head.append("highest τ without ties")
    rows = [
        [c.category, str(c.prompts), *map(_interval, (c.drawn, c.oracle))]
        + [*map(interval, (c.right_known, c.wrong_known)), _interval(c.untied)]
        for c in conditions
    ]
    return table(head, rows)


def _scores_table(setting: Setting, qualities: Sequence[Quality]) -> str:
    head = ["score", "τ with the judge", "top-1 exact", "gap closed", f"extra calls (making one: {setting.making:g})"]
    rows = [[q.score, _interval(q.tau), _interval(q.top), _interval(q.closed), f"{q.calls:.1f}"] for q in qualities]
    return table(head, rows)


def _categories_table(scores: Sequence[str], qualities: Sequence[Quality]) -> str:
    categories = list(dict.fromkeys(q.category for q in qualities))
    at = {(q.score, q.category): q.closed.value for q in qualities}
    return table(["score", *categories], [[s, *(_number(at[s, c]) for c in categories)] for s in scores])


def _failures_table(scores: Sequence[str], discernments: Sequence[Discernment]) -> str:
    counts = {d.failure: d.share.prompts for d in discernments}
    at = {(d.score, d.failure): d.share for d in discernments}
    head = ["score", *(f"{name} ({count} prompts)" for name, count in counts.items())]
    return table(head, [[score, *(_interval(at[score, name]) for name in counts)] for score in scores])
