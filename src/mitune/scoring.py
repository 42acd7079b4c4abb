"""Point-wise mutual information of given images with any prompts (post-hoc), with an error for each image.

The images are noised again and denoised with and without the prompt. The conditioning comes from one step of the
unmodified pipeline, watched by the probe; after that the denoiser is called alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Generator, Tensor

from mitune.denoiser.conditioning import Passes, stack
from mitune.denoiser.epsilon import NetworkDenoiser
from mitune.denoiser.opening.calls import size_grid
from mitune.denoiser.opening.models import Model
from mitune.denoiser.path import NoisePath
from mitune.denoiser.pictures import are_packed, encode_images
from mitune.denoiser.pipeline import Pipeline
from mitune.denoiser.reading import refuse_cut
from mitune.denoiser.replay import passes_of
from mitune.errors import MituneError
from mitune.files.images import on_grid
from mitune.information import (
    TRUNCATION,
    UNITS,
    Estimate,
    Estimator,
    LogisticProposal,
    Predict,
    Proposal,
    point_wise_draws,
)
from mitune.information.contrast import normalized_margins
from mitune.pool.evidence import gather
from mitune.pool.scores import CONTRAST, own_negatives, score_named, want_negatives
from mitune.prompts.negatives import hard_negatives
from mitune.prompts.rivals import NEGATIVES, read_whole
from mitune.run.store import write_figure

NOISINGS_A_STRATUM = 4  # two independent antithetic pairs


@dataclass(frozen=True, slots=True, eq=False)
class ImageScores:
    """Scores of N images, whose draws are paired: Estimate.of_strata(draws[0] - draws[1]) is a difference."""

    estimates: list[Estimate]
    draws: Tensor  # (N, strata, 2), float32
    maps: Tensor  # (N, h, w), float32, on the grid of the latents ((N, f, h, w) for a film, (N, l) for sound); its
    # sum is the value of the estimate


@torch.no_grad()
def score(
    pipe: Pipeline,
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

    images: N pictures of one size, read as a viewer shows them, whose sides are brought down to a multiple of
    `grid_of`; or latents (N, ...) as the denoiser sees them. prompts: N. draws: noisings of each image, a multiple of
    4 (two antithetic pairs a stratum of λ). A seed gives all images the same noise, whatever the
    batch_size. proposal: where in λ; by default `default_proposal`. call: the arguments that the pipeline is used
    with, where they shape its conditioning (negative_prompt, max_sequence_length; for packed latents, films and sound
    also their size); others do no harm.

    Raises MituneError for numbers that do not fit, for pictures that are too small, for prompts that the call would
    cut, and for an unknown estimator or scheduler; and GuidanceError if the model has no pass without the prompt.
    Source: eq. (1) of `mitune.information`; standard and orthogonal after ITD (Kong et al., 2024), self-confidence
    after SOLACE (arXiv 2603.00918).
    """
    if len(images) != len(prompts):
        raise MituneError(f"There are {len(images)} images for {len(prompts)} prompts; give one prompt for each image.")
    if draws < NOISINGS_A_STRATUM or draws % NOISINGS_A_STRATUM:
        raise MituneError(f"draws = {draws} must be a multiple of {NOISINGS_A_STRATUM}; noise comes in pairs of pairs.")
    if estimator not in UNITS:
        raise MituneError(f"There is no estimator {estimator!r}; the known ones are {', '.join(UNITS)}.")
    refuse_cut(pipe, prompts, call or {})
    denoiser = NetworkDenoiser.of(pipe)
    path = denoiser.path
    latents = images if isinstance(images, Tensor) else encode_images(pipe, on_grid(images, grid_of(pipe)), call)
    packed = are_packed(pipe, latents)
    chunks = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        batch = latents[rows].to(denoiser.device)
        passes = passes_of(pipe, prompts[rows], call or {}, latents=latents[rows])
        chunk = point_wise_draws(
            _predict(denoiser, passes, packed=packed),
            batch.transpose(1, 2) if packed else batch,
            estimator=estimator,
            proposal=proposal or default_proposal(path, estimator),
            strata=draws // NOISINGS_A_STRATUM,
            generator=Generator().manual_seed(seed),
            is_flow=path.is_flow,
            spatial=True,
        )
        chunks.append(chunk.cpu())
    spatial = torch.cat(chunks)  # (N, strata, 2, h, w)
    summed = spatial.flatten(3).sum(dim=3)
    maps = spatial.mean(dim=(1, 2))
    return ImageScores(
        estimates=[Estimate.of_strata(row, UNITS[estimator]) for row in summed],
        draws=summed,
        maps=_on_grid(maps, call or {}) if packed else maps,
    )


def score_against(
    model: Model, image: Image, prompt: str, *, negatives: str | None = None, seed: int = 0
) -> dict[str, float]:
    """m/D of a picture against each hard negative of its prompt, by their texts; the least, at most 1, is its contrast.

    Near 1 for a picture of the prompt, below 0 where it fits the negative better. negatives: the user's own file, as in
    PoolConfig. Raises MituneError for a bad file, and for a prompt without any hard negative.
    """
    scores = {"contrast": score_named("contrast")}
    listed = own_negatives(negatives, [prompt], model, wanted=want_negatives(scores))
    rivals = read_whole(model, {NEGATIVES: [negative.prompt for negative in hard_negatives(prompt, listed)]})
    if not rivals[NEGATIVES]:
        raise MituneError(
            f"No rule makes a hard negative of {prompt!r}; write some in a file, and name it (--negatives)."
        )
    latents = encode_images(model.pipe, on_grid([image], grid_of(model.pipe)), model.call)
    evidence = gather(model, latents, prompt, rivals, band=CONTRAST.contrast.band, seed=seed)
    return dict(zip(rivals[NEGATIVES], normalized_margins(evidence)[0].tolist(), strict=True))


def _on_grid(maps: Tensor, call: Mapping[str, Any]) -> Tensor:
    """(N, h, w) from the maps (N, h · w) of packed latents, by the proportions of the picture."""
    proportion = call["height"] / call["width"] if {"height", "width"} <= set(call) else 1.0
    rows = round(math.sqrt(maps.shape[1] * proportion))
    return maps.reshape(len(maps), rows, -1) if rows and maps.shape[1] % rows == 0 else maps


def grid_of(pipe: Pipeline) -> int:
    """Pixels that sides of pictures are multiples of: `size_grid`, and the eight that diffusers asks in any case."""
    return math.lcm(size_grid(pipe), 8)


def default_proposal(path: NoisePath, estimator: Estimator) -> LogisticProposal:
    """Where in λ an estimator is drawn: what training has seen, without the clean end: σ/(α + σ) > `TRUNCATION`.

    Uniform in flow time (scale 2) for self-confidence, which is a mean over it. The density of the others is in their
    error alone: networks err most at the clean end, so it reaches further to both sides, with less unequal weights.
    """
    low, high = path.log_snr_range()
    scale = 2.0 if estimator == "self-confidence" else 4.0
    return LogisticProposal(low, min(high, 2 * math.log((1 - TRUNCATION) / TRUNCATION)), scale=scale)


def _predict(denoiser: NetworkDenoiser, passes: Passes, *, packed: bool) -> Predict:
    """ε̂ with and without the prompts, of latents (N, C, ...), also where the denoiser takes them packed, (N, S, C)."""
    calls = [passes.null, passes.conditional]
    if passes.are_alike and not denoiser.separate_calls:  # in one call, as the pipeline itself makes them
        calls = [stack(calls)]

    def predict(noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        z = noisy.transpose(1, 2) if packed else noisy
        parts = [denoiser.epsilon(torch.cat([z] * (len(call) // len(z))), log_snr, call) for call in calls]
        null, conditional = torch.cat(parts).chunk(2)
        return (conditional.transpose(1, 2), null.transpose(1, 2)) if packed else (conditional, null)

    return predict


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
    write_figure(file, figure, dpi=150)
