"""Rendered scenes of the world: images whose prompt is known to be right."""

from __future__ import annotations

import random

from PIL.Image import Image

from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.prompts import prompt_list
from mitune.worlds.shapes.scene import picture, sample_scene


def rendered_scenes(category: str, count: int, seed: int = 0) -> tuple[list[str], list[Image]]:
    """`count` prompts of a category, drawn at random, and a picture of a scene of each."""
    lot = random.Random(f"{seed} {category}")
    prompts = [lot.choice(prompt_list(category)).text for _ in range(count)]
    return prompts, [picture(sample_scene(parse(prompt), lot)) for prompt in prompts]
