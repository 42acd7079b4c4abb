"""Hard negatives of a prompt: what an image must not be mistaken for.

They come from the user's own file, or are made by rule: attributes swapped between objects, the relation turned,
another count, an object dropped or exchanged, an attribute exchanged. The rules for prompts of the shapes world are
exact: no scene of a prompt fits one of its negatives. Those for other prompts (`mitune.prompts.rewording`) go by words alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mitune.denoiser.opening.models import Model
from mitune.denoiser.reading import cut_texts
from mitune.errors import MituneError
from mitune.files.texts import read_lines
from mitune.prompts.rewording import rewordings
from mitune.worlds.shapes.grammar import COLORS, INVERSE, NUMBERS, SHAPES, TEXTURES, Phrase, Prompt, PromptError, parse

OWN = "own"  # the kind of those from the user's file


@dataclass(frozen=True, slots=True)
class Negative:
    """A prompt that differs from the asked one in a single respect, `kind`."""

    prompt: str
    kind: str


def hard_negatives(prompt: str, own: Mapping[str, Sequence[Negative]] | None = None) -> list[Negative]:
    """Every hard negative of a prompt: those of `own` (see `load_negatives`) if it knows the prompt, else those of the
    shapes world if it can spell it, else those that rules on the words find, which may be none."""
    if own is not None and prompt in own:
        return list(own[prompt])
    try:
        return shapes_negatives(prompt)
    except PromptError:
        found = {text: kind for kind, text in reversed(list(rewordings(prompt)))}
        return [Negative(text, kind) for text, kind in reversed(found.items()) if text != prompt]


def load_negatives(file: Path, model: Model | None = None) -> dict[str, list[Negative]]:
    """Hard negatives by prompt from a file of JSON lines, {"prompt": "…", "negatives": ["…", …]}.

    Raises MituneError that names the file and each bad line, with `model` also those with a text that a call of it
    would cut.
    """
    if not file.is_file():
        raise MituneError(f'There is no file {file}; give JSON lines of {{"prompt": ..., "negatives": [...]}}.')
    lines, faults = read_lines(file)
    found: dict[str, list[Negative]] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prompt, negatives = _read_line(line)
            if prompt in found:
                raise ValueError(f"{prompt!r} stands in an earlier line already; put its negatives into one line")
        except ValueError as error:
            faults.add(number, str(error))
            continue
        numbers |= {text: numbers.get(text, number) for text in (prompt, *negatives)}
        found[prompt] = [Negative(text, OWN) for text in negatives]
    for text, reading in (cut_texts(model.pipe, list(numbers), model.call) if model else {}).items():
        faults.add(numbers[text], f"{text!r} has {reading}")
    faults.refuse()
    if not found:
        raise MituneError(f'{file} is empty; write JSON lines of {{"prompt": ..., "negatives": [...]}}.')
    return found


def _read_line(line: str) -> tuple[str, list[str]]:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}); write one object in each line, and no blank lines") from error
    if not isinstance(entry, dict) or set(entry) != {"prompt", "negatives"}:
        raise ValueError("not an object with the keys prompt and negatives, and no others; write them so")
    prompt, negatives = entry["prompt"], entry["negatives"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt must be a text that is not empty; write it in quotes")
    if not isinstance(negatives, list) or not all(isinstance(text, str) and text.strip() for text in negatives):
        raise ValueError("the negatives must be a list of texts, none of them empty; write [] for none")
    if prompt in negatives:
        raise ValueError(f"{prompt!r} is among its own negatives; take it out")
    if len(set(negatives)) < len(negatives):
        raise ValueError(f"{prompt!r} has a negative twice; delete one")
    return prompt, negatives


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
    found = []
    for i, phrase in enumerate(phrases):
        if phrase.count < len(NUMBERS):
            found.append(("one more", _with(prompt, {i: replace(phrase, count=phrase.count + 1)})))
        found += [("object exchanged", _with(prompt, {i: replace(phrase, shape=shape)})) for shape in absent]
    if not prompt.relation:
        found += [("object added", replace(prompt, phrases=(*phrases, Phrase(shape)))) for shape in absent]
    hard = {negative.prompt for negative in shapes_negatives(text)}
    return [Negative(str(other), kind) for kind, other in found if str(other) not in hard]


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
