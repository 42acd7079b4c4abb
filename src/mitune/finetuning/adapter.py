"""LoRA and DoRA adapters of a denoiser and its text encoders: made by PEFT, kept in diffusers' own file."""

from __future__ import annotations

import errno
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.adapter_file import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    WEIGHTS_FILE,
    adapted_parts,
    read_weights,
    weights_file,
)
from mitune.denoiser.opening.models import load_model
from mitune.errors import MituneError, ModelError
from mitune.run.sealed import pack
from mitune.run.store import unfinished_folder, write_bytes, write_json, writing
from mitune.worlds.base import embedded_model

CARD_FILE = "README.md"
REMEDY = "Lower finetune.learning_rate, or set model.dtype to bfloat16 or float32, or finetune.precision to bf16 or no."
_SETTINGS = "lora_adapter_metadata"  # where diffusers looks for rank and α in a file's notes
_BLOCK = re.compile(r"(?:^|_)(?:attn|attention|ffn?|feed_forward|mlp)\d*(?:$|_)")
_MAGNITUDE = "lora_magnitude_vector"  # DoRA's m: one number for each row of a weight matrix


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
    bad = next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise MituneError(f"The adapter is not written: its weights are not finite ({bad}). {REMEDY}")
    if not hasattr(pipeline_class, "save_lora_weights"):
        _save_for_peft(folder, *modules.values())
    header = json.dumps(_settings_of(modules), indent=2, sort_keys=True)
    write_bytes(folder / WEIGHTS_FILE, pack(weights, {"format": "pt", _SETTINGS: header, **notes}))


def _save_for_peft(folder: Path, denoiser: Any) -> None:
    settings = denoiser.peft_config["default"].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(settings.items())}
    weights = {f"base_model.model.{key}": value for key, value in _weights("transformer", denoiser).items()}
    write_json(folder / PEFT_CONFIG, plain)
    write_bytes(folder / PEFT_WEIGHTS, pack(weights, {"format": "pt"}))


def load_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Fills the adapters of `modules` with those of an earlier fine-tuning, to go on from there.

    Raises MituneError if the file is missing or damaged, or of another model, kind, rank or α.
    """
    file = weights_file(folder)
    found, notes = read_weights(file)
    own = {component: _weights(component, module) for component, module in modules.items()}
    shapes = {f"{component}.{key}": tensor.shape for component, part in own.items() for key, tensor in part.items()}
    if _SETTINGS not in notes:
        raise MituneError(
            f"The adapter {file} says nothing of its rank and alpha, so its training cannot go on; name one that "
            "`mitune train` has written."
        )
    if json.loads(notes[_SETTINGS]) != _settings_of(modules) or {k: v.shape for k, v in found.items()} != shapes:
        raise MituneError(
            f"The adapter {file} is of another model, kind, rank or alpha than the one to be trained; set "
            "finetune.adapter, rank, alpha and text_encoder as they were for it."
        )
    for component, module in modules.items():
        weights = {key: found[f"{component}.{key}"] for key in own[component]}
        set_peft_model_state_dict(module, {key.removesuffix(_suffix(component, key)): weights[key] for key in weights})


def _weights(component: str, module: nn.Module) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = get_peft_model_state_dict(module)
    return {key + _suffix(component, key): tensor.detach().cpu().contiguous() for key, tensor in weights.items()}


def _suffix(component: str, key: str) -> str:
    # transformers, which loads the text encoders' part, drops a magnitude whose name does not end in .weight; PEFT,
    # which loads the denoiser's, knows it by the bare name alone.
    return ".weight" if component.startswith("text_encoder") and _MAGNITUDE in key else ""


def _settings_of(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Rank, α and kind of each adapter, as diffusers keeps them in a file's header."""
    settings: dict[str, Any] = {}
    for component, module in modules.items():
        lora = module.peft_config["default"]
        settings |= {
            f"{component}.r": lora.r,
            f"{component}.lora_alpha": lora.lora_alpha,
            f"{component}.use_dora": lora.use_dora,
            f"{component}.target_modules": sorted(lora.target_modules),
        }
    return settings


def check_new(output: Path) -> None:
    """Raises MituneError if there is something where a fused model is to be written."""
    if output.exists():
        raise MituneError(f"{output} exists already; choose another folder for the fused model.")


def export_fused(model: ModelConfig, adapter: Path, output: Path) -> Path:
    """Writes the whole model, in its dtype, with the adapter merged into its weights: a diffusers folder.

    It makes the adapter's images, within rounding, without PEFT. Returns `output`; raises MituneError if that exists,
    or if the adapter is damaged or of another model.
    """
    check_new(output)
    pipe: Any = load_model(replace(model, device="cpu", offload="none", compile=False), adapter=adapter).pipe
    if hasattr(pipe, "fuse_lora"):
        pipe.fuse_lora(components=list(adapted_parts(pipe)), safe_fusing=True)
        pipe.unload_lora_weights()
    else:
        denoiser = denoiser_of(pipe)
        for layer in [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]:
            layer.merge(safe_merge=True)
        recurse_remove_peft_layers(denoiser)
    with unfinished_folder(output) as whole, writing(output):
        try:
            pipe.save_pretrained(whole)
        except SafetensorError as error:  # its way to say that the system refused to write
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        whole.replace(output)
    return output


def write_card(
    folder: Path, model: ModelConfig, config: FinetuneConfig, *, prompts: Sequence[str], selection: str, skipped: int
) -> None:
    """Writes the model card: what the adapter was made from and how, and how to load it.

    prompts: one for each image of the set; selection: how its images were chosen. The card may be published, so it
    names no folder of this machine.
    """
    embedded, name = embedded_model(model.name) is not None, public_name(model.name)
    base = f"model_folder({name!r})" if embedded else repr(name)
    imports = "from mitune.denoiser.opening.models import model_folder\n" if embedded else ""
    load = f'pipe.load_lora_weights(".", weight_name={WEIGHTS_FILE!r})'
    if (folder / PEFT_CONFIG).exists():
        imports += "from peft import PeftModel\n"
        load = 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".")'
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(config).items())
    card = f"""---
base_model: {json.dumps(name)}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{config.adapter}, lora, mitune]
---

# A {"DoRA" if config.adapter == "dora" else "LoRA"} adapter for {name}

Fine-tuned with mitune on {len(prompts)} of the model's own images, for {len(set(prompts))} prompts.
Images were chosen by: {selection}. Iterations skipped, as the loss was not finite: {skipped} of {config.iterations}.

```python
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained({base})
{load}  # "." is the folder of this card
```

| setting | value |
|---|---|
{settings}
"""
    write_bytes(folder / CARD_FILE, card.encode())


def public_name(model: str) -> str:
    """A model's hub id or embedded name; of a folder or file on this machine, its last part alone."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.exists() else model
