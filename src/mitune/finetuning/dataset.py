"""Reads a fine-tuning set: what the denoiser needs of its images, without VAE and text encoders."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mitune.denoiser.conditioning import Conditioning
from mitune.errors import MituneError
from mitune.finetuning.rivals import FILE as RIVALS
from mitune.finetuning.rivals import RivalPrompts
from mitune.run.seals import SEAL, faults, read_seal
from mitune.run.store import DAMAGED
from mitune.worlds.base import embedded_model

log = logging.getLogger(__name__)

_REMEDY = "the `mitune pool` or `mitune tune` command that made it makes it again"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingSet:
    """N images as the denoiser needs them, on the CPU."""

    prompts: list[str]
    selection: str  # how the images were chosen, for the model card
    latents: Tensor  # (N, C, H, W), in the denoiser's space, float32
    conditioning: Conditioning  # of the N: the denoiser's arguments for the prompts
    weights: Tensor  # (N,) of the images in the loss, with mean one
    advantages: Tensor  # (N,) of the images over others of their prompt, of either sign; ones where none are given
    is_ranked: bool  # whether advantages are given
    rivals: RivalPrompts | None  # hard negatives of the prompts; None if none are given
    checksum: str
    made_by: Mapping[str, Any] | None  # the model, as `seals` describes it; None if nobody knows

    @classmethod
    def read(cls, folder: Path) -> TrainingSet:
        """Reads metadata.jsonl, latents.safetensors and conditioning.safetensors, and holds them against the seal.

        A row of metadata.jsonl may have a `weight` of its image in the loss, and `rivals` of its prompt, texts whose
        conditioning is in rivals.safetensors; and all may have an `advantage`.
        Raises MituneError if a file is missing, damaged, or does not fit the others, if a tensor is not finite, if a
        weight or an advantage is none, or if all are 0.
        """
        made_by = _sealed_model(folder)
        files = [folder / name for name in ("metadata.jsonl", "latents.safetensors", "conditioning.safetensors")]
        for file in files:
            if not file.is_file():
                raise MituneError(f"{file} is missing; name a set that `mitune pool` has written.")
        try:
            rows = _rows(files[0])
            prompts = [str(row["prompt"]) for row in rows]
            weights, advantages = (
                torch.tensor([float(row.get(name, 1.0)) for row in rows]) for name in ("weight", "advantage")
            )
            latents = load_file(files[1])["latents"].float()
            conditioning = Conditioning.from_tensors(load_file(files[2]))
        except (SafetensorError, *DAMAGED) as error:
            raise MituneError(f"{folder} holds a damaged fine-tuning set ({error!r}); {_REMEDY}.") from error
        rivals = RivalPrompts.read(folder, rows)
        _check_tensors(folder, len(rows), {"latents": latents, **conditioning.rows})
        _check_numbers(files[0], "weight", weights, torch.isfinite(weights) & (weights >= 0), "finite and not negative")
        _check_numbers(files[0], "advantage", advantages, torch.isfinite(advantages), "finite")
        if weights.sum() == 0:
            raise MituneError(f"{files[0]}: every weight is 0, so no image would count; give one a weight above 0.")
        ranked = sum("advantage" in row for row in rows)
        if 0 < ranked < len(rows):
            raise MituneError(f"{files[0]}: {ranked} of {len(rows)} rows have an advantage; give all one, or none.")
        if not advantages.any():
            raise MituneError(
                f"{files[0]}: every advantage is 0, as no prompt has images with unlike scores, so there is nothing to "
                "learn; let `mitune pool` rank more candidates, or by another score."
            )
        return cls(
            prompts=prompts,
            selection=", ".join(sorted({str(row.get("selection", "not recorded")) for row in rows})),
            latents=latents,
            conditioning=conditioning,
            weights=weights / weights.mean(),
            advantages=advantages,
            is_ranked=ranked > 0,
            rivals=rivals,
            checksum=_checksum(files if rivals is None else [*files, folder / RIVALS]),
            made_by=made_by,
        )

    def check_model(self, name: str, denoiser: Mapping[str, str]) -> None:
        """Raises MituneError if another model made the images than the one with this denoiser: {part: SHA-256}."""
        parts = self.made_by["parts"] if self.made_by else {}
        # Without the list of parts it was a pipeline in memory, whose weights have other checksums than files.
        if "pipeline" not in parts:
            log.warning("The set has no %s with its model's files, so nobody knows whether %s made it.", SEAL, name)
        elif any(parts.get(part) != digest for part, digest in denoiser.items()):
            made_by = str((self.made_by or {}).get("name", "another model"))
            other = f"another {made_by}, whose weights differ," if Path(name).name == Path(made_by).name else made_by
            raise MituneError(f"The set was made by {other} and cannot train {name}; name its own model with --model.")


def _rows(metadata: Path) -> list[dict[str, Any]]:
    lines = metadata.read_bytes().split(b"\n")  # no other end of a line: a prompt may have one in it
    return [json.loads(line) for line in lines if line.strip()]


def _checksum(files: Sequence[Path]) -> str:
    checksum = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            checksum.update(hashlib.file_digest(opened, "sha256").digest())
    return checksum.hexdigest()


def _check_tensors(folder: Path, rows: int, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        count = len(tensor) if tensor.ndim else 0
        if not 0 < count == rows:
            raise MituneError(f"{folder} has {rows} rows of metadata but {count} of {name}; {_REMEDY}.")
    for name, tensor in tensors.items():
        bad = torch.nonzero(~torch.isfinite(tensor).reshape(rows, -1).all(dim=1)).flatten().tolist()
        if bad:
            raise MituneError(f"{folder}: the {name} of row {bad[0] + 1} are not finite; leave that image out.")


def _check_numbers(file: Path, name: str, values: Tensor, fit: Tensor, what: str) -> None:
    if not fit.all():
        row = int(torch.nonzero(~fit)[0])
        raise MituneError(f"{file}: the {name} of row {row + 1}, {values[row].item():g}, must be {what}; change it.")


def model_of(folder: Path) -> str | None:
    """The name of the model that made a set, if it can be opened by that; of a folder, the place is not recorded.

    Raises MituneError if the set is damaged.
    """
    made_by = _sealed_model(folder)
    name = str(made_by.get("name")) if made_by else ""
    return name if "/" in name or embedded_model(name) else None


def _sealed_model(folder: Path) -> Mapping[str, Any] | None:
    """What made a set, by its seal. Raises MituneError if a file that the seal names is missing or damaged."""
    if not (folder / SEAL).exists():
        return None
    bad = faults(folder)
    if bad:
        more = f" and {len(bad) - 1} more files" if bad[1:] else ""
        raise MituneError(
            f"{folder / bad[0]}{more} of this fine-tuning set are missing or damaged; {_REMEDY}, or, if you changed it "
            f"yourself, delete its {SEAL}."
        )
    seal = read_seal(folder) or {}
    made_by = seal.get("model")
    return made_by if isinstance(made_by, Mapping) and isinstance(made_by.get("parts"), Mapping) else None
