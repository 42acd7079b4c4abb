"""What a diffusers folder says of itself, model_index.json, and whether the files that it promises are there.

All of it is checked by name before anything is opened: libraries fill what is missing with random weights or an empty
vocabulary, and carry on.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import transformers
from huggingface_hub import hf_hub_download
from torch import nn

from mitune.denoiser.opening.hub import INDEX, Source
from mitune.errors import ModelError

# Weights as diffusers and transformers name them, e.g. model.fp16-00001-of-00002.safetensors
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<last>\w+))?\.safetensors"
)
CONFIGURATIONS = {"config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json"}
AGAIN = "save or download the pipeline again, whole"
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # module: what pip calls it


def read_index(source: Source) -> dict[str, Any]:
    """The list of a pipeline's class and parts. Raises ModelError if there is none, or if mitune cannot use it."""
    if INDEX not in source.files:
        raise ModelError(
            f"{source.label} is a folder without {INDEX}, so no diffusers pipeline; save one there with "
            "pipe.save_pretrained(folder), or name its parent folder."
        )
    file = Path(source.place) / INDEX
    if not file.is_file():
        file = Path(hf_hub_download(source.place, INDEX, **source.arguments))
    index = _read_json(file)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name is None:
        raise ModelError(f"{file} names no pipeline as its _class_name; {AGAIN}.")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ModelError(
            f"{source.label} is a {name}, which diffusers {diffusers.__version__} does not have; if a newer one does, "
            "upgrade it (code that comes with a model is never run)."
        )
    if "prompt" not in inspect.signature(kind.__call__).parameters or not {"unet", "transformer"} & set(index):
        raise ModelError(
            f"{source.label} is a {name}, which takes no prompt or has neither a unet nor a transformer; take a model "
            "of another kind, such as StableDiffusionPipeline or StableDiffusion3Pipeline."
        )
    listed: dict[str, Any] = index
    return listed


def parts_in(index: Mapping[str, Any]) -> Iterator[tuple[str, type[Any]]]:
    """Names and classes of the parts that a pipeline has (some are listed with nulls: SD3 without T5).

    Raises ModelError for a class that is in neither library.
    """
    for name, part in index.items():
        if name.startswith("_") or not isinstance(part, list) or part == [None, None]:
            continue
        library, kind = part
        home = {"diffusers": diffusers, "transformers": transformers}.get(library)
        home = home or getattr(diffusers.pipelines, str(library), None)
        part_class = getattr(home, str(kind), None)
        if part_class is None and not str(kind).endswith("FeatureExtractor"):  # diffusers knows the new names of these
            raise ModelError(
                f"The part {name} is a {kind} of {library}, which is not there; upgrade the library if a newer one has "
                "it (code that comes with a model is never run)."
            )
        if part_class is not None:
            yield name, part_class


def check_files(source: Source, index: Mapping[str, Any], variant: str | None, without: Iterable[str] = ()) -> None:
    """Raises ModelError, naming the part, if weights, a vocabulary or a package to read it are missing."""
    variants: set[str | None] = set()
    for name, kind in parts_in(index):
        if name in without:
            continue
        present = {file.removeprefix(f"{name}/") for file in source.files if file.startswith(f"{name}/")}
        if not present:
            raise ModelError(f"{source.label} lacks its part {name}; {AGAIN}.")
        _check_configuration(source, name, kind, present)
        if issubclass(kind, nn.Module):
            variants |= _check_weights(source.label, name, present, variant)
        elif name.startswith("tokenizer"):
            names = getattr(kind, "vocab_files_names", None) or {}
            _check_vocabulary(source.label, name, present, names.values())
    if variant is not None and variants and variant not in variants:
        others = ", ".join(sorted(str(name) for name in variants if name))
        raise ModelError(
            f"{source.label} has no weights in the variant {variant}; set model.variant to one of those that it has "
            f"({others or 'none'}), or leave it out."
        )


def _check_configuration(source: Source, part: str, kind: type[Any], present: set[str]) -> None:
    needed = {"config.json"} if issubclass(kind, nn.Module) else set()
    needed |= {"scheduler_config.json"} if issubclass(kind, diffusers.SchedulerMixin) else set()
    if missing := needed - present:
        raise ModelError(f"{source.label} lacks {part}/{min(missing)}; {AGAIN}.")
    for file in (Path(source.place) / part / name for name in CONFIGURATIONS & present):
        if file.is_file() and not isinstance(_read_json(file), dict):
            raise ModelError(f"{file} holds no settings of a {kind.__name__}; {AGAIN}.")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is no valid JSON ({error}); {AGAIN}.") from error


def _check_weights(label: str, part: str, present: set[str], variant: str | None) -> set[str | None]:
    """The variants in which the weights of a part are there; None for the plain ones."""
    matches = filter(None, map(_WEIGHTS.fullmatch, present))
    variants = {match["variant"] or match["last"] for match in matches}
    if variants & {None, variant}:
        return variants
    if variants:
        names = sorted(str(name) for name in variants)
        raise ModelError(
            f"{label} has the weights of {part} in the variant {' or '.join(names)} alone; set model.variant, e.g. "
            f"--set model.variant={names[0]}."
        )
    if any(file.endswith((".bin", ".ckpt", ".pt", ".pth", ".msgpack")) for file in present):
        raise ModelError(
            f"{label} has the weights of {part} in an old format alone, which may run code when opened; convert it to "
            ".safetensors, e.g. with pipe.save_pretrained(folder, safe_serialization=True)."
        )
    raise ModelError(f"{label} lacks the weights of {part} (.safetensors); {AGAIN}.")


def _check_vocabulary(label: str, part: str, present: set[str], names: Iterable[str]) -> None:
    """names: of the files that the tokenizer's class reads where there is no tokenizer.json."""
    if "tokenizer.json" in present:
        return
    if not any(file.endswith((".model", ".tiktoken")) for file in present):
        missing = sorted({*names} - {"tokenizer.json"} - present)
        if missing:
            raise ModelError(
                f"{label} lacks {' and '.join(missing)} of its {part}, without which it reads no word; {AGAIN}."
            )
        return
    packages = [package for module, package in SENTENCEPIECE.items() if not _installed(module)]
    if packages and any(file.endswith(".model") for file in present):
        raise ModelError(
            f"{label} keeps its {part} in a file of SentencePiece, which takes packages that are not installed: "
            f"pip install {' '.join(packages)}"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
