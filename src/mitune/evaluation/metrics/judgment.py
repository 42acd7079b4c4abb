"""What a metric says of an image: how well it shows its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mitune.config.schema import EMBEDDED
from mitune.files.images import as_shown
from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.judge import judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """`graded` in [0, 1]; the rest where the metric knows an exact truth."""

    graded: float
    exact: bool
    malformed: bool
    missed: tuple[str, ...]
    drawn: str  # what the image shows, in words


Metric = Callable[[Sequence[Image.Image], Sequence[str]], list[Judgment]]


def shapes_metric(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Judgment]:
    """The exact judge of the shapes world."""
    verdicts = [judge(np.asarray(as_shown(image)), prompt) for image, prompt in zip(images, prompts, strict=True)]
    scenes = ["; ".join(map(str, verdict.scene)) for verdict in verdicts]
    return [
        Judgment(graded=v.graded, exact=v.exact, malformed=v.malformed, missed=v.missed, drawn=scene)
        for v, scene in zip(verdicts, scenes, strict=True)
    ]


def metric_for(model_name: str, prompts: Iterable[str]) -> Metric | None:
    """The metric that comes with a model: the judge for the embedded ones, none for others.

    Raises PromptError at once for a prompt that the judge could not read.
    """
    if model_name not in EMBEDDED:
        return None
    for prompt in prompts:
        parse(prompt)
    return shapes_metric
