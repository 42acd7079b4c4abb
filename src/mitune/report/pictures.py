"""Pictures of a run, embedded: before and after for some prompts, and the best and worst candidates of a pool."""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from mitune.errors import MituneError
from mitune.files.images import read_picture

CARDS = 24  # prompts with pictures, in turn from each category
COLUMNS = 6  # pictures of a prompt and variant
EXTREMES = 8  # prompts with their best and worst candidates
THUMBNAIL = 256  # pixels of the longer side: larger pictures are shrunk, so that the page stays small
PIXELATED = 128  # pixels: up to here a picture is enlarged without smoothing

MARKS = {"exact": "✓", "wrong": "✗", "malformed": "~", "unknown": ""}  # a second sign beside the frame's color

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a data URI, with the judge's verdict (a key of MARKS) and the lines below it."""

    source: str
    verdict: str
    lines: tuple[str, ...]
    pixelated: bool

    @property
    def mark(self) -> str:
        return MARKS[self.verdict]


@dataclass(frozen=True, slots=True)
class Strip:
    """A row of pictures and its name; None where there is no picture."""

    name: str
    pictures: tuple[Picture | None, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A prompt with its strips; those of `more` are folded away."""

    prompt: str
    tags: tuple[str, ...]
    strips: tuple[Strip, ...]
    more: tuple[Strip, ...] = ()


def before_after(folder: Path, images: pa.Table, foremost: Sequence[str]) -> list[Card]:
    """Cards for the prompts with saved pictures, the columns of a card being the same seeds; `folder` is eval/.

    Prompts come in the order of the table, one of each category in turn: none is picked by its result. Variants not
    in `foremost` are folded away. Raises MituneError for a picture outside `folder` or one that cannot be read.
    """
    of_prompt: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    names = ("category", "split", "prompt", "variant", "image", "seed", "exact", "malformed", "missed", "picture")
    for row in images.select([name for name in names if name in images.column_names]).to_pylist():
        if row.get("picture") and _inside(folder, row["picture"]).is_file():
            of_prompt[row["category"], row["split"], row["prompt"]].append(row)
    cards = []
    for key in _in_turn(list(of_prompt))[:CARDS]:
        category, split, prompt = key
        rows = of_prompt[key]
        columns = sorted({(row["image"], row["seed"]) for row in rows})[:COLUMNS]
        strips = []
        for variant in dict.fromkeys(row["variant"] for row in rows):
            of_variant = {(row["image"], row["seed"]): row for row in rows if row["variant"] == variant}
            strips.append(
                Strip(
                    variant, tuple(_evaluated(folder, of_variant[at]) if at in of_variant else None for at in columns)
                )
            )
        strips.sort(key=lambda strip: foremost.index(strip.name) if strip.name in foremost else len(foremost))
        front = tuple(strip for strip in strips if strip.name in foremost)
        cards.append(Card(prompt, tuple(filter(None, (category, split))), front, tuple(strips[len(front) :])))
    return cards


def extremes(folder: Path, candidates: pa.Table, score: str, ties: str | None = None) -> list[Card]:
    """Best and worst candidates by "score.<score>" of the first prompts with saved pictures, best first.

    `folder` holds <prompt index>-<candidate>.png. ties: the score that decides among equal ones.
    """
    column, second = f"score.{score}", f"score.{ties or score}"
    saved: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("*.png")):
        if match := re.fullmatch(r"(\d+)-(\d+)", path.stem):
            saved[int(match[1]), int(match[2])] = path
    of_prompt: dict[int, list[Row]] = defaultdict(list)
    names = ["prompt_index", "prompt", "candidate", "exact", "malformed", *dict.fromkeys((column, second))]
    for row in candidates.select(names).to_pylist() if saved else ():
        if (row["prompt_index"], row["candidate"]) in saved and row[column] is not None:
            of_prompt[row["prompt_index"]].append(row)
    cards = []
    for prompt in sorted(of_prompt)[:EXTREMES]:
        rows = sorted(of_prompt[prompt], key=lambda row: (row[column], row[second]), reverse=True)
        texts = [f"{row[column]:.4g}".replace("-", "−") for row in rows]
        pictures = [
            _picture(saved[prompt, row["candidate"]], row, (text,)) for row, text in zip(rows, texts, strict=True)
        ]
        half = (len(pictures) + 1) // 2
        strips = (Strip("best", tuple(pictures[:half])), Strip("worst", tuple(pictures[half:])))
        cards.append(Card(str(rows[0]["prompt"]), (), strips))
    return cards


def _in_turn(keys: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first of each category and split, then the second of each, and so on."""
    groups: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for key in keys:
        groups[key[:2]].append(key)
    return [key for key in chain.from_iterable(zip_longest(*groups.values())) if key]


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MituneError(f"images.parquet: picture {name!r} lies outside {folder}; evaluate again.")
    return path


def _evaluated(folder: Path, row: Row) -> Picture:
    missed = tuple(part.strip() for part in (row.get("missed") or "").split(";") if part.strip())
    return _picture(folder / row["picture"], row, ("malformed",) if row["malformed"] else missed)


def _picture(path: Path, row: Row, lines: tuple[str, ...]) -> Picture:
    if row["exact"] is None:
        verdict = "unknown"
    elif row["malformed"]:
        verdict = "malformed"
    else:
        verdict = "exact" if row["exact"] else "wrong"
    source, pixelated = _embed(path)
    return Picture(source, verdict, lines, pixelated)


def _embed(path: Path) -> tuple[str, bool]:
    """A picture file as a data URI, and whether it is small enough to be enlarged pixel by pixel."""
    buffer = io.BytesIO()
    picture = read_picture(path)
    pixelated = max(picture.size) <= PIXELATED
    kind = "png" if pixelated else "webp"
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", pixelated
