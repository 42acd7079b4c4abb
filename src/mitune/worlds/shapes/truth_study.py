r"""How near do a model's estimates come to the true information, on rendered scenes, and what is the gap made of?

A scene x of the shapes world is drawn with its prompt, rendered and taken through the VAE to latents z₀, which hold all
of it. Beside it stand its other captions, its hard negatives and an unrelated prompt. For each the network's *loss* is

    L(p) = ½ ∫ ‖ε̂(z | p) − ε‖² dλ        over the λ from λ₁ to λ₂ that `mitune.scoring` draws from            (1)

With an exact ε̂ the same integral up to any λ is E log p(z | x) − E log p(z | p) there (Guo, Shamai and Verdú, 2005, in
the point-wise form of Kong et al., 2023). At λ₂ every scene of the world is told apart, so that it is −log p(x | p).
Hence (1) has the exact value

    L(p) = −log p(x | p) − N(p) + E(p)        N(p) = E log p(z | x) − E log p(z | p)  at λ₁                   (2)

where N(p) is cut off at the noisy end, and E(p) is what the network's error costs: at least 0 on average over the
scenes of p. With the empty prompt for p, p(x | ∅) = p(x). All in nats. So the standard estimate is

    L(∅) − L(p) = i(x; p) − (N(∅) − N(p)) + E(∅) − E(p)                                                       (3)

and each of its terms is measured by itself. The *mixture* estimate has the exact marginal in place of the empty prompt,
the sum over all captions c of the scene: −L(p) − log Σ p(c) exp(−L(c)).
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from mitune.denoiser.opening.models import Model, model_folder
from mitune.denoiser.pictures import encode_images
from mitune.errors import MituneError
from mitune.information import (
    alpha_sigma,
)
from mitune.scoring import NOISINGS_A_STRATUM, default_proposal
from mitune.worlds.shapes.grammar import CATEGORIES, Prompt, forms, parse, sample_prompt
from mitune.worlds.shapes.negatives import shapes_negatives
from mitune.worlds.shapes.scene import Scene, log_likelihood, picture, sample_scene
from mitune.worlds.shapes.truth import Truth
from mitune.worlds.shapes.truth_losses import END_DRAWS, Estimates, estimates_of

ASKED, CAPTION, UNRELATED = "asked", "another caption", "unrelated"  # and the kinds of hard negatives
MIXTURE = "mixture"
WORLD_SCENES, PROMPT_SCENES = 512, 64  # that stand for p(x) and p(x | p) at the noisy end, where all look alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A rendered scene with a prompt beside it: the truth, and the network's estimates."""

    scene: int
    category: str  # of the prompt that was asked for
    prompt: str
    kind: str
    truth: float  # i(x; p), −inf where the scene cannot come of the prompt
    estimates: Mapping[str, float]  # by estimator: nats; self-confidence per dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The terms of (3) for a scene and the prompt that was asked for, in nats. The first five add up to `standard`."""

    category: str
    truth: float  # i(x; p)
    noisy_end: float  # N(p) − N(∅)
    conditional: float  # −E(p)
    emphasis: float  # the part of E(∅) due to training on other shares of prompts than the world's
    null: float  # the rest of E(∅)
    standard: float  # L(∅) − L(p)
    mixture: float
    at_high_snr: float  # the part of L(∅) − L(p) at λ > `SPLIT`; in truth next to 0, as scenes are told apart before
    clean_end: float  # what L(∅) − L(p) would gain beyond λ₂, to the end of the path; in truth 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All that is measured of a model."""

    model: str
    scenes: int  # a category
    draws: int
    emphasis: Mapping[str, float]
    pairs: list[Pair]
    gaps: list[Gap]


@torch.no_grad()
def study(
    model: Model,
    *,
    scenes: int,
    categories: Sequence[str] = CATEGORIES,
    draws: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Study:
    """Draws `scenes` scenes a category with their prompts, and estimates with `draws` noisings of each.

    All prompts of a scene share their (λ, ε); scenes do not. Costs `draws` denoiser calls for each prompt of a scene,
    of which there are some 15. Where the model's folder says with which emphasis it was trained, the gap has a term
    for it. Raises MituneError for `draws` that are not a multiple of 4.
    """
    if draws < NOISINGS_A_STRATUM or draws % NOISINGS_A_STRATUM:
        raise MituneError(f"draws = {draws} must be a multiple of {NOISINGS_A_STRATUM}; noise comes in pairs of pairs.")
    truth, emphasis = Truth(), training_emphasis(model.name)
    trained = Truth(emphasis)
    rng = random.Random(seed)
    world = _encode(model, [sample_scene(sample_prompt(rng), rng) for _ in range(WORLD_SCENES)])
    cases = [case for category in categories for case in _cases(category, scenes, truth, seed)]
    pairs: list[Pair] = []
    gaps: list[Gap] = []
    for index, case in enumerate(cases):
        latents = _encode(model, [case.scene])
        estimates = estimates_of(
            model, latents, [str(prompt) for _, prompt in case.beside], draws=draws, seed=seed + index
        )
        of_scene = _pairs(index, case, estimates, truth)
        of_prompt = _encode(model, [sample_scene(case.prompt, rng) for _ in range(PROMPT_SCENES)])
        ends = [_noisy_end(model, latents[0], others, seed + index) for others in (world, of_prompt)]
        pairs += of_scene
        gaps.append(_gap(case, of_scene[0], estimates, ends, truth, trained))
        if progress:
            progress(index + 1, len(cases))
    return Study(model=model.name, scenes=scenes, draws=draws, emphasis=emphasis, pairs=pairs, gaps=gaps)


def training_emphasis(name: str) -> dict[str, float]:
    """How much oftener than in the world the last phase of a model's training drew some prompts; see `Truth`."""
    file = Path(model_folder(name)) / "training.json"
    phases = json.loads(file.read_text(encoding="utf-8"))["denoiser"] if file.is_file() else [{}]
    return dict(phases[-1].get("emphasis", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A scene of a category, and the prompts beside it with their kinds; the first is the one that it came of."""

    category: str
    scene: Scene
    beside: list[tuple[str, Prompt]]

    @property
    def prompt(self) -> Prompt:
        return self.beside[0][1]


def _cases(category: str, count: int, truth: Truth, seed: int) -> Iterator[_Case]:
    rng = random.Random(f"{seed} {category}")
    of_category = [form for form in forms() if form.category == category]
    for form in rng.choices(of_category, weights=[form.weight for form in of_category], k=count):
        prompt = rng.choice(form.prompts)
        scene = sample_scene(prompt, rng)
        beside = [(ASKED, prompt)]
        beside += [(CAPTION, caption) for caption in truth.captions(scene) if caption != prompt]
        by_kind: dict[str, list[Prompt]] = {}
        for negative in shapes_negatives(str(prompt)):
            by_kind.setdefault(negative.kind, []).append(parse(negative.prompt))
        beside += [(kind, rng.choice(prompts)) for kind, prompts in by_kind.items()]
        drawn = (sample_prompt(rng) for _ in itertools.count())
        beside.append((UNRELATED, next(p for p in drawn if log_likelihood(scene, p) == -math.inf)))
        yield _Case(category=category, scene=scene, beside=beside)


def _encode(model: Model, scenes: Sequence[Scene]) -> Tensor:
    pictures = [picture(scene) for scene in scenes]
    chunks = [encode_images(model.pipe, pictures[i : i + 64], model.call) for i in range(0, len(pictures), 64)]
    return torch.cat(chunks)


def _pairs(index: int, case: _Case, estimates: Estimates, truth: Truth) -> list[Pair]:
    captions = [row for row, (kind, _) in enumerate(case.beside, start=1) if kind in (ASKED, CAPTION)]
    priors = torch.tensor([math.log(truth.probabilities[case.beside[row - 1][1]]) for row in captions])
    marginal = torch.logsumexp(priors.double() - estimates.loss[captions], dim=0)
    return [
        Pair(
            scene=index,
            category=case.category,
            prompt=str(prompt),
            kind=kind,
            truth=truth.information(case.scene, prompt),
            estimates={
                "standard": (estimates.loss[0] - estimates.loss[row]).item(),
                "orthogonal": estimates.orthogonal[row].item(),
                MIXTURE: (-estimates.loss[row] - marginal).item(),
                "self-confidence": estimates.confidence[row].item(),
            },
        )
        for row, (kind, prompt) in enumerate(case.beside, start=1)
    ]


# --- The gap -----------------------------------------------------------------------------------------------------


def _gap(case: _Case, pair: Pair, estimates: Estimates, ends: Sequence[float], truth: Truth, trained: Truth) -> Gap:
    """Solves (2) for E(∅) and E(p), with the noisy ends of both."""
    marginal = truth.log_marginal(case.scene)
    null_excess = estimates.loss[0].item() + marginal + ends[0]
    excess = estimates.loss[1].item() + log_likelihood(case.scene, case.prompt) + ends[1]
    emphasis = marginal - trained.log_marginal(case.scene)
    return Gap(
        category=case.category,
        truth=pair.truth,
        noisy_end=ends[1] - ends[0],
        conditional=-excess,
        emphasis=emphasis,
        null=null_excess - emphasis,
        standard=pair.estimates["standard"],
        mixture=pair.estimates[MIXTURE],
        at_high_snr=estimates.at_high_snr,
        clean_end=estimates.clean_end,
    )


def _noisy_end(model: Model, latents: Tensor, others: Tensor, seed: int) -> float:
    path = model.denoiser.path
    return noisy_end(latents, others, default_proposal(path, "standard").low, is_flow=path.is_flow, seed=seed)


def noisy_end(latents: Tensor, others: Tensor, log_snr: float, *, is_flow: bool, seed: int) -> float:
    """N of (2) in nats, E log p(z | z₀) − E log p(z | p) at λ: for latents z₀ (C, H, W) and `others` (K, C, H, W),
    drawn from p(z₀ | p). Good where λ is so low that they all look alike."""
    alpha, sigma = alpha_sigma(torch.tensor(log_snr), is_flow=is_flow)
    shift = alpha / sigma * (latents - others).flatten(1)  # (K, D)
    noise = torch.randn(END_DRAWS, shift.shape[1], generator=Generator().manual_seed(seed))
    projected = torch.cat([noise, -noise]) @ shift.T  # (2 · END_DRAWS, K)
    log_ratios = -projected - shift.square().sum(dim=1) / 2
    return (math.log(len(others)) - torch.logsumexp(log_ratios.double(), dim=1)).mean().item()
