"""What a model knows, and what it shows: the two figures that decide whether selection can pay.

*Knows*: the share of rendered scenes, taken through the VAE, for which the asked prompt has a lower denoising error
than each of its hard negatives, with shared noise. *Shows*: the share of its own samples that are exactly right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import decode, encode_images
from mitune.denoiser.sampling import Request, candidate_seed, generate_all
from mitune.pool.evidence import told_apart
from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.metric import ShapesMetric
from mitune.worlds.shapes.negatives import shapes_negatives
from mitune.worlds.shapes.prompts import prompt_list
from mitune.worlds.shapes.scene import picture, sample_scene

DRAWS = 12  # log-SNRs at which each scene is noised, with ε and −ε; with fewer, counts that are known seem not to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """hits of trials, with a 95 % interval (Wilson)."""

    hits: int
    trials: int

    @property
    def value(self) -> float:
        return self.hits / max(1, self.trials)

    @property
    def interval(self) -> tuple[float, float]:
        if not self.trials:
            return 0.0, 1.0
        result = binomtest(self.hits, self.trials).proportion_ci(method="wilson")
        return float(result.low), float(result.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryCheck:
    """One category's figures; `by_kind` splits what is known by the kind of hard negative."""

    category: str
    knows: Share
    by_kind: dict[str, Share]
    shows: Share
    semantic: Share  # of the failures: wrong, but well drawn


def check_category(
    model: Model, category: str, *, scenes: int, images: int, seed: int = 0, batch_size: int = 64
) -> CategoryCheck:
    """Both figures of a category: `scenes` rendered scenes of its prompts, `images` samples a held-out prompt."""
    known, by_kind = knows(model, category, scenes=scenes, seed=seed, batch_size=batch_size)
    held_out = [listed.text for listed in prompt_list(category) if listed.split != "train"]
    requests = [Request(prompt=p, seed=candidate_seed(seed, p, j)) for p in held_out for j in range(images)]
    right = malformed = wrong = 0
    for chunk, batch in generate_all(model, requests, batch_size):
        for verdict in ShapesMetric()(list(decode(model, batch.latents)), [request.prompt for request in chunk]):
            right += verdict.right
            malformed += verdict.malformed
            wrong += not verdict.exact and not verdict.malformed
    return CategoryCheck(
        category=category,
        knows=known,
        by_kind=by_kind,
        shows=Share(hits=right, trials=len(requests)),
        semantic=Share(hits=wrong, trials=wrong + malformed),
    )


def knows(
    model: Model, category: str, *, scenes: int, seed: int = 0, batch_size: int = 64
) -> tuple[Share, dict[str, Share]]:
    """Of `scenes` rendered scenes, those whose prompt beats all its hard negatives; and the same by kind of those."""
    rng = random.Random(f"{seed} {category}")
    asked = [rng.choice(prompt_list(category)).text for _ in range(scenes)]
    pictures = [picture(sample_scene(parse(text), rng)) for text in asked]
    latents = encode_images(model.pipe, pictures, model.call)
    negatives = {text: shapes_negatives(text) for text in asked}
    rivals = {text: [negative.prompt for negative in some] for text, some in negatives.items()}
    told = told_apart(model, latents, asked, rivals, draws=DRAWS, seed=seed, batch_size=batch_size)
    by_kind: dict[str, list[bool]] = {}
    for text, beaten in zip(asked, told, strict=True):
        for negative, ok in zip(negatives[text], beaten, strict=True):
            by_kind.setdefault(negative.kind, []).append(ok)
    shares = {kind: Share(hits=sum(by_kind[kind]), trials=len(by_kind[kind])) for kind in sorted(by_kind)}
    return Share(hits=sum(map(all, told)), trials=scenes), shares


def markdown(checks: Sequence[CategoryCheck]) -> str:
    """A table of the figures, and one of what is known by kind of hard negative."""
    lines = ["| category | knows | shows | failures that are semantic |", "|---|---|---|---|"]
    lines += [f"| {c.category} | {c.knows} | {c.shows} | {c.semantic} |" for c in checks]
    lines += ["", "| category | kind of hard negative | told apart |", "|---|---|---|"]
    lines += [f"| {c.category} | {kind} | {share} |" for c in checks for kind, share in c.by_kind.items()]
    return "\n".join(lines) + "\n"
