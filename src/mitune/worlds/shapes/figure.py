"""A grid of prompts and samples with the judge's verdicts, to look at."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import decode
from mitune.denoiser.reading import refuse_cut
from mitune.denoiser.sampling import generate_all, requests_of
from mitune.evaluation.metrics.base import Judgment
from mitune.run.store import write_figure
from mitune.worlds.shapes.grammar import CATEGORIES
from mitune.worlds.shapes.metric import ShapesMetric
from mitune.worlds.shapes.prompts import prompt_list

RIGHT, WRONG, MALFORMED = "#2f9e44", "#e03131", "#868e96"


def save_grid(model: Model, file: Path, *, images: int, seed: int) -> None:
    """One held-out prompt a category, `images` samples each; frames: green (right), red (wrong), grey (malformed).

    Raises MituneError for a model whose call would cut these prompts.
    """
    prompts = [next(p.text for p in prompt_list(category) if p.split == "unseen") for category in CATEGORIES]
    refuse_cut(model.pipe, prompts, model.call)
    requests = requests_of(prompts, images, seed)
    pictures, judged = [], []
    for chunk, batch in generate_all(model, requests, min(64, len(requests))):
        decoded = list(decode(model, batch.latents))
        pictures += decoded
        judged += ShapesMetric()(decoded, [request.prompt for request in chunk])
    figure = Figure(figsize=(images + 2.6, len(prompts) * 1.06 + 0.4), layout="constrained")
    axes = figure.subplots(len(prompts), images + 1, width_ratios=[2.6, *[1] * images], squeeze=False)
    for row, (category, prompt) in enumerate(zip(CATEGORIES, prompts, strict=True)):
        axes[row, 0].text(0.98, 0.62, category, ha="right", va="bottom", fontsize=8, color="#868e96")
        axes[row, 0].text(0.98, 0.56, fill(prompt, 30), ha="right", va="top", fontsize=10)
        axes[row, 0].axis("off")
        for column in range(images):
            at = row * images + column
            axis = axes[row, column + 1]
            axis.imshow(np.asarray(pictures[at]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=_color(judged[at]), linewidth=3)
    right = sum(judgment.right for judgment in judged)
    figure.suptitle(f"{model.name}: {right} of {len(judged)} right (green); wrong: red; malformed: grey", fontsize=10)
    write_figure(file, figure, dpi=110)


def _color(judgment: Judgment) -> str:
    return RIGHT if judgment.right else MALFORMED if judgment.malformed else WRONG
