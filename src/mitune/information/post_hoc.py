"""Point-wise information of given latents, which are noised again: unbiased draws of the integral. In nats."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from mitune.errors import MituneError
from mitune.information.conversion import alpha_sigma
from mitune.information.proposals import Proposal

Estimator = Literal["standard", "orthogonal", "self-confidence"]
UNITS: Mapping[str, str] = MappingProxyType(
    {"standard": "nats", "orthogonal": "nats", "self-confidence": "per dimension"}
)


def point_wise_terms(conditional: Tensor, null: Tensor, noise: Tensor, estimator: Estimator) -> Tensor:
    """The integrand of an estimator at one λ, before its sum over dimensions: as (B, C, H, W) as the arguments.

    conditional, null: ε̂(z | p) and ε̂(z | ∅); noise: the ε in z. With ½ ∫ E[·] dλ over its sum,
    standard ("ITD"): ‖ε − ε̂_∅‖² − ‖ε − ε̂_p‖², a log-likelihood ratio; orthogonal: ‖ε̂_p − ε̂_∅‖², as in (1).
    self-confidence is no information: −‖ε − ε̂_p‖², without the prompt's rival. Raises MituneError for other names.
    """
    if estimator == "standard":
        return (noise - null) ** 2 - (noise - conditional) ** 2
    if estimator == "orthogonal":
        return (conditional - null) ** 2
    if estimator == "self-confidence":
        return -((noise - conditional) ** 2)
    raise MituneError(f"There is no estimator {estimator!r}; the known ones are {', '.join(UNITS)}.")


class Predict(Protocol):
    """ε̂(z | p) and ε̂(z | ∅), both (B, ...) like `noisy`, at one log-SNR for the whole batch, a scalar tensor."""

    def __call__(self, noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]: ...


def point_wise_draws(
    predict: Predict,
    latents: Tensor,
    *,
    estimator: Estimator,
    proposal: Proposal,
    strata: int,
    generator: Generator,
    is_flow: bool,
    spatial: bool = False,
) -> Tensor:
    """Draws of the point-wise integral for given latents (B, C, H, W), by noising them again: (B, strata, 2), float32.

    Each of `strata` equal parts of the proposal gets two independent draws, so `Estimate.of_strata` of a row is value
    ± unbiased error. A draw is the mean over an antithetic pair, z₀ noised with ε and −ε: four calls of `predict` a
    stratum. All images share λ and ε, so differences between images or prompts have less noise than the values.
    In nats; for self-confidence per dimension, as the plain mean over the proposal. The generator is on the CPU: its
    state gives the same draws on any device. spatial=True sums over channels alone: (B, strata, 2, H, W).
    Source: eq. (1) with 1/density for importance; ITD (Kong et al., 2024) for standard and orthogonal.
    """
    axes = (1,) if spatial else tuple(range(1, latents.ndim))
    dimensions = latents[0].numel()
    z0 = latents.float()
    rows = []
    for stratum in range(strata):
        for _ in range(2):
            uniform = (stratum + torch.rand((), generator=generator, dtype=torch.float64)) / strata
            log_snr = proposal.at(uniform)
            weight = 1 / dimensions if estimator == "self-confidence" else 0.5 / proposal.density(log_snr).item()
            alpha, sigma = (x.float().to(z0.device) for x in alpha_sigma(log_snr, is_flow=is_flow))
            noise = torch.randn(z0.shape[1:], generator=generator).to(z0.device)
            pair = []
            for epsilon in (noise, -noise):
                conditional, null = predict(alpha * z0 + sigma * epsilon, log_snr)
                pair.append(point_wise_terms(conditional.float(), null.float(), epsilon, estimator).sum(dim=axes))
            rows.append(weight * (pair[0] + pair[1]) / 2)
    draws = torch.stack(rows, dim=1)
    return draws.reshape(len(draws), strata, 2, *draws.shape[2:])
