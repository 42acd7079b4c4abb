"""Point-wise mutual information of given images with any prompts (post-hoc), with a standard error for each image.

The images are noised again and denoised with and without the prompt. The conditioning comes from one step of the
unmodified pipeline, watched by the probe; after that the denoiser is called alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Generator, Tensor

from mitune.errors import MituneError
from mitune.information import (
    TRUNCATION,
    UNITS,
    Estimate,
    Estimator,
    LogisticProposal,
    Proposal,
    alpha_sigma,
    epsilon_and_sample,
    point_wise_draws,
)
from mitune.path import NoisePath, path_of
from mitune.probe import MIProbe, denoiser_of, family_of, unflatten

NOISINGS_A_STRATUM = 4  # two independent antithetic pairs


@dataclass(frozen=True, slots=True, eq=False)
class ImageScores:
    """Scores of N images, whose draws are paired: Estimate.of_strata(draws[0] - draws[1]) is a difference."""

    estimates: list[Estimate]
    draws: Tensor  # (N, strata, 2), float32
    maps: Tensor  # (N, h, w), float32, on the grid of the latents; its sum is the value of the estimate


@torch.no_grad()
def score(
    pipe: Any,
    images: Sequence[Image] | Tensor,
    prompts: Sequence[str],
    *,
    estimator: Estimator = "orthogonal",
    draws: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    proposal: Proposal | None = None,
    call: Mapping[str, Any] | None = None,
) -> ImageScores:
    """I(z₀; p) of each image with the prompt beside it, in nats; for self-confidence −‖ε̂_p − ε‖² per dimension.

    images: N pictures, or latents (N, C, H, W) as the denoiser sees them. prompts: N. draws: noisings of each image,
    a multiple of 4 (two antithetic pairs a stratum of λ). A seed gives all images the same noise, whatever the
    batch_size. proposal: where in λ; by default `default_proposal`. call: the arguments that the pipeline is used
    with, where they shape its conditioning (negative_prompt, max_sequence_length); others do no harm.

    Raises MituneError for numbers that do not fit and for an unknown estimator or scheduler, and GuidanceError if the
    model has no pass without the prompt.
    Source: eq. (1) of `mitune.information`; standard and orthogonal after ITD (Kong et al., 2024), self-confidence
    after SOLACE (arXiv 2603.00918).
    """
    if len(images) != len(prompts):
        raise MituneError(f"There are {len(images)} images for {len(prompts)} prompts; give one prompt for each image.")
    if draws < NOISINGS_A_STRATUM or draws % NOISINGS_A_STRATUM:
        raise MituneError(f"draws = {draws} must be a multiple of {NOISINGS_A_STRATUM}; noise comes in pairs of pairs.")
    if estimator not in UNITS:
        raise MituneError(f"There is no estimator {estimator!r}; the known ones are {', '.join(UNITS)}.")
    path = path_of(pipe.scheduler)
    latents = images if isinstance(images, Tensor) else encode_images(pipe, images)
    if latents.ndim != 4:
        raise MituneError(f"The latents have shape {tuple(latents.shape)}; give (N, C, H, W), not packed.")
    chunks = []
    for start in range(0, len(prompts), batch_size):
        some = slice(start, start + batch_size)
        denoiser = _PipelineDenoiser(pipe, path, latents[some], prompts[some], call or {})
        chunk = point_wise_draws(
            denoiser,
            latents[some].to(denoiser.device),
            estimator=estimator,
            proposal=proposal or default_proposal(path),
            strata=draws // NOISINGS_A_STRATUM,
            generator=Generator().manual_seed(seed),
            is_flow=path.is_flow,
            spatial=True,
        )
        chunks.append(chunk.cpu())
    spatial = torch.cat(chunks)  # (N, strata, 2, h, w)
    summed = spatial.sum(dim=(-2, -1))
    return ImageScores(
        estimates=[Estimate.of_strata(row, UNITS[estimator]) for row in summed],
        draws=summed,
        maps=spatial.mean(dim=(1, 2)),
    )


def default_proposal(path: NoisePath) -> LogisticProposal:
    """Uniform in flow time over the λ that training has seen, without the clean end: σ/(α + σ) > `TRUNCATION`."""
    low, high = path.log_snr_range()
    return LogisticProposal(low, min(high, 2 * math.log((1 - TRUNCATION) / TRUNCATION)))


@torch.no_grad()
def encode_images(pipe: Any, images: Sequence[Image]) -> Tensor:
    """Pictures of one size as latents (N, C, H, W) the way the pipeline's denoiser sees them; the VAE's mode."""
    if len({image.size for image in images}) != 1:
        raise MituneError("The images differ in size; score those of one size together.")
    vae = pipe.vae
    dtype = vae.dtype
    # SDXL's VAE overflows in half precision; its pipeline also lifts it for the time of a call.
    lifted = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if lifted:
        vae.to(torch.float32)
    pixels = pipe.image_processor.preprocess([image.convert("RGB") for image in images])
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if lifted:
        vae.to(dtype)
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    shift, scale = vae.config.get("shift_factor") or 0.0, float(vae.config.scaling_factor)
    return (latents.float() - shift) * scale


class _PipelineDenoiser:
    """ε̂ with and without the prompts for point_wise_draws, from the pipeline's own denoiser and conditioning."""

    def __init__(
        self, pipe: Any, path: NoisePath, latents: Tensor, prompts: Sequence[str], call: Mapping[str, Any]
    ) -> None:
        self.denoiser = denoiser_of(pipe)
        self.dtype = cast(torch.dtype, self.denoiser.dtype)
        self.family = family_of(self.denoiser)
        self.path = path
        size = [pipe.vae_scale_factor * side for side in latents.shape[-2:]]
        ours = {
            "prompt": list(prompts),
            "latents": latents.to(self.dtype),
            "height": size[0],
            "width": size[1],
            "num_inference_steps": 2,  # one would do, but makes PixArt take its distilled path
            "guidance_scale": max(2.0, call.get("guidance_scale", 2.0)),
            "generator": Generator().manual_seed(0),  # a sampler that draws must not touch the global state
            "output_type": "latent",
        }
        if isinstance(negative := call.get("negative_prompt"), str):
            ours["negative_prompt"] = [negative] * len(prompts)  # some pipelines want it of the prompt's own type
        with MIProbe(pipe) as probe:
            pipe(**{**call, **ours})
        self.null, self.conditional = probe.null_conditioning, probe.conditioning
        self.device = next(iter(self.null.values())).device

    def __call__(self, noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (x.float().to(noisy.device) for x in alpha_sigma(log_snr, is_flow=self.path.is_flow))
        told = self.family.timestep_factor * self.path.timestep(log_snr) + self.family.timestep_offset
        if self.family.separate_calls:  # the two texts may differ in length
            outputs = [self._output(noisy, told, unflatten(c)) for c in (self.null, self.conditional)]
        else:
            both = {name: torch.cat([self.null[name], self.conditional[name]]) for name in self.null}
            outputs = list(self._output(torch.cat([noisy, noisy]), told, unflatten(both)).chunk(2))
        null, conditional = (
            epsilon_and_sample(output, noisy, alpha, sigma, self.path.predicts, is_flow=self.path.is_flow)[0]
            for output in outputs
        )
        return conditional, null

    def _output(self, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]) -> Tensor:
        told = timestep.to(noisy.device).expand(len(noisy))
        output = self.denoiser(noisy.to(self.dtype), timestep=told, **conditioning, return_dict=False)[0]
        predicted: Tensor = output[:, : noisy.shape[1]].float()  # without learned variances
        return -predicted if self.family.negated else predicted


def save_heat_map(file: Path, image: Image, information: Tensor) -> None:
    """Writes a PNG of the picture with one of `ImageScores.maps`, (h, w), over it, and a scale in nats per latent."""
    values = information.float().cpu().numpy()
    limit = float(np.abs(values).max()) or 1.0
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    extent = (0, image.width, image.height, 0)
    axes.imshow(image.convert("L"), cmap="gray", extent=extent)
    overlay = axes.imshow(
        values, cmap="coolwarm", vmin=-limit, vmax=limit, alpha=0.6, extent=extent, interpolation="bilinear"
    )
    axes.set_axis_off()
    figure.colorbar(overlay, ax=axes, label="nats per latent pixel")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=150)
