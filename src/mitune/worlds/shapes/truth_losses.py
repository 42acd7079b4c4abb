"""A network's loss on one image with several prompts, and the estimates beside it. In nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mitune.denoiser.opening.models import Model
from mitune.denoiser.replay import condition
from mitune.information import (
    Estimator,
    LogisticProposal,
    Predict,
    Proposal,
    alpha_sigma,
    point_wise_draws,
    true_noise,
)
from mitune.scoring import NOISINGS_A_STRATUM, default_proposal

EMPTY = ""
END_DRAWS = 16
SPLIT = 2.0  # log-SNR


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimates:
    """Those of a network on one image with the empty prompt, first, and P others: (P + 1,) each."""

    loss: Tensor  # L of (1), nats
    orthogonal: Tensor  # ½ ∫ ‖ε̂(z | p) − ε̂(z | ∅)‖² dλ, nats
    confidence: Tensor  # −mean of ‖ε̂(z | p) − ε‖² per dimension
    at_high_snr: float  # the part of L(∅) − L(p) at λ > `SPLIT`, for the first of the others, nats
    clean_end: float  # what it gains beyond λ₂, nats


@torch.no_grad()
def estimates_of(model: Model, latents: Tensor, prompts: Sequence[str], *, draws: int, seed: int) -> Estimates:
    """Noises one image, latents (1, C, H, W), and denoises it with the empty prompt and each of the others."""
    path = model.denoiser.path
    inside = default_proposal(path, "self-confidence")  # one question for all, and this one is a mean over it
    beyond = LogisticProposal(inside.high, path.log_snr_range()[1])
    loss, orthogonal, confidence = _integrals(model, latents, [EMPTY, *prompts], inside, draws, seed)
    clean, _, _ = _integrals(model, latents, [EMPTY, prompts[0]], beyond, END_DRAWS, seed)
    strata = loss.shape[1]  # from noise to clean; one counts as high where its middle lies
    high = inside.at((torch.arange(strata) + 0.5) / strata) > SPLIT
    return Estimates(
        loss=loss.mean(dim=1),
        orthogonal=orthogonal.mean(dim=1),
        confidence=confidence.mean(dim=1),
        at_high_snr=((loss[0] - loss[1])[high].sum() / strata).item(),
        clean_end=(clean[0] - clean[1]).mean().item(),
    )


def _integrals(
    model: Model, latents: Tensor, prompts: Sequence[str], proposal: Proposal, draws: int, seed: int
) -> list[Tensor]:
    """Loss, orthogonal estimate against the first prompt, and confidence: (P, strata) each, to be averaged."""
    path, device = model.denoiser.path, model.denoiser.device
    z0 = latents.to(device).expand(len(prompts), -1, -1, -1)
    predict = network(model, prompts)
    answers: list[Tensor] = []

    def against_noise(noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (x.float().to(device) for x in alpha_sigma(log_snr, is_flow=path.is_flow))
        answers.append(predict(noisy, log_snr))
        return true_noise(noisy, z0, alpha, sigma), answers[-1]

    def against_first(noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        return (answer := next(known)), answer[:1]

    # The same generator asks the same questions again, so the network is asked but once.
    ways: list[tuple[Predict, Estimator]] = [
        (against_noise, "standard"), (against_first, "orthogonal"), (against_first, "self-confidence")
    ]  # fmt: skip
    integrals = []
    for both, estimator in ways:
        known = iter(answers)
        drawn = point_wise_draws(
            both,
            z0,
            estimator=estimator,
            proposal=proposal,
            strata=draws // NOISINGS_A_STRATUM,
            generator=Generator().manual_seed(seed),
            is_flow=path.is_flow,
        )
        integrals.append(drawn.double().mean(dim=2).cpu())
    return integrals


def network(model: Model, prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """ε̂ of latents (P, C, H, W), each with the prompt beside it, at one log-SNR."""
    denoiser = model.denoiser
    conditioning = condition(model, prompts).to(denoiser.device)
    return lambda noisy, log_snr: denoiser.epsilon(noisy, log_snr, conditioning)
