"""Tiny pipelines of the real diffusers classes with random weights, built from configurations, offline."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


def tiny_vae() -> AutoencoderKL:
    """(3, 16, 16) pixels to (4, 8, 8) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """StableDiffusionPipeline with a U-Net of some 10,000 weights on (4, 8, 8) latents, DDIM."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3(seed: int = 0, shift: float = 1.0) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline without its T5 encoder on (4, 8, 8) latents; call it with `**SD3_CALL`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusion3Pipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
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


def wake(denoiser: nn.Module) -> nn.Module:
    """Gives random values to the weights that start at zero, which would make a network deaf to the prompt."""
    for name, weight in denoiser.named_parameters():
        if name.endswith("weight") and not weight.any():
            nn.init.normal_(weight, std=0.2)
    return denoiser.eval()


def _text_config(tokenizer: CLIPTokenizer, positions: int = TOKENS) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
