"""The one way in which pictures are read: as a viewer shows them, on white, in 8-bit RGB.

Turned as EXIF says, transparency on white, 16-bit gray scaled to 8 bits, all other modes converted; of an animation the
first frame, which is what Pillow opens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mitune.errors import MituneError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none whose decoder runs another program
WHITE = (255, 255, 255, 255)
_16_BIT = 65535


def read_picture(file: Path) -> Image.Image:
    """A picture file as a viewer shows it, in mode RGB.

    Raises MituneError that names the file if it is broken, of another kind, or has far too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd but can be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                return as_shown(opened)
    except MituneError as error:
        raise MituneError(f"{file}: {error}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}" if Image.MAX_IMAGE_PIXELS else "the limit of Pillow"
        raise MituneError(f"{file} has more than {limit} pixels; make it smaller.") from error
    except Exception as error:  # decoders raise whatever they like on a broken file
        reason = "it is empty" if _is_empty(file) else " ".join(str(error).split()) or type(error).__name__
        raise MituneError(
            f"{file} cannot be read as a picture ({reason}); give a whole file of the kinds {', '.join(FORMATS)}."
        ) from error


def _is_empty(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == 0


def as_shown(image: Image.Image) -> Image.Image:
    """A picture in mode RGB as a viewer shows it; the same again for one that is so already.

    Raises MituneError for a picture without pixels, and for modes whose white nobody knows (floating point, LAB).
    """
    if not prod(image.size):
        raise MituneError(f"A picture of {image.width} × {image.height} pixels has none; leave it out.")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        turned = _from_16_bit(turned)
    if turned.mode in ("F", "LAB"):
        raise MituneError(
            f"A picture in Pillow's mode {turned.mode} does not say what is white; save it with 8 or 16 bits a channel."
        )
    if turned.mode == "La":
        turned = turned.convert("LA")
    if turned.has_transparency_data:
        colors = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", colors.size, WHITE), colors)
    return turned.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """8-bit gray of 16-bit gray, of either byte order, or kept in 32 bits as older versions of Pillow do."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _16_BIT:
        raise MituneError("A picture with 32 bits a pixel does not say what is white; save it with 8 or 16 bits.")
    if (clear := image.info.get("transparency")) is not None:
        values[values == clear] = _16_BIT
    return Image.fromarray(np.round(values * 255 / _16_BIT).astype(np.uint8))


def on_grid(images: Sequence[Image.Image], grid: int) -> list[Image.Image]:
    """Pictures as shown, with sides cut down to multiples of `grid` pixels by resampling, as diffusers does.

    Raises MituneError if they differ in size, or have a side below `grid`.
    """
    pictures = [as_shown(image) for image in images]
    if len({image.size for image in pictures}) != 1:
        raise MituneError("The images differ in size; score those of one size together.")
    width, height = pictures[0].size
    if min(width, height) < grid:
        raise MituneError(
            f"The image has {width} × {height} pixels; the smallest that this model takes has {grid} × {grid}."
        )
    size = (width - width % grid, height - height % grid)
    return [image if image.size == size else image.resize(size, Image.Resampling.LANCZOS) for image in pictures]
