"""Which candidates of a prompt stay: the best k by a score, or a control.

A rule is written as text, so that it fits a command line and a folder name:

    self-confidence         the k best by that score
    self-confidence>=-0.3   those of the k best that reach a threshold
    self-confidence@0.9     those of the k best within the prompt's upper tenth
    random                  k at random: what fine-tuning on any of the model's own images does
    oracle                  the k best by the judge (or another metric): what a perfect score would do
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mitune.errors import MituneError

RANDOM, ORACLE = "random", "oracle"


@dataclass(frozen=True, slots=True)
class Rule:
    """A selection rule: what to rank by, and the least value that counts, absolute or as a quantile."""

    by: str
    threshold: float | None = None
    quantile: float | None = None

    @property
    def slug(self) -> str:
        """A folder name: letters, digits, dots and dashes."""
        text = self.by
        text += f"-from-{self.threshold:g}" if self.threshold is not None else ""
        return text + (f"-upper-{self.quantile:g}" if self.quantile is not None else "")


def parse_rule(text: str, scores: Sequence[str]) -> Rule:
    """The rule that `text` spells. Raises MituneError for an unknown score or a malformed number."""
    match = re.fullmatch(r"([a-z0-9-]+?)(?:(>=|@)(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?))?", text)
    known = [*scores, RANDOM, ORACLE]
    if match is None or match[1] not in known:
        raise MituneError(f"Unknown selection {text!r}; use one of {', '.join(known)}, with >=NUMBER or @QUANTILE.")
    by, operator, number = match.groups()
    if operator == "@" and not 0 <= float(number) < 1:
        raise MituneError(f"The quantile in {text!r} must lie in [0, 1).")
    if operator == ">=" and not np.isfinite(float(number)):
        raise MituneError(f"The threshold in {text!r} must be finite.")
    return Rule(by, float(number) if operator == ">=" else None, float(number) if operator == "@" else None)


def select(
    values: Sequence[float], keep: int, *, threshold: float | None = None, quantile: float | None = None
) -> list[int]:
    """Indices of the `keep` largest finite values, best first; ties go to the earlier candidate."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(array))
    order = finite[np.argsort(-array[finite], kind="stable")][:keep]
    least = -np.inf if threshold is None else threshold
    if quantile is not None and len(finite):
        least = max(least, float(np.quantile(array[finite], quantile)))
    return [int(index) for index in order if array[index] >= least]


def apply(rule: Rule, columns: Mapping[str, Sequence[float]], keep: int, seed: int) -> list[int]:
    """The candidates that a rule keeps, given the scores of one prompt; `seed` serves the random control alone."""
    if rule.by == RANDOM:
        # One score may have no value where a trajectory is short; a candidate without any is broken or was dropped.
        scores = np.array(list(columns.values()), dtype=np.float64)
        drawn = np.random.default_rng(seed).random(scores.shape[1])
        values: Sequence[float] = np.where(np.isfinite(scores).any(axis=0), drawn, np.nan).tolist()
    else:
        values = columns[rule.by]
    return select(values, keep, threshold=rule.threshold, quantile=rule.quantile)


def softmax_weights(values: Sequence[float], temperature: float) -> list[float]:
    """Weights exp(value / temperature) with mean one, for reward-weighted fine-tuning on several kept candidates."""
    scaled = np.asarray(values, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return [float(weight) for weight in weights / weights.mean()]
