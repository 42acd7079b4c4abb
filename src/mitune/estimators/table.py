"""Estimators of mutual information from samples by name, with one interface in the manner of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, Self

from mitune.errors import MituneError
from mitune.estimators.fields import PlainField, SkeletonField
from mitune.estimators.references import (
    CCA,
    KSG,
    GaussianCopula,
    Variational,
    donsker_varadhan,
    info_nce,
    jensen_shannon,
    nguyen_wainwright_jordan,
    smile,
)
from mitune.evaluation.statistics import Array
from mitune.information import Estimate


class Estimator(Protocol):
    """Learns from samples x (n, dim_x) and y (n, dim_y), and says I(x; y) on samples; in nats."""

    def fit(self, x: Array, y: Array) -> Self:
        """Learns from the samples. Raises MituneError where they are no two finite tables of equal length."""

    def estimate(self, x: Array, y: Array) -> Estimate:
        """Mutual information with its standard error; changes nothing. The samples may be those of `fit`."""


# Each is made from a seed; the last three are without randomness.
ESTIMATORS: Mapping[str, Callable[[int], Estimator]] = MappingProxyType(
    {
        "RFMI": lambda seed: SkeletonField(is_flow=True, scale=2, seed=seed),
        "MINDE-C": lambda seed: SkeletonField(is_flow=False, scale=3, seed=seed),
        "RFMI-plain": lambda seed: PlainField(is_flow=True, seed=seed),
        "MINDE-C-plain": lambda seed: PlainField(is_flow=False, seed=seed),
        "MINE": lambda seed: Variational(donsker_varadhan, donsker_varadhan, seed),
        "InfoNCE": lambda seed: Variational(info_nce, info_nce, seed),
        "NWJ": lambda seed: Variational(nguyen_wainwright_jordan, nguyen_wainwright_jordan, seed),
        "SMILE": lambda seed: Variational(jensen_shannon, smile, seed),
        "Gaussian-copula": lambda _: GaussianCopula(),
        "CCA": lambda _: CCA(),
        "KSG": lambda _: KSG(),
    }
)


def get_estimator(name: str, seed: int = 0) -> Estimator:
    """A new estimator of that name. Raises MituneError, with the names that exist, for any other."""
    if name not in ESTIMATORS:
        raise MituneError(f"There is no estimator {name!r}; the known ones are {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name](seed)
