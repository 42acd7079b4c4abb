"""An adapter that is to be added to others: its layers, and what its files say of the model that it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from mitune.denoiser.opening.adapter_file import PEFT_CONFIG, read_weights, weights_file
from mitune.errors import MituneError
from mitune.finetuning.adapter import MAGNITUDE, SETTINGS
from mitune.finetuning.card import CARD_FILE
from mitune.finetuning.weight_change import WeightChange
from mitune.run.store import DAMAGED
from mitune.run.store import SETTINGS as CLAIM

_KEY = re.compile(
    rf"(?P<layer>(?:unet|transformer|text_encoder\w*)\..+)\.(?P<part>lora_A|lora_B|{MAGNITUDE})(\.weight)?"
)
_DIMENSIONS = {"lora_A": 2, "lora_B": 2, MAGNITUDE: 1}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The factors of one layer."""

    down: Tensor  # A, (r, in)
    up: Tensor  # B, (out, r)
    scaling: float  # s = α / r
    magnitude: Tensor | None  # m of a DoRA, (out,)

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return len(self.up), self.down.shape[1]

    def change(self, weight: Tensor | None) -> WeightChange:
        """What the layer changes. weight: W of the base model, (out, in), for a DoRA."""
        if self.magnitude is None or weight is None:
            return WeightChange.of_lora(self.down, self.up, self.scaling)
        return WeightChange.of_dora(self.down, self.up, self.scaling, self.magnitude, weight)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Summand:
    """An adapter and its weight in the sum."""

    file: Path
    weight: float
    layers: Mapping[str, Layer]  # by name, with the component: unet.mid_block.attentions.0.…
    targets: Mapping[str, frozenset[str]]  # by component (unet, text_encoder, …): its layers, as PEFT names them
    model: str | None  # the base model's name, as the card has it
    parts: Mapping[str, str]  # SHA-256 of the components' files in the base model, as far as they are recorded

    @classmethod
    def read(cls, adapter: Path, weight: float) -> Summand:
        """Reads a folder, or a .safetensors file. Raises MituneError if it is damaged, or not in diffusers' layout."""
        file = weights_file(adapter)
        tensors, notes = read_weights(file)
        header = _header(file, notes)
        layers = {name: _layer(name, parts, header) for name, parts in _by_layer(file, tensors).items()}
        components = {name.partition(".")[0] for name in layers}
        return cls(
            file=file,
            weight=weight,
            layers=layers,
            targets={component: _targets(component, layers, header) for component in components},
            model=_model_of(file.with_name(CARD_FILE)),
            parts={name: digest for name, digest in _parts_of(file.with_name(CLAIM)).items() if name in components},
        )

    @property
    def rank(self) -> int:
        """The largest of its layers'."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def is_for_peft(self) -> bool:
        """Whether PEFT loads it, as diffusers has no way to do so for this model."""
        return self.file.with_name(PEFT_CONFIG).is_file()


def check_alike(summands: Sequence[Summand]) -> None:
    """Raises MituneError if two of the adapters are not for the same model, as far as their files tell."""
    for one, other in combinations(summands, 2):
        difference = _difference(one, other)
        if difference:
            raise MituneError(
                f"{one.file} and {other.file} are for different models ({difference}); merge adapters of one model."
            )


def _difference(one: Summand, other: Summand) -> str | None:
    for name in sorted(one.layers.keys() & other.layers.keys()):
        shapes = one.layers[name].shape, other.layers[name].shape
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} in one and {shapes[1]} in the other"
    components = one.targets.keys() | other.targets.keys()
    denoisers = {name for name in components if not name.startswith("text_encoder")}
    if len(denoisers) > 1:
        return " and ".join(sorted(denoisers))
    known = one.parts.keys() & other.parts.keys()
    for part in sorted(known):
        if one.parts[part] != other.parts[part]:
            return f"the weights of their {part} differ"
    if not known and one.model and other.model and one.model.split("/")[-1] != other.model.split("/")[-1]:
        return f"{one.model} and {other.model}"
    return None


def _by_layer(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{layer: {lora_A: …, lora_B: …}}, and the magnitude if there is one."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != _DIMENSIONS[match["part"]]:
            raise MituneError(
                f"{file} holds {key}, of shape {tuple(tensor.shape)}, which is none of a LoRA's or DoRA's of linear "
                "layers as diffusers names them; convert the adapter, or merge others."
            )
        layers.setdefault(match["layer"], {})[match["part"]] = tensor
    for name, parts in layers.items():
        if parts.keys() == {MAGNITUDE} or parts["lora_B"].shape[1] != len(parts["lora_A"]):
            raise MituneError(f"The factors of {name} in {file} do not fit each other; train the adapter again.")
    return layers


def _header(file: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    try:
        return dict(json.loads(notes.get(SETTINGS, "{}")))
    except DAMAGED as error:
        raise MituneError(f"What {file} notes of its rank and alpha is damaged; copy the adapter anew.") from error


def _layer(name: str, parts: Mapping[str, Tensor], header: Mapping[str, Any]) -> Layer:
    """Without a header, α is the rank; as diffusers has it."""
    component, _, layer = name.partition(".")
    rank = len(parts["lora_A"])
    alpha = header.get(f"{component}.lora_alpha", rank)
    for pattern, exception in header.get(f"{component}.alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = exception
            break
    root = header.get(f"{component}.use_rslora", False)
    return Layer(parts["lora_A"], parts["lora_B"], alpha / (rank**0.5 if root else rank), parts.get(MAGNITUDE))


def _targets(component: str, layers: Mapping[str, Layer], header: Mapping[str, Any]) -> frozenset[str]:
    listed = header.get(f"{component}.target_modules")
    if isinstance(listed, list):
        return frozenset(listed)
    return frozenset(name.partition(".")[2] for name in layers if name.startswith(f"{component}."))


def _model_of(card: Path) -> str | None:
    """The base model that a card's head names, if there is one."""
    try:
        name = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])["base_model"]
    except (IndexError, yaml.YAMLError, *DAMAGED):
        return None
    return name if isinstance(name, str) else None


def _parts_of(claim: Path) -> dict[str, str]:
    try:
        parts = json.loads(claim.read_text(encoding="utf-8"))["model"]["parts"]
        return {str(name): str(digest) for name, digest in parts.items()}
    except DAMAGED:
        return {}
