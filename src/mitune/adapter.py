"""LoRA and DoRA adapters of a denoiser and its text encoders: made by PEFT, kept in diffusers' own file."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin, SD3LoraLoaderMixin
from diffusers.training_utils import cast_training_params
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mitune.config import EMBEDDED, FinetuneConfig, ModelConfig
from mitune.denoiser import denoiser_of
from mitune.errors import MituneError, ModelError
from mitune.models import load_model
from mitune.store import write_bytes, writing

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # the name that pipe.load_lora_weights looks for
CARD_FILE = "README.md"
PEFT_CONFIG = "adapter_config.json"  # where this is, PeftModel.from_pretrained(pipe.transformer, folder) reads it
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


def save_adapter(folder: Path, pipeline_class: type[Any], modules: Mapping[str, nn.Module]) -> None:
    """Writes the adapters of `modules`, by component name, into one file for `pipe.load_lora_weights(folder)`.

    Rank, α and kind go into the file's header: without it, α would be read as the rank. For a pipeline without that
    method, the folder is also one that PEFT reads: `PeftModel.from_pretrained(pipe.transformer, folder)`.
    """
    arguments: dict[str, Any] = {}
    for component, module in modules.items():
        arguments[f"{component}_lora_layers"] = _weights(component, module)
        arguments[f"{component}_lora_adapter_metadata"] = _header(module)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".") as unfinished:
        writer = pipeline_class if hasattr(pipeline_class, "save_lora_weights") else SD3LoraLoaderMixin
        writer.save_lora_weights(unfinished, weight_name=WEIGHTS_FILE, **arguments)
        if writer is not pipeline_class:
            _save_for_peft(Path(unfinished), *modules.values())
        for file in Path(unfinished).iterdir():
            file.replace(folder / file.name)


def _save_for_peft(folder: Path, denoiser: Any) -> None:
    denoiser.peft_config["default"].save_pretrained(str(folder))
    weights = {f"base_model.model.{key}": value for key, value in _weights("transformer", denoiser).items()}
    save_file(weights, folder / "adapter_model.safetensors")


def load_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Fills the adapters of `modules` with those of an earlier fine-tuning, to go on from there.

    Raises MituneError if the file is missing or damaged, or of another model, kind, rank or α.
    """
    file = folder / WEIGHTS_FILE
    try:
        found = load_file(file)
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["lora_adapter_metadata"])
    except (OSError, SafetensorError, KeyError) as error:
        raise MituneError(f"Cannot read the adapter {file}; name a folder that `mitune train` has written.") from error
    own = {component: _weights(component, module) for component, module in modules.items()}
    shapes = {f"{component}.{key}": tensor.shape for component, part in own.items() for key, tensor in part.items()}
    settings = {
        f"{component}.{key}": value for component, module in modules.items() for key, value in _header(module).items()
    }
    if header != settings or {key: tensor.shape for key, tensor in found.items()} != shapes:
        raise MituneError(
            f"The adapter in {folder} is of another model, kind, rank or alpha than the one to be trained; set "
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


def _header(module: Any) -> dict[str, Any]:
    lora = module.peft_config["default"]
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "use_dora": lora.use_dora,
        "target_modules": sorted(lora.target_modules),
    }


def export_fused(model: ModelConfig, adapter: Path, output: Path) -> Path:
    """Writes the whole model, in its dtype, with the adapter merged into its weights: a diffusers folder.

    It makes the adapter's images, within rounding, without PEFT. Returns `output`; raises MituneError if that exists.
    """
    if output.exists():
        raise MituneError(f"{output} exists already; choose another folder for the fused model.")
    if (adapter / PEFT_CONFIG).exists():
        pipe: Any = load_model(replace(model, device="cpu")).pipe
        PeftModel.from_pretrained(denoiser_of(pipe), str(adapter)).merge_and_unload(safe_merge=True)
    else:
        pipe = load_model(replace(model, device="cpu"), adapter=adapter).pipe
        with safe_open(adapter / WEIGHTS_FILE, framework="pt") as opened:
            adapted = sorted({key.split(".")[0] for key in opened.keys()})  # noqa: SIM118  (no iterator)
        pipe.fuse_lora(components=adapted, safe_fusing=True)
        pipe.unload_lora_weights()
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as unfinished:
        whole = Path(unfinished) / output.name
        pipe.save_pretrained(whole)
        whole.replace(output)
    return output


def write_card(
    folder: Path, model: ModelConfig, config: FinetuneConfig, *, prompts: Sequence[str], selection: str, skipped: int
) -> None:
    """Writes the model card: what the adapter was made from and how, and how to load it.

    prompts: one for each image of the set; selection: how its images were chosen.
    """
    embedded = model.name in EMBEDDED
    base = f"model_folder({model.name!r})" if embedded else repr(model.name)
    imports = "from mitune.models import model_folder\n" if embedded else ""
    load = f"pipe.load_lora_weights({str(folder)!r}, weight_name={WEIGHTS_FILE!r})"
    if (folder / PEFT_CONFIG).exists():
        imports += "from peft import PeftModel\n"
        load = f"pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {str(folder)!r})"
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(config).items())
    card = f"""---
base_model: {json.dumps(model.name)}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{config.adapter}, lora, mitune]
---

# A {"DoRA" if config.adapter == "dora" else "LoRA"} adapter for {model.name}

Fine-tuned with mitune on {len(prompts)} of the model's own images, for {len(set(prompts))} prompts.
Images were chosen by: {selection}. Iterations skipped, as the loss was not finite: {skipped} of {config.iterations}.

```python
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained({base})
{load}
```

| setting | value |
|---|---|
{settings}
"""
    write_bytes(folder / CARD_FILE, card.encode())
