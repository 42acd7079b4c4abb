"""A number with its error: means of draws, plain and stratified, with Student's t for few of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

ONE_SIGMA = 0.6827  # what a standard error covers to each side where it is known


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error, the number of draws it rests on, its unit, and the error's own certainty."""

    value: float
    standard_error: float
    samples: int
    unit: str = "nats"
    degrees_of_freedom: float = math.inf

    @classmethod
    def of_mean(cls, draws: Tensor, unit: str = "nats") -> Estimate:
        """Mean of independent draws (n,) and its standard error; NaN for the error of a single draw."""
        return cls.of_strata(draws.reshape(1, -1), unit)

    @classmethod
    def of_strata(cls, draws: Tensor, unit: str = "nats") -> Estimate:
        """Mean over strata of equal weight, (strata, n), with n independent draws in each; the error is unbiased."""
        value, error, degrees = (x.item() for x in stratified_mean(draws))
        return cls(value, error, draws.numel(), unit, degrees)

    @property
    def error(self) -> float:
        """What to print behind ±: half the interval that covers the truth in 68 of 100 cases."""
        return self._half_width(ONE_SIGMA)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The ends of the interval that covers the truth with that probability, by Student's t."""
        half = self._half_width(confidence)
        return self.value - half, self.value + half

    def _half_width(self, confidence: float) -> float:
        return self.standard_error * float(student.ppf((1 + confidence) / 2, self.degrees_of_freedom))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f} {self.unit} (n = {self.samples})"


def stratified_mean(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of draws (..., strata, n), its standard error, and the degrees of freedom of that, each (...), float64.

    With T = Σ v and S = Σ v² over the variances v of the strata's means, Satterthwaite's degrees (1946), (n − 1) T²/S,
    are too few where strata share the variance, as v² is on average more than the square of what v estimates. Welch's
    (1947), (n + 1) T²/S − 2, are right for normal draws, and too many for the skewed ones of a denoiser. The mean of
    the two is taken: n − 1 where one stratum has all of the variance. The last two results are NaN for n = 1.
    """
    strata, each = draws.shape[-2:]
    draws = draws.double()
    mean = draws.mean(dim=(-2, -1))
    if each < 2:
        return mean, torch.full_like(mean, math.nan), torch.full_like(mean, math.nan)
    variances = draws.var(dim=-1) / each
    total, squares = variances.sum(dim=-1), (variances**2).sum(dim=-1)
    degrees = each * torch.where(squares > 0, total**2 / squares, strata) - 1
    return mean, total.sqrt() / strata, degrees
