"""Asks a model about finished images: the evidence that scores against rival prompts rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mitune.denoiser.conditioning import Conditioning
from mitune.denoiser.epsilon import Denoiser
from mitune.denoiser.opening.models import Model
from mitune.denoiser.replay import condition
from mitune.information import alpha_sigma
from mitune.information.contrast import ALL, ASKED, CHOSEN, LOG_SNR_RANGE, SIGNS, Band, Evidence
from mitune.prompts.rivals import NEGATIVES, Rivals, read_whole

DRAWS = 8  # noise levels


@torch.no_grad()
def gather(
    model: Model,
    latents: Tensor,
    prompt: str,
    rivals: Rivals,
    *,
    band: Band = ALL,
    places: Tensor | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 64,
) -> Evidence:
    """Noises latents (N, C, H, W) again and denoises them under the prompt and its rivals, given by kind.

    All images and prompts see the same `draws` noises ε, and −ε, one at the middle of each equal part of
    `LOG_SNR_RANGE`, of which `band` leaves some. `places` (N, K), as `Evidence.at` takes them, says which of the
    prompts each image sees; all of them by default. Costs `Evidence.calls` an image, in batches of `batch_size`.
    """
    texts = [prompt, *(text for kind in rivals for text in rivals[kind])]
    kinds: tuple[str, ...] = (ASKED, *(kind for kind in rivals for _ in rivals[kind]))
    if places is None:
        places = torch.arange(len(texts)).expand(len(latents), -1)
    else:
        kinds = (ASKED, *[CHOSEN] * (places.shape[1] - 1))
    denoiser = model.denoiser
    device = denoiser.device
    conditioning = condition(model, texts, batch_size).to(device)
    step = (LOG_SNR_RANGE[1] - LOG_SNR_RANGE[0]) / draws
    log_snr = LOG_SNR_RANGE[0] + step * (torch.arange(draws) + 0.5)
    noises = torch.randn(draws, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
    kept = band.places(log_snr)
    log_snr, noises, step = log_snr[kept], noises[kept], step * band.stride
    rows = []
    together = max(1, batch_size // places.shape[1])
    for images, texts_of in zip(torch.split(latents, together), torch.split(places, together), strict=True):
        levels = [
            _squared_norms(denoiser, images.to(device), conditioning, texts_of, noise.to(device), level, batch_size)
            for level, noise in zip(log_snr, noises, strict=True)
        ]
        rows.append(torch.stack(levels, dim=-1).cpu())
    errors, distances = torch.cat(rows, dim=1)
    return Evidence(
        kinds=kinds, log_snr=log_snr, step=step, errors=errors, distances=distances, dimensions=latents[0].numel()
    )


def _squared_norms(
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    places: Tensor,
    noise: Tensor,
    log_snr: Tensor,
    batch_size: int,
) -> Tensor:
    """‖ε̂_p − ε‖² and ‖ε̂_asked − ε̂_p‖² of n images under the prompts at `places` (n, P), means over ε and −ε,
    (2, n, P)."""
    alpha, sigma = (x.to(latents.device) for x in alpha_sigma(log_snr, is_flow=denoiser.path.is_flow))
    prompts = places.shape[1]
    image = torch.arange(len(latents)).repeat_interleave(prompts)
    text = places.flatten()
    norms = []
    for sign in SIGNS:
        noisy = (alpha * latents + sigma * sign * noise)[image.to(latents.device)]
        epsilons = [
            denoiser.epsilon(noisy[rows], log_snr, conditioning.take(text[rows]))
            for rows in torch.split(torch.arange(len(noisy)), batch_size)
        ]
        epsilon = torch.cat(epsilons).reshape(len(latents), prompts, -1)
        errors = (epsilon - sign * noise.flatten()).square().sum(dim=2)
        distances = (epsilon - epsilon[:, :1]).square().sum(dim=2)
        norms.append(torch.stack([errors, distances]))
    return (norms[0] + norms[1]) / 2


def told_apart(
    model: Model,
    latents: Tensor,
    prompts: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[bool]]:
    """For each of the latents (N, C, H, W): whether the prompt beside it beats each of its rivals, in their order.

    To beat is to have the lower denoising error, a margin (1) above 0; `rivals` has those of every prompt.
    """
    beaten: list[list[bool]] = [[] for _ in prompts]
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        against = read_whole(model, {NEGATIVES: rivals[prompt]})
        evidence = gather(model, latents[rows], prompt, against, draws=draws, seed=seed, batch_size=batch_size)
        for row, margins in zip(rows, evidence.margins, strict=True):
            beaten[row] = (margins > 0).tolist()
    return beaten
