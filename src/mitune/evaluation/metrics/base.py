"""What judges images: a metric of single images against their prompts, or one of a whole set against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mitune.errors import MituneError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mitune.information import Estimate


# How an image misses its prompt. A malformed one says nothing about meaning, and is only that.
TOO_MUCH, TOO_LITTLE, BOUND, PLACED, MALFORMED = (
    "too much", "too little", "wrongly bound", "wrongly placed", "malformed",
)  # fmt: skip
FAILURES = (TOO_MUCH, TOO_LITTLE, BOUND, PLACED, MALFORMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """What a metric says of an image. The rest than `graded` is for metrics that know an exact truth."""

    graded: float  # within the metric's bounds, in its own unit
    exact: bool | None = None  # whether the image shows all of the prompt, and nothing against it
    malformed: bool = False  # so badly drawn that it says nothing about meaning
    missed: tuple[str, ...] = ()  # parts of the prompt
    drawn: str = ""  # what the image shows, in words
    failures: tuple[str, ...] = ()  # of `FAILURES`, in their order; none where the image is right

    @property
    def right(self) -> bool:
        """Whether the image is exactly right: exact, and not malformed."""
        return bool(self.exact) and not self.malformed


class ImageMetric(Protocol):
    """Judges images one by one, each against its prompt."""

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest that it gives; None where there are none."""

    def __call__(self, images: Sequence[Image], prompts: Sequence[str], /) -> list[Judgment]:
        """A judgment of each image (mode RGB, of any size) against the prompt beside it."""


@runtime_checkable
class ChoosyMetric(Protocol):
    """A metric that cannot judge by every prompt, and says so before any image is made."""

    def check(self, prompts: Sequence[str], /) -> None:
        """Raises MituneError for prompts that it cannot judge by."""


class SetMetric(Protocol):
    """Compares a set of images with a reference set by their features, as FID does."""

    def features(self, images: Sequence[Image], /) -> Tensor:
        """(N, D)."""

    def compare(self, generated: Tensor, reference: Tensor, /) -> Estimate:
        """Of features (N, D) and (M, D)."""


def judge(metric: ImageMetric, images: Sequence[Image], prompts: Sequence[str]) -> list[Judgment]:
    """A judgment of each image. Raises MituneError for a metric that gives too few, or values out of its bounds."""
    judgments = metric(images, prompts)
    if len(judgments) != len(images):
        raise MituneError(
            f"The metric {metric.name} gave {len(judgments)} judgments of {len(images)} images; let it give one each."
        )
    low, high = metric.bounds or (-math.inf, math.inf)
    for judgment in judgments:
        if not (math.isfinite(judgment.graded) and low <= judgment.graded <= high):
            raise MituneError(
                f"The metric {metric.name} graded an image {judgment.graded}; let it give finite numbers within its "
                f"bounds ({low:g} to {high:g})."
            )
    return judgments


def merit(metric: ImageMetric, judgment: Judgment) -> float:
    """The graded judgment with more always better: from 0 to 1 over the metric's bounds, else up to its sign."""
    if metric.bounds is None:
        return judgment.graded if metric.higher_is_better else -judgment.graded
    worst, best = metric.bounds if metric.higher_is_better else reversed(metric.bounds)
    return (judgment.graded - worst) / (best - worst)
