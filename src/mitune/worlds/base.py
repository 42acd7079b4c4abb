"""What a world is: prompts whose images can be judged, with models of its own. And how one is named.

`shapes:train/color` is a list of a world in the table below; `mine:world/train` is one of the world `world` in a file
mine.py of one's own. A model of a world in the table goes by its bare name (`shapes-sd`), others as `mine:world/model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mitune.errors import MituneError, did_you_mean
from mitune.evaluation.metrics.base import ImageMetric
from mitune.resolver import Row, Table, is_location

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Listed:
    """A prompt of a list; category and split ("train", "seen", "unseen") are empty where it has none."""

    text: str
    category: str = ""
    split: str = ""


@dataclass(frozen=True, slots=True)
class Negative:
    """A prompt that differs from the one asked for in a single respect, `kind`."""

    prompt: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A model that comes with a world: a diffusers folder, and the arguments that its pipeline is called with."""

    name: str
    folder: Path
    call: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""  # one line, for `mitune list models`


class World(Protocol):
    """Prompts, what an image of each must not be mistaken for, a metric that judges the images, and models."""

    @property
    def models(self) -> Mapping[str, EmbeddedModel]: ...

    @property
    def metric(self) -> ImageMetric: ...

    def prompts(self, name: str, /) -> list[Listed]:
        """The list of that name. Raises MituneError where there is none."""

    def negatives(self, prompt: str, /) -> list[Negative] | None:
        """Every hard negative of a prompt; None for a prompt that is not one of this world."""


@runtime_checkable
class WorldWithCommands(Protocol):
    """A world that has commands of its own; where they are, as package.module:attribute of an app of typer."""

    @property
    def commands(self) -> str:
        """Below `mitune` and the world's name in the table."""

    @property
    def benchmarks(self) -> str:
        """Below `mitune bench`."""


@runtime_checkable
class WorldOfScenes(Protocol):
    """A world that knows the scenes of its prompts, so that more can be studied in it (`mitune bench`)."""

    def rendered(self, category: str, count: int, seed: int, /) -> tuple[list[str], list[Image]]:
        """Prompts of a category, drawn at random, and for each a picture that is right; `count` of both."""

    def wider_negatives(self, prompt: str, /) -> list[Negative]:
        """What a picture with too much in it may show, and no hard negative asks for."""


WORLDS: Table[World] = Table(
    "world",
    World,
    {"shapes": Row("colored shapes with an exact judge, and two small models", "mitune.worlds.shapes.world:WORLD")},
    may_fit=(WorldOfScenes,),
)


def worlds() -> list[World]:
    """The worlds of the table."""
    return [WORLDS.resolve(name) for name in WORLDS.rows]


def within(source: str) -> tuple[World, str] | None:
    """The world that `source` names, and what of it (see above); None where it names none.

    Raises MituneError for a world of one's own that cannot be had.
    """
    place, _, name = source.partition(":")
    if place in WORLDS.rows:
        return WORLDS.resolve(place), name
    location, slash, name = source.partition("/")
    return (WORLDS.resolve(location), name) if slash and is_location(location) else None


def embedded_models() -> dict[str, EmbeddedModel]:
    """The models of the worlds of the table, by name."""
    return {name: model for world in worlds() for name, model in world.models.items()}


def world_of_prompt(prompt: str) -> World | None:
    """The world of the table that a prompt is one of."""
    return next((world for world in worlds() if world.negatives(prompt) is not None), None)


def world_of_model(name: str) -> World | None:
    """The world that a model belongs to; None for a hub id, a folder or a file."""
    named = within(name)
    if named is not None:
        return named[0]
    return next((world for world in worlds() if name in world.models), None)


def embedded_model(name: str) -> EmbeddedModel | None:
    """The model of a world by that name; None for a hub id, a folder or a file.

    Raises MituneError for a world without such a model.
    """
    named = within(name)
    if named is None:
        return embedded_models().get(name)
    world, short = named
    if short not in world.models:
        known = ", ".join(world.models) or "none"
        raise MituneError(f"There is no model {name!r}{did_you_mean(short, world.models)}; its world has: {known}.")
    return world.models[short]
