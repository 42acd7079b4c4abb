"""Estimators of mutual information to compare with: closed forms, nearest neighbors, and variational bounds.

None of them uses a denoiser. Each has `fit(x, y)` and `estimate(x, y)` on samples x (n, dim_x), y (n, dim_y), in nats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor, nn

from mitune.errors import MituneError
from mitune.estimators.gaussian import Map, Skeleton, checked_pair, marginal_map
from mitune.evaluation.statistics import Array
from mitune.information import Estimate


def _identity_map(x: Array) -> Map:
    del x
    return lambda new: new


@dataclass
class CCA:
    """−½ Σ ln(1 − ρ_i²) over the canonical correlations of the samples as they are (Hotelling, 1936)."""

    def fit(self, x: Array, y: Array) -> Self:
        """Learns the canonical coordinates."""
        self.skeleton_ = Skeleton.of(*checked_pair(x, y), normalizing=_identity_map)
        return self

    def estimate(self, x: Array, y: Array) -> Estimate:
        """Mean log-ratio of the fitted normal."""
        ratios = self.skeleton_.canonical.log_ratios(*self.skeleton_(*checked_pair(x, y, self.skeleton_.columns)))
        return Estimate.of_mean(torch.from_numpy(ratios))


@dataclass
class GaussianCopula:
    """The same on the normal scores of the ranks, less the bias of sampling: exact for any Gaussian copula."""

    def fit(self, x: Array, y: Array) -> Self:
        """Learns ranks and canonical coordinates."""
        self.skeleton_ = Skeleton.of(*checked_pair(x, y), normalizing=marginal_map)
        return self

    def estimate(self, x: Array, y: Array) -> Estimate:
        """Mean log-ratio of the fitted normal."""
        x, y = checked_pair(x, y, self.skeleton_.columns)
        return Estimate.of_mean(torch.from_numpy(self.skeleton_.point_wise(x, y)))


@dataclass
class KSG:
    """Nearest neighbors in the joint space, counted in each side (Kraskov, Stögbauer & Grassberger, 2004, eq. 8)."""

    neighbors: int = 10

    def fit(self, x: Array, y: Array) -> Self:
        """Nothing to learn but the scale of each column."""
        x, y = checked_pair(x, y)
        self.scale_x_, self.scale_y_ = x.std(axis=0), y.std(axis=0)
        return self

    def estimate(self, x: Array, y: Array) -> Estimate:
        """Mean of ψ(k) + ψ(n) − ψ(n_x + 1) − ψ(n_y + 1) over the samples; the error takes them as independent."""
        x, y = checked_pair(x, y, (len(self.scale_x_), len(self.scale_y_)))
        if len(x) <= self.neighbors:
            raise MituneError(f"{len(x)} samples are too few for {self.neighbors} neighbors; give more.")
        x, y = x / self.scale_x_, y / self.scale_y_
        joint = np.hstack([x, y])
        distance = cKDTree(joint).query(joint, self.neighbors + 1, p=np.inf)[0][:, -1]
        radius = np.nextafter(distance, 0)  # eq. (8) counts those strictly nearer
        inside = [cKDTree(side).query_ball_point(side, radius, p=np.inf, return_length=True) for side in (x, y)]
        values = digamma(self.neighbors) + digamma(len(x)) - digamma(inside[0]) - digamma(inside[1])
        return Estimate.of_mean(torch.from_numpy(values))


# --- Variational bounds ------------------------------------------------------------------------------------------
# Each takes a critic's scores f(x_i, y_j), (B, B), and gives a bound on I in nats. The diagonal holds the true pairs.

Bound = Callable[[Tensor], Tensor]
CLIP = 5.0  # τ of SMILE


def _off_diagonal(scores: Tensor) -> Tensor:
    """The scores of false pairs, (B (B − 1),)."""
    return scores[~torch.eye(len(scores), dtype=torch.bool)]


def _log_mean_exp(scores: Tensor) -> Tensor:
    return scores.logsumexp(0) - math.log(len(scores))


def donsker_varadhan(scores: Tensor) -> Tensor:
    """E[f] − ln E[eᶠ] over true and false pairs (MINE: Belghazi et al., 2018, eq. 10)."""
    return scores.diagonal().mean() - _log_mean_exp(_off_diagonal(scores))


def nguyen_wainwright_jordan(scores: Tensor) -> Tensor:
    """E[f] − E[eᶠ⁻¹] (NWJ: Nguyen et al., 2010; Poole et al., 2019, eq. 6)."""
    return scores.diagonal().mean() - (_log_mean_exp(_off_diagonal(scores)) - 1).exp()


def info_nce(scores: Tensor) -> Tensor:
    """E[f_ii − ln mean_j e^{f_ij}], at most ln B (InfoNCE: van den Oord et al., 2018; Poole et al., eq. 10)."""
    return (scores.diagonal() - scores.logsumexp(dim=1)).mean() + math.log(len(scores))


def jensen_shannon(scores: Tensor) -> Tensor:
    """−E[softplus(−f)] − E[softplus(f)]: no information, but the critic that maximizes it is ln p(x,y)/p(x)p(y)."""
    return -nn.functional.softplus(-scores.diagonal()).mean() - nn.functional.softplus(_off_diagonal(scores)).mean()


def smile(scores: Tensor) -> Tensor:
    """Donsker–Varadhan with eᶠ clipped to e^±τ in its second term (SMILE: Song & Ermon, 2020, eq. 14)."""
    return scores.diagonal().mean() - _log_mean_exp(_off_diagonal(scores).clamp(-CLIP, CLIP))


class Critic(nn.Module):
    """f(x, y) of all pairs of a batch: one MLP on (x, y), its first layer computed for each side once."""

    def __init__(self, dim_x: int, dim_y: int, width: int) -> None:
        super().__init__()
        self.first_x = nn.Linear(dim_x, width)
        self.first_y = nn.Linear(dim_y, width, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, B) from x (B, dim_x), y (B, dim_y)."""
        scores: Tensor = self.rest(self.first_x(x)[:, None] + self.first_y(y)[None])
        return scores[..., 0]


@dataclass
class Variational:
    """A critic trained on `objective`, stopped by a held-out fifth, and read by `bound`."""

    objective: Bound
    bound: Bound
    seed: int = 0
    width: int = 64
    batch: int = 64
    steps: int = 2000
    learning_rate: float = 1e-3
    patience: int = 6  # checks of the held-out part, one every 100 steps, without a gain
    critic_: Critic = field(init=False, repr=False)

    def fit(self, x: Array, y: Array) -> Self:
        """Trains the critic on standardized samples, at least ten batches of them."""
        x, y = checked_pair(x, y)
        if len(x) < 10 * self.batch:
            raise MituneError(f"{len(x)} samples are too few for batches of {self.batch}; give more, or lower `batch`.")
        self.center_, self.scale_ = (x.mean(0), y.mean(0)), (x.std(0), y.std(0))
        sides = self._standardized(x, y)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            critic = Critic(x.shape[1], y.shape[1], self.width)
        held, rest = torch.tensor_split(torch.randperm(len(x), generator=generator), [len(x) // 5])
        optimizer = torch.optim.Adam(critic.parameters(), lr=self.learning_rate)
        best, waited = -math.inf, 0
        self.critic_ = copy.deepcopy(critic)
        for step in range(1, self.steps + 1):
            drawn = rest[torch.randint(len(rest), (self.batch,), generator=generator)]
            optimizer.zero_grad()
            (-self.objective(critic(*(side[drawn] for side in sides)))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 100 == 0:
                value = self._blocks(critic, sides[0][held], sides[1][held], self.objective).mean().item()
                waited = 0 if value > best else waited + 1
                if value > best:
                    best, self.critic_ = value, copy.deepcopy(critic)
                elif waited >= self.patience:
                    break
        return self

    def estimate(self, x: Array, y: Array) -> Estimate:
        """Mean of the bound over batches; the standard error is that of the batches."""
        x, y = checked_pair(x, y, (len(self.center_[0]), len(self.center_[1])))
        if len(x) < self.batch:
            raise MituneError(f"{len(x)} samples are too few for batches of {self.batch}; give more.")
        return Estimate.of_mean(self._blocks(self.critic_, *self._standardized(x, y), self.bound))

    def _standardized(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        sides = zip((x, y), self.center_, self.scale_, strict=True)
        first, second = (torch.from_numpy((side - center) / scale).float() for side, center, scale in sides)
        return first, second

    @torch.no_grad()
    def _blocks(self, critic: Critic, x: Tensor, y: Tensor, bound: Bound) -> Tensor:
        """The bound on every full batch of the samples, (batches,)."""
        full = len(x) - len(x) % self.batch
        pairs = zip(torch.split(x[:full], self.batch), torch.split(y[:full], self.batch), strict=True)
        return torch.stack([bound(critic(a, b)) for a, b in pairs])
