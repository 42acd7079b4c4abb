"""A tiny pipeline, with random weights, of every family of models that mitune supports. All offline.

Every pipeline is of the real diffusers class with all its parts: prompts go through tokenizers and text encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mitune.worlds.shapes.training.architecture import BETAS
from tests.tiny import (
    TOKENS,
    WORDS,
    tiny_sd,
    tiny_sd3_with_t5,
    tiny_sdxl,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
    wake,
)

PROMPTS = ["a red ball", "two blue cubes a ball"]  # of different lengths: some pipelines pad, some do not
HIDDEN = 16  # width of the text encoders
# Of the language models.
SIZE = {
    "vocab_size": 16,
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family: its pipeline, and what is known of how that calls its denoiser, from diffusers' source."""

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    separate: bool = False  # two calls a step, the conditional one first
    conditional_first: bool = False
    sign: int = 1
    told: Callable[[float], float] = lambda t: t  # what the denoiser is told at the scheduler's timestep t
    added: float = 0.0  # to the guidance scale
    makes: str = "pictures"
    candidates: int = 3
    rescaled: bool = False  # the guided output gets the norm of the conditional one


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word; those that are not in WORDS are the same."""
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=chat_template,
    )


def t5(name: str = "T5") -> Any:
    config = getattr(transformers, f"{name}Config")
    encoder = getattr(transformers, f"{name}EncoderModel")
    return encoder(config(vocab_size=16, d_model=HIDDEN, d_kv=8, d_ff=8, num_layers=1, num_heads=2)).eval()


def language_model(name: str, **options: Any) -> Any:
    """A decoder of transformers: Gemma2, Glm, Qwen3."""
    config = getattr(transformers, f"{name}Config")(
        **SIZE, num_key_value_heads=1, head_dim=8, pad_token_id=0, **options
    )
    return getattr(transformers, f"{name}Model")(config).eval()


def clip(kind: Any = transformers.CLIPTextModel, positions: int = TOKENS) -> tuple[Any, Any]:
    words = tiny_tokenizer()
    return tiny_text_encoder(kind, words, positions), words


def vae(levels: int = 2, shift: float | None = None) -> AutoencoderKL:
    """Some families' latents are shifted."""
    return tiny_vae(levels, width=4, scaling_factor=0.5, shift_factor=shift)


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | options)


def dynamic() -> FlowMatchEulerDiscreteScheduler:
    """Its shift is made from the size of the picture."""
    return flow(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def build(name: str, transformer: Any, **parts: Any) -> Any:
    pipe = getattr(diffusers, name)(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(0)
        pipe = make()
        # Else the prompt's share of so small a network would be lost in rounding.
        denoiser = wake(getattr(pipe, "transformer", None) or pipe.unet)
        with torch.no_grad():
            torch._foreach_mul_(list(denoiser.parameters()), 1.25)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


SMALL = {"patch_size": 2, "in_channels": 4}
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def pixart(name: str) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, caption_channels=HIDDEN, cross_attention_dim=16, out_channels=8, num_layers=1, **SMALL, **HEADS
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae()}
    return build(name, transformer, scheduler=DPMSolverMultistepScheduler(**BETAS), **parts)


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=HIDDEN,
        sample_size=8,
        **HEADS,
    )
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    ).eval()
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": language_model("Gemma2"), "vae": autoencoder}
    return build("SanaPipeline", transformer, scheduler=scheduler, **parts)


def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=HIDDEN,
        caption_projection_dim=16,
        pos_embed_max_size=64,
        **SMALL,
        **HEADS,
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae()}
    return build("AuraFlowPipeline", transformer, scheduler=flow(), **parts)


def hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=4,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=HIDDEN,
        cross_attention_dim_t5=HIDDEN,
        pooled_projection_dim=4,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
        **SMALL,
        **HEADS,
    )
    bert = transformers.BertConfig(
        vocab_size=16, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return build(
        "HunyuanDiTPipeline",
        transformer,
        vae=vae(4),
        text_encoder=transformers.BertModel(bert).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        scheduler=DDPMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=HIDDEN,
        **SMALL,
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": language_model("Gemma2"), "vae": vae(4, shift=0.1)}
    return build("Lumina2Pipeline", transformer, scheduler=flow(), **parts)


def cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        out_channels=4, text_embed_dim=HIDDEN, time_embed_dim=8, condition_dim=4, num_layers=1, **SMALL, **HEADS
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": language_model("Glm"), "vae": vae()}
    scheduler = flow(shift=1.0, use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256)
    return build("CogView4Pipeline", transformer, scheduler=scheduler, **parts)


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 2, 2),
        **HEADS,
    )
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = SIZE | {"num_key_value_heads": 2, "rope_scaling": rope}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=EYES)
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.0, 0.2],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    ).eval()
    return build(
        "QwenImagePipeline",
        transformer,
        scheduler=dynamic(),
        vae=autoencoder,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer(),
    )


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae(shift=0.1)}
    return build("ChromaPipeline", transformer, scheduler=flow(), **parts)


def flux(guidance_embeds: bool = False) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=guidance_embeds,
        **HEADS,
    )
    text_encoder, words = clip()
    return build(
        "FluxPipeline",
        transformer,
        scheduler=dynamic(),
        vae=vae(shift=0.1),
        text_encoder=text_encoder,
        tokenizer=words,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


CHAT = "{% for message in messages %}a ball {{ message['content'] }} {% endfor %}"


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=HIDDEN,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    parts = {"tokenizer": tokenizer(CHAT), "text_encoder": language_model("Qwen3"), "vae": vae(shift=0.1)}
    return build("ZImagePipeline", transformer, scheduler=flow(), **parts)


def hidream() -> Any:
    """Its pictures are 128 pixels high and wide, whatever it is asked for, so their patches are large."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[HIDDEN, HIDDEN],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128),
        llama_layers=[0, 1],
        **HEADS,
    )
    # The pipeline asks for attentions.
    config = transformers.LlamaConfig(**SIZE, pad_token_id=0, attn_implementation="eager")
    (first, words), (second, _) = (clip(transformers.CLIPTextModelWithProjection, 128) for _ in range(2))
    return build(
        "HiDreamImagePipeline",
        transformer,
        scheduler=flow(),
        vae=vae(1, shift=0.1),
        text_encoder=first,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=words,
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
        text_encoder_4=transformers.LlamaForCausalLM(config).eval(),
        tokenizer_4=tokenizer(),
    )


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=HIDDEN,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return build(
        "WanPipeline",
        transformer,
        scheduler=scheduler,
        vae=autoencoder,
        text_encoder=t5("UMT5"),
        tokenizer=tokenizer(),
        transformer_2=None,
    )


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=HIDDEN,
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    ).eval()
    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": autoencoder}
    return build("LTXPipeline", transformer, scheduler=flow(), **parts)


def audio_ldm2() -> Any:
    """Without the parts that read prompts, which are too large a family of their own; it is given embeddings."""
    unet = tiny_unet((HIDDEN, HIDDEN), diffusers.AudioLDM2UNet2DConditionModel)
    words = transformers.GPT2Config(vocab_size=16, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=16)
    sound = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    pipe = diffusers.AudioLDM2Pipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=t5(),
        projection_model=None,
        language_model=transformers.GPT2LMHeadModel(words).eval(),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False),
        vocoder=transformers.SpeechT5HifiGan(sound).eval(),
    )
    return pipe


def sound_embeddings() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    given = {
        prefix + name: torch.randn(2, 4, HIDDEN, generator=generator) for prefix in ("", "generated_") for name in names
    }
    given["negative_generated_prompt_embeds"] = given.pop("generated_negative_prompt_embeds")
    masks = {name: torch.ones(2, 4, dtype=torch.long) for name in ("attention_mask", "negative_attention_mask")}
    return {"prompt": None, "audio_length_in_s": 64 / 16000} | given | masks


PICTURE = {"height": 16, "width": 16}
TEXT = {"max_sequence_length": TOKENS}
SHORT = {"max_sequence_length": 3}  # as many places in the text as candidates: they must not be mistaken for rows;
# T5 is the only one to read Chroma's prompts, whose longest has six tokens
FREE = {"use_resolution_binning": False}
UNCLEANED = {"clean_caption": False}

# In ASCII, as pytest escapes other letters.
CASES: dict[str, Case] = {
    "SD 1.x, 2.x base (epsilon)": Case(make=seeded(tiny_sd)),
    "SD 2.x (v)": Case(make=seeded(lambda: tiny_sd(prediction_type="v_prediction"))),
    "SDXL": Case(make=seeded(tiny_sdxl), call=PICTURE),
    "SD3, SD3.5": Case(make=seeded(tiny_sd3_with_t5), call=TEXT),
    "PixArt-alpha": Case(make=seeded(lambda: pixart("PixArtAlphaPipeline")), call=PICTURE | FREE | UNCLEANED),
    "PixArt-Sigma": Case(make=seeded(lambda: pixart("PixArtSigmaPipeline")), call=PICTURE | FREE | UNCLEANED),
    "Sana": Case(make=seeded(sana), call={"height": 32, "width": 32, "complex_human_instruction": None} | FREE | TEXT),
    "AuraFlow": Case(make=seeded(aura_flow), call=PICTURE | TEXT, told=lambda t: t / 1000),
    "HunyuanDiT": Case(make=seeded(hunyuan_dit), call={"height": 32, "width": 32} | FREE),
    "Lumina 2": Case(
        make=seeded(lumina2),
        call={"height": 64, "width": 64, "cfg_normalization": False, "system_prompt": ""} | {"max_sequence_length": 16},
        separate=True,
        sign=-1,
        told=lambda t: 1 - t / 1000,
    ),
    "CogView4": Case(make=seeded(cogview4), call=PICTURE, separate=True),
    "Qwen-Image": Case(
        make=seeded(qwen_image),
        call=PICTURE | TEXT,
        guidance="true_cfg_scale",
        separate=True,
        told=lambda t: t / 1000,
        rescaled=True,
    ),
    "Chroma": Case(
        make=seeded(chroma),
        call=PICTURE | {"max_sequence_length": 6},
        separate=True,
        told=lambda t: t / 1000,
        candidates=6,
    ),
    "Z-Image": Case(
        make=seeded(z_image),
        call=PICTURE | {"max_sequence_length": 16},
        conditional_first=True,
        sign=-1,
        told=lambda t: 1 - t / 1000,
        added=1.0,
    ),
    "Flux (true CFG)": Case(
        make=seeded(flux), call=PICTURE | SHORT, guidance="true_cfg_scale", separate=True, told=lambda t: t / 1000
    ),
    "HiDream": Case(make=seeded(hidream), call={"height": 128, "width": 128} | TEXT, sign=-1, candidates=2),
    "Wan 2.1 (video)": Case(
        make=seeded(wan), call={"height": 32, "width": 32, "num_frames": 5} | TEXT, separate=True, makes="films"
    ),
    "LTX-Video (video)": Case(
        make=seeded(ltx), call={"height": 32, "width": 32, "num_frames": 9} | TEXT, makes="films"
    ),
    "AudioLDM2 (sound)": Case(make=seeded(audio_ldm2), call=sound_embeddings(), makes="sound"),
}
