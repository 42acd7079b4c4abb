"""What a result depends on: the settings that change it, and the contents of the model's files. Nothing else.

Every folder of results (pool, adapter, verdict, study) is tied to this identity (`store.claim`): going on with another
device, another micro-batch or the same model in another place is the same work; other weights under the same name are
not. Contents are known by SHA-256, part by part of the pipeline; files in the hub's cache carry theirs as a name, so
only local folders are read, once a process (some seconds for 10 GB).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from torch import nn

from mitune.config.schema import EvalConfig, FinetuneConfig, ModelConfig, PoolConfig
from mitune.denoiser.opening.adapter_file import adapter_checksum
from mitune.denoiser.opening.hub import INDEX
from mitune.denoiser.opening.models import Model, call_arguments, parts_of
from mitune.errors import ModelError
from mitune.resolver import is_location

# Settings that change no result beyond rounding, or only add to it. All others do.
INDIFFERENT: Mapping[type[Any], frozenset[str]] = {
    ModelConfig: frozenset({"device", "offload", "compile"}),
    PoolConfig: frozenset({"batch_size"}),
    FinetuneConfig: frozenset({"micro_batch_size", "checkpoint_every"}),
    EvalConfig: frozenset({"batch_size", "guidance_scales"}),
}
_STUDIES = frozenset({"batch_size"})  # of the benchmarks' own settings
_PLACES = ("name", "base", "revision", "variant")  # where a model's files are; what is in them counts instead
_CALL = ("guidance_scale", "steps", "call")  # count as the call's arguments, the model's own defaults included
_CONFIGURATION = (".json", ".txt", ".model")  # of a part: its settings, or a tokenizer's vocabulary
_digests: dict[tuple[str, int, int, int, int], str] = {}


def settings_that_matter(config: Any) -> dict[str, Any]:
    """The settings of a section (a dataclass of `config`, or of a study) that its results depend on.

    Of a file, what is in it counts.
    """
    indifferent = INDIFFERENT.get(type(config), _STUDIES)
    settings = {name: value for name, value in asdict(config).items() if name not in indifferent}
    if isinstance(config, PoolConfig) and config.negatives is not None and not is_location(config.negatives):
        settings["negatives"] = digest(Path(config.negatives))
    return settings


def model_identity(config: ModelConfig, adapter: Path | None = None) -> dict[str, Any]:
    """What images of a model depend on beside their prompts and seeds, as plain data.

    {"parts": {name: SHA-256}, "adapter": its checksum or "", "call": arguments of the pipeline's call, and the other
    settings that matter}. A model of the hub must have been opened before. Raises ModelError where it has not.
    """
    settings = settings_that_matter(config)
    kind = getattr(diffusers, str(_index(config)["_class_name"]), DiffusionPipeline)
    return {
        "parts": model_parts(config),
        "adapter": adapter_checksum(adapter),
        "call": call_arguments(config, kind),
        **{name: value for name, value in settings.items() if name not in (*_PLACES, *_CALL)},
    }


def model_parts(config: ModelConfig) -> dict[str, str]:
    """SHA-256 of the files of each part (unet, vae, scheduler, …) that the pipeline's list names, and of that list.

    Of a single file, that file stands in the denoiser's place.
    """
    folder, index = _folder(config), _index(config)
    present = [name for name, part in index.items() if isinstance(part, list) and part[0] is not None]
    parts = {"pipeline": digest(folder / INDEX)}
    for name in present:
        listed = [f"{file.name} {digest(file)}" for file in _files(folder / name, config.variant)]
        parts[name] = hashlib.sha256("\n".join(listed).encode()).hexdigest()
    if config.is_single_file:
        parts["unet" if "unet" in parts else "transformer"] = digest(Path(config.name))
    return parts


def loaded_identity(model: Model) -> dict[str, Any]:
    """The same of a pipeline that was opened elsewhere, from the weights and settings that it holds."""
    parts = {}
    for name, part in model.pipe.components.items():
        config = getattr(part, "config", {})  # diffusers' is a mapping, transformers' becomes one
        settings = config if isinstance(config, Mapping) else config.to_dict()
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}  # where it was read from
        known = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for key, tensor in part.state_dict().items() if isinstance(part, nn.Module) else ():
            known.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if not tensor.is_meta:  # as parts are that wait on the CPU
                known.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        parts[name] = known.hexdigest()
    return {"parts": parts, "call": model.call}


def _index(config: ModelConfig) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((_folder(config) / INDEX).read_text(encoding="utf-8"))
    return loaded


def _folder(config: ModelConfig) -> Path:
    """The folder that lists the pipeline's parts: a local one, or the hub's snapshot."""
    place = parts_of(config)
    if Path(place).is_dir():
        return Path(place)
    cached = try_to_load_from_cache(place, INDEX, revision=config.revision)
    if not isinstance(cached, str):
        raise ModelError(f"{place} is neither a folder nor in the hub's cache; check the name, or go online once.")
    return Path(cached).parent


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a part that diffusers reads: its settings, and its weights in the variant if it has one."""
    if not folder.is_dir():
        return []
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    of_variant = [file for file in weights if variant and f".{variant}" in file.name]
    plain = [file for file in weights if re.fullmatch(r"[^.]+\.safetensors", file.name)]
    indices = ".safetensors.index"  # lists of shards, which the shards make superfluous
    configuration = [file for file in files if file.suffix in _CONFIGURATION and indices not in file.name]
    return configuration + (of_variant or plain or weights)


def digest(file: Path) -> str:
    """SHA-256 of a file's contents; of a large file in the hub's cache, its name there."""
    source = file.resolve()
    if source.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", source.name):
        return source.name
    stat = source.stat()
    key = (str(source), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if key not in _digests:
        with source.open("rb") as opened:
            _digests[key] = hashlib.file_digest(opened, "sha256").hexdigest()
    return _digests[key]
