"""Opens single components of a pipeline, so that training holds the denoiser without the VAE and the text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline
from torch import nn

from mitune.config import ModelConfig
from mitune.errors import ModelError
from mitune.models import model_folder, open_pipeline, open_single_denoiser, opening, parts_of


@dataclass(frozen=True, slots=True)
class Components:
    """The list of parts of a diffusers folder, model_index.json. A part is read when it is asked for."""

    config: ModelConfig
    index: Mapping[str, Any]

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Reads the list alone.

        Raises ModelError if there is no such model, or if its kind takes no prompt or has no denoiser.
        """
        with opening(config):
            index = DiffusionPipeline.load_config(parts_of(config), revision=config.revision)
        name = index["_class_name"]
        accepted = inspect.signature(getattr(diffusers, name).__call__).parameters if hasattr(diffusers, name) else {}
        if "prompt" not in accepted or not {"unet", "transformer"} & set(index):
            raise ModelError(
                f"{config.name} is a {name}, which takes no prompt or has neither a unet nor a transformer; fine-tune "
                "a model of another kind, such as StableDiffusionPipeline or StableDiffusion3Pipeline."
            )
        return cls(config, index)

    @property
    def pipeline_class(self) -> type[Any]:
        """The class of the whole; most have `save_lora_weights` and `load_lora_weights` for adapters."""
        found: type[Any] = getattr(diffusers, self.index["_class_name"])
        return found

    @property
    def denoiser_name(self) -> str:
        """unet or transformer."""
        return "unet" if "unet" in self.index else "transformer"

    @property
    def text_encoder_names(self) -> list[str]:
        """The text encoders that an adapter file of this pipeline can hold: CLIP's, not T5."""
        if not hasattr(self.pipeline_class, "save_lora_weights"):
            return []
        accepted = inspect.signature(self.pipeline_class.save_lora_weights).parameters
        present = [name for name, part in self.index.items() if name.startswith("text_encoder") and _is_present(part)]
        return [name for name in present if f"{name}_lora_layers" in accepted]

    def denoiser(self) -> nn.Module:
        """The denoiser, on the CPU, in the dtype of the settings."""
        config, name = self.config, self.denoiser_name
        with opening(config):
            if config.is_single_file:
                found = open_single_denoiser(config, self.index, name)
            else:
                found = AutoModel.from_pretrained(
                    model_folder(config.name),
                    subfolder=name,
                    revision=config.revision,
                    variant=config.variant,
                    dtype=getattr(torch, config.dtype),
                    use_safetensors=True,
                )
        module: nn.Module = found
        return module

    def scheduler(self) -> Any:
        """The scheduler that the pipeline comes with."""
        _, name = self.index["scheduler"]
        with opening(self.config):
            return getattr(diffusers, name).from_pretrained(
                parts_of(self.config), subfolder="scheduler", revision=self.config.revision
            )

    def text_pipeline(self) -> Any:
        """The pipeline with its tokenizers and text encoders only, on the CPU: enough for `encode_prompt`."""
        kept = ("text_encoder", "tokenizer", "scheduler")
        without = [name for name, part in self.index.items() if isinstance(part, list) and not name.startswith(kept)]
        with opening(self.config):
            return open_pipeline(self.config, self.index, without)


def _is_present(part: Any) -> bool:
    return isinstance(part, list) and part[0] is not None  # the list's entry is [library, class], or nulls
