"""Does a score order the candidates of a prompt as the judge does, and what does keeping its best ones give?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mitune.evaluation.rows import column_of, numbers, right
from mitune.evaluation.statistics import RESAMPLES, Array, Interval, bootstrap, kendall_tau


@dataclass(frozen=True, slots=True)
class Selection:
    """How far a score orders the candidates of a prompt as the judge does, and what keeping its best ones gives."""

    score: str
    agreement: Interval | None  # Kendall's τ-b with the graded score; None where no prompt has both varying
    kept: Interval  # exact share of the `keep` best by the score
    drawn: Interval  # exact share of all judged candidates, scored or not: what a random choice gives
    oracle: Interval  # exact share of the `keep` best of them by the judge: the ceiling


def selection(
    candidates: pa.Table,
    keep: int = 1,
    *,
    ties: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Selection]:
    """Every score of a pool held against the judge, with prompts resampled; empty where the pool was not judged.

    `candidates` has one row a candidate: prompt_index, exact, graded, malformed and a column "score.<name>" per
    score. A candidate without a finite score is neither ranked nor kept by it, but a random choice or the judge could
    keep it; one without a verdict is left out. Of equal scores, those that are best by the score which `ties` names are
    kept; where it names none, they count for the exact share that they have together.
    """
    exact, graded = right(candidates), numbers(candidates, "graded")
    if not np.isfinite(exact).any():
        return []
    prompts = np.array(column_of(candidates, "prompt_index"))
    groups = [np.flatnonzero((prompts == prompt) & np.isfinite(exact)) for prompt in np.unique(prompts)]
    of_all = [[_share(exact[group]), best_share(exact[group], exact[group], keep)] for group in groups]
    drawn, oracle = bootstrap(np.array(of_all), low=0, high=1, resamples=resamples, seed=seed)
    selections = []
    for name in (name.removeprefix("score.") for name in candidates.column_names if name.startswith("score.")):
        scores = order = numbers(candidates, f"score.{name}")
        if ties and name in ties:
            order = lexicographic(scores, numbers(candidates, f"score.{ties[name]}"))
        figures = []
        for group in groups:
            scored = group[np.isfinite(scores[group])]
            tau = kendall_tau(scores[scored], graded[scored]) if np.isfinite(graded[scored]).all() else math.nan
            figures.append((tau, best_share(order[scored], exact[scored], keep)))
        columns = np.array(figures)
        (agreement,) = bootstrap(columns[:, :1], low=-1, high=1, resamples=resamples, seed=seed)
        (kept,) = bootstrap(columns[:, 1:], low=0, high=1, resamples=resamples, seed=seed)
        selections.append(Selection(name, agreement if agreement.prompts else None, kept, drawn, oracle))
    return selections


def lexicographic(first: Array, second: Array) -> Array:
    """Ranks (n,), from 0 for the lowest, by `first` and then by `second`; equal where both are."""
    pairs = np.stack([first, second], axis=1)
    ranks: Array = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.float64)
    return ranks


def _share(exact: Array) -> float:
    return float(exact.mean()) if len(exact) else math.nan


def best_share(by: Array, exact: Array, keep: int) -> float:
    """Expected exact share of the `keep` best of (n,) candidates `by` a score, ties broken by lot; nan for none."""
    if not len(by):
        return math.nan
    keep = min(keep, len(by))
    threshold = np.sort(by)[-keep]
    above, tied = by > threshold, by == threshold
    return float(exact[above].sum() + (keep - above.sum()) * exact[tied].mean()) / keep
