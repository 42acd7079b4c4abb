"""What a model knows, and what it shows: the two figures that decide whether selection can pay.

*Knows*: the share of rendered scenes, taken through the VAE, for which the asked prompt has a lower denoising error
than each of its hard negatives, with shared noise. *Shows*: the share of its own samples that are exactly right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from mitune.contrast import denoising_errors, shapes_negatives
from mitune.generate import Request, candidate_seed, decode, generate_all
from mitune.metrics.judgment import shapes_metric
from mitune.models import Model
from mitune.scoring import encode_images
from mitune.shapes.grammar import parse
from mitune.shapes.prompts import prompt_list
from mitune.shapes.scene import picture, sample_scene

DRAWS = 8  # noisings of each scene, spread over log-SNR


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
    knows, by_kind = _knows(model, category, scenes, seed, batch_size)
    held_out = [listed.text for listed in prompt_list(category) if listed.split != "train"]
    requests = [Request(prompt=p, seed=candidate_seed(seed, p, j)) for p in held_out for j in range(images)]
    right = malformed = wrong = 0
    for chunk, batch in generate_all(model, requests, batch_size):
        for verdict in shapes_metric(decode(model, batch.latents), [request.prompt for request in chunk]):
            right += verdict.exact and not verdict.malformed
            malformed += verdict.malformed
            wrong += not verdict.exact and not verdict.malformed
    return CategoryCheck(
        category=category,
        knows=knows,
        by_kind=by_kind,
        shows=Share(hits=right, trials=len(requests)),
        semantic=Share(hits=wrong, trials=wrong + malformed),
    )


def _knows(model: Model, category: str, scenes: int, seed: int, batch_size: int) -> tuple[Share, dict[str, Share]]:
    rng = random.Random(f"{seed} {category}")
    asked = [rng.choice(prompt_list(category)).text for _ in range(scenes)]
    latents = encode_images(model.pipe, [picture(sample_scene(parse(text), rng)) for text in asked])
    pairs = [(i, text, "asked") for i, text in enumerate(asked)]
    pairs += [(i, other.prompt, other.kind) for i, text in enumerate(asked) for other in shapes_negatives(text)]
    errors = denoising_errors(
        model,
        latents[[i for i, _, _ in pairs]],
        [text for _, text, _ in pairs],
        draws=DRAWS,
        seed=seed,
        batch_size=batch_size,
    ).mean(dim=1)
    own = errors[:scenes]
    beaten = [(i, kind, bool(errors[at] > own[i])) for at, (i, _, kind) in enumerate(pairs) if kind != "asked"]
    missed = {i for i, _, ok in beaten if not ok}
    kinds = {
        kind: Share(hits=sum(ok for _, k, ok in beaten if k == kind), trials=sum(k == kind for _, k, _ in beaten))
        for kind in sorted({kind for _, kind, _ in beaten})
    }
    return Share(hits=scenes - len(missed), trials=scenes), kinds


def markdown(checks: Sequence[CategoryCheck]) -> str:
    """A table of the figures, and one of what is known by kind of hard negative."""
    lines = ["| category | knows | shows | failures that are semantic |", "|---|---|---|---|"]
    lines += [f"| {c.category} | {c.knows} | {c.shows} | {c.semantic} |" for c in checks]
    lines += ["", "| category | kind of hard negative | told apart |", "|---|---|---|"]
    lines += [f"| {c.category} | {kind} | {share} |" for c in checks for kind, share in c.by_kind.items()]
    return "\n".join(lines) + "\n"
