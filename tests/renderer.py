"""Another renderer of the shapes world, which shares no drawing code with mitune: polygons by PIL, 8 samples a pixel.

It draws as somebody would who had only read what a scene holds: each object a little off its place, larger or smaller
than asked, in another shade, on another shade of the background, and saved as JPEG.
"""

import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from mitune.worlds.shapes.scene import BACKGROUND, DARK, RGB, Scene

FINE = 8  # samples a pixel, each way
SHIFT, SIZE, SHADE, QUALITY = 1.0, 0.08, 12, 90  # pixels each way, share, of 255 in each channel, of JPEG


def outline(shape: str, x: float, y: float, size: float) -> list[tuple[float, float]]:
    """Corners, in pixels, of a shape about (x, y); a size of 1 is that of the shapes world, in cells of 16 pixels."""
    corners = {
        "square": [(-6.5, -6.5), (6.5, -6.5), (6.5, 6.5), (-6.5, 6.5)],
        "triangle": [(-0.3, -7), (0.3, -7), (7.05, 6.5), (-7.05, 6.5)],
        "diamond": [(0, -7), (7, 0), (0, 7), (-7, 0)],
        "cross": [(-2.5, -7), (2.5, -7), (2.5, -2.5), (7, -2.5), (7, 2.5), (2.5, 2.5)]
        + [(2.5, 7), (-2.5, 7), (-2.5, 2.5), (-7, 2.5), (-7, -2.5), (-2.5, -2.5)],
        "circle": [(7 * math.cos(a / 32 * math.pi), 7 * math.sin(a / 32 * math.pi)) for a in range(64)],
    }[shape]
    return [(x + size * a, y + size * b) for a, b in corners]


def paint(color, texture: str, x: float, y: float, period: float, dark, white) -> Image.Image:
    """The color with its texture all over the fine canvas, in 4 × 4 pixels that begin at (x, y)."""
    side = 64 * FINE
    v, u = (((np.mgrid[0:side, 0:side] + 0.5) / FINE - np.array([y, x])[:, None, None]) / period % 8).astype(int)
    second = {
        "plain": np.zeros_like(u, bool),
        "striped": v % 4 < 2,
        "checkered": (u // 4 + v // 4) % 2 == 0,
        "dotted": (u % 4 > 1) & (v % 4 > 1),
    }[texture]
    pixels = np.where(second[..., None], white if texture == "dotted" else dark, color)
    return Image.fromarray(pixels.astype(np.uint8))


def draw(scene: Scene, rng: random.Random, *, shift=SHIFT, size=SIZE, shade=SHADE, quality: int | None = QUALITY):
    """The picture of a scene, (64, 64, 3), with every deviation drawn anew: uniform up to the given largest ones."""

    def off(color):
        return [min(255, max(0, c + rng.randint(-shade, shade))) for c in color]

    canvas = Image.new("RGB", (64 * FINE, 64 * FINE), tuple(off(BACKGROUND)))
    for o in scene:
        dx, dy, scale = rng.uniform(-shift, shift), rng.uniform(-shift, shift), 1 + rng.uniform(-size, size)
        x, y = 8 * o.x + 8 + dx, 16 * o.y + 8 + dy
        mask = Image.new("L", canvas.size)
        ImageDraw.Draw(mask).polygon([(FINE * a, FINE * b) for a, b in outline(o.shape, x, y, scale)], fill=255)
        period = rng.choice([1.0, scale])  # some scale the texture with the shape, and some leave it
        canvas.paste(
            paint(
                off(RGB[o.color]), o.texture, x - 8 * period, y - 8 * period, period, off(DARK), off((255, 255, 255))
            ),
            mask=mask,
        )
    small = canvas.resize((64, 64), Image.Resampling.BOX)
    if quality is not None:
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=quality)
        small = Image.open(stream).convert("RGB")
    return np.asarray(small)
