"""LoRA and DoRA adapters of a denoiser and its text encoders: made by PEFT, kept in diffusers' own file."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.opening.adapter_file import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_FILE, read_weights, weights_file
from mitune.errors import MituneError, ModelError
from mitune.run.sealed import pack
from mitune.run.store import write_bytes, write_json

REMEDY = "Lower finetune.learning_rate, or set model.dtype to bfloat16 or float32, or finetune.precision to bf16 or no."
SETTINGS = "lora_adapter_metadata"  # where diffusers looks for rank and α in a file's notes
_BLOCK = re.compile(r"(?:^|_)(?:attn|attention|ffn?|feed_forward|mlp)\d*(?:$|_)")
MAGNITUDE = "lora_magnitude_vector"  # DoRA's m: one number for each row of a weight matrix


def adapted_layers(module: nn.Module) -> list[str]:
    """Names of the attention and fully connected layers: each nn.Linear inside a block called attn, ff, mlp or alike.

    Those are diffusers' and transformers' names; embeddings, normalization and convolutions stay as they are.
    Source: MI-TUNE, section 4. Raises ModelError if there is no such layer.
    """
    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(map(_BLOCK.search, name.split(".")))
    ]
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no attention or fully connected layers under diffusers' usual names, so "
            "there is nothing to adapt; fine-tune another model."
        )
    return layers


def check_rank(module: nn.Module, rank: int) -> None:
    """Raises MituneError if most of the layers to be adapted are narrower than the rank, which then adds nothing."""
    layers = dict(module.named_modules())
    widths = [min(layers[name].in_features, layers[name].out_features) for name in adapted_layers(module)]
    width = statistics.median_low(widths)
    if rank > width:
        raise MituneError(
            f"finetune.rank = {rank} is above the width of most layers of this {type(module).__name__}, {width}; set "
            f"it to at most {width}."
        )


def add_adapter(module: Any, config: FinetuneConfig) -> None:
    """Freezes a denoiser or text encoder and adds to it a new adapter, in float32, which changes no output yet.

    Its weights are a function of `config.seed` alone, and torch's global generator is left as it was.
    """
    module.requires_grad_(False)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_dora=config.adapter == "dora",
        target_modules=adapted_layers(module),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(module, PeftAdapterMixin) or not isinstance(module, ModelMixin):
            module.add_adapter(lora)
        else:  # families that diffusers has no adapters for (PixArt, HunyuanDiT)
            inject_adapter_in_model(lora, module)
            module.peft_config = {"default": lora}
    cast_training_params(module, dtype=torch.float32)


def trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name; those of the component `unet` begin with `unet.`."""
    return {
        f"{component}.{name}": parameter
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def save_adapter(
    folder: Path,
    pipeline_class: type[Any],
    modules: Mapping[str, nn.Module],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes the adapters of `modules`, by component name, into one file for `pipe.load_lora_weights(folder)`.

    Rank, α and kind go into the file's header, as without them α would be read as the rank, and so do `notes` and a
    checksum; equal adapters make equal files. For a pipeline without that method, the folder is also one that PEFT
    reads: `PeftModel.from_pretrained(pipe.transformer, folder)`. Raises MituneError for weights that are not finite.
    """
    parts = {component: _weights(component, module) for component, module in modules.items()}
    weights = {f"{component}.{key}": tensor for component, part in parts.items() for key, tensor in part.items()}
    bad = not_finite(weights)
    if bad is not None:
        raise MituneError(f"The adapter is not written: its weights are not finite ({bad}). {REMEDY}")
    write_adapter(folder, weights, _configs(modules), notes, for_peft=not hasattr(pipeline_class, "save_lora_weights"))


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None if there is none."""
    return next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)


def write_adapter(
    folder: Path,
    weights: Mapping[str, Tensor],
    configs: Mapping[str, LoraConfig],
    notes: Mapping[str, str] = MappingProxyType({}),
    *,
    for_peft: bool,
) -> None:
    """Writes the file of `save_adapter`, of weights and settings by component name. for_peft: and PEFT's own two."""
    if for_peft:
        _write_for_peft(folder, weights, configs)
    header = json.dumps(_header(configs), indent=2, sort_keys=True)
    write_bytes(folder / WEIGHTS_FILE, pack(weights, {"format": "pt", SETTINGS: header, **notes}))


def _write_for_peft(folder: Path, weights: Mapping[str, Tensor], configs: Mapping[str, LoraConfig]) -> None:
    ((component, config),) = configs.items()  # of the denoiser, which alone has an adapter where diffusers loads none
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.to_dict().items())}
    renamed = {f"base_model.model.{key.removeprefix(f'{component}.')}": value for key, value in weights.items()}
    write_json(folder / PEFT_CONFIG, plain)
    write_bytes(folder / PEFT_WEIGHTS, pack(renamed, {"format": "pt"}))


def load_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Fills the adapters of `modules` with those of an earlier fine-tuning, to go on from there.

    Raises MituneError if the file is missing or damaged, or of another model, kind, rank or α.
    """
    file = weights_file(folder)
    weights, notes = read_weights(file)
    expected = {component: _weights(component, module) for component, module in modules.items()}
    shapes = {
        f"{component}.{key}": tensor.shape for component, part in expected.items() for key, tensor in part.items()
    }
    if SETTINGS not in notes:
        raise MituneError(
            f"The adapter {file} says nothing of its rank and alpha, so its training cannot go on; name one that "
            "`mitune train` has written."
        )
    if json.loads(notes[SETTINGS]) != _header(_configs(modules)) or {k: v.shape for k, v in weights.items()} != shapes:
        raise MituneError(
            f"The adapter {file} is of another model, kind, rank or alpha than the one to be trained; set "
            "finetune.adapter, rank, alpha and text_encoder as they were for it."
        )
    for component, module in modules.items():
        part = {key.removesuffix(suffix(component, key)): weights[f"{component}.{key}"] for key in expected[component]}
        set_peft_model_state_dict(module, part)


def _weights(component: str, module: nn.Module) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = get_peft_model_state_dict(module)
    return {key + suffix(component, key): tensor.detach().cpu().contiguous() for key, tensor in weights.items()}


def suffix(component: str, key: str) -> str:
    """What PEFT's name of a weight lacks in the file."""
    # transformers, which loads the text encoders' part, drops a magnitude whose name does not end in .weight; PEFT,
    # which loads the denoiser's, knows it by the bare name alone.
    return ".weight" if component.startswith("text_encoder") and MAGNITUDE in key else ""


def _configs(modules: Mapping[str, Any]) -> dict[str, LoraConfig]:
    return {component: module.peft_config["default"] for component, module in modules.items()}


def _header(configs: Mapping[str, LoraConfig]) -> dict[str, Any]:
    """Rank, α and kind of each adapter, as diffusers keeps them in a file's notes."""
    header: dict[str, Any] = {}
    for component, lora in configs.items():
        header |= {
            f"{component}.r": lora.r,
            f"{component}.lora_alpha": lora.lora_alpha,
            f"{component}.use_dora": lora.use_dora,
            f"{component}.target_modules": sorted(lora.target_modules),
        }
    return header
