"""The denoising loss with a target that leads away from a prompt's hard negatives, as far as they fit the image."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mitune.finetuning.objectives.base import Batch, Needs, Network, Rivals, per_image, squared_distance
from mitune.information import epsilon_difference

STRENGTH = 1.0  # γ₊
TEMPERATURE = 2.0  # τ, for which ‖ε̂ − ε‖²/τ is −log p(z₀ | prompt) a unit of log-SNR, in nats


class RivalTarget:
    """w ‖f − y*‖² with y* = u + γ₊ (f₀(p) − Σ_k w_k f₀(p_k)), the mean over an image's values.

    p_k are p itself and those of its hard negatives that were drawn (`draws.py`), and w_k = softmax of
    −‖ε̂₀(p_k) − ε‖²/τ, the sum over an image's values; of ε, so that they are the same whatever the network predicts.
    f₀(p) − Σ_k w_k f₀(p_k) is, but for a factor of t, the gradient of log p(p | z) over these prompts: nothing where
    the model is sure of p, or where p has no rivals. There the loss is that of `denoising`, of which the drift stays.

    Fitted without bounds, f = E[u] + γ₊ (f₀(p) − Σ_k E[w_k] f₀(p_k)) at each z.

    Source: AGSM, arXiv 2605.30038, with hard negatives for the other prompts of a batch, and positive pairs alone.
    """

    needs: Needs = "rivals"

    def __call__(self, batch: Batch, network: Network) -> Tensor:
        target = batch.target
        if batch.rivals is not None and len(batch.rivals.images) > 0:
            target = target + STRENGTH * _lead(batch, batch.rivals, network)
        return batch.weights * squared_distance(network(batch), target)


def _lead(batch: Batch, rivals: Rivals, network: Network) -> Tensor:
    """f₀(p) − Σ_k w_k f₀(p_k), (B, C, H, W)."""
    against = _against(batch, rivals)
    base, others = network.reference(batch), network.reference(against)
    matches = torch.arange(len(base), device=base.device).unsqueeze(1) == rivals.images  # (B, R)
    fit = torch.where(matches, _fit(others, against), -math.inf)
    weights = torch.cat([_fit(base, batch).unsqueeze(1), fit], dim=1).softmax(dim=1)  # (B, 1 + R)
    expected = per_image(weights[:, 0], base) * base + (weights[:, 1:] @ others.flatten(1)).view_as(base)
    return base - expected


def _against(batch: Batch, rivals: Rivals) -> Batch:
    """The images of a batch once for each of their rivals, with its prompt: R in all."""
    names = ("latents", "noise", "timesteps", "weights", "advantages", "worse")
    tensors = {name: getattr(batch, name)[rivals.images] for name in names}
    return replace(batch, **tensors, prompts=rivals.prompts, conditioning=rivals.conditioning, rivals=None)


def _fit(predicted: Tensor, batch: Batch) -> Tensor:
    """−‖ε̂ − ε‖²/τ, (B,)."""
    path = batch.path
    alpha, sigma = (per_image(part(batch.timesteps), predicted) for part in (path.alpha, path.sigma))
    errors = epsilon_difference(predicted - batch.target, alpha, sigma, path.predicts)
    return -errors.square().flatten(1).sum(dim=1) / TEMPERATURE
