"""Watches whether a training makes sense: its losses on the way, and at its end what it has learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mitune.errors import MituneError
from mitune.finetuning.adapter import REMEDY
from mitune.finetuning.checkpoint import TrainingState
from mitune.finetuning.dataset import TrainingSet

LOST = 25  # iterations in a row with no finite, sensible loss: fine-tuning has diverged
_BEYOND = 10.0  # times the loss of a network that predicts nothing: no model that works has it


@dataclass(frozen=True, slots=True)
class LossWatch:
    """Tells a loss that a working model may have from others."""

    limit: float

    @classmethod
    def of(cls, images: TrainingSet) -> Self:
        """The limit for a set: of ε, z₀, v = αε − σz₀ and v = ε − z₀, the last has the largest mean square.

        An image with advantage A may be asked for A times the way to its target, which counts A² times.
        """
        nothing = 1 + images.latents.square().mean().item()
        largest = (images.weights * images.advantages.square().clamp(min=1)).max().item()
        return cls(_BEYOND * largest * nothing)

    def count(self, state: TrainingState, loss: float, gradient_norm: float) -> None:
        """Counts an iteration into the state."""
        skipped = not (math.isfinite(loss) and math.isfinite(gradient_norm))
        lost = skipped or loss > self.limit
        state.iterations += 1
        state.skipped += skipped
        state.lost += lost
        state.lost_in_a_row = state.lost_in_a_row + 1 if lost else 0

    def check(self, state: TrainingState, total: int) -> None:
        """Raises MituneError where the loss is lost, for good or for most of the `total` iterations."""
        done = state.iterations == total
        if state.lost_in_a_row < LOST and not (done and 2 * state.lost > total):
            return
        which = f"the last {state.lost_in_a_row}" if state.lost_in_a_row >= LOST else f"{state.lost} of {total}"
        raise MituneError(
            f"Fine-tuning diverged, and no adapter is written: in {which} iterations the loss was not finite, or "
            f"{_BEYOND:g} times what predicting nothing would give. {REMEDY}"
        )


def check_learned(state: TrainingState, first: Mapping[str, Tensor]) -> None:
    """Raises MituneError if the adapter changes no more than it did at first, with these weights (on the CPU)."""
    values = {name: value for name, value in state.parameters.items() if "lora_B" in name}
    if all(torch.equal(value.detach().cpu(), first[name]) for name, value in values.items()):
        raise MituneError(
            f"Fine-tuning learned nothing, and no adapter is written: after {state.iterations} iterations its weights "
            "are what they were; raise finetune.learning_rate, or set model.dtype to float32."
        )
