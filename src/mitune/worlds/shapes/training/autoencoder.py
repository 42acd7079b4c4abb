"""The embedded models' VAE: its training, and the world's scenes as its latents."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mitune.worlds.shapes.grammar import COLORS, SHAPES, TEXTURES, forms, parse, sample_prompt
from mitune.worlds.shapes.scene import GRID, Object, Scene, render, sample_scene
from mitune.worlds.shapes.training.architecture import LATENT_CHANNELS, new_autoencoder, new_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """The VAE's training: L1 reconstruction plus a KL term that keeps the latents smooth."""

    seed: int = 0
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 1e-3
    exact_from: float = 0.8  # share of the steps after which bfloat16 gives way to float32


def crowded_scene(rng: random.Random) -> Scene:
    """Many objects at once, some overlapping: more to learn from in a picture than in the world's own scenes."""
    objects: list[Object] = []
    for y in range(GRID):
        x = rng.choice((0, 0, 1, 2))
        while x <= 2 * GRID - 2:
            if rng.random() < 0.6:
                objects.append(Object(rng.choice(COLORS), rng.choice(SHAPES), rng.choice(TEXTURES), x, y))
            x += rng.choice((2, 2, 2, 1, 3))
    rng.shuffle(objects)
    return tuple(objects)


def pixels(scenes: list[Scene]) -> Tensor:
    """Rendered scenes as (B, 3, 64, 64) in [−1, 1]."""
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(folder: Path, config: AutoencoderConfig) -> AutoencoderKL:
    """Trains the VAE; returns it with its scaling factor set, so that the latents of the world have unit spread."""
    torch.manual_seed(config.seed)
    model = new_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    rng = random.Random(config.seed)
    running = 0.0
    for step in range(config.steps):
        half = config.batch_size // 2
        scenes = [crowded_scene(rng) for _ in range(half)]
        scenes += [sample_scene(sample_prompt(rng), rng) for _ in range(config.batch_size - half)]
        x = pixels(scenes)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < config.exact_from * config.steps):
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        loss = F.l1_loss(y.float(), x) + 0.5 * F.mse_loss(y.float(), x)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        optimizer.zero_grad()
        (loss + config.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 100 == 99:
            log.info("vae step %d: reconstruction %.4f, kl %.3f", step + 1, running, kl.item())
    with torch.no_grad():
        scenes = [sample_scene(sample_prompt(rng), rng) for _ in range(256)]
        spread = model.encode(pixels(scenes)).latent_dist.mode().std().item()
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(folder / "vae")
    return model


def training_prompts(seed: int) -> dict[str, float]:
    """The prompts to train on, each with its probability: all of a form's, or 1500 of them where it has too many."""
    rng = random.Random(seed)
    weights: dict[str, float] = {}
    for form in forms():
        chosen = form.prompts if len(form.prompts) <= 3000 else rng.sample(form.prompts, 1500)
        for prompt in chosen:
            weights[str(prompt)] = weights.get(str(prompt), 0.0) + form.weight / len(chosen)
    return weights


def encode_world(folder: Path, vae: AutoencoderKL, weights: dict[str, float], *, scenes: int, seed: int) -> None:
    """Draws `scenes` scenes of each prompt and keeps their latents, so that training needs no VAE; `weights` are the
    prompts' probabilities."""
    rng = random.Random(seed)
    latents = torch.empty(len(weights), scenes, LATENT_CHANNELS, 8, 8, dtype=torch.float16)
    for i, text in enumerate(weights):
        with torch.no_grad():
            encoded = vae.encode(pixels([sample_scene(parse(text), rng) for _ in range(scenes)])).latent_dist.mode()
        latents[i] = encoded * vae.config.scaling_factor
        if i % 512 == 0:
            log.info("encoded the scenes of %d of %d prompts", i, len(weights))
    save_file({"latents": latents, "weights": torch.tensor(list(weights.values()))}, folder / "world.safetensors")
    (folder / "world.txt").write_text("\n".join(weights) + "\n", encoding="utf-8")
    new_tokenizer().save_pretrained(folder / "tokenizer")  # once: equal pairs may be merged in another order
