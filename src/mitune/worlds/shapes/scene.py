"""Scenes of the shapes world: objects on a coarse grid, their probability given a prompt, and their picture.

Positions are coarse so that drawing is easy and failures are about meaning: 16-pixel objects in the cells of a 4 × 4
grid. Only the two objects of an "in front of" scene overlap, by half a cell, side by side in a row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mitune.worlds.shapes.grammar import COLORS, DEPTH_RELATIONS, SHAPES, TEXTURES, Phrase, Prompt

SIZE = 64  # pixels of a side
CELL = 16  # pixels of an object
STEP = 8  # pixels of the finest horizontal step
GRID = SIZE // CELL

BACKGROUND = (242, 240, 235)
DARK = (40, 38, 46)
WHITE = (255, 255, 255)
RGB = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (38, 84, 204),
    "yellow": (246, 205, 40),
    "purple": (150, 60, 195),
    "orange": (242, 128, 28),
}


@dataclass(frozen=True, slots=True)
class Object:
    """One object: `x` counts half cells from the left (0 to 6), `y` cells from the top (0 to 3)."""

    color: str
    shape: str
    texture: str
    x: int
    y: int

    def __str__(self) -> str:
        return f"{self.texture} {self.color} {self.shape} at {self.x}, {self.y}"


Scene = tuple[Object, ...]  # from back to front
Coordinates = NDArray[Any]


def relation_holds(relation: str, first: Object, second: Object, first_in_front: bool) -> bool:
    """Whether `relation` holds from the first object to the second. A perfect diagonal is no relation."""
    dx, dy = second.x - first.x, 2 * (second.y - first.y)
    overlap = dy == 0 and abs(dx) < 2
    if relation in DEPTH_RELATIONS:
        return overlap and first_in_front == (relation == "in front of")
    offset = {"to the left of": dx, "to the right of": -dx, "above": dy, "below": -dy}[relation]
    return not overlap and offset > 0 and abs(dx) != abs(dy) and offset == max(abs(dx), abs(dy))


@cache
def _placements(relation: str) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    """All positions ((x, y) of the first, (x, y) of the second) for which the relation holds."""
    if relation in DEPTH_RELATIONS:
        rights = [((x, y), (x + 1, y)) for x in range(2 * GRID - 2) for y in range(GRID)]
        return tuple(rights + [(b, a) for a, b in rights])
    cells = [(x, y) for x in range(0, 2 * GRID, 2) for y in range(GRID)]
    objects = {cell: Object("red", "circle", "plain", *cell) for cell in cells}
    return tuple((a, b) for a in cells for b in cells if relation_holds(relation, objects[a], objects[b], False))


def sample_scene(prompt: Prompt, rng: random.Random) -> Scene:
    """A scene drawn from p(scene | prompt)."""
    if prompt.relation:
        places = list(rng.choice(_placements(prompt.relation)))
    else:
        cells = rng.sample(range(GRID * GRID), sum(phrase.count for phrase in prompt.phrases))
        places = [(2 * (cell % GRID), cell // GRID) for cell in cells]
    objects: list[Object] = []
    # Where one object covers another, their colors must differ, or nobody could tell which lies in front.
    named_colors = {phrase.color for phrase in prompt.phrases}
    others = [color for color in COLORS if color not in named_colors]
    depth = prompt.relation in DEPTH_RELATIONS
    free = rng.sample(others, 2) if depth else rng.choices(COLORS, k=len(prompt.phrases))
    for phrase, free_color in zip(prompt.phrases, free, strict=True):
        for _ in range(phrase.count):
            color, texture = phrase.color or free_color, phrase.texture or "plain"
            objects.append(Object(color, phrase.shape, texture, *places[len(objects)]))
    return tuple(reversed(objects)) if prompt.relation == "in front of" else tuple(objects)


def fits(scene: Scene, prompt: Prompt) -> bool:
    """Whether the scene holds all that the prompt says, and nothing else."""
    return {o.shape for o in scene} == {p.shape for p in prompt.phrases} and all(met for _, met in parts(scene, prompt))


def parts(scene: Sequence[Object], prompt: Prompt) -> list[tuple[str, bool]]:
    """The prompt's parts, each with whether the scene meets it: per phrase its number, color and texture, then the
    relation, then that nothing else is there."""
    by_phrase = [[o for o in scene if o.shape == phrase.shape] for phrase in prompt.phrases]
    checks: list[tuple[str, bool]] = []
    for phrase, objects in zip(prompt.phrases, by_phrase, strict=True):
        checks.append((str(Phrase(phrase.shape, phrase.count)), len(objects) == phrase.count))
        for attribute in ("color", "texture"):
            value = getattr(phrase, attribute)
            if value:
                met = bool(objects) and all(getattr(o, attribute) == value for o in objects)
                checks.append((f"{phrase.shape}: {value}", met))
    if prompt.relation:
        first, second = by_phrase[:2]
        met = len(first) == 1 and len(second) == 1
        if met:
            in_front = scene.index(first[0]) > scene.index(second[0])
            met = relation_holds(prompt.relation, first[0], second[0], in_front)
        checks.append((f"{prompt.phrases[0].shape} {prompt.relation} {prompt.phrases[1].shape}", met))
    named_shapes = {phrase.shape for phrase in prompt.phrases}
    checks.append(("nothing else", all(o.shape in named_shapes for o in scene)))
    return checks


def log_likelihood(scene: Scene, prompt: Prompt) -> float:
    """log p(scene | prompt) in nats; −inf where the scene cannot come of the prompt."""
    impossible = -math.inf
    if not fits(scene, prompt):
        return impossible
    depth = prompt.relation in DEPTH_RELATIONS
    if not depth and (any(o.x % 2 for o in scene) or len({(o.x, o.y) for o in scene}) < len(scene)):
        return impossible
    if depth and scene[0].color == scene[1].color:
        return impossible
    total = 0.0
    others = len(COLORS) - sum(phrase.color is not None for phrase in prompt.phrases)
    free_colors = [others, others - 1] if depth else [len(COLORS)] * len(prompt.phrases)
    for phrase in prompt.phrases:
        objects = [o for o in scene if o.shape == phrase.shape]
        if len({o.color for o in objects}) > 1 or {o.texture for o in objects} != {phrase.texture or "plain"}:
            return impossible
        total -= 0.0 if phrase.color else math.log(free_colors.pop(0))
        if not prompt.relation:
            total += math.lgamma(phrase.count + 1)
    if prompt.relation:
        return total - math.log(len(_placements(prompt.relation)))
    return total - math.log(math.perm(GRID * GRID, len(scene)))


@cache
def _coverage(shape: str) -> NDArray[np.float32]:
    """How much of each pixel of a cell the shape covers, (CELL, CELL), by 8 × 8 samples a pixel."""
    fine = (np.arange(CELL * 8) + 0.5) / 8 - CELL / 2
    samples = inside(shape, *np.meshgrid(fine, fine))
    covered: NDArray[np.float32] = samples.reshape(CELL, 8, CELL, 8).mean(axis=(1, 3), dtype=np.float32)
    return covered


def inside(shape: str, x: Coordinates, y: Coordinates) -> NDArray[np.bool_]:
    """Whether points (x right, y down, in pixels from the middle of its cell) lie in the shape."""
    r = CELL / 2 - 1  # a margin of one pixel keeps neighbors apart
    covered: NDArray[np.bool_]
    match shape:
        case "circle":
            covered = x**2 + y**2 <= r**2
        case "square":
            covered = np.maximum(abs(x), abs(y)) <= r - 0.5
        case "triangle":
            covered = (y <= r - 0.5) & (abs(x) <= (y + r) / 2 + 0.3)
        case "diamond":
            covered = abs(x) + abs(y) <= r
        case _:
            covered = (np.minimum(abs(x), abs(y)) <= 2.5) & (np.maximum(abs(x), abs(y)) <= r)
    return covered


def second_color(texture: str, x: Coordinates, y: Coordinates) -> NDArray[np.bool_]:
    """Whether points (in pixels from the upper left corner of the cell) have the texture's second color."""
    second = np.zeros(x.shape, bool)
    match texture:
        case "striped":
            second = y % 4 < 2
        case "dotted":
            second = (x % 4 // 2 == 1) & (y % 4 // 2 == 1)
        case "checkered":
            second = (x // 4 + y // 4) % 2 == 0
    return second


@cache
def sprite(color: str, shape: str, texture: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Paint (CELL, CELL, 3) in [0, 255] and coverage (CELL, CELL, 1) in [0, 1] of one object."""
    y, x = np.mgrid[0:CELL, 0:CELL]
    paint = np.empty((CELL, CELL, 3), np.float32)
    paint[:] = RGB[color]
    paint[second_color(texture, x, y)] = WHITE if texture == "dotted" else DARK
    return paint, _coverage(shape)[..., None]


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, (SIZE, SIZE, 3), RGB."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUND
    for o in scene:
        paint, coverage = sprite(o.color, o.shape, o.texture)
        window = canvas[o.y * CELL : (o.y + 1) * CELL, o.x * STEP : o.x * STEP + CELL]
        window += coverage * (paint - window)
    return canvas.round().astype(np.uint8)


def picture(scene: Scene) -> Image.Image:
    """The picture of a scene as an image."""
    return Image.fromarray(render(scene))


KINDS = tuple((color, shape, texture) for color in COLORS for shape in SHAPES for texture in TEXTURES)
