"""Rendered scenes of the world as latents of a model: images whose prompt is known to be right."""

from __future__ import annotations

import random

from torch import Tensor

from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import encode_images
from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.prompts import prompt_list
from mitune.worlds.shapes.scene import picture, sample_scene


def rendered_scenes(model: Model, category: str, count: int, seed: int = 0) -> tuple[list[str], Tensor]:
    """`count` prompts of a category, drawn at random, and a scene of each, taken through the VAE: (count, C, H, W)."""
    lot = random.Random(f"{seed} {category}")
    prompts = [lot.choice(prompt_list(category)).text for _ in range(count)]
    pictures = [picture(sample_scene(parse(prompt), lot)) for prompt in prompts]
    return prompts, encode_images(model.pipe, pictures, model.call)
