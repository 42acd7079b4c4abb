r"""A Gaussian skeleton of a joint distribution: what a closed form knows before any network is trained.

Mutual information does not change when x and y are each mapped one-to-one. So each side is first made as normal as a
simple map can make it, then turned into canonical coordinates, in which it has unit covariance and x_i goes with y_i
alone, with correlation ρ_i. If the whole is then normal,

    I_G = −½ Σ ln(1 − ρ_i²)                                                              (1)

All in NumPy; samples are rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import orth
from scipy.special import digamma, ndtr, ndtri
from scipy.stats import chi, kstest, rankdata

from mitune.errors import MituneError
from mitune.evaluation.statistics import Array

Map = Callable[[Array], Array]  # (n, d) to (n, d), one-to-one up to ties


TIED = 0.01  # share of a column's samples that may have another's value; rounding to float32 makes far fewer


def checked_pair(x: Array, y: Array, columns: tuple[int, int] | None = None) -> tuple[Array, Array]:
    """Both as float64 of shape (n, d). Raises MituneError unless they are samples that the estimators are made for.

    That is: finite, two-dimensional, equally long, not empty, with as many `columns` as were fitted where those are
    given, continuous, and without a part of x that is a part of y. Of a variable with atoms, ranks and distances say
    nothing, and of infinite information no number is right: all would be wrong without a word.
    """
    try:
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MituneError(f"x and y must be tables of numbers ({error}).") from error
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not (x.size and y.size):
        raise MituneError(f"x {x.shape} and y {y.shape} must be two tables with the same number of rows; reshape them.")
    if columns is not None and (x.shape[1], y.shape[1]) != columns:
        raise MituneError(
            f"x {x.shape} and y {y.shape} must have the {columns[0]} and {columns[1]} columns of the fit."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise MituneError("x or y holds values that are not finite; drop or fill those rows.")
    for name, side in (("x", x), ("y", y)):
        for number, column in enumerate(side.T, start=1):
            _check_continuous(column, f"Column {number} of {name}")
    if len(x) > x.shape[1] + y.shape[1] + 1:  # else chance alone makes them fit
        _refuse_determined(_largest_correlation(x, y))
        _refuse_determined(_largest_correlation(rankdata(x, axis=0), rankdata(y, axis=0)))
    return x, y


def _largest_correlation(x: Array, y: Array) -> float:
    """The first canonical correlation, also where the columns of a side depend on each other."""
    sides = (side / np.abs(side).max(axis=0) for side in (x, y))
    bases = [orth((side - side.mean(axis=0)) / side.std(axis=0)) for side in sides]
    return float(np.linalg.norm(bases[0].T @ bases[1], ord=2))


def _refuse_determined(correlation: float) -> None:
    if correlation > 1 - 1e-9:
        raise MituneError("x and y determine each other, so their information is infinite; add the noise they have.")


def _check_continuous(column: Array, where: str) -> None:
    values, counts = np.unique(column, return_counts=True)
    tied = int(counts[counts > 1].sum())
    if len(values) == 1 < len(column):
        raise MituneError(f"{where} is constant; drop it.")
    if tied > TIED * len(column):
        raise MituneError(
            f"{where} is not continuous: {tied} of its {len(column)} samples have another's value. Drop repeated rows; "
            "spread counts and rounded values by uniform noise as wide as their spacing, which changes no information."
        )


# --- Maps that make one side normal ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """The distribution function of one variable as a sample tells it: linear between the mid-ranks."""

    values: Array  # (m,) distinct, ascending
    levels: Array  # (m,) in (0, 1)

    @classmethod
    def of(cls, values: Array) -> Ranks:
        """From a sample (n,)."""
        distinct, counts = np.unique(values, return_counts=True)
        return cls(distinct, (np.cumsum(counts) - counts / 2) / len(values))

    def __call__(self, values: Array) -> Array:
        """Levels of values, (n,); beyond the sample, that of its end."""
        return np.interp(values, self.values, self.levels)


def marginal_map(x: Array) -> Map:
    """Every coordinate to its normal score: the map that makes a Gaussian copula a normal. Fitted to x (n, d)."""
    ranks = [Ranks.of(column) for column in x.T]
    return lambda new: ndtri(np.stack([rank(column) for rank, column in zip(ranks, new.T, strict=True)], axis=1))


def radial_map(x: Array) -> Map:
    """Radii to those of a normal, directions kept: makes any elliptical distribution a normal. Fitted to x (n, d).

    Source: radial Gaussianization (Lyu & Simoncelli, 2009), about Tyler's scatter, which heavy tails do not disturb.
    """
    center = np.median(x, axis=0)
    root = inverse_root(tyler_scatter(x - center))
    ranks = Ranks.of(_norms((x - center) @ root))

    def apply(new: Array) -> Array:
        white = (new - center) @ root
        radius = np.maximum(_norms(white), np.finfo(float).tiny)
        moved: Array = white * (chi.ppf(ranks(radius), x.shape[1]) / radius)[:, None]
        return moved

    return apply


def normalizing_map(x: Array) -> Map:
    """The better of `marginal_map` and `radial_map` for x (n, d).

    Each of them settles exactly what the other leaves open, marginals or radii; so what is left open decides, by its
    Kolmogorov–Smirnov distance from the normal's.
    """
    marginal = marginal_map(x)
    dimensions = x.shape[1]
    if dimensions == 1:
        return marginal
    radial = radial_map(x)
    scores = marginal(x)
    radii = _norms(scores @ inverse_root(np.cov(scores.T)))
    marginal_rest = kstest(radii, chi(dimensions).cdf).statistic
    radial_rest = np.mean([kstest(column, ndtr).statistic for column in radial(x).T])
    # Both rests are of the order 1/√n for a normal; the factor leaves such ties to the marginals.
    return marginal if marginal_rest <= 1.5 * radial_rest else radial


def tyler_scatter(x: Array, iterations: int = 30) -> Array:
    """Scatter matrix (d, d) of trace d of centered samples, from their directions alone (Tyler, 1987)."""
    n, dimensions = x.shape
    scatter = np.eye(dimensions)
    for _ in range(iterations):
        squared = np.einsum("ni,ij,nj->n", x, np.linalg.inv(scatter), x)
        scatter = dimensions / n * (x / np.maximum(squared, np.finfo(float).tiny)[:, None]).T @ x
        scatter *= dimensions / np.trace(scatter)
    return scatter


def inverse_root(covariance: Array) -> Array:
    """The symmetric inverse square root. Raises MituneError where a coordinate is a combination of the others."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] <= 1e-12 * values[-1]:
        raise MituneError("A column of x or y is constant or a combination of others; drop it.")
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def _norms(x: Array) -> Array:
    return np.asarray(np.linalg.norm(x, axis=1))


# --- Canonical coordinates ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Canonical:
    """Linear maps of both sides to canonical coordinates, with the correlations of the pairs in descending order."""

    mean_x: Array  # (dim_x,)
    mean_y: Array  # (dim_y,)
    weights_x: Array  # (dim_x, dim_x)
    weights_y: Array  # (dim_y, dim_y)
    correlations: Array  # (min(dim_x, dim_y),)
    samples: int

    @classmethod
    def of(cls, x: Array, y: Array) -> Canonical:
        """Canonical correlation analysis (Hotelling, 1936) of samples x (n, dim_x) and y (n, dim_y)."""
        n = len(x)
        if n <= x.shape[1] + y.shape[1] + 1:
            raise MituneError(f"{n} samples are too few for {x.shape[1]} + {y.shape[1]} coordinates; give more.")
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        x, y = x - mean_x, y - mean_y
        root_x, root_y = inverse_root(x.T @ x / n), inverse_root(y.T @ y / n)
        left, correlations, right = np.linalg.svd(root_x @ (x.T @ y / n) @ root_y)
        _refuse_determined(correlations[0])
        return cls(mean_x, mean_y, root_x @ left, root_y @ right.T, correlations, n)

    def __call__(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Both sides in canonical coordinates."""
        return (x - self.mean_x) @ self.weights_x, (y - self.mean_y) @ self.weights_y

    @property
    def information(self) -> float:
        """I_G of (1), in nats: the plug-in value, which is too high by `bias` on average."""
        return float(-0.5 * np.log1p(-(self.correlations**2)).sum())

    @property
    def bias(self) -> float:
        """What sampling alone adds to `information` for normal data, in nats; about dim_x dim_y / 2n.

        Exact, from the mean of ln|Σ̂| under a Wishart distribution (Misra, Singh & Demchuk, 2005).
        """

        def mean_log(dimensions: int) -> float:
            return float(digamma((self.samples - 1 - np.arange(dimensions)) / 2).sum())

        dim_x, dim_y = len(self.mean_x), len(self.mean_y)
        return (mean_log(dim_x) + mean_log(dim_y) - mean_log(dim_x + dim_y)) / 2

    @property
    def significant(self) -> int:
        """How many pairs stand out of what independent sides would show: the edge of Wachter's law."""
        share_x, share_y = len(self.mean_x) / self.samples, len(self.mean_y) / self.samples
        edge = np.sqrt(share_x * (1 - share_y)) + np.sqrt(share_y * (1 - share_x))
        return int((self.correlations > 1.1 * edge).sum())

    def log_ratios(self, u: Array, w: Array) -> Array:
        """ln p(u, w) / (p(u) p(w)) of the normal, (n,), in nats, for samples in canonical coordinates.

        Its mean over the samples that were fitted is `information`, exactly.
        """
        pairs = len(self.correlations)
        rho = self.correlations
        u, w = u[:, :pairs], w[:, :pairs]
        quadratic = (rho**2 * (u**2 + w**2) - 2 * rho * u * w) / (1 - rho**2)
        return np.asarray(-0.5 * (np.log1p(-(rho**2)) + quadratic).sum(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """Both maps to normal scores, and the canonical coordinates after them."""

    samples: tuple[Array, Array]  # that it was fitted to
    map_x: Map
    map_y: Map
    canonical: Canonical

    @classmethod
    def of(cls, x: Array, y: Array, normalizing: Callable[[Array], Map] = normalizing_map) -> Skeleton:
        """Fitted to samples x (n, dim_x) and y (n, dim_y)."""
        map_x, map_y = normalizing(x), normalizing(y)
        return cls((x, y), map_x, map_y, Canonical.of(map_x(x), map_y(y)))

    def __call__(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Both sides in canonical coordinates."""
        return self.canonical(self.map_x(x), self.map_y(y))

    @property
    def columns(self) -> tuple[int, int]:
        """dim_x and dim_y."""
        return self.samples[0].shape[1], self.samples[1].shape[1]

    def was_fitted_to(self, x: Array, y: Array) -> bool:
        """Whether these are the very samples."""
        return np.array_equal(x, self.samples[0]) and np.array_equal(y, self.samples[1])

    def point_wise(self, x: Array, y: Array) -> Array:
        """The log-ratio of each sample, (n,), in nats; less the bias where the samples are those that were fitted."""
        return self.canonical.log_ratios(*self(x, y)) - (self.canonical.bias if self.was_fitted_to(x, y) else 0.0)


def summary_map(u: Array, keep: int) -> Map:
    """Of canonical coordinates (n, d), the first `keep` and the normal score of the norm of the rest: (n, keep + 1)."""
    rest = Ranks.of(_norms(u[:, keep:]))
    return lambda new: np.column_stack([new[:, :keep], ndtri(rest(_norms(new[:, keep:])))])
