"""Hard negatives of a prompt of the shapes world. They are exact: no scene of a prompt fits one of its negatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mitune.worlds.base import Negative
from mitune.worlds.shapes.grammar import COLORS, INVERSE, NUMBERS, SHAPES, TEXTURES, Phrase, Prompt, PromptError, parse


def shapes_negatives(text: str) -> list[Negative]:
    """Every hard negative of a prompt of the shapes world. Raises PromptError for other prompts."""
    prompt = parse(text)
    negatives = [Negative(str(other), kind) for kind, other in _variations(prompt)]
    return [negative for negative in negatives if negative.prompt != text]


def wider_negatives(text: str) -> list[Negative]:
    """What a picture with too much in it, or with other shapes, may show, and no hard negative asks for: one more of
    an object, a further object, each object exchanged for every shape that the prompt does not name. None for prompts
    that are not of the shapes world."""
    try:
        prompt = parse(text)
    except PromptError:
        return []
    phrases = prompt.phrases
    absent = [shape for shape in SHAPES if shape not in {phrase.shape for phrase in phrases}]
    variations = []
    for i, phrase in enumerate(phrases):
        if phrase.count < len(NUMBERS):
            variations.append(("one more", _with(prompt, {i: replace(phrase, count=phrase.count + 1)})))
        variations += [("object exchanged", _with(prompt, {i: replace(phrase, shape=shape)})) for shape in absent]
    if not prompt.relation:
        variations += [("object added", replace(prompt, phrases=(*phrases, Phrase(shape)))) for shape in absent]
    hard = {negative.prompt for negative in shapes_negatives(text)}
    return [Negative(str(other), kind) for kind, other in variations if str(other) not in hard]


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
            current = getattr(phrase, attribute)
            others = [value for value in values if value not in {getattr(p, attribute) for p in phrases}]
            if current and others:
                other = _changed(phrase, attribute, _next(current, values, others))
                yield f"{attribute} exchanged", _with(prompt, {i: other})


def _changed(phrase: Phrase, attribute: str, value: str) -> Phrase:
    return replace(phrase, color=value) if attribute == "color" else replace(phrase, texture=value)


def _with(prompt: Prompt, changes: dict[int, Phrase]) -> Prompt:
    return replace(prompt, phrases=tuple(changes.get(i, phrase) for i, phrase in enumerate(prompt.phrases)))


def _next(value: str, values: tuple[str, ...], allowed: list[str]) -> str:
    """The first allowed value after `value` in the world's order: a fixed choice, spread over the values."""
    start = values.index(value)
    return next(v for v in (*values[start:], *values) if v in allowed)
