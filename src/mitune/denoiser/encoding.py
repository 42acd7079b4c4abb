"""Prompts through a pipeline's text encoders, with gradients for these."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mitune.denoiser.conditioning import Conditioning
from mitune.denoiser.pipeline import OptionalMembers, Pipeline
from mitune.errors import ModelError

_POOLED = ("pooled_projections", "added_cond_kwargs.text_embeds")  # what SD3 and SDXL call the pooled prompt


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoders:
    """Text encoders of a pipeline."""

    pipe: Pipeline  # with its tokenizers and text encoders, at least
    names: Sequence[str]  # of those that are trained
    call: Mapping[str, Any]  # arguments of the pipeline's call, e.g. max_sequence_length

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The text encoders that are trained, by component name."""
        return {name: self.pipe.components[name] for name in self.names}

    def to(self, device: torch.device) -> None:
        """Moves all of the pipeline."""
        self.pipe.to(device)

    def __call__(self, prompts: Sequence[str], conditioning: Conditioning) -> Conditioning:
        """The conditioning of these prompts, with what `encode` makes of them."""
        encoded = encode(self.pipe, prompts, self.call, conditioning.rows)
        return replace(conditioning, rows={**conditioning.rows, **encoded})


def encode(
    pipe: Pipeline, prompts: Sequence[str], call: Mapping[str, Any], names: Collection[str]
) -> dict[str, Tensor]:
    """The prompts' conditioning as the pipeline makes it, but with gradients; of the text-dependent `names` alone.

    call: arguments of the pipeline's call, e.g. max_sequence_length. Raises ModelError for a pipeline whose prompts
    go into anything but encoder_hidden_states and a pooled vector.
    """
    encoding = cast(OptionalMembers, pipe)
    accepted = inspect.signature(encoding.encode_prompt).parameters
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in accepted}
    options |= {name: value for name, value in call.items() if name in accepted}
    encoded = encoding.encode_prompt(
        list(prompts),
        device=encoding.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **options,
    )
    pooled = [name for name in _POOLED if name in names]
    if "encoder_hidden_states" not in names or len(encoded) != 2 + 2 * len(pooled):
        raise ModelError(
            f"mitune cannot train the text encoders of {type(pipe).__name__}; set finetune.text_encoder = false."
        )
    return dict(zip(["encoder_hidden_states", *pooled], encoded[::2], strict=True))
