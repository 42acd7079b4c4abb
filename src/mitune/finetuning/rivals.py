"""The hard negatives that a fine-tuning set may have for its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, Tensor

from mitune.denoiser.conditioning import Conditioning
from mitune.errors import MituneError
from mitune.finetuning.objectives.base import Rivals
from mitune.run.store import DAMAGED

FILE = "rivals.safetensors"
DRAWN = 3  # of an image's rivals in an iteration: each costs a pass forward


@dataclass(frozen=True, slots=True, eq=False)
class RivalPrompts:
    """The rivals of all prompts of a set, each once."""

    prompts: Sequence[str]  # R texts
    conditioning: Conditioning  # of the R
    of_images: Sequence[Sequence[int]]  # for each image of the set, which of the R are rivals of its prompt

    @classmethod
    def read(cls, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Self | None:
        """Those that the rows of metadata.jsonl name; None if they name none.

        Their conditioning is in rivals.safetensors, in the order in which the rows first name them.
        Raises MituneError if that is missing or damaged, or has another number of prompts.
        """
        named = [list(map(str, row.get("rivals", ()))) for row in rows]
        places = {text: place for place, text in enumerate(dict.fromkeys(text for texts in named for text in texts))}
        if not places:
            return None
        try:
            conditioning = Conditioning.from_tensors(load_file(folder / FILE))
        except (SafetensorError, *DAMAGED) as error:
            raise MituneError(
                f"{folder / FILE} is missing or damaged ({error!r}); name a set that `mitune pool` has written."
            ) from error
        if len(conditioning) != len(places):
            raise MituneError(
                f"{folder / FILE} is for {len(conditioning)} prompts, but the rows of metadata.jsonl name "
                f"{len(places)} rivals; write each once, in the order of the rows."
            )
        return cls(list(places), conditioning, [[places[text] for text in texts] for texts in named])

    def draw(self, rows: Tensor, generator: Generator) -> Tensor:
        """At most `DRAWN` rivals for each of these images of the set, (B, DRAWN); −1 where there are no more."""
        drawn = torch.full((len(rows), DRAWN), -1)
        for place, row in enumerate(rows.tolist()):
            rivals = torch.tensor(self.of_images[row], dtype=torch.int64)
            lot = torch.randperm(len(rivals), generator=generator)[:DRAWN]
            drawn[place, : len(lot)] = rivals[lot]
        return drawn

    def batch(self, drawn: Tensor, device: torch.device) -> Rivals:
        """Those drawn for the images of a batch, (b, DRAWN), on the device."""
        chosen = drawn[drawn >= 0]
        return Rivals(
            images=torch.nonzero(drawn >= 0)[:, 0].to(device, non_blocking=True),
            prompts=[self.prompts[place] for place in chosen.tolist()],
            conditioning=self.conditioning.take(chosen).to(device, non_blocking=True),
        )
