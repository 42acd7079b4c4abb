"""How sure is a figure? Shares and means over prompts with 95 % intervals, and the agreement of two rankings.

The images of one prompt share its difficulty, so the prompt is the unit: its images are averaged first, and prompts are
resampled (Efron's percentile bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, kendalltau, spearmanr

RESAMPLES = 10_000
_TAIL = 0.025  # on either side of a 95 % interval
_BLOCK = 2_000_000  # drawn prompts held at once: bounds the memory, not the result

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `prompts` prompts, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    prompts: int

    @property
    def sign(self) -> int:
        """1 where the whole interval lies above zero, −1 where it lies below, else 0."""
        return int(self.low > 0) - int(self.high < 0)


NOTHING = Interval(math.nan, math.nan, math.nan, 0)  # where no prompt says anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """hits of trials, with a 95 % interval (Wilson); NaN without a trial."""

    hits: int
    trials: int

    @property
    def value(self) -> float:
        return self.hits / self.trials if self.trials else math.nan

    @property
    def low(self) -> float:
        return self._ends[0]

    @property
    def high(self) -> float:
        return self._ends[1]

    @property
    def _ends(self) -> tuple[float, float]:
        if not self.trials:
            return math.nan, math.nan
        result = binomtest(self.hits, self.trials).proportion_ci(method="wilson")
        return float(result.low), float(result.high)


# --- The bootstrap -----------------------------------------------------------------------------------------------


def resampled(count: int, resamples: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """`resamples` draws of `count` places with replacement, in blocks (draws, count)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        yield rng.integers(count, size=(min(block, resamples - start), count))


def bootstrap(
    values: Array, *, low: float = -math.inf, high: float = math.inf, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Mean over prompts and 95 % percentile interval of each column of `values` (prompts, columns).

    NaN marks a prompt that a column does not have; a column of NaN alone gives NaN. All columns see the same
    resampled prompts, and the same seed gives the same intervals.

    n equal values c leave nothing to resample. At 97.5 % confidence, anything else between `low` and `high` then has
    a probability of at most q = 1 − 0.025^(1/n) (Clopper and Pearson), so that the mean lies between c − q (c − low)
    and c + q (high − c): these are the ends of such an interval.
    """
    present = np.isfinite(values)
    counts = present.sum(axis=0)
    filled = np.where(present, values, 0.0)
    drawn = _resampled_means(filled, present, resamples, seed)
    intervals = []
    for column, count in enumerate(counts.tolist()):
        known = values[present[:, column], column]
        if not count:
            intervals.append(NOTHING)
        elif np.ptp(known) < 1e-9:  # equal but for rounding
            constant, other = float(known[0]), 1 - _TAIL ** (1 / count)
            ends = (constant - other * (constant - low), constant + other * (high - constant))
            intervals.append(Interval(constant, *ends, count))
        else:
            # A resample may miss every prompt of a column that has few; it then has no mean and does not count.
            ends = tuple(np.nanquantile(drawn[:, column], (_TAIL, 1 - _TAIL)).tolist())
            intervals.append(Interval(float(known.mean()), *ends, count))
    return intervals


def bootstrap_ratio(
    above: Array, below: Array, least: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Ratio of means over prompts, mean(above)/mean(below), with its 95 % percentile interval, column by column.

    All are (prompts, columns); `least` is the lowest that `above` could be. NaN in any leaves the prompt out of that
    column. `prompts` counts those with something below, which alone carry the ratio; NaN where there are none. Where
    all of them have one ratio, nothing is left to resample, and the lower end is that of `bootstrap` for equal values.
    """
    present = np.isfinite(above) & np.isfinite(below) & (below > 0)
    filled = np.hstack([np.where(present, values, 0.0) for values in (above, below)])
    drawn = _resampled_means(filled, None, resamples, seed)
    intervals = []
    for column, count in enumerate(present.sum(axis=0).tolist()):
        if not count:
            intervals.append(NOTHING)
            continue
        rows = present[:, column]
        up, down, lowest = (float(values[rows, column].sum()) for values in (above, below, least))
        if np.ptp(above[rows, column] / below[rows, column]) < 1e-9:
            other = 1 - _TAIL ** (1 / count)
            intervals.append(Interval(up / down, up / down - other * (up - lowest) / down, up / down, count))
            continue
        top, bottom = drawn[:, column], drawn[:, column + above.shape[1]]
        low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], (_TAIL, 1 - _TAIL)).tolist()
        intervals.append(Interval(up / down, low, high, count))
    return intervals


def _resampled_means(filled: Array, present: NDArray[np.bool_] | None, resamples: int, seed: int) -> Array:
    """Means of `resamples` draws of the prompts with replacement, (resamples, columns), over those that are present."""
    prompts, blocks = len(filled), []
    counted = np.ones_like(filled) if present is None else present
    for chosen in resampled(prompts, resamples, seed):
        size = len(chosen)
        places = (chosen + prompts * np.arange(size)[:, None]).ravel()
        times = np.bincount(places, minlength=size * prompts).reshape(size, prompts).astype(np.float64)
        with np.errstate(invalid="ignore"):
            blocks.append((times @ filled) / (times @ counted))
    return np.concatenate(blocks)


def bootstrap_of(
    statistic: Callable[[NDArray[np.int64]], float], count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Any statistic of the places (n,) of prompts, with its 95 % percentile interval; all NaN where its value is.

    Resamples of which it is NaN do not count.
    """
    value = statistic(np.arange(count))
    if math.isnan(value):
        return Interval(value, value, value, count)
    drawn = [statistic(places) for block in resampled(count, resamples, seed) for places in block]
    low, high = np.nanquantile(drawn, (_TAIL, 1 - _TAIL)).tolist()
    return Interval(value, low, high, count)


def share_of_gain(part: Array, gain: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """mean(part)/mean(gain) over prompts, (prompts,) each, and its interval; NaN where the gain is not clearly above 0.

    Unlike in `bootstrap_ratio`, a prompt's own terms may have either sign.
    """
    tops, bottoms = _resampled_means(np.stack([part, gain], axis=1), None, resamples, seed).T
    above = bottoms > 0
    if (~above).mean() > _TAIL:
        return Interval(math.nan, math.nan, math.nan, len(part))
    low, high = np.quantile(tops[above] / bottoms[above], (_TAIL, 1 - _TAIL)).tolist()
    return Interval(float(part.mean() / gain.mean()), low, high, len(part))


# --- Agreement of rankings ---------------------------------------------------------------------------------------


def kendall_tau(first: Array, second: Array) -> float:
    """Kendall's τ-b of two rankings (n,) with ties; nan where either is constant, or has no two entries."""
    return math.nan if len(first) < 2 else float(kendalltau(first, second).statistic)


def spearman(first: Array, second: Array) -> float:
    """Spearman's ρ of two rankings (n,); nan where either is constant."""
    return float(spearmanr(first, second).statistic) if np.ptp(first) > 0 and np.ptp(second) > 0 else math.nan
