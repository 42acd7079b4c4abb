"""Hard negatives of a prompt: what an image must not be mistaken for.

For prompts of the shapes world they are made by rule: attributes swapped between objects, the relation turned, another
count, an object dropped or exchanged, an attribute exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mitune.generate import condition
from mitune.information import alpha_sigma, epsilon_difference
from mitune.loss import denoising_errors as errors_of_output
from mitune.models import Model
from mitune.path import path_of
from mitune.probe import denoiser_of
from mitune.shapes.grammar import COLORS, INVERSE, NUMBERS, SHAPES, TEXTURES, Phrase, Prompt, parse

LOG_SNR_RANGE = (-5.0, 2.0)  # where prompts are told apart: below, all is noise; above, the image tells by itself


@dataclass(frozen=True, slots=True)
class Negative:
    """A prompt that differs from the asked one in a single respect, `kind`."""

    prompt: str
    kind: str


def shapes_negatives(text: str) -> list[Negative]:
    """Every hard negative of a prompt of the shapes world. Raises PromptError for other prompts."""
    prompt = parse(text)
    negatives = [Negative(str(other), kind) for kind, other in _variations(prompt)]
    return [negative for negative in negatives if negative.prompt != text]


def _variations(prompt: Prompt) -> Iterator[tuple[str, Prompt]]:
    phrases = prompt.phrases
    for attribute in ("color", "texture"):
        for i in range(len(phrases)):
            for j in range(i + 1, len(phrases)):
                a, b = getattr(phrases[i], attribute), getattr(phrases[j], attribute)
                if a and b and a != b:
                    changes = {i: _changed(phrases[i], attribute, b), j: _changed(phrases[j], attribute, a)}
                    yield f"{attribute} swapped", _with(prompt, changes)
    if prompt.relation:
        yield "relation turned", replace(prompt, relation=INVERSE[prompt.relation])
    for i, phrase in enumerate(phrases):
        if any(p.count > 1 for p in phrases):
            for count in (phrase.count - 1, phrase.count + 1):
                if 1 <= count <= len(NUMBERS):
                    yield "count changed", _with(prompt, {i: replace(phrase, count=count)})
        if len(phrases) > 1:
            yield "object dropped", Prompt(phrases[:i] + phrases[i + 1 :])
        others = [shape for shape in SHAPES if shape not in {p.shape for p in phrases}]
        if others:
            yield "object exchanged", _with(prompt, {i: replace(phrase, shape=_next(phrase.shape, SHAPES, others))})
        for attribute, values in (("color", COLORS), ("texture", TEXTURES)):
            own = getattr(phrase, attribute)
            others = [value for value in values if value not in {getattr(p, attribute) for p in phrases}]
            if own and others:
                other = _changed(phrase, attribute, _next(own, values, others))
                yield f"{attribute} exchanged", _with(prompt, {i: other})


def _changed(phrase: Phrase, attribute: str, value: str) -> Phrase:
    return replace(phrase, color=value) if attribute == "color" else replace(phrase, texture=value)


def _with(prompt: Prompt, changes: dict[int, Phrase]) -> Prompt:
    return replace(prompt, phrases=tuple(changes.get(i, phrase) for i, phrase in enumerate(prompt.phrases)))


def _next(value: str, values: tuple[str, ...], allowed: list[str]) -> str:
    """The first allowed value after `value` in the world's order: a fixed choice, spread over the values."""
    start = values.index(value)
    return next(v for v in (*values[start:], *values) if v in allowed)


@torch.no_grad()
def denoising_errors(
    model: Model, latents: Tensor, prompts: Sequence[str], *, draws: int, seed: int, batch_size: int
) -> Tensor:
    """‖ε̂(z | p) − ε‖² of latents (N, C, H, W) with the prompt beside each, at `draws` even log-SNRs: (N, draws).

    All rows share their (λ, ε), so differences between prompts of one image are paired. No unconditional pass.
    """
    path, denoiser = path_of(model.pipe.scheduler), denoiser_of(model.pipe)
    distinct = sorted(set(prompts))
    at = {prompt: i for i, prompt in enumerate(distinct)}
    known = condition(model, distinct, batch_size)
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for log_snr in torch.linspace(*LOG_SNR_RANGE, draws):
        noise = torch.randn(1, *latents.shape[1:], generator=generator)
        scale = epsilon_difference(torch.ones(()), *alpha_sigma(log_snr, is_flow=path.is_flow), path.predicts)
        errors = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            z = latents[rows].to(model.pipe.device)
            index = [at[prompt] for prompt in prompts[rows]]
            mean_square = errors_of_output(
                denoiser,
                z,
                {name: value[index] for name, value in known.items()},
                noise.expand_as(z).to(z.device),
                path.timestep(log_snr).expand(len(z)).to(z.device),
                path,
            )
            errors.append(scale.item() ** 2 * z[0].numel() * mean_square.cpu())
        columns.append(torch.cat(errors))
    return torch.stack(columns, dim=1)
