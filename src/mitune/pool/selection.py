"""Which candidates of a prompt stay: the best k by a score, or a control.

A rule is written as text, so that it fits a command line and a folder name:

    self-confidence         the k best by that score
    self-confidence>=-0.3   those of the k best that reach a threshold
    self-confidence@0.9     those of the k best within the prompt's upper tenth
    mine:sharp>=0.5         likewise by a score of one's own (`mitune.pool.scores`)
    random                  k at random: what fine-tuning on any of the model's own images does
    oracle                  the k best by the judge (or another metric): what a perfect score would do

Where a score holds candidates equal, the on-line score that it goes with decides, if any, and then their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from mitune.errors import MituneError

CONTROLS = RANDOM, ORACLE = "random", "oracle"


@dataclass(frozen=True, slots=True)
class Rule:
    """A selection rule: what to rank by, and the least value that counts, absolute or as a quantile."""

    by: str
    threshold: float | None = None
    quantile: float | None = None

    @property
    def slug(self) -> str:
        """A folder name: letters, digits, dots and dashes."""
        text = re.sub(r"[:_]+", "-", self.by)
        text += f"-from-{self.threshold:g}" if self.threshold is not None else ""
        return text + (f"-upper-{self.quantile:g}" if self.quantile is not None else "")


def parse_rule(text: str) -> Rule:
    """The rule that `text` spells, whether or not a score of that name exists. Raises MituneError if it spells none."""
    match = re.fullmatch(r"(\w[\w.:-]*?)(?:(>=|@)(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?))?", text, re.ASCII)
    if match is None:
        raise MituneError(
            f"pool.select names {text!r}, which is no selection; write the name of a score, and behind it >=NUMBER or "
            "@QUANTILE if you like, e.g. contrast>=1."
        )
    by, operator, number = match.groups()
    if operator == "@" and not 0 <= float(number) < 1:
        raise MituneError(f"The quantile in {text!r} must lie in [0, 1); write one such as @0.9.")
    if operator == ">=" and not np.isfinite(float(number)):
        raise MituneError(f"The threshold in {text!r} must be finite; write a smaller number.")
    return Rule(by, float(number) if operator == ">=" else None, float(number) if operator == "@" else None)


def select(
    values: Sequence[float],
    keep: int,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    ties: Sequence[float] | None = None,
) -> list[int]:
    """Indices of the `keep` largest finite values, best first; equal ones by `ties`, and then the earlier candidate."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(array))
    second = np.zeros(len(finite)) if ties is None else np.asarray(ties, dtype=np.float64)[finite]
    order = finite[np.lexsort((-second, -array[finite]))][:keep]
    least = -np.inf if threshold is None else threshold
    if quantile is not None and len(finite):
        least = max(least, float(np.quantile(array[finite], quantile)))
    return [int(index) for index in order if array[index] >= least]


def apply(
    rule: Rule,
    columns: Mapping[str, Sequence[float]],
    keep: int,
    seed: int,
    ties: Sequence[float] | None = None,
) -> list[int]:
    """The candidates that a rule keeps, given the scores of one prompt; `seed` serves the random control alone."""
    values = values_of(rule, columns, seed)
    return select(values, keep, threshold=rule.threshold, quantile=rule.quantile, ties=ties)


def values_of(rule: Rule, columns: Mapping[str, Sequence[float]], seed: int) -> Sequence[float]:
    """What a rule goes by, out of the scores of one prompt: one of them, or numbers drawn for the random control."""
    if rule.by == RANDOM:
        # One score may have no value where a trajectory is short; a candidate without any is broken or was dropped.
        scores = np.array(list(columns.values()), dtype=np.float64)
        drawn = np.random.default_rng(seed).random(scores.shape[1])
        values: list[float] = np.where(np.isfinite(scores).any(axis=0), drawn, np.nan).tolist()
        return values
    return columns[rule.by]


def mean_rank(*scores: Tensor) -> Tensor:
    """Mean of the ranks that scores (N,) give, from 1 for the lowest; ties share theirs, NaN comes first. (N,)."""
    ranks = [rankdata(score.double().nan_to_num(-np.inf).numpy()) for score in scores]
    return torch.tensor(sum(ranks) / len(ranks), dtype=torch.float64)
