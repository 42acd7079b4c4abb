"""Images from a pipeline in batches of constant shape, each with a seed of its own, watched by the probe.

The shape in which the denoiser is called never changes (a batch is filled up with repeats), and each text is encoded
alone. So on a CPU the latents of an image are, bit for bit, a function of its prompt and its seed: not of its
neighbors, of the order, or of a race in which others are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mitune.denoiser.batches import constant_batches, texts_encoded_once
from mitune.denoiser.conditioning import Passes
from mitune.denoiser.network import free_denoiser
from mitune.denoiser.opening.calls import calling
from mitune.denoiser.opening.models import Model, prompted
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.quiet import quiet_pipelines
from mitune.information import SCORES, Trace
from mitune.seeds import seed_of

log = logging.getLogger(__name__)
LARGEST_BATCH = 64  # to begin with on a GPU; more than that makes none faster
CPU_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One image to be made."""

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What one call of the pipeline gave for its B requests."""

    latents: Tensor  # (B, C, H, W), in the denoiser's space, on the CPU
    trace: Trace
    passes: Passes  # of the B: the denoiser's conditioning, on the CPU
    dropped: list[int]  # (B) the step after which a race dropped it, its latents and terms being NaN; 0 where it stayed
    batch_size: int  # of the denoiser's calls


class Dropping(Protocol):
    """What drops candidates half-way, as a race of a pool does (`mitune.pool.race`)."""

    @property
    def candidates(self) -> int:
        """How many candidates of a prompt come one after the other."""

    def drop(self, probe: MIProbe) -> None:
        """Called after each step; has the probe keep those that stay."""

    def prompts_together(self, steps: int, batch_size: int) -> int:
        """How many prompts' candidates one call of the pipeline makes."""


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """The seed of candidate j of a prompt, the same wherever and whenever it is made."""
    return seed_of(seed, prompt, candidate)


def requests_of(prompts: Iterable[str], count: int, seed: int) -> list[Request]:
    """Those of the candidates 0 … count − 1 of each prompt in turn."""
    return [Request(prompt=p, seed=candidate_seed(seed, p, j)) for p in prompts for j in range(count)]


def generate(
    model: Model,
    requests: Sequence[Request],
    batch_size: int,
    on_step: Callable[[MIProbe], None] | None = None,
) -> Generated:
    """Runs the pipeline once, with the probe, and its denoiser in batches of `batch_size`.

    on_step is called with the probe after each step, and may have it keep some candidates only.
    """
    free_denoiser(model.pipe)
    with (
        texts_encoded_once(model.pipe),
        constant_batches(model.pipe, batch_size),
        calling(model.pipe, model.call),
        MIProbe(model.pipe, guidance_scale=model.guidance_scale, on_step=on_step) as probe,
        quiet_pipelines(),
    ):
        latents = model.pipe(
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="latent",
            **prompted(model.pipe, [request.prompt for request in requests], model.call),
        )[0]
    stayed, dropped = probe.candidates, probe.dropped
    texts = {requests[place].prompt: row for row, place in enumerate(stayed)}
    rows = [texts[request.prompt] for request in requests]
    finished = latents.float().cpu()
    finished[list(dropped)] = torch.nan
    return Generated(
        latents=finished,
        trace=probe.trace(latents).spread(stayed, len(requests)),
        passes=probe.passes.take(rows).to("cpu"),
        dropped=[dropped.get(place, 0) for place in range(len(requests))],
        batch_size=batch_size,
    )


def default_batch_size(device: torch.device) -> int:
    """The batch size to begin with where the settings name none; out of memory halves it."""
    return LARGEST_BATCH if device.type == "cuda" else CPU_BATCH


def generate_all(
    model: Model, requests: Sequence[Request], batch_size: int, race: Dropping | None = None, scores: Sequence[str] = ()
) -> Iterator[tuple[Sequence[Request], Generated]]:
    """Runs of requests with what came of them, in order. Out of memory halves the batch from there on.

    With a race, the requests are all candidates of one prompt, then all of another, and so on. The prompts are known
    to be read whole (`refuse_cut`). Raises MituneError at the first denoising step if one of these on-line `scores`
    has no value at the steps of such a run.
    """

    def on_step(probe: MIProbe) -> None:
        if probe.steps == 1:
            for name in scores:
                SCORES[name].check(probe.planned())
        if race is not None:
            race.drop(probe)

    start = 0
    while start < len(requests):
        together = race.candidates * race.prompts_together(model.steps, batch_size) if race else batch_size
        chunk = requests[start : start + together]
        try:
            batch = generate(model, chunk, batch_size, on_step)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            log.warning("Out of memory; going on with batches of %d.", batch_size)
            continue
        yield chunk, batch
        start += len(chunk)
