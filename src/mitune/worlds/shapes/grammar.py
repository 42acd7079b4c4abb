"""The shapes world's language: what can be asked for, how it is said, and how likely it is.

A prompt is a few phrases ("two red circles", "a striped square") and at most one relation between the first two.
The world is closed: a scene fits a prompt when it holds what the prompt says and no further object. Within a prompt
the shapes differ, so a shape names its phrase. Attributes that a prompt leaves out are drawn freely: the color
uniformly, the texture always plain.

The joint distribution of prompt and scene is known: a prompt has probability `Form.weight / len(form.prompts)`, and
`mitune.worlds.shapes.scene.log_likelihood` gives log p(scene | prompt). Categories follow T2I-CompBench++.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mitune.errors import MituneError

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
PLANE_RELATIONS = ("to the left of", "to the right of", "above", "below")
DEPTH_RELATIONS = ("in front of", "behind")
RELATIONS = PLANE_RELATIONS + DEPTH_RELATIONS
INVERSE = dict(
    [("to the left of", "to the right of"), ("to the right of", "to the left of"), ("above", "below")]
    + [("below", "above"), ("in front of", "behind"), ("behind", "in front of")]
)
NUMBERS = ("a", "two", "three", "four", "five", "six")
CATEGORIES = ("color", "shape", "texture", "2d_spatial", "3d_spatial", "numeracy", "complex")


class PromptError(MituneError):
    """A prompt that the shapes world cannot read."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """`count` objects of one shape; a color or texture of None is left open."""

    shape: str
    count: int = 1
    color: str | None = None
    texture: str | None = None

    def __str__(self) -> str:
        noun = self.shape if self.count == 1 else self.shape + ("es" if self.shape.endswith("s") else "s")
        words = (NUMBERS[self.count - 1], self.color, self.texture, noun)
        text = " ".join(word for word in words if word)
        return re.sub(r"^a (?=[aeiou])", "an ", text)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Phrases of different shapes; `relation` holds from the first phrase to the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    def __str__(self) -> str:
        if self.relation:
            return f"{self.phrases[0]} {self.relation} {self.phrases[1]}"
        *head, last = map(str, self.phrases)
        return f"{', '.join(head)} and {last}" if head else last


@cache
def parse(text: str) -> Prompt:
    """The prompt that `text` spells. Raises PromptError, with the word at fault, for anything else."""
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    parts = text.split(f" {relation} ") if relation else re.split(r", | and ", text)
    prompt = Prompt(tuple(_parse_phrase(part, text) for part in parts), relation)
    shapes = [phrase.shape for phrase in prompt.phrases]
    if len(set(shapes)) < len(shapes):
        raise PromptError(f"{text!r} names a shape twice; in the shapes world each phrase needs its own shape.")
    if str(prompt) != text:
        raise PromptError(f"{text!r} is no prompt of the shapes world; did you mean {str(prompt)!r}?")
    return prompt


def _parse_phrase(part: str, text: str) -> Phrase:
    words: dict[str, str] = {}
    for position, word in enumerate(part.split()):
        noun = next((s for s in SHAPES if word in (s, s + "s", s + "es")), None)
        if position == 0 and word in (*NUMBERS, "an"):
            words["number"] = "a" if word == "an" else word
        elif word in COLORS:
            words["color"] = word
        elif word in TEXTURES:
            words["texture"] = word
        elif noun:
            words["shape"] = noun
        else:
            raise PromptError(f"{text!r}: the shapes world does not know {word!r} here. See `mitune shapes prompts`.")
    if "shape" not in words or "number" not in words:
        raise PromptError(f"{text!r}: {part!r} needs a number and a shape, as in 'two red circles'.")
    return Phrase(words["shape"], NUMBERS.index(words["number"]) + 1, words.get("color"), words.get("texture"))


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of prompt: its category (None: seen in training only), its share of the world, its prompts."""

    name: str
    category: str | None
    weight: float
    prompts: tuple[Prompt, ...]


def _of_shapes(count: int) -> Iterator[tuple[str, ...]]:
    return itertools.permutations(SHAPES, count)


def _pairs(relations: tuple[str | None, ...], *, colors: bool, textures: bool = False) -> tuple[Prompt, ...]:
    color_pairs = list(itertools.permutations(COLORS, 2)) if colors else [(None, None)]
    texture_pairs = list(itertools.permutations(TEXTURES, 2)) if textures else [(None, None)]
    return tuple(
        Prompt((Phrase(s1, 1, c1, t1), Phrase(s2, 1, c2, t2)), relation)
        for (s1, s2), (c1, c2), (t1, t2), relation in itertools.product(
            _of_shapes(2), color_pairs, texture_pairs, relations
        )
    )


@cache
def forms() -> tuple[Form, ...]:
    """Every form of prompt; the weights add up to one."""
    singles = tuple(
        Prompt((Phrase(s, 1, c, t),)) for s, c, t in itertools.product(SHAPES, (None, *COLORS), (None, *TEXTURES))
    )
    listed = tuple(Prompt(tuple(map(Phrase, shapes))) for n in (2, 3, 4) for shapes in _of_shapes(n))
    numbers = tuple(Prompt((Phrase(s, n, c),)) for s, n, c in itertools.product(SHAPES, range(1, 7), (None, *COLORS)))
    two_numbers = tuple(
        Prompt((Phrase(s1, n1), Phrase(s2, n2)))
        for (s1, s2), n1, n2 in itertools.product(_of_shapes(2), range(1, 5), range(1, 5))
        if n1 + n2 > 2
    )
    three_bound = tuple(
        Prompt(tuple(Phrase(s, 1, c) for s, c in zip(shapes, colors, strict=True)))
        for shapes, colors in itertools.product(_of_shapes(3), itertools.permutations(COLORS, 3))
    )
    return (
        Form("single", None, 0.06, singles),
        Form("color", "color", 0.20, _pairs((None,), colors=True)),
        Form("shape", "shape", 0.08, listed),
        Form("texture", "texture", 0.14, _pairs((None,), colors=False, textures=True)),
        Form("2d_spatial", "2d_spatial", 0.08, _pairs(PLANE_RELATIONS, colors=False)),
        Form("2d_spatial, colored", "2d_spatial", 0.08, _pairs(PLANE_RELATIONS, colors=True)),
        Form("3d_spatial", "3d_spatial", 0.06, _pairs(DEPTH_RELATIONS, colors=False)),
        Form("3d_spatial, colored", "3d_spatial", 0.06, _pairs(DEPTH_RELATIONS, colors=True)),
        Form("numeracy", "numeracy", 0.07, numbers),
        Form("numeracy, two kinds", "numeracy", 0.05, two_numbers),
        Form("complex, three bound", "complex", 0.08, three_bound),
        Form("complex, all at once", "complex", 0.04, _pairs(RELATIONS, colors=True, textures=True)),
    )


def sample_prompt(rng: random.Random) -> Prompt:
    """A prompt of the world's own distribution."""
    form = rng.choices(forms(), weights=[form.weight for form in forms()])[0]
    return rng.choice(form.prompts)


def vocabulary() -> tuple[str, ...]:
    """Every word of every prompt, for the tokenizer."""
    plurals = tuple(str(Phrase(shape, 2)).split()[-1] for shape in SHAPES)
    joints = tuple(sorted({word for relation in RELATIONS for word in relation.split()}))
    return (*NUMBERS, "an", "and", ",", *COLORS, *TEXTURES, *SHAPES, *plurals, *joints)
