r"""The true mutual information between a picture of the shapes world and a prompt, point-wise and in total. In nats.

    i(x; p) = log p(x | p) − log p(x)        p(x) = Σ_c p(c) p(x | c)        I(X; P) = E i(x; p)

The sum runs over the captions c of the scene: all prompts of the world that it can come from, two dozen at most. A
scene stands for its picture: objects that do not overlap may be listed in any order, `log_likelihood` counts the orders
of equal objects, and different scenes have different pictures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from mitune.worlds.shapes.grammar import (
    COLORS,
    DEPTH_RELATIONS,
    PLANE_RELATIONS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Phrase,
    Prompt,
    forms,
)
from mitune.worlds.shapes.scene import GRID, Object, Scene, log_likelihood, relation_holds

CELLS = tuple((2 * x, y) for y in range(GRID) for x in range(GRID))
Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Truth:
    """The joint distribution of prompt and picture.

    emphasis: how much oftener than in the world a model's training draws the prompts of a category ("numeracy"), of a
    relation ("above"), or with a relation and a first color ("red first"); its marginal then differs from the world's.
    """

    emphasis: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def probabilities(self) -> dict[Prompt, float]:
        """p(c) of every prompt; one that several forms spell has the sum of theirs."""
        weights: dict[Prompt, float] = {}
        for form in forms():
            for prompt in form.prompts:
                first = f"{prompt.phrases[0].color} first" if prompt.relation else None
                factor = math.prod(
                    self.emphasis.get(name or "", 1.0) for name in (form.category, prompt.relation, first)
                )
                weights[prompt] = weights.get(prompt, 0.0) + factor * form.weight / len(form.prompts)
        total = math.fsum(weights.values())
        return {prompt: weight / total for prompt, weight in weights.items()}

    def captions(self, scene: Scene) -> dict[Prompt, float]:
        """log p(c) + log p(x | c) of every prompt c that the scene can come from."""
        joint: dict[Prompt, float] = {}
        for prompt in _descriptions(scene):
            probability = self.probabilities.get(prompt)
            if probability is not None and (likelihood := log_likelihood(scene, prompt)) > -math.inf:
                joint[prompt] = math.log(probability) + likelihood
        return joint

    def log_marginal(self, scene: Scene) -> float:
        """log p(x); −inf for a scene that no prompt asks for."""
        joint = list(self.captions(scene).values())
        if not joint:
            return -math.inf
        largest = max(joint)
        return largest + math.log(math.fsum(math.exp(value - largest) for value in joint))

    def information(self, scene: Scene, prompt: Prompt) -> float:
        """i(x; p); −inf where the scene cannot come of the prompt, NaN where it cannot come of any."""
        marginal = self.log_marginal(scene)
        return log_likelihood(scene, prompt) - marginal if marginal > -math.inf else math.nan

    def mutual_information(self, category: str | None = None) -> float:
        """I(X; P) = E i(x; p), exactly; with a category, the expectation over its own prompts alone.

        Shapes, colors and the textures other than plain are exchangeable, and a position counts only for the relations
        that it makes true, so a few thousand scenes stand for all. Raises ValueError where an emphasis breaks that.
        """
        if self.emphasis:
            raise ValueError("the total is known for the world itself alone; take Truth() without an emphasis")
        known: dict[Prompt, float] = {}
        total = weight = 0.0
        for form in forms():
            if category not in (None, form.category):
                continue
            for prompt in form.prompts:
                kind = _renamed(prompt)
                if kind not in known:
                    known[kind] = math.fsum(p * self.information(s, kind) for s, p in _kinds_of_scenes(kind))
                total += form.weight / len(form.prompts) * known[kind]
            weight += form.weight
        return total / weight


def _descriptions(scene: Scene) -> Iterator[Prompt]:
    """Prompts in the manner of the grammar that may hold for the scene; every one in the world that does is there.

    All phrases of a prompt name their color, or none does; and so with textures.
    """
    by_shape: dict[str, list[Object]] = {}
    for o in scene:
        by_shape.setdefault(o.shape, []).append(o)
    single = all(len(objects) == 1 for objects in by_shape.values())
    relations = (None, *RELATIONS) if single and len(by_shape) == 2 else (None,)
    for shapes in itertools.permutations(by_shape):
        for colored, textured, relation in itertools.product((False, True), (False, True), relations):
            phrases = (
                Phrase(
                    shape,
                    len(by_shape[shape]),
                    by_shape[shape][0].color if colored else None,
                    by_shape[shape][0].texture if textured else None,
                )
                for shape in shapes
            )
            yield Prompt(tuple(phrases), relation)


def _renamed(prompt: Prompt) -> Prompt:
    """The prompt with its shapes, colors and textures renamed by order of appearance; plain stays plain."""
    colors = {c: COLORS[i] for i, c in enumerate(dict.fromkeys(p.color for p in prompt.phrases if p.color))}
    others = dict.fromkeys(p.texture for p in prompt.phrases if p.texture not in (None, "plain"))
    textures = {"plain": "plain"} | {t: TEXTURES[i + 1] for i, t in enumerate(others) if t}
    phrases = (
        Phrase(SHAPES[i], p.count, colors.get(p.color or ""), textures.get(p.texture or ""))
        for i, p in enumerate(prompt.phrases)
    )
    return Prompt(tuple(phrases), prompt.relation)


def every_scene(prompt: Prompt) -> Iterator[Scene]:
    """All scenes that can come of the prompt, one for each picture; they are equally likely."""
    for places in _places(prompt):
        yield from _painted(prompt, places)


def _kinds_of_scenes(prompt: Prompt) -> Iterator[tuple[Scene, float]]:
    """Scenes of the prompt that differ in more than position, each with the probability of all that it stands for."""
    for places, share in _kinds_of_places(prompt).items():
        scenes = list(_painted(prompt, places))
        yield from ((scene, share / len(scenes)) for scene in scenes)


def _painted(prompt: Prompt, places: Places) -> Iterator[Scene]:
    """The prompt's scenes with objects at these places, phrase after phrase: one for each choice of the open colors."""
    named_colors = {phrase.color for phrase in prompt.phrases}
    open_ = [i for i, phrase in enumerate(prompt.phrases) if phrase.color is None]
    palettes: Iterable[tuple[str, ...]]
    if prompt.relation in DEPTH_RELATIONS:  # see `sample_scene`
        palettes = itertools.permutations([c for c in COLORS if c not in named_colors], len(open_))
    else:
        palettes = itertools.product(COLORS, repeat=len(open_))
    for palette in palettes:
        free, at = dict(zip(open_, palette, strict=True)), iter(places)
        scene = tuple(
            Object(phrase.color or free[i], phrase.shape, phrase.texture or "plain", *next(at))
            for i, phrase in enumerate(prompt.phrases)
            for _ in range(phrase.count)
        )
        yield scene[::-1] if prompt.relation == "in front of" else scene


def _places(prompt: Prompt) -> Iterator[Places]:
    """All positions of the prompt's objects, phrase after phrase; those of equal objects in one order alone."""
    if prompt.relation in DEPTH_RELATIONS:
        sides = [((x, y), (x + 1, y)) for x in range(2 * GRID - 2) for y in range(GRID)]
        yield from itertools.chain(sides, (side[::-1] for side in sides))
        return
    for places in _distinct([phrase.count for phrase in prompt.phrases], frozenset(CELLS)):
        if prompt.relation is None or prompt.relation == _plane_relation(places):
            yield places


def _distinct(counts: list[int], cells: frozenset[tuple[int, int]]) -> Iterator[Places]:
    """Cells for objects that come in `counts` of one kind."""
    if not counts:
        yield ()
        return
    for chosen in itertools.combinations(sorted(cells), counts[0]):
        for rest in _distinct(counts[1:], cells - set(chosen)):
            yield chosen + rest


def _plane_relation(places: Places) -> str | None:
    first, second = (Object("red", shape, "plain", *at) for shape, at in zip(SHAPES, places[:2], strict=False))
    return next((r for r in PLANE_RELATIONS if relation_holds(r, first, second, False)), None)


def _kinds_of_places(prompt: Prompt) -> dict[Places, float]:
    """Positions that stand for all with the same relations, and their share of the prompt's scenes."""
    if prompt.relation in DEPTH_RELATIONS or [phrase.count for phrase in prompt.phrases] != [1, 1]:
        return {next(_places(prompt)): 1.0}
    by_relation: dict[str | None, list[Places]] = {}
    for places in _places(prompt):
        by_relation.setdefault(_plane_relation(places), []).append(places)
    count = sum(map(len, by_relation.values()))
    return {places[0]: len(places) / count for places in by_relation.values()}
