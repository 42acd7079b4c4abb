"""What a method is: a way to make a model show its prompts better, by training it or otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mitune.config.schema import Config
from mitune.denoiser.opening.models import Model
from mitune.evaluation.variant import Variant
from mitune.resolver import Row, Table
from mitune.run.stages import Run
from mitune.worlds.base import Listed


class Method(Protocol):
    """Prepares variants of a model for given prompts."""

    def check(self, config: Config, prompts: Sequence[Listed], base: Model) -> None:
        """Raises MituneError for what the method cannot work with, before anything is made. `base` is the model."""
        ...

    def prepare(self, config: Config, prompts: Sequence[Listed], run: Run) -> list[Variant]:
        """The variants to hold against the base, one for each of the method's choices; their files lie in `run.folder`.

        The same call goes on where it was stopped, and returns the same variants once all is done.
        """
        ...


METHODS: Table[Method] = Table(
    "method",
    Method,
    {
        "mi-tune": Row(
            "Algorithm 1 of MI-TUNE: pool, selection, fine-tuning, in rounds; an adapter for each selection",
            "mitune.methods.mi_tune:MITune",
        ),
    },
)
