"""Is the tuned model better, and how sure is that? Means over prompts with 95 % bootstrap intervals.

The images of one prompt share its difficulty, so the prompt is the unit: its images are averaged first, prompts are
resampled (Efron's percentile bootstrap), and two models are compared prompt by prompt. In a pooled figure every
prompt weighs the same, whatever its category.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import kendalltau

from mitune.errors import MituneError

Metric = Literal["exact", "graded"]
METRICS: tuple[Metric, ...] = ("exact", "graded")
TITLES: dict[Metric, str] = {"exact": "exact match", "graded": "graded score"}
POOLED = "all"  # the category or split of a figure over all of them
RESAMPLES = 10_000
_TAIL = 0.025  # on either side of a 95 % interval
_BLOCK = 2_000_000  # drawn prompts held at once: bounds the memory, not the result

Array = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)


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

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one variant over the prompts of one category and split ("all": over all of them)."""

    variant: str
    category: str
    split: str
    metric: Metric
    prompts: int
    images: int  # behind `value`, over all prompts and seeds
    seeds: int  # how often an image of a prompt was made anew, with another seed
    value: Interval
    difference: Interval | None  # variant − baseline, paired by prompt; None for the baseline itself

    @property
    def basis(self) -> str:
        """What the figure rests on: prompts × images × seeds, or the total where prompts have unlike numbers."""
        each, rest = divmod(self.images, self.prompts * self.seeds)
        return f"{self.prompts}, {self.images} images" if rest else f"{self.prompts} × {each} × {self.seeds}"


@dataclass(frozen=True, slots=True)
class Failures:
    """How the images of one variant fail: a malformed one says nothing about meaning."""

    variant: str
    category: str
    images: int
    failed: int
    semantic: int  # well drawn, but not what was asked

    @property
    def semantic_share(self) -> float:
        """Share of the failures that are about meaning; nan where nothing failed."""
        return self.semantic / self.failed if self.failed else math.nan


@dataclass(frozen=True, slots=True)
class Selection:
    """How far a score orders the candidates of a prompt as the judge does, and what keeping its best ones gives."""

    score: str
    agreement: Interval | None  # Kendall's τ-b with the graded score; None where no prompt has both varying
    kept: Interval  # exact share of the `keep` best by the score
    drawn: Interval  # exact share of all judged candidates, scored or not: what a random choice gives
    oracle: Interval  # exact share of the `keep` best of them by the judge: the ceiling


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
    drawn = _resampled_means(filled, present, resamples, np.random.default_rng(seed))
    found = []
    for column, count in enumerate(counts.tolist()):
        own = values[present[:, column], column]
        if not count:
            found.append(Interval(math.nan, math.nan, math.nan, 0))
        elif np.ptp(own) < 1e-9:  # equal but for rounding
            constant, other = float(own[0]), 1 - _TAIL ** (1 / count)
            ends = (constant - other * (constant - low), constant + other * (high - constant))
            found.append(Interval(constant, *ends, count))
        else:
            # A resample may miss every prompt of a column that has few; it then has no mean and does not count.
            ends = tuple(np.nanquantile(drawn[:, column], (_TAIL, 1 - _TAIL)).tolist())
            found.append(Interval(float(own.mean()), *ends, count))
    return found


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
    drawn = _resampled_means(filled, np.ones_like(filled, dtype=np.bool_), resamples, np.random.default_rng(seed))
    found = []
    for column, count in enumerate(present.sum(axis=0).tolist()):
        if not count:
            found.append(Interval(math.nan, math.nan, math.nan, 0))
            continue
        own = present[:, column]
        up, down, lowest = (float(values[own, column].sum()) for values in (above, below, least))
        if np.ptp(above[own, column] / below[own, column]) < 1e-9:
            other = 1 - _TAIL ** (1 / count)
            found.append(Interval(up / down, up / down - other * (up - lowest) / down, up / down, count))
            continue
        top, bottom = drawn[:, column], drawn[:, column + above.shape[1]]
        low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], (_TAIL, 1 - _TAIL)).tolist()
        found.append(Interval(up / down, low, high, count))
    return found


def _resampled_means(filled: Array, present: NDArray[np.bool_], resamples: int, rng: np.random.Generator) -> Array:
    """Means of `resamples` draws of the prompts with replacement, (resamples, columns)."""
    prompts = len(filled)
    means = np.empty((resamples, filled.shape[1]))
    block = max(1, _BLOCK // prompts)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        chosen = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * prompts).reshape(size, prompts).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means[start : start + size] = (times @ filled) / (times @ present)
    return means


def summarize(rows: pa.Table, baseline: str = "base", *, resamples: int = RESAMPLES, seed: int = 0) -> list[Comparison]:
    """Every metric of every variant, by category and split and pooled, each with its difference to the baseline.

    `rows` has one row an image: variant, prompt, category, split, image, seed, exact, graded, malformed. An image is
    exact only if it is not malformed. Differences rest on the prompts that both variants have. A metric without any
    value is left out; categories and splits without a name count in the pool only. Raises MituneError for a missing
    column, for values that only some rows have, and for an unknown baseline.
    """
    variants = _distinct(_list(rows, "variant"))
    if baseline not in variants:
        raise MituneError(
            f"images.parquet: no image of {baseline!r} to compare with, only of {', '.join(variants) or 'nothing'}. "
            "Evaluate it too, or name another baseline."
        )
    scored = {metric: _scores(rows, metric) for metric in METRICS}
    metrics = [metric for metric in METRICS if scored[metric] is not None]
    columns = list(product(variants, metrics))

    keys = list(zip(*(_list(rows, name) for name in ("category", "split", "prompt")), strict=True))
    units = _distinct(keys)
    unit, of_variant = _positions(keys, units), _positions(_list(rows, "variant"), variants)
    images = np.zeros((len(units), len(variants)))
    np.add.at(images, (unit, of_variant), 1)
    seeds = _seeds(zip(unit, of_variant, _list(rows, "image"), _list(rows, "seed"), strict=True), images.shape)
    means = np.full((len(units), len(columns)), np.nan)
    for column, (variant, metric) in enumerate(columns):
        own, values = images[:, variants.index(variant)], scored[metric]
        of_this = of_variant == variants.index(variant)
        sums = np.bincount(unit[of_this], weights=values[of_this], minlength=len(units))  # type: ignore[index]
        np.divide(sums, own, out=means[:, column], where=own > 0)
    base = [columns.index((baseline, metric)) for _, metric in columns]

    found: list[Comparison] = []
    names = [[*filter(None, _distinct(key[i] for key in units)), POOLED] for i in (0, 1)]
    for category, split in product(*names):
        inside = [i for i, key in enumerate(units) if category in (key[0], POOLED) and split in (key[1], POOLED)]
        if not inside:
            continue
        own = means[inside]
        levels = bootstrap(own, low=0, high=1, resamples=resamples, seed=seed)
        differences = bootstrap(own - own[:, base], low=-1, high=1, resamples=resamples, seed=seed)
        for (variant, metric), value, difference in zip(columns, levels, differences, strict=True):
            if value.prompts:
                at = np.ix_(inside, [variants.index(variant)])
                paired = difference if variant != baseline and difference.prompts else None
                counts = (value.prompts, int(images[at].sum()), int(seeds[at].max()))
                found.append(Comparison(variant, category, split, metric, *counts, value, paired))
    return found


def failures(rows: pa.Table) -> list[Failures]:
    """Images that miss the prompt, by variant and category and pooled: how many, and how many of them well drawn."""
    exact = _scores(rows, "exact")
    if exact is None:
        return []
    malformed = flags(rows, "malformed")
    variant, category = np.array(_list(rows, "variant")), np.array(_list(rows, "category"))
    found = []
    for name, kind in product(_distinct(variant.tolist()), [*filter(None, _distinct(category.tolist())), POOLED]):
        own = (variant == name) & ((category == kind) | (kind == POOLED))
        missed = own & (exact == 0)
        if own.any():
            found.append(Failures(name, kind, int(own.sum()), int(missed.sum()), int((missed & ~malformed).sum())))
    return found


def kendall_tau(first: Array, second: Array) -> float:
    """Kendall's τ-b of two rankings (n,) with ties; nan where either is constant, or has no two entries."""
    return math.nan if len(first) < 2 else float(kendalltau(first, second).statistic)


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
    exact, graded = numbers(candidates, "exact"), numbers(candidates, "graded")
    if not np.isfinite(exact).any():
        return []
    exact = exact * ~flags(candidates, "malformed")
    prompts = np.array(_list(candidates, "prompt_index"))
    groups = [np.flatnonzero((prompts == prompt) & np.isfinite(exact)) for prompt in np.unique(prompts)]
    of_all = [[_share(exact[group]), best_share(exact[group], exact[group], keep)] for group in groups]
    drawn, oracle = bootstrap(np.array(of_all), low=0, high=1, resamples=resamples, seed=seed)
    found = []
    for column in (name for name in candidates.column_names if name.startswith("score.")):
        name = column.removeprefix("score.")
        scores = order = numbers(candidates, column)
        if ties and name in ties:
            order = lexicographic(scores, numbers(candidates, f"score.{ties[name]}"))
        figures = []
        for group in groups:
            own = group[np.isfinite(scores[group])]
            tau = kendall_tau(scores[own], graded[own]) if np.isfinite(graded[own]).all() else math.nan
            figures.append((tau, best_share(order[own], exact[own], keep)))
        table = np.array(figures)
        (agreement,) = bootstrap(table[:, :1], low=-1, high=1, resamples=resamples, seed=seed)
        (kept,) = bootstrap(table[:, 1:], low=0, high=1, resamples=resamples, seed=seed)
        found.append(Selection(name, agreement if agreement.prompts else None, kept, drawn, oracle))
    return found


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


def markdown_table(comparisons: Sequence[Comparison], baseline: str = "base", *, made_by: str = "") -> str:
    """The comparisons as Markdown, one table a metric: value [95 % interval], and what each figure rests on.

    A row holds a variant against the baseline; a bold difference has an interval without zero. `made_by` names the
    command that made the figures, in a column of its own.
    """
    tables = []
    for metric in _distinct(c.metric for c in comparisons):
        own = [c for c in comparisons if c.metric == metric]
        of_base = {(c.category, c.split): str(c.value) for c in own if c.variant == baseline}
        others = [c for c in own if c.variant != baseline]
        names = _distinct(c.variant for c in others)
        columns = names if len(names) == 1 else ["variant", "value"]
        splits = any(c.split != POOLED for c in own)

        head = [f"{TITLES[metric]} ↑", *["split"] * splits, "prompts × images × seeds", baseline]
        head += [*columns, f"{columns[-1]} − {baseline}", *["made by"] * bool(made_by)]
        lines = [head, ["---"] * len(head)]
        for c in others:
            line = [c.category, *[c.split] * splits, c.basis, of_base.get((c.category, c.split), "–")]
            line += [*[c.variant] * (len(names) > 1), str(c.value), _difference(c), *[made_by] * bool(made_by)]
            lines.append(line)
        tables.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
    return "\n\n".join(tables) + "\n"


def _difference(comparison: Comparison) -> str:
    """The signed difference with its interval, bold where that holds no zero, and its prompts where they are fewer."""
    difference = comparison.difference
    if difference is None:
        return "–"
    value, low, high = (f"{x:+.3f}".replace("-", "−") for x in (difference.value, difference.low, difference.high))
    bold = "**" if difference.sign else ""
    fewer = "" if difference.prompts == comparison.prompts else f" ({difference.prompts} prompts)"
    return f"{bold}{value} [{low}, {high}]{bold}{fewer}"


def _list(rows: pa.Table, name: str) -> list[Any]:
    if name not in rows.column_names:
        raise MituneError(f"The table has no column {name!r}, only {', '.join(rows.column_names)}; write it again.")
    values: list[Any] = rows[name].to_pylist()
    return values


def numbers(rows: pa.Table, name: str) -> Array:
    """A column of numbers or truth values (n,), NaN where it has none."""
    return np.array([math.nan if value is None else value for value in _list(rows, name)], np.float64)


def flags(rows: pa.Table, name: str) -> NDArray[np.bool_]:
    """A column of truth values (n,); unknown counts as false."""
    return np.array([bool(value) for value in _list(rows, name)], np.bool_)


def _scores(rows: pa.Table, metric: Metric) -> Array | None:
    """The metric of each image (n,), or None where no image has one."""
    values = numbers(rows, metric)
    missing = int(np.isnan(values).sum())
    if missing == len(values):
        return None
    if missing:
        raise MituneError(f"images.parquet: {missing} of {len(values)} images have no {metric!r}; evaluate them again.")
    return values * ~flags(rows, "malformed") if metric == "exact" else values


def _seeds(keys: Iterable[tuple[int, int, int, int]], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """How many seeds an image of a prompt and variant has, at most, (prompts, variants)."""
    of_image: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for unit, variant, image, seed in keys:
        of_image[unit, variant, image].add(seed)
    most = np.zeros(shape, np.int64)
    for (unit, variant, _), seeds in of_image.items():
        most[unit, variant] = max(most[unit, variant], len(seeds))
    return most


def _distinct(values: Iterable[Key]) -> list[Key]:
    return list(dict.fromkeys(values))


def _positions(values: Sequence[Any], known: Sequence[Any]) -> NDArray[np.int64]:
    """Where each value stands among the known ones, (n,)."""
    position = {value: index for index, value in enumerate(known)}
    return np.array([position[value] for value in values], np.int64)
