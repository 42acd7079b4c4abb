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
from mitune.models import model_folder, opening


@dataclass(frozen=True, slots=True)
class Components:
    """The list of parts of a diffusers folder, model_index.json. A part is read when it is asked for."""

    config: ModelConfig
    index: Mapping[str, Any]

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Reads the list alone.

        Raises ModelError if there is no such model, or if its kind has no denoiser or no adapters in diffusers.
        """
        with opening(config):
            index = DiffusionPipeline.load_config(model_folder(config.name), revision=config.revision)
        name = index["_class_name"]
        if not hasattr(getattr(diffusers, name, None), "save_lora_weights") or not {"unet", "transformer"} & set(index):
            raise ModelError(
                f"{config.name} is a {name}, for which diffusers has no load_lora_weights; fine-tune a model of a kind "
                "that has it, such as StableDiffusionPipeline or StableDiffusion3Pipeline."
            )
        return cls(config, index)

    @property
    def pipeline_class(self) -> type[Any]:
        """The class whose `save_lora_weights` writes the adapter, and whose `load_lora_weights` reads it."""
        found: type[Any] = getattr(diffusers, self.index["_class_name"])
        return found

    @property
    def denoiser_name(self) -> str:
        """unet or transformer."""
        return "unet" if "unet" in self.index else "transformer"

    @property
    def text_encoder_names(self) -> list[str]:
        """The text encoders that an adapter file of this pipeline can hold: CLIP's, not T5."""
        accepted = inspect.signature(self.pipeline_class.save_lora_weights).parameters
        present = [name for name, part in self.index.items() if name.startswith("text_encoder") and _is_present(part)]
        return [name for name in present if f"{name}_lora_layers" in accepted]

    def denoiser(self) -> nn.Module:
        """The denoiser, on the CPU, in the dtype of the settings."""
        with opening(self.config):
            module: nn.Module = AutoModel.from_pretrained(
                model_folder(self.config.name), subfolder=self.denoiser_name, **self._options()
            )
        return module

    def scheduler(self) -> Any:
        """The scheduler that the pipeline comes with."""
        _, name = self.index["scheduler"]
        with opening(self.config):
            return getattr(diffusers, name).from_pretrained(
                model_folder(self.config.name), subfolder="scheduler", revision=self.config.revision
            )

    def text_pipeline(self) -> Any:
        """The pipeline with its tokenizers and text encoders only, on the CPU: enough for `encode_prompt`."""
        kept = ("text_encoder", "tokenizer", "scheduler")
        absent = {
            name: None
            for name, part in self.index.items()
            if isinstance(part, list) and not (_is_present(part) and name.startswith(kept))
        }
        with opening(self.config):
            return self.pipeline_class.from_pretrained(model_folder(self.config.name), **self._options(), **absent)

    def _options(self) -> dict[str, Any]:
        return {
            "revision": self.config.revision,
            "variant": self.config.variant,
            "dtype": getattr(torch, self.config.dtype),
            "use_safetensors": True,
        }


def _is_present(part: Any) -> bool:
    return isinstance(part, list) and part[0] is not None  # the list's entry is [library, class], or nulls
