"""What a network's output says about noise and signal, whatever it was trained to predict."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Predicts = Literal["epsilon", "velocity", "sample"]


def alpha_sigma(log_snr: Tensor, *, is_flow: bool) -> tuple[Tensor, Tensor]:
    """α and σ at log-SNR λ, of its shape. VP: α² = sigmoid(λ), σ² = sigmoid(−λ). Flow: α = sigmoid(λ/2), σ = 1 − α."""
    if is_flow:
        return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def epsilon_difference(delta: Tensor, alpha: Tensor, sigma: Tensor, predicts: Predicts) -> Tensor:
    """Δε of (1), (B, C, H, W), from the same difference of what the network predicts; alpha, sigma broadcast."""
    # z cancels. The factor α serves v = αε − σz₀ (VP) and v = ε − z₀ (flow) alike.
    factor = {"epsilon": torch.ones_like(alpha), "velocity": alpha, "sample": -alpha / sigma}
    return factor[predicts] * delta  # path.py has refused any other prediction type


def velocity_difference(delta: Tensor, alpha: Tensor, sigma: Tensor, predicts: Predicts) -> Tensor:
    """Δv = Δε/α likewise, of v = α ε − σ z₀ (VP) or ε − z₀ (flow). At α = 0 an ε-network says nothing of it."""
    factor = {"epsilon": 1 / alpha, "velocity": torch.ones_like(alpha), "sample": -1 / sigma}
    return factor[predicts] * delta


def epsilon_and_sample(
    output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, predicts: Predicts, *, is_flow: bool
) -> tuple[Tensor, Tensor]:
    """ε̂ and ẑ₀ = (z − σ ε̂)/α from a network's output at z = `noisy`, all (B, C, H, W); alpha, sigma broadcast.

    At α = 0 an ε-network says nothing of z₀, at σ = 0 a z₀-network nothing of ε: those come back infinite or NaN.
    """
    if predicts == "epsilon":
        return output, (noisy - sigma * output) / alpha
    if predicts == "sample":
        return (noisy - alpha * output) / sigma, output
    if is_flow:  # v = ε − z₀
        return noisy + alpha * output, noisy - sigma * output
    return sigma * noisy + alpha * output, alpha * noisy - sigma * output  # v = α ε − σ z₀


def true_noise(noisy: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε = (z − α z₀)/σ, (B, C, H, W): the noise that a point z of a trajectory holds, once its end z₀ is known."""
    return (noisy - alpha * latents) / sigma
