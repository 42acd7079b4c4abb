"""Opens single components of a pipeline, so that training holds the denoiser without the VAE and the text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoModel
from torch import nn

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.hub import Source, source_of
from mitune.denoiser.opening.layout import check_files, read_index
from mitune.denoiser.opening.loading import opening
from mitune.denoiser.opening.models import open_pipeline, open_single_denoiser, parts_of
from mitune.denoiser.opening.schedulers import scheduler_for
from mitune.denoiser.pipeline import Pipeline, Scheduler


@dataclass(frozen=True, slots=True)
class Components:
    """The list of parts of a diffusers folder, model_index.json. A part is read when it is asked for."""

    config: ModelConfig
    source: Source
    index: Mapping[str, Any]

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Reads the list alone. Raises ModelError if there is no such model, or if mitune has no use for its kind."""
        source = source_of(parts_of(config), config.revision)
        return cls(config, source, read_index(source))

    @property
    def pipeline_class(self) -> type[Any]:
        """The class of the whole; most have `save_lora_weights` and `load_lora_weights` for adapters."""
        kind: type[Any] = getattr(diffusers, self.index["_class_name"])
        return kind

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
        config, source, name = self.config, self.source, self.denoiser_name
        if config.is_single_file:
            network = open_single_denoiser(config, source, self.index, name)
        else:
            check_files(source, self.index, config.variant, set(self.index) - {name})
            with opening(config):
                network = AutoModel.from_pretrained(
                    source.place,
                    subfolder=name,
                    variant=config.variant,
                    dtype=getattr(torch, config.dtype),
                    use_safetensors=True,
                    **source.arguments,
                )
        module: nn.Module = network
        return module

    def scheduler(self) -> Scheduler:
        """The scheduler that the pipeline is used with."""
        _, name = self.index["scheduler"]
        with opening(self.config):
            shipped = getattr(diffusers, name).from_pretrained(
                self.source.place, subfolder="scheduler", **self.source.arguments
            )
        return scheduler_for(self.config, shipped)

    def text_pipeline(self) -> Pipeline:
        """The pipeline with its tokenizers and text encoders only, on the CPU: enough for `encode_prompt`."""
        kept = ("text_encoder", "tokenizer", "scheduler")
        without = [name for name, part in self.index.items() if isinstance(part, list) and not name.startswith(kept)]
        return open_pipeline(self.config, self.source, self.index, without)


def _is_present(part: Any) -> bool:
    return isinstance(part, list) and part[0] is not None  # the list's entry is [library, class], or nulls
