"""The exact judge: reads any 64 × 64 picture back into a scene, and says part by part whether a prompt holds.

Reading is analysis by synthesis. Objects sit in rows of 16 pixels, on half-cell columns of 8, and at most two overlap,
so every row is explained by itself: the sequence of objects, gaps and overlaps whose drawing comes nearest to the
picture, found by dynamic programming over its eight columns. What even the best drawing cannot explain is the
*residual*; a picture with a large residual is read once more with its objects free to lie a little off their places, of
another size and shade (`fitting.py`), and only if that leaves one too large as well it is malformed, which is kept
apart from being wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mitune.errors import MituneError
from mitune.worlds.shapes.fitting import fit
from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.poses import Array
from mitune.worlds.shapes.scene import BACKGROUND, CELL, GRID, KINDS, SIZE, STEP, Object, Scene, parts, sprite

COLUMNS = SIZE // STEP
CANDIDATES = 6  # kinds tried for each object of an overlapping pair
MALFORMED = 30.0  # root mean square error, of 255, over the worst 16 × 8 strip of a picture
FITTED = 17.0  # the same once its objects are fitted
HOPELESS = 100.0  # the same beyond which no object is merely a little off
OBJECT_COST = 4.0**2 * CELL * STEP * 3  # what an object must explain to be there at all


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows: its scene, back to front, and the error of its worst strip (RMS, of 255)."""

    scene: Scene
    residual: float
    limit: float = MALFORMED  # the largest residual of a well-formed picture

    @property
    def malformed(self) -> bool:
        return self.residual > self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture shows what the prompt asks; `graded` is the share of the prompt's parts that are met."""

    exact: bool
    graded: float
    parts: tuple[tuple[str, bool], ...]
    malformed: bool
    scene: Scene

    @property
    def right(self) -> bool:
        """Exact, and well drawn."""
        return self.exact and not self.malformed

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(part for part, met in self.parts if not met)


def judge(image: NDArray[np.uint8], prompt: str) -> Verdict:
    """Holds a picture (64, 64, 3) against a prompt.

    Raises PromptError for a prompt outside the grammar, and MituneError for a picture of another size.
    """
    reading = read(image)
    met = tuple(parts(reading.scene, parse(prompt)))
    share = sum(ok for _, ok in met) / len(met)
    return Verdict(all(ok for _, ok in met), share, met, reading.malformed, reading.scene)


@cache
def _templates() -> tuple[Array, Array, Array]:
    """Paint (K, 16, 16, 3), coverage (K, 16, 16, 1) and the drawing of each kind on the background (K, 16, 16, 3)."""
    sprites = [sprite(*kind) for kind in KINDS]
    paint = np.stack([p for p, _ in sprites])
    coverage = np.stack([c for _, c in sprites])
    ground = np.array(BACKGROUND, np.float32)
    return paint, coverage, ground + coverage * (paint - ground)


def read(image: NDArray[np.uint8]) -> Reading:
    """The best explanation of a picture (64, 64, 3) as a scene. Raises MituneError for one of another size."""
    if image.shape != (SIZE, SIZE, 3):
        raise MituneError(
            f"The judge of the shapes world reads pictures of {SIZE} × {SIZE} pixels, and this one has "
            f"{' × '.join(map(str, image.shape[1::-1]))}; leave height and width out of model.call."
        )
    picture = image.astype(np.float32)
    objects: list[Object] = []
    residual = 0.0
    for y in range(GRID):
        row = picture[y * CELL : (y + 1) * CELL]
        kinds, errors = _read_row(row)
        objects += [Object(*KINDS[kind], x, y) for x, kind in kinds]
        residual = max(residual, float(np.sqrt(errors.max() / (CELL * STEP * 3))))
    reading = Reading(tuple(objects), residual)
    if objects and MALFORMED < residual < HOPELESS:
        fitted = _fitted(picture, reading.scene)
        return reading if fitted.malformed else fitted
    return reading


def _fitted(picture: Array, scene: Scene) -> Reading:
    """The scene with its objects moved, sized and shaded as the picture has them; compared as drawn, and as JPEG keeps
    that drawing, with its colors at half the resolution.
    """
    scene, drawing = fit(picture, scene)
    pixels = drawing.clip(0, 255).round().astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling="4:2:0")
    residuals = []
    for drawn in (pixels, np.asarray(Image.open(stream))):
        errors = ((picture - drawn) ** 2).reshape(GRID, CELL, COLUMNS, STEP, 3).mean(axis=(1, 3, 4))
        residuals.append(float(np.sqrt(errors.max())))
    return Reading(scene, min(residuals), FITTED)


def _squared_distance(patch: Array, drawings: Array) -> Array:
    """Σ (patch − drawing)² over pixels, (K,)."""
    flat = drawings.reshape(len(drawings), -1)
    difference = flat - patch.reshape(1, -1)
    distance: Array = np.einsum("kd,kd->k", difference, difference)
    return distance


def _read_row(row: Array) -> tuple[list[tuple[int, int]], Array]:
    """Objects (x, kind) of one row, back to front, and the squared error of each column, (8,)."""
    strips = [row[:, c * STEP : (c + 1) * STEP] for c in range(COLUMNS)]
    ground = np.array(BACKGROUND, np.float32)
    empty = [float(((strip - ground) ** 2).sum()) for strip in strips]
    _, _, drawn = _templates()
    threshold = OBJECT_COST / 2
    left = [
        _squared_distance(s, drawn[:, :, :STEP]) if e > threshold else None for s, e in zip(strips, empty, strict=True)
    ]
    right = [
        _squared_distance(s, drawn[:, :, STEP:]) if e > threshold else None for s, e in zip(strips, empty, strict=True)
    ]

    # best[c]: least cost of the first c columns, with the objects that explain them and the error of each column.
    best: list[tuple[float, list[tuple[int, int]], list[float]]] = [(0.0, [], [])]
    for c in range(1, COLUMNS + 1):
        cost, objects, errors = best[c - 1]
        options = [(cost + empty[c - 1], objects, [*errors, empty[c - 1]])]
        if c >= 2:
            cost, objects, errors = best[c - 2]
            first, last = left[c - 2], right[c - 1]
            if first is not None and last is not None:
                kind = int(np.argmin(first + last))
                halves = [float(first[kind]), float(last[kind])]
                options.append((cost + sum(halves) + OBJECT_COST, [*objects, (c - 2, kind)], [*errors, *halves]))
        if c >= 3:
            cost, objects, errors = best[c - 3]
            first, last = left[c - 3], right[c - 1]
            if first is not None and last is not None:
                pair, thirds = _read_overlap(strips[c - 2], first, last)
                placed = [(c - 3 + side, kind) for side, kind in pair]
                options.append((cost + sum(thirds) + 2 * OBJECT_COST, objects + placed, [*errors, *thirds]))
        best.append(min(options, key=lambda option: option[0]))
    _, objects, errors = best[COLUMNS]
    return objects, np.array(errors, np.float32)


def _read_overlap(middle: Array, first: Array, last: Array) -> tuple[list[tuple[int, int]], list[float]]:
    """Two objects half over each other, given their shared strip and the distances of their free halves to each kind.

    Returns [(0 or 1 half cells to the right, kind)] from back to front, and the squared error of the three strips.
    """
    paint, coverage, drawn = _templates()
    lefts, rights = np.argsort(first)[:CANDIDATES], np.argsort(last)[:CANDIDATES]
    over_right = drawn[rights, :, :STEP][None]  # the right object lies behind, the left one is drawn over it
    over_left = drawn[lefts, :, STEP:][:, None]
    cover_left, paint_left = coverage[lefts, :, STEP:][:, None], paint[lefts, :, STEP:][:, None]
    cover_right, paint_right = coverage[rights, :, :STEP][None], paint[rights, :, :STEP][None]
    left_in_front = over_right + cover_left * (paint_left - over_right)
    right_in_front = over_left + cover_right * (paint_right - over_left)
    free = first[lefts][:, None] + last[rights][None]
    shared = np.stack([((drawing - middle) ** 2).sum(axis=(2, 3, 4)) for drawing in (left_in_front, right_in_front)])
    front, i, j = np.unravel_index(int(np.argmin(shared + free)), shared.shape)
    a, b = (0, int(lefts[i])), (1, int(rights[j]))
    return [b, a] if front == 0 else [a, b], [
        float(first[lefts[i]]),
        float(shared[front, i, j]),
        float(last[rights[j]]),
    ]
