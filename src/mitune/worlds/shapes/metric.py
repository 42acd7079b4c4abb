"""The exact judge of the shapes world, as a metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image, Resampling

from mitune.evaluation.metrics.base import FAILURES, Judgment
from mitune.files.images import as_shown
from mitune.worlds.shapes.failures import failures_of
from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.judge import judge
from mitune.worlds.shapes.scene import SIZE


class ShapesMetric:
    """Graded is the share of the prompt's parts that an image shows; exact, all of them and nothing else."""

    name = "shapes"
    higher_is_better = True
    bounds = (0.0, 1.0)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises PromptError for a prompt that the judge cannot read."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Judgment]:
        """Raises PromptError like `check`, and MituneError for an image that is not square.

        Square ones of another size, of other models, are judged as they look at the world's own.
        """
        judgments = []
        for image, prompt in zip(images, prompts, strict=True):
            verdict = judge(np.asarray(_at_size(as_shown(image))), prompt)
            failures = failures_of(verdict, parse(prompt))
            judgments.append(
                Judgment(
                    graded=verdict.graded,
                    exact=verdict.exact,
                    malformed=verdict.malformed,
                    missed=verdict.missed,
                    drawn="; ".join(map(str, verdict.scene)),
                    failures=tuple(name for name in FAILURES if name in failures),
                )
            )
        return judgments


def _at_size(image: Image) -> Image:
    if image.width != image.height or image.width == SIZE:
        return image
    return image.resize((SIZE, SIZE), Resampling.BOX)
