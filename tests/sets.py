"""Tiny fine-tuning sets, made by tiny pipelines that are then saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from mitune.config.schema import ModelConfig
from mitune.denoiser.probe import MIProbe
from tests.tiny import PROMPTS, TOKENS, _text_config, tiny_sd, tiny_sd3, tiny_tokenizer, tiny_vae

CALLS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {"height": 16, "width": 16},
    "sd3": {"max_sequence_length": 1},
}


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """StableDiffusionXLPipeline on (4, 8, 8) latents, DDIM."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
        ).eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def tiny_sd3_with_t5() -> StableDiffusion3Pipeline:
    """`tiny_sd3` with a third text encoder, without which diffusers does not open a saved folder."""
    pipe = tiny_sd3()
    config = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    pipe.register_modules(
        text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=T5Tokenizer(model_max_length=TOKENS)
    )
    return pipe


BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3_with_t5}


def saved_pipeline(kind: str, folder: Path) -> ModelConfig:
    """Saves a tiny pipeline ("sd", "sdxl", "sd3") and returns the settings that open it."""
    BUILDERS[kind]().save_pretrained(folder)
    return ModelConfig(name=str(folder), device="cpu", call=CALLS[kind])


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
