r"""RFMI and MINDE-C on samples: mutual information from a trained denoiser, with and without a Gaussian skeleton.

Without one, both are as in their papers: one network with the condition dropped now and then, and
I = ½ ∫ E‖ε̂(z|y) − ε̂(z)‖² dλ of `information/`, eq. (1), on the flow path (RFMI) or the VP path (MINDE-C).

With one, each denoiser is a closed form plus what a network, zero at the start, adds to it. For a normal N(μ, v)

    ε_G(z) = E[ε | z] = σ (z − αμ) / (α²v + σ²)                                              (2)

and the gap between p(x | c) and N(μ(c), v) is an integral of the same kind as (1), with the normal in ∅'s place:

    J(x|c) = E KL(p(x|c) ‖ N) = ½ ∫ E‖ε̂(z|c) − ε_G(z|c)‖² dλ                                 (3)
    I(x;y) = I_G + J(x|y) − J(x)                                                             (4)

I_G is the skeleton's own information, known without an error of integration. So where the samples have a Gaussian
copula both gaps are zero and the answer is exact, and elsewhere the networks have only the rest to learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from mitune.estimators.gaussian import Canonical, Map, Skeleton, checked_pair, summary_map
from mitune.estimators.networks import BatchedMLP, Folds, Training, point_wise, stratified, train
from mitune.evaluation.statistics import Array
from mitune.information import (
    TRUNCATION,
    Estimate,
    LogisticProposal,
    Proposal,
    RectifiedFlowProposal,
    alpha_sigma,
    epsilon_difference,
    point_wise_terms,
)

WIDE = 6  # more coordinates than these are summed up for the networks


def _time_features(log_snr: Tensor) -> Tensor:
    """(..., 5) from λ (..., 1): λ itself and two slow waves."""
    waves = log_snr * (torch.pi / 14) * torch.arange(1, 3)
    return torch.cat([log_snr / 4, waves.sin(), waves.cos()], dim=-1)


def _root_mean_square(x: Tensor) -> Tensor:
    """(..., 1) from (..., d). Heavy tails and spirals depend on the norm, which an MLP is slow to find by itself."""
    return (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


# --- With a skeleton ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """J of (3) for samples x (n, d) under conditions (n, c), against the normal N(slope · condition, 1 − slope²).

    slope (d,) takes x_i from condition_i; without a condition (c = 0) it is zero.
    """

    x: Tensor
    condition: Tensor
    slope: Tensor
    is_flow: bool
    proposal: Proposal

    @classmethod
    def of(cls, x: Array, condition: Array, correlations: Array, *, is_flow: bool, scale: float) -> Gap:
        """From samples in canonical coordinates; λ is drawn from a logistic distribution of that scale."""
        slope = np.zeros(x.shape[1])
        slope[: len(correlations)] = correlations
        # What is not normal shows where the noise is about as wide as p(x|c), so λ is drawn around that.
        location = 1 - float(np.log1p(-(slope**2)).mean())
        proposal = LogisticProposal(location - 8, location + 8, location, scale)
        x_, condition_, slope_ = (torch.from_numpy(values).float() for values in (x, condition, slope))
        return cls(x_, condition_, slope_, is_flow, proposal)

    def network(self, training: Training) -> BatchedMLP:
        """An offset and a factor of ε_G for each coordinate."""
        dimensions, conditions = self.x.shape[1], self.condition.shape[1]
        inputs = 2 * dimensions + 1 + 5 + (conditions + 1 if conditions else 0)
        return BatchedMLP(training.members, inputs, 2 * dimensions, training.width, training.depth)

    def loss(self, network: BatchedMLP, rows: Tensor, generator: Generator) -> Tensor:
        """Less the standard form of (3), ½∫‖ε − ε_G‖² − ‖ε − ε̂‖²: held-out samples lower it by true knowledge alone."""
        weight, denoised, normal, noise = self._denoise(network, rows, generator)
        return -(weight * point_wise_terms(denoised, normal, noise, "standard")).sum(dim=-1)

    def information(self, network: BatchedMLP, rows: Tensor, generator: Generator) -> Tensor:
        """The orthogonal form of (3)."""
        weight, denoised, normal, noise = self._denoise(network, rows, generator)
        return (weight * point_wise_terms(denoised, normal, noise, "orthogonal")).sum(dim=-1)

    def _denoise(
        self, network: BatchedMLP, rows: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """½/density (K, B, 1), ε̂, ε_G and ε (K, B, d), each sample at a λ of its own."""
        x, condition = self.x[rows], self.condition[rows]
        log_snr = self.proposal.at(stratified(rows.shape[0], rows.shape[1], generator))[..., None]
        weight = (0.5 / self.proposal.density(log_snr)).float()
        log_snr = log_snr.float()
        alpha, sigma = alpha_sigma(log_snr, is_flow=self.is_flow)
        noise = torch.randn(x.shape, generator=generator)
        noisy = alpha * x + sigma * noise

        has_condition = condition.shape[-1] > 0
        mean = self.slope * _padded(condition, x.shape[-1]) if has_condition else torch.zeros_like(x)
        variance = 1 - self.slope**2
        total = alpha**2 * variance + sigma**2
        residual = (noisy - alpha * mean) / total.sqrt()  # of unit variance where the normal is right
        normal = sigma / total.sqrt() * residual  # ε_G of (2)
        scaled = noisy / (alpha**2 + sigma**2).sqrt()
        features = [scaled, residual, _root_mean_square(scaled), _time_features(log_snr)]
        if has_condition:
            features += [condition, _root_mean_square(condition)]
        offset, factor = network(torch.cat(features, dim=-1)).chunk(2, dim=-1)
        # Both ends of the path are known: all noise or none, ε̂ is ε_G. So what is added vanishes there.
        reach = alpha * sigma * variance.sqrt() / total
        return weight, normal + reach * (offset + factor * residual), normal, noise


def _padded(condition: Tensor, dimensions: int) -> Tensor:
    """(..., dimensions) from (..., c): cut, or filled with zeros."""
    return torch.nn.functional.pad(condition, (0, max(0, dimensions - condition.shape[-1])))[..., :dimensions]


@dataclass
class SkeletonField:
    """I of (4): a Gaussian skeleton, and networks for the two gaps between the samples and it.

    The side with fewer coordinates is the one that is noised. Of a side with more than `WIDE`, the networks (not the
    skeleton) see the canonical coordinates that stand out and the norm of the rest.
    """

    is_flow: bool
    scale: float  # of the logistic distribution of λ; 2 makes a flow's times uniform
    seed: int = 0
    training: Training = Training()

    def fit(self, x: Array, y: Array) -> Self:
        """Fits skeleton and networks to samples x (n, dim_x), y (n, dim_y) with n > dim_x + dim_y + 1."""
        x, y = self._ordered(*checked_pair(x, y))
        self.skeleton_ = Skeleton.of(x, y)
        u, w = self.skeleton_(x, y)
        keep = max(1, self.skeleton_.canonical.significant)
        self.summaries_ = (_summary(u, keep), _summary(w, keep))
        self.canonical_ = Canonical.of(self.summaries_[0](u), self.summaries_[1](w))
        generator = torch.Generator().manual_seed(self.seed)
        self.folds_ = Folds.of(len(x), self.training.members, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.networks_ = [train(gap, self.folds_, self.training, generator) for gap in self._gaps(u, w)]
        return self

    def estimate(self, x: Array, y: Array) -> Estimate:
        """I on samples of the same shapes; the standard error is that of sampling alone.

        The samples that were fitted are each judged by the network that has not seen them, and the skeleton's bias is
        taken off. Other samples are judged by all networks.
        """
        x, y = checked_pair(*self._ordered(*checked_pair(x, y)), self.skeleton_.columns)
        fitted = self.skeleton_.was_fitted_to(x, y)
        rows = self.folds_.held_out if fitted else torch.arange(len(x)).expand(self.training.members, -1)
        values = torch.from_numpy(self.skeleton_.point_wise(x, y))
        gaps = self._gaps(*self.skeleton_(x, y))
        generator = torch.Generator().manual_seed(self.seed + 1)
        for sign, gap, network in zip((1, -1), gaps, self.networks_, strict=False):
            values = values + sign * point_wise(gap, network, rows, self.training.draws, generator)
        return Estimate.of_mean(values)

    def _ordered(self, x: Array, y: Array) -> tuple[Array, Array]:
        return (y, x) if x.shape[1] > y.shape[1] else (x, y)

    def _gaps(self, u: Array, w: Array) -> list[Gap]:
        """J(x|y), and J(x) unless x is a single normal score: that is normal already."""
        u, w = self.canonical_(self.summaries_[0](u), self.summaries_[1](w))
        conditional = Gap.of(u, w, self.canonical_.correlations, is_flow=self.is_flow, scale=self.scale)
        if u.shape[1] == 1:
            return [conditional]
        return [conditional, Gap.of(u, w[:, :0], np.zeros(0), is_flow=self.is_flow, scale=self.scale)]


def _summary(u: Array, keep: int) -> Map:
    return summary_map(u, keep) if u.shape[1] > max(WIDE, keep + 1) else np.asarray


# --- As in the papers --------------------------------------------------------------------------------------------

BETA = (0.1, 20.0)  # of the VP path's linear schedule
_FLOW_PROPOSAL = RectifiedFlowProposal(-16, 2 * math.log((1 - TRUNCATION) / TRUNCATION))  # RFMI, Prop. 3.3
_VP_PROPOSAL = LogisticProposal(-8, 12, 2, scale=8)  # nearly uniform


@dataclass(frozen=True, slots=True, eq=False)
class PaperField:
    """A network for ε̂(z|y) and ε̂(z) of standardized samples x (n, d), y (n, c): with a zero for y where it is dropped.

    It predicts the velocity v = ε − x at uniform flow times, or ε at uniform times of a linear VP schedule.
    """

    x: Tensor
    y: Tensor
    is_flow: bool

    def network(self, training: Training) -> BatchedMLP:
        """A velocity or an ε."""
        inputs = self.x.shape[1] + self.y.shape[1] + 1 + 5
        return BatchedMLP(training.members, inputs, self.x.shape[1], training.width, training.depth)

    def loss(self, network: BatchedMLP, rows: Tensor, generator: Generator) -> Tensor:
        """Mean squared error with and without y, on shared noise."""
        time = stratified(rows.shape[0], rows.shape[1], generator)[..., None]
        if self.is_flow:
            log_snr = (2 * torch.logit(time)).float()
        else:
            time = time.clamp(min=1e-3)  # as usual for this schedule
            integral = BETA[0] * time + (BETA[1] - BETA[0]) * time**2 / 2
            log_snr = -torch.log(torch.expm1(integral)).float()
        x, noise, outputs = self._outputs(network, rows, log_snr, generator)
        target = noise - x if self.is_flow else noise
        return torch.stack([((output - target) ** 2).mean(dim=-1) for output in outputs]).mean(dim=0)

    def information(self, network: BatchedMLP, rows: Tensor, generator: Generator) -> Tensor:
        """RFMI: t/(1−t) u·(u − u_∅) of Prop. 3.2, up to its truncation. MINDE-C: ½‖Δε‖² of (1)."""
        proposal: Proposal = _FLOW_PROPOSAL if self.is_flow else _VP_PROPOSAL
        log_snr = proposal.at(stratified(rows.shape[0], rows.shape[1], generator))[..., None]
        weight = (0.5 / proposal.density(log_snr)).float()[..., 0]
        log_snr = log_snr.float()
        _, _, (conditional, null) = self._outputs(network, rows, log_snr, generator)
        alpha, sigma = alpha_sigma(log_snr, is_flow=self.is_flow)
        if not self.is_flow:
            return weight * (epsilon_difference(conditional - null, alpha, sigma, "epsilon") ** 2).sum(dim=-1)
        # u·(u − u_∅) where (1) has ‖u − u_∅‖²; with Δε = α Δv, t/(1−t) dt is ½ α² dλ.
        return weight * (alpha**2 * conditional * (conditional - null)).sum(dim=-1)

    def _outputs(
        self, network: BatchedMLP, rows: Tensor, log_snr: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """x, ε and the network's outputs with and without y, all (K, B, d)."""
        x, y = self.x[rows], self.y[rows]
        alpha, sigma = alpha_sigma(log_snr, is_flow=self.is_flow)
        noise = torch.randn(x.shape, generator=generator)
        noisy = alpha * x + sigma * noise
        time = _time_features(log_snr)
        conditioned = torch.cat([noisy, y, torch.ones_like(log_snr), time], dim=-1)
        dropped = torch.cat([noisy, torch.zeros_like(y), torch.zeros_like(log_snr), time], dim=-1)
        return x, noise, (network(conditioned), network(dropped))


@dataclass
class PlainField:
    """The estimators as in their papers, on standardized samples and without a skeleton; x is noised, y the condition.

    Cross-fitted like the others: the samples that were fitted are each judged by the network that has not seen them.
    """

    is_flow: bool
    seed: int = 0
    training: Training = Training(learning_rate=2e-3)

    def fit(self, x: Array, y: Array) -> Self:
        """Trains the networks on samples x (n, dim_x), y (n, dim_y)."""
        x, y = checked_pair(x, y)
        self.samples_ = (x, y)
        self.center_, self.scale_ = (x.mean(0), y.mean(0)), (x.std(0), y.std(0))
        generator = torch.Generator().manual_seed(self.seed)
        self.folds_ = Folds.of(len(x), self.training.members, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = train(self._field(x, y), self.folds_, self.training, generator)
        return self

    def estimate(self, x: Array, y: Array) -> Estimate:
        """I on samples of the same shapes; the standard error is that of sampling alone."""
        x, y = checked_pair(x, y, (len(self.center_[0]), len(self.center_[1])))
        fitted = np.array_equal(x, self.samples_[0]) and np.array_equal(y, self.samples_[1])
        rows = self.folds_.held_out if fitted else torch.arange(len(x)).expand(self.training.members, -1)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return Estimate.of_mean(point_wise(self._field(x, y), self.network_, rows, self.training.draws, generator))

    def _field(self, x: Array, y: Array) -> PaperField:
        sides = zip((x, y), self.center_, self.scale_, strict=True)
        first, second = (torch.from_numpy((side - center) / scale).float() for side, center, scale in sides)
        return PaperField(first, second, self.is_flow)
