"""Reads adapter files: mitune's own, and those of other programs that diffusers knows. Never a pickle."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mitune.denoiser.network import denoiser_of
from mitune.denoiser.pipeline import Pipeline
from mitune.errors import ModelError, first_line
from mitune.run.sealed import unpack

log = logging.getLogger(__name__)

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # the name that pipe.load_lora_weights looks for
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"  # where this is, PeftModel.from_pretrained(pipe.transformer, folder) reads it
# The two factors of a layer's change, B A, as programs name them.
_FACTORS = (
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)


def weights_file(adapter: Path) -> Path:
    """The safetensors file of an adapter, which is named by its folder or by the file itself.

    Raises ModelError if there is none, or more than one that could be meant.
    """
    if adapter.is_file() and adapter.suffix == ".safetensors":
        return adapter
    if adapter.is_file():
        raise ModelError(
            f"{adapter} is no .safetensors file, and others may run code when opened; convert it to .safetensors."
        )
    if not adapter.is_dir():
        raise ModelError(f"There is no adapter folder {adapter}; train one with `mitune train`.")
    if (adapter / WEIGHTS_FILE).is_file():
        return adapter / WEIGHTS_FILE
    files = sorted(file for file in adapter.glob("*.safetensors") if file.is_file())
    if not files:
        raise ModelError(
            f"{adapter} holds no adapter: there is no .safetensors file in it, and mitune opens no other kind, as "
            "that may run code; train one with `mitune train`, or convert what is there."
        )
    if len(files) > 1:
        raise ModelError(f"{adapter} holds {len(files)} .safetensors files; name the one that is meant.")
    return files[0]


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter file, and its notes.

    Raises ModelError if it is damaged, or if its weights are none of LoRA's, lack a half, or are not finite.
    """
    try:
        tensors, notes = unpack(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The adapter {file} is damaged ({_line(error)}); train it again with `mitune train`, or copy it anew."
        ) from error
    reason = _fault(tensors)
    if reason:
        raise ModelError(f"The adapter {file} {reason}; train it again with `mitune train`, or choose another one.")
    return tensors, notes


def _fault(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the weights of an adapter, if anything."""
    if not tensors:
        return "holds no weights"
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            return f"has weights that are not finite ({name})"
        for pair in _FACTORS:
            for part, other in (pair, pair[::-1]):
                if part in name and name.replace(part, other) not in tensors:
                    return f"has {name} without its other factor"
    return None


def adapter_checksum(adapter: Path | None) -> str:
    """Of what an adapter's effect depends on, its weights and PEFT's settings; empty for none.

    Raises ModelError if there is no such adapter.
    """
    if adapter is None:
        return ""
    file = weights_file(adapter)
    settings = file.with_name(PEFT_CONFIG)
    parts = [file, settings] if settings.is_file() else [file]
    try:
        return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    except OSError as error:
        raise ModelError(f"Cannot read the adapter {file} ({error.strerror}); make it readable.") from error


def load_adapter(pipe: Pipeline, adapter: Path) -> None:
    """Loads an adapter, a folder or a .safetensors file, the ordinary way, and fails unless all of it has come in.

    That is `load_lora_weights`, or PEFT's own for pipelines that have no such method (PixArt, HunyuanDiT). Raises
    ModelError for an adapter that is damaged, or of another model.
    """
    file = weights_file(adapter)
    tensors, _ = read_weights(file)
    before = _adapted(pipe)
    try:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        else:
            _load_with_peft(denoiser_of(pipe), file.parent)
    except ModelError:
        raise
    except Exception as error:  # a dozen readers of other programs' layouts, each with errors of its own
        raise ModelError(_misfit(file, pipe, _line(error))) from error
    layers, came_in = _layers(tensors), _adapted(pipe) - before
    if came_in == 0 or (came_in < layers and _is_ours(tensors, pipe)):
        raise ModelError(_misfit(file, pipe, f"of its {layers} layers {came_in} are found"))
    if came_in < layers:
        log.warning("%s: %d of %d layers are none of this model's and have no effect.", file, layers - came_in, layers)


def _misfit(file: Path, pipe: Pipeline, reason: str) -> str:
    return (
        f"The adapter {file} does not fit this model, a {type(pipe).__name__} ({reason}); it was trained for another "
        "one, so name that with --model, or another adapter."
    )


def _load_with_peft(denoiser: Any, folder: Path) -> None:
    file = folder / PEFT_WEIGHTS
    if not (file.is_file() and (folder / PEFT_CONFIG).is_file()):  # else PEFT looks for a pickle, or on the hub
        raise ModelError(f"{folder} lacks {PEFT_WEIGHTS} or {PEFT_CONFIG}, by which PEFT loads it onto this model.")
    read_weights(file)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # else random ones would take their place
        PeftModel.from_pretrained(denoiser, str(folder))  # in place: the pipeline goes on with the same module


def _adapted(pipe: Pipeline) -> int:
    """How many layers of a pipeline have an adapter, each as often as it has one."""
    layers = [layer for part in adapted_parts(pipe).values() for layer in part.modules()]
    return sum(len(layer.lora_A) for layer in layers if isinstance(layer, LoraLayer))


def adapted_parts(pipe: Pipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that have an adapter in them."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        name: part
        for name, part in modules.items()
        if any(isinstance(layer, BaseTunerLayer) for layer in part.modules())
    }


def _layers(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(down)[0] for name in tensors for down, _ in _FACTORS if down in name})


def _is_ours(tensors: Mapping[str, Tensor], pipe: Pipeline) -> bool:
    """Whether the names are diffusers' own, which begin with a component; others' may be split, joined or left out."""
    return all(name.split(".")[0] in pipe.components for name in tensors)


def _line(error: BaseException) -> str:
    """The first line of an error, to stand in a sentence."""
    line = first_line(error)
    return line.rstrip(".:") if len(line) <= 200 else line[:200] + "..."
