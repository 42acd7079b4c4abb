"""ε̂(z, λ | prompt): the one place where a noised latent becomes what a network says of its noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from mitune.denoiser.conditioning import Conditioning
from mitune.denoiser.network import as_tensor, denoiser_of, execution_device, family_of
from mitune.denoiser.path import NoisePath, path_of
from mitune.denoiser.pipeline import DenoiserModule, Pipeline
from mitune.information import alpha_sigma, epsilon_and_sample


class Denoiser(Protocol):
    """What scores, contrasts, losses and studies need of a model.

    Arguments may lie on any device; answers lie on that of `noisy`. Where all lie on `device`, nothing is moved.
    """

    @property
    def path(self) -> NoisePath:
        """The noise path that the network was trained on."""

    @property
    def device(self) -> torch.device:
        """Where the network computes."""

    def prediction(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the network predicts at z = `noisy` (B, ...) and t (B,), in its own parametrisation: of noisy's shape,
        float32, with the sign that the scheduler takes. conditioning: of B candidates."""

    def epsilon(self, noisy: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """ε̂ at z = `noisy` (B, ...) and λ, a scalar or (B,): of noisy's shape, float32. conditioning: likewise."""


@dataclass(frozen=True, slots=True, eq=False)
class NetworkDenoiser:
    """The network of any diffusers pipeline as a `Denoiser`; its hooks of offloading move it when it is called."""

    network: DenoiserModule
    path: NoisePath
    device: torch.device

    @classmethod
    def of(cls, pipe: Pipeline) -> Self:
        """Raises ModelError or MituneError if the pipeline's network or scheduler is not known."""
        return cls(denoiser_of(pipe), path_of(pipe.scheduler), execution_device(pipe))

    @property
    def separate_calls(self) -> bool:
        """Whether the pipeline calls the network with and without the prompt in turn, in place of once for both."""
        return family_of(self.network).separate_calls

    def prediction(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Denoiser.prediction`."""
        family, dtype = family_of(self.network), self.network.dtype
        z = noisy.to(self.device)
        times = family.timestep_factor * timesteps.to(self.device) + family.timestep_offset

        def call(rows: Tensor | slice, arguments: dict[str, Any]) -> Tensor:
            latents = z[rows].to(dtype)
            output = self.network(
                list(latents.unsqueeze(2)) if family.listed else latents,
                **{family.timestep_name: times[rows]},
                **arguments,
                return_dict=False,
            )[0]
            return as_tensor(output)[:, : noisy.shape[1]].float()  # further channels are a learned variance

        parts = list(conditioning.to(self.device, dtype).arguments())
        if len(parts) == 1:
            predicted = call(slice(None), parts[0][1])
        else:
            order = torch.cat([rows for rows, _ in parts]).argsort()
            predicted = torch.cat([call(rows, arguments) for rows, arguments in parts])[order]
        return (-predicted if family.negated else predicted).to(noisy.device)

    def epsilon(self, noisy: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Denoiser.epsilon`."""
        path = self.path
        output = self.prediction(noisy, path.timestep(log_snr).expand(len(noisy)), conditioning)
        shape = (-1, *[1] * (noisy.ndim - 1)) if log_snr.ndim else ()
        alpha, sigma = (
            level.float().reshape(shape).to(noisy.device) for level in alpha_sigma(log_snr, is_flow=path.is_flow)
        )
        return epsilon_and_sample(output, noisy, alpha, sigma, path.predicts, is_flow=path.is_flow)[0]
