"""Reads a fine-tuning set: what the denoiser needs of its images, without VAE and text encoders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mitune.errors import MituneError

_NULL = "null."  # before the names of the unconditional embeddings, which training does not need


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """N images as the denoiser needs them, on the CPU."""

    prompts: list[str]
    selection: str  # how the images were chosen, for the model card
    latents: Tensor  # (N, C, H, W), in the denoiser's space, float32
    conditioning: dict[str, Tensor]  # (N, ...) each: the denoiser's arguments; nested ones have dots in their names
    weights: Tensor  # (N,) of the images in the loss, with mean one
    checksum: str

    @classmethod
    def read(cls, folder: Path) -> TrainingSet:
        """Reads metadata.jsonl, latents.safetensors and conditioning.safetensors.

        Raises MituneError if one is missing, damaged, or does not fit the others, or if a latent is not finite.
        """
        files = [folder / name for name in ("metadata.jsonl", "latents.safetensors", "conditioning.safetensors")]
        for file in files:
            if not file.is_file():
                raise MituneError(f"{file} is missing; name a set that `mitune pool` has written.")
        try:
            rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
            prompts = [str(row["prompt"]) for row in rows]
            weights = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
            latents = load_file(files[1])["latents"].float()
            conditioning = {k: v for k, v in load_file(files[2]).items() if not k.startswith(_NULL)}
            checksum = hashlib.sha256()
            for file in files:
                with file.open("rb") as opened:
                    checksum.update(hashlib.file_digest(opened, "sha256").digest())
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MituneError(f"{folder} holds a damaged fine-tuning set ({error!r}); make it again.") from error
        counts = {"latents": len(latents)} | {name: len(tensor) for name, tensor in conditioning.items()}
        for name, count in counts.items():
            if not 0 < count == len(rows):
                raise MituneError(f"{folder} has {len(rows)} rows of metadata but {count} of {name}; make it again.")
        bad = torch.nonzero(~torch.isfinite(latents).flatten(1).all(dim=1)).flatten().tolist()
        if bad:
            raise MituneError(f"{folder}: the latents of row {bad[0] + 1} are not finite; leave that image out.")
        if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise MituneError(f"{files[0]}: every weight must be finite and not negative, and one above 0.")
        selection = ", ".join(sorted({str(row.get("selection", "not recorded")) for row in rows}))
        return cls(prompts, selection, latents, conditioning, weights / weights.mean(), checksum.hexdigest())
