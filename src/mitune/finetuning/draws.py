"""What is random in an iteration of the training, and the batch that comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.path import NoisePath
from mitune.denoiser.pipeline import Scheduler
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.objectives.base import Batch
from mitune.seeds import seed_of


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What is random in an iteration of B images."""

    rows: Tensor  # (B,) of the set
    noise: Tensor  # (B, C, H, W) ε
    timesteps: Tensor  # (B,) t, float32
    worse: Tensor  # (B,) rows of the set: an image of the same prompt with less advantage, or the row itself
    rivals: Tensor  # (B, K) of the rivals that the set has for its prompts; −1 where there are no more

    def batch(self, part: Tensor, images: TrainingSet, path: NoisePath, device: torch.device) -> Batch:
        """Those images of the draw that `part` (b,) counts, on the device."""
        rows = self.rows[part]

        def take(values: Tensor, places: Tensor) -> Tensor:
            return values[places].to(device, non_blocking=True)

        latents = take(images.latents, rows)
        return Batch(
            latents=latents,
            noise=take(self.noise, part),
            timesteps=take(self.timesteps, part),
            path=path,
            prompts=[images.prompts[row] for row in rows.tolist()],
            conditioning=images.conditioning.take(rows).to(device, non_blocking=True),
            weights=take(images.weights, rows),
            advantages=take(images.advantages, rows),
            worse=take(images.latents, self.worse[part]) if images.is_ranked else latents,
            rivals=None if images.rivals is None else images.rivals.batch(self.rivals[part], device),
        )


def draw(images: TrainingSet, path: NoisePath, shift: float, config: FinetuneConfig, iteration: int) -> Draw:
    """The batch, noise and timesteps of an iteration: a function of (config.seed, iteration) alone.

    `config.timesteps` is a share of the schedule: (0.5, 1) of 1000 steps is U(500, 1000) of MI-TUNE's Table 8. For
    flow it is a range of σ *before* the scheduler's shift, σ ← shift · σ / (1 + (shift − 1) σ), as in sampling.
    """
    generator = torch.Generator().manual_seed(seed_of("finetune", config.seed, iteration))
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
    worse = _worse(images, rows, generator) if images.is_ranked else rows
    rivals = torch.empty(len(rows), 0) if images.rivals is None else images.rivals.draw(rows, generator)
    return Draw(rows, noise, timesteps, worse, rivals)


def _worse(images: TrainingSet, rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each row one of those that share its prompt and have less advantage, (B,); the row itself where none has."""
    numbers = {prompt: number for number, prompt in enumerate(images.prompts)}
    prompts = torch.tensor([numbers[prompt] for prompt in images.prompts])
    same = prompts[rows].unsqueeze(1) == prompts
    behind = same & (images.advantages < images.advantages[rows].unsqueeze(1))  # (B, N)
    behind[torch.arange(len(rows)), rows] = ~behind.any(dim=1)
    return torch.multinomial(behind.float(), 1, generator=generator).flatten()


def shift_of(scheduler: Scheduler) -> float:
    """The constant by which a flow scheduler shifts σ; 1 where it has none, or one that depends on the resolution."""
    if scheduler.config.get("use_dynamic_shifting"):
        return 1.0
    return float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)
