"""The embedded models' architectures, untrained: one VAE, a tokenizer, and two ordinary diffusers pipelines.

The networks' numbers are those of the published weights, and stand here alone. What any small Stable Diffusion has is
public, for those of the tests and of the benchmarks.
"""

from __future__ import annotations

import json
from typing import Any

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
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mitune.worlds.shapes.grammar import vocabulary

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of its noise
MAX_TOKENS = 16  # the longest prompt takes 14
JOINT_WIDTH = 144  # of the two CLIP text encoders of shapes-sd3, side by side: 128 + 16
LATENT_CHANNELS = 8


def new_autoencoder() -> AutoencoderKL:
    """(3, 64, 64) pixels to (8, 8, 8) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        shift_factor=0.0,
        force_upcast=False,
    )


def new_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges turn every word of the grammar into one token."""
    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=10_000,
        min_frequency=0,
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    backend.train_from_iterator([" ".join(vocabulary())], trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def text_config(
    tokenizer: CLIPTokenizer, *, width: int, layers: int, heads: int, mlp: int, projection: int = 8
) -> CLIPTextConfig:
    """Of a CLIP text encoder for this tokenizer; `mlp` is the width within its layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def third_encoder(width: int) -> T5EncoderModel:
    """The T5 that SD3 folders must hold, as small as it may be."""
    return T5EncoderModel(T5Config(vocab_size=200, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))


def sd_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """DDIM with the settings of Stable Diffusion."""
    return DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )


def _silent_t5() -> T5EncoderModel:
    """A third text encoder whose output is zero, so that CLIP carries the prompt alone.

    `MODEL_CALL` shortens it to one token, since a pipeline's own default would feed the denoiser 256 of them.
    """
    encoder = third_encoder(JOINT_WIDTH)
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder


def new_pipeline(
    name: str, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """An untrained `shapes-sd` or `shapes-sd3`, of the ordinary diffusers classes."""
    torch.manual_seed(seed)
    return _new_sd(vae, tokenizer) if name == "shapes-sd" else _new_sd3(vae, tokenizer)


def _new_sd(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, width=128, layers=3, heads=4, mlp=512)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(48, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _new_sd3(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    text_encoder = CLIPTextModelWithProjection(text_config(tokenizer, width=128, layers=3, heads=4, mlp=512))
    text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer, width=16, layers=2, heads=1, mlp=64))
    for encoder in (text_encoder, text_encoder_2):
        # A pooled text vector is a bag of words, a shortcut past binding: here it is zero and stays zero.
        encoder.text_projection.weight.data.zero_().requires_grad_(False)
        encoder.text_projection.requires_grad_(False)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=_silent_t5(),
        tokenizer_3=T5Tokenizer(model_max_length=MAX_TOKENS),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=JOINT_WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=16,
            pos_embed_max_size=4,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
