"""How much of each pixel an object covers that lies a little off its place or has another size."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mitune.worlds.shapes.grammar import SHAPES, TEXTURES
from mitune.worlds.shapes.scene import CELL, inside, second_color

Array = NDArray[np.float32]

SHIFT = 1.25  # pixels
SIZE = 0.1  # share by which an object may be smaller or larger
MARGIN = 1  # pixels around its cell that an object can reach
WINDOW = CELL + 2 * MARGIN
_FINE = 8  # samples a pixel, each way, and steps of a shift
_SIZES = 40  # steps of a size
_REACH, _LARGEST = int(SHIFT * _FINE), int(SIZE * _SIZES)

DRAWINGS = tuple(product(SHAPES, TEXTURES))


class Pose(NamedTuple):
    """How an object lies: shift in eighths of a pixel, size in fortieths, and whether its texture has that size."""

    dx: int = 0
    dy: int = 0
    size: int = 0
    scaled: bool = False

    def near(self, step: int) -> list[Pose]:
        """The poses at most a step away in shift and size."""
        limits = ((self.dx, _REACH), (self.dy, _REACH), (self.size, _LARGEST))
        ranges = [sorted({max(-most, value - step), value, min(most, value + step)}) for value, most in limits]
        return [Pose(dx, dy, size, self.scaled) for dx, dy, size in product(*ranges)]


_SCALES = ((-3, False), (-3, True), (0, False), (3, False), (3, True))
COARSE = [Pose(dx, dy, *scale) for scale in _SCALES for dx, dy in product((-8, -3, 3, 8), repeat=2)]


@lru_cache(maxsize=256)
def _integral(shape: str, texture: str, size: int, scaled: bool) -> Array:
    """Integral images (2, n + 1, n + 1), in pixels, of where an object has its color and its second one."""
    half = WINDOW * _FINE // 2 + _REACH
    fine = (np.arange(-half, half) + 0.5) / _FINE
    scale = 1 + size / _SIZES
    x, y = np.meshgrid(fine, fine)
    covered = inside(shape, x / scale, y / scale)
    period = scale if scaled else 1.0
    second = covered & second_color(texture, x / period + CELL / 2, y / period + CELL / 2)
    sums = np.stack([covered & ~second, second]).cumsum(axis=1, dtype=np.float32).cumsum(axis=2, dtype=np.float32)
    return np.pad(sums / np.float32(_FINE**2), ((0, 0), (1, 0), (1, 0)))


def object_map(shape: str, texture: str, pose: Pose) -> Array:
    """How much of each pixel of its window both colors of an object cover, (2, P)."""
    x, y = _REACH - pose.dx, _REACH - pose.dy
    length = WINDOW * _FINE + 1
    corners = _integral(shape, texture, pose.size, pose.scaled)[:, y : y + length : _FINE, x : x + length : _FINE]
    rows = corners[:, 1:] - corners[:, :-1]
    return (rows[..., 1:] - rows[..., :-1]).reshape(2, -1)


def products(maps: Array) -> Array:
    """The products of both maps with each other, (V, 3, P)."""
    return np.stack([maps[:, 0] ** 2, maps[:, 0] * maps[:, 1], maps[:, 1] ** 2], axis=1)


@cache
def coarse() -> tuple[Array, Array]:
    """Maps of every shape and texture at all coarse poses, and their products."""
    maps = np.stack([object_map(*drawing, pose) for drawing in DRAWINGS for pose in COARSE])
    return maps, products(maps)
