"""What a ranked set says of its images: how much better or worse each is than the others of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def best_and_worst(order: Sequence[int], count: int) -> list[int]:
    """The first and the last `count` of candidates in their order; all of them if there are no more."""
    return [*order[:count], *order[max(count, len(order) - count) :]]


def advantages(scores: Sequence[float], prompts: Sequence[int]) -> list[float]:
    """How much better each of N images is than others of its prompt, in standard deviations; 0 a prompt in sum.

        A = clip((s − mean of the prompt) / deviation, −1, 1), less its own mean over the prompt

    The deviation is the root mean square of s − mean of the prompt over all N images. After DiffusionNFT (arXiv
    2509.16117), where 2r − 1 is the same with the standard deviation of s itself; but what differs between prompts says
    nothing of an image. Where all images of a prompt have one score, A is 0.
    """
    of_prompt = np.unique(prompts, return_inverse=True)[1]
    centered = _centered(np.asarray(scores, dtype=np.float64), of_prompt)
    deviation = np.sqrt(np.mean(centered**2))
    clipped = np.clip(centered / deviation, -1, 1) if deviation > 0 else np.zeros_like(centered)
    values: list[float] = _centered(clipped, of_prompt).tolist()
    return values


def _centered(values: Array, of_prompt: NDArray[np.intp]) -> Array:
    means: Array = np.bincount(of_prompt, values) / np.bincount(of_prompt)
    return values - means[of_prompt]
