"""The images of prompts, each prompt's together: what the pipeline makes in batches that begin and end anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mitune.denoiser.conditioning import Passes
from mitune.denoiser.opening.models import Model
from mitune.denoiser.sampling import Dropping, Generated, generate_all, requests_of
from mitune.information import Trace


@dataclass(slots=True)
class Sampled:
    """The images of one prompt, as far as they are made; every list has one entry an image."""

    seeds: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # latents
    dropped: list[int] = field(default_factory=list)  # the step after which a race dropped it, or 0
    steps: list[int] = field(default_factory=list)  # that the denoiser made for it
    terms: dict[str, list[Any]] = field(default_factory=dict)  # of the trace
    passes: Passes | None = None  # the denoiser's conditioning on the prompt
    batch_size: int = 0  # that the denoiser was called with at last

    def add(self, seed: int, batch: Generated, row: int) -> None:
        """The image in a row of a batch."""
        self.seeds.append(seed)
        self.rows.append(batch.latents[row])
        self.dropped.append(batch.dropped[row])
        self.steps.append(batch.dropped[row] or len(batch.trace.log_snr))
        self.batch_size = batch.batch_size
        for name, values in batch.trace.select([row]).to_columns().items():
            self.terms.setdefault(name, []).extend(values)
        if self.passes is None:
            self.passes = batch.passes.take([row])

    @property
    def latents(self) -> Tensor:
        """(M, C, H, W)."""
        return torch.stack(self.rows)

    @property
    def finite(self) -> Tensor:
        """(M,) whether the latents are numbers."""
        return torch.tensor([bool(torch.isfinite(row).all()) for row in self.rows])

    @property
    def trace(self) -> Trace:
        """The terms of all, as one trace."""
        return Trace.from_columns(self.terms)


def sample(
    model: Model,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    batch_size: int,
    race: Dropping | None = None,
    scores: Sequence[str] = (),
    on_images: Callable[[int], None] = lambda _images: None,
) -> Iterator[Sampled]:
    """The `count` images of each prompt in turn, as soon as they are whole.

    race, scores: as in `generate_all`. on_images: is called after each call of the pipeline, once what it completed has
    been taken, with the number of images made.
    """
    requests = requests_of(prompts, count, seed)
    current = Sampled()
    for chunk, batch in generate_all(model, requests, batch_size, race, scores):
        for row, request in enumerate(chunk):
            current.add(request.seed, batch, row)
            if len(current.rows) == count:
                yield current
                current = Sampled()
        on_images(len(chunk))


def prompts_together(count: int, batch_size: int) -> int:
    """The least number of prompts whose `count` images each fill batches of that size."""
    return batch_size // math.gcd(batch_size, count)
