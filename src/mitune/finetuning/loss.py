"""The model's own loss on its images, and what is random in it.

z = α z₀ + σ ε        loss = E‖network(z, t, p) − target‖²        target: ε, z₀, v = αε − σz₀ or (flow) v = ε − z₀
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.network import network_output
from mitune.denoiser.path import NoisePath
from mitune.errors import ModelError
from mitune.finetuning.dataset import TrainingSet

_POOLED = ("pooled_projections", "added_cond_kwargs.text_embeds")  # what SD3 and SDXL call the pooled prompt


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What is random in an iteration of B images."""

    rows: Tensor  # (B,) of the set
    noise: Tensor  # (B, C, H, W) ε
    timesteps: Tensor  # (B,) t, float32


def draw(images: TrainingSet, path: NoisePath, shift: float, config: FinetuneConfig, iteration: int) -> Draw:
    """The batch, noise and timesteps of an iteration: a function of (config.seed, iteration) alone.

    `config.timesteps` is a share of the schedule: (0.5, 1) of 1000 steps is U(500, 1000) of MI-TUNE's Table 8. For
    flow it is a range of σ *before* the scheduler's shift, σ ← shift · σ / (1 + (shift − 1) σ), as in sampling.
    """
    digest = hashlib.sha256(f"finetune\n{config.seed}\n{iteration}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rows = torch.randint(len(images.latents), (config.batch_size,), generator=generator)
    low, high = config.timesteps
    if path.is_flow:
        share = low + (high - low) * torch.rand(config.batch_size, generator=generator)
        timesteps = path.training_steps * shift * share / (1 + (shift - 1) * share)
    else:
        first = min(round(low * path.training_steps), path.training_steps - 1)
        end = max(round(high * path.training_steps), first + 1)
        timesteps = torch.randint(first, end, (config.batch_size,), generator=generator).float()
    noise = torch.randn(config.batch_size, *images.latents.shape[1:], generator=generator)
    return Draw(rows, noise, timesteps)


def shift_of(scheduler: Any) -> float:
    """The constant by which a flow scheduler shifts σ; 1 where it has none, or one that hangs on the resolution."""
    if scheduler.config.get("use_dynamic_shifting"):
        return 1.0
    return float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)


def target_of(latents: Tensor, noise: Tensor, timesteps: Tensor, path: NoisePath) -> Tensor:
    """What the network should predict, (B, C, H, W): ε, z₀, v = ε − z₀ (flow) or v = αε − σz₀ (VP)."""
    if path.predicts == "epsilon":
        return noise
    if path.predicts == "sample":
        return latents
    if path.is_flow:
        return noise - latents
    shape = (-1, *[1] * (latents.ndim - 1))
    return path.alpha(timesteps).reshape(shape) * noise - path.sigma(timesteps).reshape(shape) * latents


def denoising_errors(
    denoiser: Any, latents: Tensor, conditioning: dict[str, Tensor], noise: Tensor, timesteps: Tensor, path: NoisePath
) -> Tensor:
    """Mean squared error of the denoiser on each image, (B,), float32.

    latents and noise: (B, C, H, W); timesteps: (B,); conditioning: (B, ...) each.
    """
    predicted = network_output(denoiser, path.add_noise(latents, noise, timesteps), conditioning, timesteps)
    errors = (predicted - target_of(latents, noise, timesteps, path)) ** 2
    return errors.flatten(1).mean(dim=1)


def encode(pipe: Any, prompts: list[str], call: dict[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    """The prompts' conditioning as the pipeline makes it, but with gradients; of the text-dependent `names` alone.

    call: arguments of the pipeline's call, e.g. max_sequence_length. Raises ModelError for a pipeline whose prompts
    go into anything but encoder_hidden_states and a pooled vector.
    """
    accepted = inspect.signature(pipe.encode_prompt).parameters
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in accepted}
    options |= {name: value for name, value in call.items() if name in accepted}
    encoded = pipe.encode_prompt(
        prompts,
        device=pipe.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **options,
    )
    pooled = [name for name in _POOLED if name in names]
    if "encoder_hidden_states" not in names or len(encoded) != 2 + 2 * len(pooled):
        raise ModelError(
            f"mitune cannot train the text encoders of {type(pipe).__name__}; set finetune.text_encoder = false."
        )
    return dict(zip(["encoder_hidden_states", *pooled], encoded[::2], strict=True))
