"""How fast are the papers' architectures?  Pool and training of SD-2.1-base, SDXL and SD-3.5-Medium on a GPU.

    python benchmarks/full_size.py          # --tiny runs the same code on small networks, also on a CPU

Denoisers and VAEs have the published sizes and random weights, in bfloat16; text encoders have the published widths and
one layer, as a prompt is encoded once. `build_pool` and `finetune` do the work, on a folder written here. FLOPs are
torch's count for the denoiser alone, the peak is that of a large matrix product, measured at the start.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from published import SD21_BASE, SD35_MEDIUM, SDXL_BASE
from timing import DEVICE, now, print_table, seconds
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer

from mitune.config.schema import FinetuneConfig, ModelConfig, PoolConfig
from mitune.denoiser.network import denoiser_of, rows_counted
from mitune.denoiser.opening.models import load_model, model_folder
from mitune.finetuning.adapter import add_adapter
from mitune.finetuning.run import finetune
from mitune.pool.build import build_pool
from mitune.worlds.shapes.prompts import prompt_list
from mitune.worlds.shapes.training.architecture import sd_scheduler, text_config, third_encoder

TOKENS, T5_TOKENS = 77, 256
POOL_IMAGES, TRAINING_ITERATIONS = 700 * 50, 300  # of the papers


@dataclass(frozen=True, slots=True)
class Size:
    """What differs between the published networks and the small ones that only show that all runs."""

    denoisers: Mapping[str, dict[str, Any]]
    clip: tuple[int, int]  # widths of SDXL's and SD3's two
    vae: dict[str, Any]
    matrix: int  # side of the product that gives the peak
    rank: int  # of the adapter


FULL = Size(
    denoisers={"SD-2.1-base": SD21_BASE, "SDXL": SDXL_BASE, "SD-3.5-Medium": SD35_MEDIUM},
    clip=(768, 1280),
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    matrix=8192,
    rank=32,
)
TINY = Size(
    denoisers={
        "SD-2.1-base": SD21_BASE
        | {"sample_size": 16, "block_out_channels": [32] * 4, "attention_head_dim": 2, "cross_attention_dim": 32},
        "SDXL": SDXL_BASE
        | {"sample_size": 8, "block_out_channels": [32] * 3, "attention_head_dim": 2, "cross_attention_dim": 32}
        | {
            "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        "SD-3.5-Medium": SD35_MEDIUM
        | {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
        | {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32}
        | {"dual_attention_layers": [0], "pos_embed_max_size": 8},
    },
    clip=(16, 16),
    vae={"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 8},
    matrix=256,
    rank=4,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", nargs="+", choices=FULL.denoisers, default=list(FULL.denoisers))
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=400, help="Images in an iteration of the training.")
    parser.add_argument("--micro-batch", type=int, default=50, help="Of these at once; halved where memory is short.")
    parser.add_argument("--compile", action="store_true", help="Both, with torch.compile.")
    parser.add_argument("--iterations", type=int, default=3, help="Timed, after one that is not.")
    arguments = parser.parse_args(argv)
    size = TINY if arguments.tiny else FULL
    peak = peak_flops(size.matrix)
    pools, trainings = [], []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            pool, training = measure(name, size, Path(folder), arguments, peak)
        shown = f"{name}, tiny" if arguments.tiny else name
        pools.append([shown, arguments.candidates, arguments.steps, *pool])
        trainings.append([shown, arguments.batch, *training])
    if arguments.tiny:
        print("Small networks: this shows that all runs, and says nothing about the papers' sizes.\n")
    print(f"Measured peak of a bfloat16 product: {peak / 1e12:.3g} TFLOP/s.\n")
    print_table(["pool, with a race, of", "M", "steps", "images/s", "share of peak", "700 × 50, hours"], pools)
    print()
    print_table(["training of", "batch", "seconds an iteration", "share of peak", "300 iterations, minutes"], trainings)


def measure(
    name: str, size: Size, folder: Path, arguments: argparse.Namespace, peak: float
) -> tuple[list[str], list[str]]:
    """The figures of the pool, then those of the training."""
    config = size.denoisers[name]
    build(name, config, size).save_pretrained(folder / "model")
    settings = ModelConfig(
        name=str(folder / "model"), dtype="bfloat16", steps=arguments.steps, compile=arguments.compile
    )
    model = load_model(settings)
    prompts = [listed.text for listed in prompt_list("color")]
    pool = PoolConfig(candidates=arguments.candidates, batch_size=arguments.candidates)
    build_pool(model, prompts[:1], folder / "first" / "pool", pool)  # the first call builds caches
    with rows_counted(denoiser_of(model.pipe)) as rows:
        began = now()
        result = build_pool(model, prompts[1:2], folder / "second" / "pool", pool)
        took = now() - began
    forward, both = flops(type(denoiser_of(model.pipe)), config)
    rate = arguments.candidates / took
    pooled = [f"{rate:.3g}", f"{sum(rows) * forward / took / peak:.1%}", f"{POOL_IMAGES / rate / 3600:.3g}"]
    del model
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()

    training = FinetuneConfig(
        rank=size.rank,
        batch_size=arguments.batch,
        micro_batch_size=arguments.micro_batch,
        iterations=1 + arguments.iterations,
        precision="bf16",
    )
    ends: list[float] = []
    dataset = next(iter(result.sets.values()))
    finetune(settings, dataset, folder / "adapter", training, progress=lambda *_: ends.append(now()))
    iteration = median(after - before for before, after in zip(ends, ends[1:], strict=False))
    share = both * arguments.batch / iteration / peak
    return pooled, [f"{iteration:.3g}", f"{share:.1%}", f"{TRAINING_ITERATIONS * iteration / 60:.3g}"]


def peak_flops(side: int) -> float:
    """FLOP/s of a product of two square bfloat16 matrices: the best of ten."""
    one, other = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: one @ other) for _ in range(11)]
    return float(2 * side**3 / min(times[1:]))


def flops(kind: type[Any], config: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs for one row: forward alone, and forward and backward with an adapter; counted without memory."""
    with torch.device("meta"):
        denoiser = kind(**config).eval()
        arguments = inputs(kind, denoiser.config)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            denoiser(**arguments)
        add_adapter(denoiser, FinetuneConfig())
        with FlopCounterMode(display=False) as both:
            denoiser(**arguments, return_dict=False)[0].sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def inputs(kind: type[Any], config: Any) -> dict[str, Any]:
    """Arguments of a call with one row."""
    noisy, timestep = torch.randn(1, config.in_channels, config.sample_size, config.sample_size), torch.zeros(1)
    if kind is SD3Transformer2DModel:
        told = torch.randn(1, TOKENS + T5_TOKENS, config.joint_attention_dim)
        pooled = torch.randn(1, config.pooled_projection_dim)
        return {
            "hidden_states": noisy, "timestep": timestep, "encoder_hidden_states": told, "pooled_projections": pooled
        }  # fmt: skip
    told = torch.randn(1, TOKENS, config.cross_attention_dim)
    arguments = {"sample": noisy, "timestep": timestep, "encoder_hidden_states": told}
    if config.addition_embed_type is None:
        return arguments
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.zeros(1, 6)}
    return arguments | {"added_cond_kwargs": added}


def build(name: str, config: Mapping[str, Any], size: Size) -> Any:
    """A pipeline of the published class around a random denoiser of this configuration, in bfloat16."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            parts = sd3_parts(config, size) if name == "SD-3.5-Medium" else unet_parts(config, size)
    finally:
        torch.set_default_dtype(default)
    kinds = {"SD-2.1-base": StableDiffusionPipeline, "SDXL": StableDiffusionXLPipeline}
    return kinds.get(name, StableDiffusion3Pipeline)(**parts)


def unet_parts(config: Mapping[str, Any], size: Size) -> dict[str, Any]:
    words = tokenizer()
    common = {"tokenizer": words, "unet": UNet2DConditionModel(**config), "scheduler": sd_scheduler()}
    if "addition_embed_type" not in config:
        text = CLIPTextModel(one_layer(words, config["cross_attention_dim"]))
        vae = AutoencoderKL(**autoencoder(size, 4), scaling_factor=0.18215)
        others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return common | others | {"text_encoder": text, "vae": vae}
    first, second = size.clip
    return common | {
        "text_encoder": CLIPTextModel(one_layer(words, first)),
        "text_encoder_2": CLIPTextModelWithProjection(one_layer(words, second)),
        "tokenizer_2": words,
        "vae": AutoencoderKL(**autoencoder(size, 4), scaling_factor=0.13025),
    }


def sd3_parts(config: Mapping[str, Any], size: Size) -> dict[str, Any]:
    words, (first, second), width = tokenizer(), size.clip, config["joint_attention_dim"]
    return {
        "tokenizer": words,
        "text_encoder": CLIPTextModelWithProjection(one_layer(words, first)),
        "tokenizer_2": words,
        "text_encoder_2": CLIPTextModelWithProjection(one_layer(words, second)),
        "tokenizer_3": T5Tokenizer(model_max_length=T5_TOKENS),
        "text_encoder_3": third_encoder(width),
        "transformer": SD3Transformer2DModel(**config),
        "vae": AutoencoderKL(
            **autoencoder(size, 16),
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(model_folder("shapes-sd"), subfolder="tokenizer", model_max_length=TOKENS)


def one_layer(words: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return text_config(words, width=width, layers=1, heads=1, mlp=width, projection=width)


def autoencoder(size: Size, channels: int) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": channels,
        **size.vae,
    }


if __name__ == "__main__":
    main()
