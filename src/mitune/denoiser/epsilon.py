"""ε̂(z, λ | prompt): the one place where a noised latent becomes what a network says of its noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from mitune.denoiser.network import denoiser_of, execution_device, network_output
from mitune.denoiser.path import NoisePath, path_of
from mitune.information import alpha_sigma, epsilon_and_sample


class Denoiser(Protocol):
    """What scores, contrasts, losses and studies need of a model.

    Arguments may lie on any device; answers lie on that of `noisy`. Where `noisy` lies on `device`, nothing is moved.
    """

    @property
    def path(self) -> NoisePath:
        """The noise path that the network was trained on."""

    @property
    def device(self) -> torch.device:
        """Where the network computes."""

    def prediction(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """What the network predicts at z = `noisy` (B, ...) and t (B,), in its own parametrisation: of noisy's shape,
        float32, with the sign that the scheduler takes. conditioning: of B candidates."""

    def epsilon(self, noisy: Tensor, log_snr: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """ε̂ at z = `noisy` (B, ...) and λ, a scalar or (B,): of noisy's shape, float32. conditioning: likewise."""


@dataclass(frozen=True, slots=True, eq=False)
class NetworkDenoiser:
    """The network of any diffusers pipeline as a `Denoiser`."""

    network: nn.Module
    path: NoisePath
    device: torch.device

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Raises ModelError or MituneError if the pipeline's network or scheduler is not known."""
        return cls(denoiser_of(pipe), path_of(pipe.scheduler), execution_device(pipe))

    def prediction(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """See `Denoiser.prediction`."""
        told = {name: value.to(self.device) for name, value in conditioning.items()}
        output = network_output(self.network, noisy.to(self.device), told, timesteps.to(self.device))
        return output.to(noisy.device)

    def epsilon(self, noisy: Tensor, log_snr: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """See `Denoiser.epsilon`."""
        timesteps = self.path.timestep(log_snr).expand(len(noisy))
        output = self.prediction(noisy, timesteps, conditioning)
        shape = (-1, *[1] * (noisy.ndim - 1)) if log_snr.ndim else ()
        alpha, sigma = (
            level.float().reshape(shape).to(noisy.device) for level in alpha_sigma(log_snr, is_flow=self.path.is_flow)
        )
        return epsilon_and_sample(output, noisy, alpha, sigma, self.path.predicts, is_flow=self.path.is_flow)[0]
