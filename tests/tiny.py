"""Tiny pipelines of the real diffusers classes, and their parts, with random weights, from configurations, offline.

What they share with the embedded models is built by these models' own functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer

from mitune.config.schema import ModelConfig
from mitune.worlds.shapes.training.architecture import sd_scheduler, text_config, third_encoder

TOKENS = 24  # room for words of which each letter is a token
PROMPTS = ["a red ball", "two blue cubes"]
WORDS = ("a", "red", "ball", "two", "blue", "cubes")
SD3_CALL = {"max_sequence_length": 0}  # no third text encoder: without this, 256 rows of zeros


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a token for each of WORDS and one for the rest."""
    letters = sorted(set("".join(WORDS)))
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            parts = ["".join(pair), *parts[2:]]
            if pair not in merges:
                merges.append(pair)
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TOKENS)


def tiny_text_encoder(kind: type[nn.Module], tokenizer: CLIPTokenizer, positions: int = TOKENS) -> nn.Module:
    """A text encoder of a CLIP class, (B, n) tokens to (B, n, 16)."""
    config = text_config(tokenizer, width=16, layers=2, heads=2, mlp=16)
    config.max_position_embeddings = positions
    return kind(config).eval()


def tiny_vae(levels: int = 2, width: int = 8, **options: Any) -> AutoencoderKL:
    """(3, 16, 16) pixels to latents of 4 channels; each level but the first halves the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(width,) * levels,
        latent_channels=4,
        norm_num_groups=width // 2,
        sample_size=16,
        **options,
    ).eval()


def tiny_unet(text_width: int | tuple[int, ...], kind: Any = UNet2DConditionModel, **options: Any) -> Any:
    """Some 10,000 weights on (4, 8, 8) latents."""
    return kind(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    ).eval()


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """StableDiffusionPipeline on (4, 8, 8) latents, DDIM."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=tiny_text_encoder(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(16),
        scheduler=sd_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """StableDiffusionXLPipeline on (4, 8, 8) latents, DDIM."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return StableDiffusionXLPipeline(
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=tiny_text_encoder(CLIPTextModel, tokenizer),
        text_encoder_2=tiny_text_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(32, projection_class_embeddings_input_dim=6 * 4 + 8, **added),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def tiny_sd3(seed: int = 0, shift: float = 1.0) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline without its T5 encoder on (4, 8, 8) latents; call it with `**SD3_CALL`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusion3Pipeline(
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=tiny_text_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    wake(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_with_t5() -> StableDiffusion3Pipeline:
    """`tiny_sd3` with a third text encoder, without which diffusers does not open a saved folder."""
    pipe = tiny_sd3()
    pipe.register_modules(text_encoder_3=third_encoder(32).eval(), tokenizer_3=T5Tokenizer(model_max_length=TOKENS))
    return pipe


def wake(denoiser: nn.Module) -> nn.Module:
    """Gives random values to the weights that start at zero, which would make a network deaf to the prompt."""
    for name, weight in denoiser.named_parameters():
        if name.endswith("weight") and not weight.any():
            nn.init.normal_(weight, std=0.2)
    return denoiser.eval()


BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3_with_t5}
CALLS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {"height": 16, "width": 16},
    "sd3": {"max_sequence_length": 1},
}


def saved_pipeline(kind: str, folder: Path) -> ModelConfig:
    """Saves a tiny pipeline ("sd", "sdxl", "sd3") and returns the settings that open it."""
    BUILDERS[kind]().save_pretrained(folder)
    return ModelConfig(name=str(folder), device="cpu", call=CALLS[kind])
