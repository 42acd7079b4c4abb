"""Tiny fine-tuning sets, made by tiny pipelines, and the images that these make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mitune.denoiser.probe import MIProbe
from tests.tiny import BUILDERS, CALLS, PROMPTS


def images_of(pipe: Any, kind: str, prompts: list[str] = PROMPTS) -> torch.Tensor:
    """(B, 3, 16, 16) images in [0, 1], three steps with guidance."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": generator, "output_type": "pt"}
    return pipe(prompts, **call, **CALLS[kind]).images


def write_set(
    kind: str, folder: Path, *, weights: list[float] | None = None, advantages: list[float] | None = None
) -> Path:
    """Writes a set of six images by a tiny pipeline, with two prompts in turn."""
    pipe = BUILDERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    prompts = PROMPTS * 3
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(2)}
    with MIProbe(pipe) as probe:
        latents = pipe(prompts, **call, output_type="latent", **CALLS[kind]).images
    folder.mkdir(parents=True)
    save_file({"latents": latents.contiguous()}, folder / "latents.safetensors")
    passes = probe.passes.to_tensors()
    save_file({name: value.contiguous() for name, value in passes.items()}, folder / "conditioning.safetensors")
    rows: list[dict[str, Any]] = [{"file_name": f"{i}.png", "prompt": prompt} for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        row |= {"selection": "mi-tune"} | ({"weight": weights[i]} if weights else {})
        row |= {"advantage": advantages[i]} if advantages else {}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
