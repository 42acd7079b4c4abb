"""Where the drawing of a scene lies best on a picture: objects a little off their places, of another size or shade.

Another renderer, or a file of lossy compression, draws the same scene with other pixels. Here each object of a reading
may move by `SHIFT` pixels each way, be `SIZE` smaller or larger, and have colors `SHADE` off. All colors, shapes and
textures are tried, since a shift can hide what an object is, and of two that overlap either in front. A smear or half
an object is no such deviation: its error stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from mitune.worlds.shapes.grammar import COLORS
from mitune.worlds.shapes.poses import COARSE, DRAWINGS, MARGIN, WINDOW, Array, Pose, coarse, object_map, products
from mitune.worlds.shapes.scene import BACKGROUND, CELL, DARK, RGB, STEP, WHITE, Object
from mitune.worlds.shapes.scene import SIZE as SIDE

SHADE = 16.0  # of 255, in each channel, that colors may be off
_ANY = 255.0  # a shade so far off that the color does not matter
KEPT = 3  # of all colors, shapes and textures, those that are fitted finely
_EDGE = ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """An object with its pose, and what it puts on the picture."""

    object: Object
    pose: Pose
    maps: Array  # (2, P): how much of each pixel of its window its color and its texture's second color cover
    colors: Array  # (2, 3): both colors, less the ground's

    @property
    def window(self) -> tuple[slice, slice]:
        """Where it lies on the picture with its margin."""
        x, y = STEP * self.object.x, CELL * self.object.y
        return slice(y, y + WINDOW), slice(x, x + WINDOW)

    @property
    def clear(self) -> Array:
        """How much of each pixel it leaves free, (WINDOW, WINDOW, 1)."""
        left: Array = (1 - self.maps.sum(axis=0)).reshape(WINDOW, WINDOW, 1)
        return left


def fit(picture: Array, scene: Sequence[Object]) -> tuple[tuple[Object, ...], Array]:
    """The scene as it lies best on the picture (64, 64, 3), and its drawing there, of that shape.

    `scene` says how many objects there are and about where; each is then fitted anew, given the others.
    """
    placed = [_Placed(o, Pose(), object_map(o.shape, o.texture, Pose()), _colors(o.color, o.texture)) for o in scene]
    ground = _ground(picture, placed)
    placed = [replace(p, colors=p.colors - ground) for p in placed]
    wide = np.pad(picture - ground, _EDGE)
    for index in range(len(placed)):
        placed[index] = _view(wide, ground, placed, index).anew()
    placed = _settled(wide, ground, placed)
    for i in range(len(placed) - 1):
        a, b = placed[i : i + 2]
        if a.object.y == b.object.y and abs(a.object.x - b.object.x) < 2:
            swapped = _settled(wide, ground, [*placed[:i], b, a, *placed[i + 2 :]])
            placed = min(placed, swapped, key=lambda one: float((_within(_drawing(one) - wide) ** 2).sum()))
    return tuple(p.object for p in placed), ground + _within(_drawing(placed))


def _settled(wide: Array, ground: Array, placed: Sequence[_Placed]) -> list[_Placed]:
    """Every object at the best pose next to its own, given the others."""
    placed = list(placed)
    for index, p in enumerate(placed):
        _, placed[index] = _view(wide, ground, placed, index).near(p.object, p.pose, 1)
    return placed


def _colors(color: str, texture: str) -> Array:
    """The color of an object and its texture's second one, (2, 3)."""
    return np.array([RGB[color], WHITE if texture == "dotted" else DARK], np.float32)


def _within(wide: Array) -> Array:
    return wide[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _drawing(placed: Iterable[_Placed]) -> Array:
    """What objects put on a ground of zero, margin included."""
    canvas = np.zeros((SIDE + 2 * MARGIN, SIDE + 2 * MARGIN, 3), np.float32)
    for p in placed:
        canvas[p.window] *= p.clear
        canvas[p.window] += (p.maps.T @ p.colors).reshape(WINDOW, WINDOW, 3)
    return canvas


def _clear(placed: Iterable[_Placed]) -> Array:
    """How much of each pixel objects leave free, margin included: none of the margin, which shows no picture."""
    clear = np.pad(np.ones((SIDE, SIDE, 1), np.float32), _EDGE)
    for p in placed:
        clear[p.window] *= p.clear
    return clear


def _ground(picture: Array, placed: Sequence[_Placed]) -> Array:
    """The shade of the background, (3,): the median where no object is."""
    free = _within(_clear(placed))[..., 0] == 1
    nominal = np.array(BACKGROUND, np.float32)
    shade = np.median(picture[free], axis=0) if free.any() else nominal
    return np.clip(shade, nominal - SHADE, nominal + SHADE).astype(np.float32)


class _View(NamedTuple):
    """What the picture shows of one object, given the others.

    The picture less what lies in front is uncovered · (behind + Σ maps · (colors − behind)), where `uncovered` is what
    the objects in front leave of a pixel. The target is the picture less all that does not depend on the maps; the
    squared errors of many maps are then products of matrices.
    """

    object: Object
    ground: Array
    linear: Array  # (P, 6): uncovered · target · (1, behind)
    squares: Array  # (P, 7): uncovered² · (1, behind, behind²)

    def anew(self) -> _Placed:
        """The object as any color, shape and texture, at any pose."""
        linear, squares = self._sums(*coarse())
        nominal = np.stack([_colors(self.object.color, texture) for _, texture in DRAWINGS]) - self.ground
        costs, _ = _costs(linear, squares, np.repeat(nominal, len(COARSE), axis=0), _ANY)
        poses = costs.reshape(len(DRAWINGS), -1).argmin(axis=1)
        kinds = list(product(COLORS, range(len(DRAWINGS))))
        rows = [drawing * len(COARSE) + poses[drawing] for _, drawing in kinds]
        nominal = np.stack([_colors(color, DRAWINGS[drawing][1]) for color, drawing in kinds]) - self.ground
        costs, _ = _costs(linear[rows], squares[rows], nominal, SHADE)
        kept = []
        for color, drawing in (kinds[best] for best in np.argsort(costs)[:KEPT]):
            shape, texture = DRAWINGS[drawing]
            o = replace(self.object, color=color, shape=shape, texture=texture)
            kept.append(self.near(o, COARSE[poses[drawing]], 2))
        _, least = min(kept, key=lambda one: one[0])
        return self.near(least.object, least.pose, 1)[1]

    def near(self, o: Object, pose: Pose, step: int) -> tuple[float, _Placed]:
        """The object at the best pose that is at most a step away, and its squared error up to a constant."""
        poses = pose.near(step)
        maps = np.stack([object_map(o.shape, o.texture, pose) for pose in poses])
        nominal = np.repeat(_colors(o.color, o.texture)[None] - self.ground, len(maps), axis=0)
        costs, colors = _costs(*self._sums(maps, products(maps)), nominal, SHADE)
        best = int(np.argmin(costs))
        return float(costs[best]), _Placed(o, poses[best], maps[best], colors[best])

    def _sums(self, maps: Array, multiplied: Array) -> tuple[Array, Array]:
        """The matrices summed over the maps, (V, 2, 6), and over their products, (V, 3, 7)."""
        pixels = maps.shape[-1]
        linear = (maps.reshape(-1, pixels) @ self.linear).reshape(len(maps), 2, -1)
        return linear, (multiplied.reshape(-1, pixels) @ self.squares).reshape(len(maps), 3, -1)


def _view(wide: Array, ground: Array, placed: Sequence[_Placed], index: int) -> _View:
    window = placed[index].window
    back, front = placed[:index], placed[index + 1 :]
    behind, over = (_drawing(others)[window].reshape(-1, 3) for others in (back, front))
    uncovered, inside = (_clear(others)[window].reshape(-1, 1) for others in (front, ()))
    target = inside * (wide[window].reshape(-1, 3) - over) - uncovered * behind
    linear = np.hstack([uncovered * target, uncovered * target * behind])
    return _View(
        placed[index].object, ground, linear, np.hstack([uncovered**2, uncovered**2 * behind, uncovered**2 * behind**2])
    )


def _costs(linear: Array, squares: Array, nominal: Array, shade: float) -> tuple[Array, Array]:
    """Squared errors of V candidates up to a constant, (V,), and their colors (V, 2, 3): at most `shade` off the
    nominal ones, and `SHADE` the second.
    """
    weight, crossed, behind = squares[..., :1], squares[..., 1:4], squares[..., 4:]
    right = linear[..., :3] + crossed[:, :2] + crossed[:, 1:]
    colors = nominal.copy()
    for layer, most in ((0, shade), (1, SHADE)) * 2:
        free = (right[:, layer] - weight[:, 1] * colors[:, 1 - layer]) / np.maximum(weight[:, 2 * layer], 1e-3)
        colors[:, layer] = np.clip(free, nominal[:, layer] - most, nominal[:, layer] + most)
    a, b = colors[:, 0], colors[:, 1]
    square = weight[:, 0] * a**2 + 2 * weight[:, 1] * a * b + weight[:, 2] * b**2
    rest = behind[:, 0] + 2 * behind[:, 1] + behind[:, 2] + 2 * linear[..., 3:].sum(axis=1)
    costs: Array = (square - 2 * (right * colors).sum(axis=1) + rest).sum(axis=1)
    return costs, colors
