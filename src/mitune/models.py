"""Opens a pipeline by hub id, by folder, or by the name of an embedded model. Reads safetensors and JSON only."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from mitune.config import ModelConfig
from mitune.errors import ModelError

# What each embedded model is called with; other models keep their pipeline's own defaults.
EMBEDDED: Mapping[str, Mapping[str, Any]] = {
    "shapes-sd": {"guidance_scale": 2.0, "num_inference_steps": 12},
    "shapes-sd3": {"guidance_scale": 2.0, "num_inference_steps": 12, "max_sequence_length": 1},
}


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded pipeline and the arguments that every call of it gets."""

    pipe: DiffusionPipeline
    call: dict[str, Any]
    name: str

    @property
    def steps(self) -> int:
        """Denoiser calls for one image."""
        default = inspect.signature(type(self.pipe).__call__).parameters["num_inference_steps"].default
        return int(self.call.get("num_inference_steps", default))


def model_folder(name: str) -> str:
    """Where a model's files are: the packaged folder of an embedded name, else the name itself (hub id or folder)."""
    return str(files("mitune") / "shapes" / "models" / name) if name in EMBEDDED else name


def call_arguments(config: ModelConfig) -> dict[str, Any]:
    """Arguments of the pipeline's call: the embedded model's defaults, overruled by the settings."""
    call = dict(EMBEDDED.get(config.name, {}))
    if config.guidance_scale is not None:
        call["guidance_scale"] = config.guidance_scale
    if config.steps is not None:
        call["num_inference_steps"] = config.steps
    return call | config.call


def device_of(config: ModelConfig) -> torch.device:
    """The device that the settings name, or the GPU if there is one."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(config: ModelConfig, *, adapter: Path | None = None) -> Model:
    """Opens the pipeline, and loads an adapter folder onto it where one is given.

    Raises ModelError, with the remedy, if there is no such model, or if the folder is no diffusers pipeline.
    """
    folder = model_folder(config.name)
    local = Path(folder)
    if local.is_dir() and not (local / "model_index.json").is_file():
        raise ModelError(
            f"{config.name} is a folder without model_index.json, so no diffusers pipeline; save one there with "
            "pipe.save_pretrained(folder), or name its parent folder."
        )
    with opening(config):
        index = DiffusionPipeline.load_config(folder, revision=config.revision)
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            revision=config.revision,
            variant=config.variant,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            **{name: None for name, part in index.items() if part == [None, None]},  # SD3 without T5 says so, too
        )
    if adapter is not None:
        load_adapter(pipe, adapter)
    pipe.set_progress_bar_config(disable=True)
    return Model(pipe.to(device_of(config)), call_arguments(config), config.name)


@contextmanager
def opening(config: ModelConfig) -> Iterator[None]:
    """Turns what diffusers and the hub raise for a model that cannot be read into one ModelError."""
    diffusers.utils.logging.disable_progress_bar()  # loading is quick, and mitune shows bars of its own
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"Cannot open the model {config.name!r} ({reason}); give a hub id, a folder made by pipe.save_pretrained, "
            f"or an embedded model ({', '.join(EMBEDDED)})."
        ) from error


def load_adapter(pipe: DiffusionPipeline, adapter: Path) -> None:
    """Loads an adapter folder the ordinary way, and fails if it left no trace."""
    if not adapter.is_dir():
        raise ModelError(f"There is no adapter folder {adapter}; train one with `mitune train`.")
    pipe.load_lora_weights(str(adapter))
    if not pipe.get_active_adapters():
        raise ModelError(f"{adapter} holds no weights that fit this model; it was trained for another one.")


def adapter_checksum(adapter: Path | None) -> str:
    """Of an adapter's weights; empty for none."""
    if adapter is None:
        return ""
    weights = sorted(adapter.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
