"""Is the tuned model better? Every metric of every variant of a model, and its difference to the base by prompt.

In a pooled figure every prompt weighs the same, whatever its category.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mitune.errors import MituneError
from mitune.evaluation.rows import column_of, flags, numbers, right
from mitune.evaluation.statistics import RESAMPLES, Array, Interval, bootstrap
from mitune.evaluation.tables import DASH, interval, table

Measure = Literal["exact", "graded"]  # of a judgment
MEASURES: tuple[Measure, ...] = ("exact", "graded")
TITLES: dict[Measure, str] = {"exact": "exact match", "graded": "graded score"}
POOLED = "all"  # the category or split of a figure over all of them

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one variant over the prompts of one category and split ("all": over all of them)."""

    variant: str
    category: str
    split: str
    metric: Measure
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


def summarize(rows: pa.Table, baseline: str = "base", *, resamples: int = RESAMPLES, seed: int = 0) -> list[Comparison]:
    """Every metric of every variant, by category and split and pooled, each with its difference to the baseline.

    `rows` has one row an image: variant, prompt, category, split, image, seed, exact, graded, malformed. An image is
    exact only if it is not malformed. Differences rest on the prompts that both variants have. A metric without any
    value is left out; categories and splits without a name count in the pool only. Raises MituneError for a missing
    column, for values that only some rows have, and for an unknown baseline.
    """
    variants = _distinct(column_of(rows, "variant"))
    if baseline not in variants:
        raise MituneError(
            f"images.parquet: no image of {baseline!r} to compare with, only of {', '.join(variants) or 'nothing'}. "
            "Evaluate it too, or name another baseline."
        )
    scored = {metric: _scores(rows, metric) for metric in MEASURES}
    metrics = [metric for metric in MEASURES if scored[metric] is not None]
    columns = list(product(variants, metrics))

    keys = list(zip(*(column_of(rows, name) for name in ("category", "split", "prompt")), strict=True))
    units = _distinct(keys)
    unit, of_variant = _positions(keys, units), _positions(column_of(rows, "variant"), variants)
    images = np.zeros((len(units), len(variants)))
    np.add.at(images, (unit, of_variant), 1)
    seeds = _seeds(zip(unit, of_variant, column_of(rows, "image"), column_of(rows, "seed"), strict=True), images.shape)
    means = np.full((len(units), len(columns)), np.nan)
    for column, (variant, metric) in enumerate(columns):
        image_counts, values = images[:, variants.index(variant)], scored[metric]
        of_this = of_variant == variants.index(variant)
        sums = np.bincount(unit[of_this], weights=values[of_this], minlength=len(units))  # type: ignore[index]
        np.divide(sums, image_counts, out=means[:, column], where=image_counts > 0)
    base = [columns.index((baseline, metric)) for _, metric in columns]

    comparisons: list[Comparison] = []
    names = [[*filter(None, _distinct(key[i] for key in units)), POOLED] for i in (0, 1)]
    for category, split in product(*names):
        inside = [i for i, key in enumerate(units) if category in (key[0], POOLED) and split in (key[1], POOLED)]
        if not inside:
            continue
        group = means[inside]
        levels = bootstrap(group, low=0, high=1, resamples=resamples, seed=seed)
        differences = bootstrap(group - group[:, base], low=-1, high=1, resamples=resamples, seed=seed)
        for (variant, metric), value, difference in zip(columns, levels, differences, strict=True):
            if value.prompts:
                at = np.ix_(inside, [variants.index(variant)])
                paired = difference if variant != baseline and difference.prompts else None
                counts = (value.prompts, int(images[at].sum()), int(seeds[at].max()))
                comparisons.append(Comparison(variant, category, split, metric, *counts, value, paired))
    return comparisons


def failures(rows: pa.Table) -> list[Failures]:
    """Images that miss the prompt, by variant and category and pooled: how many, and how many of them well drawn."""
    exact = _scores(rows, "exact")
    if exact is None:
        return []
    malformed = flags(rows, "malformed")
    variant, category = np.array(column_of(rows, "variant")), np.array(column_of(rows, "category"))
    counts = []
    for name, kind in product(_distinct(variant.tolist()), [*filter(None, _distinct(category.tolist())), POOLED]):
        group = (variant == name) & ((category == kind) | (kind == POOLED))
        missed = group & (exact == 0)
        if group.any():
            counts.append(Failures(name, kind, int(group.sum()), int(missed.sum()), int((missed & ~malformed).sum())))
    return counts


def markdown_table(comparisons: Sequence[Comparison], baseline: str = "base", *, made_by: str = "") -> str:
    """The comparisons as Markdown, one table a metric: value [95 % interval], and what each figure rests on.

    A row holds a variant against the baseline; a bold difference has an interval without zero. `made_by` names the
    command that made the figures, in a column of its own.
    """
    tables = []
    for metric in _distinct(c.metric for c in comparisons):
        of_metric = [c for c in comparisons if c.metric == metric]
        of_base = {(c.category, c.split): interval(c.value) for c in of_metric if c.variant == baseline}
        others = [c for c in of_metric if c.variant != baseline]
        names = _distinct(c.variant for c in others)
        columns = names if len(names) == 1 else ["variant", "value"]
        splits = any(c.split != POOLED for c in of_metric)

        head = [f"{TITLES[metric]} ↑", *["split"] * splits, "prompts × images × seeds", baseline]
        head += [*columns, f"{columns[-1]} − {baseline}", *["made by"] * bool(made_by)]
        lines = []
        for c in others:
            line = [c.category, *[c.split] * splits, c.basis, of_base.get((c.category, c.split), DASH)]
            line += [*[c.variant] * (len(names) > 1), interval(c.value), _difference(c), *[made_by] * bool(made_by)]
            lines.append(line)
        tables.append(table(head, lines))
    return "\n".join(tables)


def _difference(comparison: Comparison) -> str:
    """The signed difference with its interval, bold where that holds no zero, and its prompts where they are fewer."""
    difference = comparison.difference
    few = difference is not None and difference.prompts != comparison.prompts
    return interval(difference, sign=True) + (f" ({difference.prompts} prompts)" if difference and few else "")


def _scores(rows: pa.Table, metric: Measure) -> Array | None:
    """The metric of each image (n,), or None where no image has one."""
    values = numbers(rows, metric)
    missing = int(np.isnan(values).sum())
    if missing == len(values):
        return None
    if missing:
        raise MituneError(f"images.parquet: {missing} of {len(values)} images have no {metric!r}; evaluate them again.")
    return right(rows) if metric == "exact" else values


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
