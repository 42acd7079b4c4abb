"""Adds up adapters that exist, each with a weight of either sign: no training, and again an ordinary adapter.

    W' = W + Σ w_i (W'_i − W)

Weights that sum to one go between models, as MI-TUNE's λ · color + (1 − λ) · shape (arXiv 2405.20759, Fig. 7); a
negative weight goes away from one, as from what training on a model's own images does whatever was picked (Neon,
arXiv 2510.03597). Of LoRA and DoRA the sum is exact, as `weight_change` shows, and of mixtures of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn

from mitune.config.schema import ModelConfig
from mitune.denoiser.network import components_of
from mitune.denoiser.opening.adapter_file import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_FILE, adapter_checksum
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.identity import model_parts
from mitune.errors import MituneError
from mitune.finetuning.adapter import MAGNITUDE, not_finite, suffix, write_adapter
from mitune.finetuning.card import public_name, write_merged_card
from mitune.finetuning.summand import Summand, check_alike
from mitune.finetuning.weight_change import WeightChange, weighted_sum
from mitune.run.locks import sole_worker
from mitune.run.store import SETTINGS, claim, write_bytes
from mitune.worlds.base import embedded_model


@dataclass(frozen=True, slots=True)
class MergeResult:
    """Where the merged adapter lies, and how near it comes to the sum."""

    adapter: Path
    rank: int
    full_rank: int  # of the exact sum
    kept: float = 1.0  # 1 − ‖error‖² / ‖change of the weights‖², Frobenius norms over all layers
    is_copy: bool = False  # of the only adapter that counts

    def __str__(self) -> str:
        if self.is_copy:
            return "It is a copy of the only one that counts, with its rank and alpha."
        if self.rank == self.full_rank:
            return f"Its rank and alpha are {self.rank}; nothing is approximated."
        return (
            f"Its rank and alpha are {self.rank} instead of {self.full_rank}, which keeps {100 * self.kept:.2f} % of "
            "the squared norm of the change."
        )


def merge_adapters(
    adapters: Sequence[tuple[Path, float]], output: Path, *, rank: int | None = None, model: ModelConfig | None = None
) -> MergeResult:
    """Writes the sum of adapters, given as (folder or file, weight), to the folder `output`, with a model card.

    The ranks add up, and alpha is the rank (a layer that fewer adapters have is filled up with zeros); an adapter of
    weight 0 counts for nothing, and the only other one, with weight 1, is copied. rank: at most this one, by a
    truncated singular value decomposition of each layer's low-rank part, the nearest there is; a DoRA's scale of each
    row stays. model: that of the adapters, whose weights DoRA takes; None: the one that their cards name.
    Raises MituneError for adapters that are damaged, in another layout than diffusers', of other than linear layers, or
    of different models, for weights that are not finite or all 0, and for an `output` that holds something else.
    """
    summands = _read(adapters)
    check_alike(summands)
    name = _model_name(summands, model)
    if rank is not None and rank < 1:
        raise MituneError(f"The rank of the merged adapter, {rank}, must be at least 1; change --rank.")
    _check_output(output)
    summed = [summand for summand in summands if summand.weight != 0]
    parts = {part: digest for summand in summands for part, digest in summand.parts.items()}
    base: Mapping[str, Tensor] = {}
    if not _is_copy(summed, rank) and _dora_components(summed):
        base, parts_of_base = _base_weights(summed, model or _model_of_cards(name))
        parts |= parts_of_base
    checksums = [adapter_checksum(summand.file) for summand in summands]
    merged = [{"adapter": c, "weight": s.weight} for c, s in zip(checksums, summands, strict=True)]
    with sole_worker(output):
        claim(output, {"model": {"parts": parts}, "merged": merged, "rank": rank}, "merged adapter")
        result = _copy(summed[0], output) if _is_copy(summed, rank) else _add_up(summed, base, output, rank)
        rows = [(place, weight, checksum) for (place, weight), checksum in zip(adapters, checksums, strict=True)]
        kind: Literal["lora", "dora"] = "dora" if _dora_components(summed) else "lora"
        write_merged_card(output, name, kind, rows, str(result))
    return result


def _read(adapters: Sequence[tuple[Path, float]]) -> list[Summand]:
    if not adapters:
        raise MituneError("There is no adapter to merge; name at least one.")
    for place, weight in adapters:
        if not math.isfinite(weight):
            raise MituneError(f"The weight of {place}, {weight}, must be finite; change it.")
    if not any(weight for _, weight in adapters):
        raise MituneError("Every weight is 0, so that the sum would change nothing; give an adapter another one.")
    return [Summand.read(place, weight) for place, weight in adapters]


def _model_name(summands: Sequence[Summand], model: ModelConfig | None) -> str:
    """For the card."""
    name = next((summand.model for summand in summands if summand.model), None)
    if name is None and model is None:
        raise MituneError("None of these adapters has a card that names its model; name it with --model.")
    return name or public_name(model.name if model else "")


def _model_of_cards(name: str) -> ModelConfig:
    if "/" not in name and embedded_model(name) is None:  # of a folder or file, the place is not recorded
        raise MituneError(
            f"The sum of DoRA adapters depends on the weights of their model, {name}; name its place with --model."
        )
    return ModelConfig(name=name)


def _check_output(output: Path) -> None:
    is_ours = (output / SETTINGS).exists()
    if output.is_dir() and not is_ours and any(not path.name.startswith(".") for path in output.iterdir()):
        raise MituneError(f"{output} is not empty and holds no merged adapter; choose another folder.")


def _dora_components(summands: Sequence[Summand]) -> set[str]:
    """The components of which an adapter is a DoRA: there, the sum is one."""
    return {
        name.partition(".")[0]
        for summand in summands
        for name, layer in summand.layers.items()
        if layer.magnitude is not None
    }


def _base_weights(summands: Sequence[Summand], model: ModelConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The base model's weights, (out, in), of the layers whose sum is a DoRA, and the SHA-256 of the parts that these
    are of. Raises MituneError if they are of another model than the adapters."""
    components, needed = Components.of(model), _dora_components(summands)
    modules: dict[str, nn.Module] = {}
    if components.denoiser_name in needed:
        modules[components.denoiser_name] = components.denoiser()
    if texts := needed.intersection(components.text_encoder_names):
        parts = components_of(components.text_pipeline())
        modules |= {name: parts[name] for name in texts}
    weights = {
        f"{component}.{name}": layer.weight.detach()
        for component, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    digests = {name: digest for name, digest in model_parts(model).items() if name in modules}
    base: dict[str, Tensor] = {}
    for summand in summands:
        same = all(summand.parts.get(name, digest) == digest for name, digest in digests.items())
        for name, layer in summand.layers.items():
            if name.partition(".")[0] not in needed:
                continue
            if not same or name not in weights or weights[name].shape != layer.shape:
                raise MituneError(
                    f"{summand.file} is not for {model.name}, with whose weights it would be merged; name its own "
                    "model with --model."
                )
            base[name] = weights[name]
    return base, digests


def _is_copy(summands: Sequence[Summand], rank: int | None) -> bool:
    return len(summands) == 1 and summands[0].weight == 1 and (rank is None or rank >= summands[0].rank)


def _copy(summand: Summand, output: Path) -> MergeResult:
    write_bytes(output / WEIGHTS_FILE, summand.file.read_bytes())
    for name in (PEFT_CONFIG, PEFT_WEIGHTS) if summand.is_for_peft else ():
        write_bytes(output / name, summand.file.with_name(name).read_bytes())
    return MergeResult(output, summand.rank, summand.rank, is_copy=True)


def _add_up(summands: Sequence[Summand], base: Mapping[str, Tensor], output: Path, most: int | None) -> MergeResult:
    """Writes the sum. base: W of the layers where it is to be a DoRA."""
    layers = sorted({name for summand in summands for name in summand.layers})
    ranks = {name: sum(s.layers[name].rank for s in summands if name in s.layers) for name in layers}
    full_rank = max(ranks.values())
    rank = min(most or full_rank, full_rank)
    weights: dict[str, Tensor] = {}
    error = norm = 0.0
    for name in layers:
        weight = base.get(name)
        change = weighted_sum([(s.weight, s.layers[name].change(weight)) for s in summands if name in s.layers])
        if rank < full_rank:
            norm += change.squared_norm(weight)
        change, lost = change.truncated(rank)
        error += lost
        weights |= _tensors(name, change.padded(rank), weight)
    bad = not_finite(weights)
    if bad is not None:
        raise MituneError(f"The sum has weights that are not finite ({bad}); give the adapters smaller weights.")
    write_adapter(output, weights, _configs(summands, rank), for_peft=any(s.is_for_peft for s in summands))
    return MergeResult(output, rank, full_rank, 1 - error / norm if norm else 1.0)


def _tensors(name: str, change: WeightChange, weight: Tensor | None) -> dict[str, Tensor]:
    """A layer's factors under their names in the file, with s = 1."""
    factors = {"lora_A.weight": change.down, "lora_B.weight": change.up}
    if weight is not None:
        dora = change.dora_factors(weight)
        if dora is None:
            raise MituneError(f"The sum takes a row of {name} to 0, which no DoRA can; change the adapters' weights.")
        down, up, magnitude = dora
        key = MAGNITUDE + suffix(name.partition(".")[0], MAGNITUDE)
        factors = {"lora_A.weight": down, "lora_B.weight": up, key: magnitude}
    return {f"{name}.{key}": tensor.to(torch.float32) for key, tensor in factors.items()}


def _configs(summands: Sequence[Summand], rank: int) -> dict[str, LoraConfig]:
    doras = _dora_components(summands)
    components = sorted({component for summand in summands for component in summand.targets})
    return {
        component: LoraConfig(
            r=rank,
            lora_alpha=rank,
            use_dora=component in doras,
            target_modules=sorted({target for s in summands for target in s.targets.get(component, ())}),
        )
        for component in components
    }
