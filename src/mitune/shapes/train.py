"""Trains the embedded models from nothing: one VAE, then `shapes-sd` and `shapes-sd3` on its latents.

`train_autoencoder`, `encode_world` and `train_denoiser` are the three stages. Each writes checkpoints into the work
folder and goes on from the last one when called again; `export` writes the ordinary diffusers folders.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mitune.shapes.grammar import CATEGORIES, COLORS, SHAPES, TEXTURES, forms, parse, sample_prompt, vocabulary
from mitune.shapes.judge import judge
from mitune.shapes.scene import GRID, Object, Scene, render, sample_scene

log = logging.getLogger(__name__)

MAX_TOKENS = 16  # the longest prompt takes 14
JOINT_WIDTH = 144  # of the two CLIP text encoders of shapes-sd3, side by side: 128 + 16
LATENT_CHANNELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """The VAE's training: L1 reconstruction plus a KL term that keeps the latents smooth."""

    seed: int = 0
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 1e-3
    exact_from: float = 0.8  # share of the steps after which bfloat16 gives way to float32


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


def crowded_scene(rng: random.Random) -> Scene:
    """Many objects at once, some overlapping: more to learn from in a picture than in the world's own scenes."""
    objects: list[Object] = []
    for y in range(GRID):
        x = rng.choice((0, 0, 1, 2))
        while x <= 2 * GRID - 2:
            if rng.random() < 0.6:
                objects.append(Object(rng.choice(COLORS), rng.choice(SHAPES), rng.choice(TEXTURES), x, y))
            x += rng.choice((2, 2, 2, 1, 3))
    rng.shuffle(objects)
    return tuple(objects)


def pixels(scenes: list[Scene]) -> Tensor:
    """Rendered scenes as (B, 3, 64, 64) in [−1, 1]."""
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(folder: Path, config: AutoencoderConfig) -> AutoencoderKL:
    """Trains the VAE; returns it with its scaling factor set, so that the latents of the world have unit spread."""
    torch.manual_seed(config.seed)
    model = new_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    rng = random.Random(config.seed)
    running = 0.0
    for step in range(config.steps):
        half = config.batch_size // 2
        scenes = [crowded_scene(rng) for _ in range(half)]
        scenes += [sample_scene(sample_prompt(rng), rng) for _ in range(config.batch_size - half)]
        x = pixels(scenes)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < config.exact_from * config.steps):
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        loss = F.l1_loss(y.float(), x) + 0.5 * F.mse_loss(y.float(), x)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        optimizer.zero_grad()
        (loss + config.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 100 == 99:
            log.info("vae step %d: reconstruction %.4f, kl %.3f", step + 1, running, kl.item())
    with torch.no_grad():
        scenes = [sample_scene(sample_prompt(rng), rng) for _ in range(256)]
        spread = model.encode(pixels(scenes)).latent_dist.mode().std().item()
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(folder / "vae")
    return model


def encode_world(folder: Path, vae: AutoencoderKL, *, scenes: int, seed: int) -> None:
    """Draws (prompt, scene) pairs of the world and keeps their latents, so that training needs no VAE."""
    rng = random.Random(seed)
    prompts, chunks = [], []
    for start in range(0, scenes, 256):
        pairs = [(prompt, sample_scene(prompt, rng)) for prompt in (sample_prompt(rng) for _ in range(256))]
        with torch.no_grad():
            latents = vae.encode(pixels([scene for _, scene in pairs])).latent_dist.mode()
        chunks.append((latents * vae.config.scaling_factor).half())
        prompts += [str(prompt) for prompt, _ in pairs]
        if start % 8192 == 0:
            log.info("encoded %d of %d scenes", start + 256, scenes)
    save_file({"latents": torch.cat(chunks).contiguous()}, folder / "world.safetensors")
    (folder / "world.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    new_tokenizer().save_pretrained(folder / "tokenizer")  # once: equal pairs may be merged in another order


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


def _text_config(tokenizer: CLIPTokenizer, *, width: int, layers: int, projection: int = 8) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _silent_t5() -> T5EncoderModel:
    """The third text encoder that SD3 folders must hold: its output is zero, and CLIP carries the prompt alone.

    `MODEL_CALL` shortens it to one token, since a pipeline's own default would feed the denoiser 256 of them.
    """
    config = T5Config(vocab_size=200, d_model=JOINT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder


def new_pipeline(
    name: str, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """An untrained `shapes-sd` or `shapes-sd3`, of the ordinary diffusers classes."""
    torch.manual_seed(seed)
    if name == "shapes-sd":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(_text_config(tokenizer, width=128, layers=3)),
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
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    text_encoder = CLIPTextModelWithProjection(_text_config(tokenizer, width=128, layers=3))
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer, width=16, layers=2))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig:
    """A phase in the training of one base model and its text encoders: float32 weights, bfloat16 arithmetic."""

    seed: int = 0
    start: int = 0  # the steps before this one belong to an earlier phase
    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 300
    cool_down: float = 0.3  # last share of the steps, over which the rate falls to zero
    prompt_dropout: float = 0.1
    ema: float = 0.998
    velocity_weight_cap: float = 20.0  # ε errors count as velocity errors, 1/ᾱ, up to this
    timestep_power: float = 1.0  # ε: t = 1000 u^power for uniform u; below 1, more of them at high noise
    logit_mean: float = 0.6  # flow: logit-normal times; above 0, more of them at high noise
    relation_weight: int = 1  # how much oftener than others scenes of a relation are drawn


# Attributes are bound first. Where things stand is settled at higher noise, and takes a phase of its own.
PHASES = {
    "shapes-sd": (
        DenoiserConfig(steps=3000),
        DenoiserConfig(
            start=3000, steps=4500, warmup=100, timestep_power=0.4, velocity_weight_cap=50.0, relation_weight=3
        ),
    ),
    "shapes-sd3": (
        DenoiserConfig(steps=3500),
        DenoiserConfig(start=3500, steps=5000, warmup=100, logit_mean=1.6, relation_weight=3),
    ),
}


def _rate(step: int, config: DenoiserConfig) -> float:
    """Share of the learning rate at a step: linear warm-up, constant, linear cool-down."""
    left = (config.steps - step) / (config.cool_down * (config.steps - config.start))
    return min(1.0, (step - config.start + 1) / config.warmup, left)


class Trainee(nn.Module):
    """Denoiser and text encoders of a pipeline as one module, with its loss."""

    def __init__(self, pipe: StableDiffusionPipeline | StableDiffusion3Pipeline, config: DenoiserConfig) -> None:
        super().__init__()
        self.is_flow = isinstance(pipe, StableDiffusion3Pipeline)
        self.denoiser = pipe.transformer if self.is_flow else pipe.unet
        self.encoders = nn.ModuleList([pipe.text_encoder, *([pipe.text_encoder_2] if self.is_flow else [])])
        self.config = config
        self.alphas_cumprod: Tensor | None = None if self.is_flow else pipe.scheduler.alphas_cumprod

    def loss(self, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Denoising loss of latents (B, 8, 8, 8) and token ids (B, L); a scalar."""
        noise = torch.randn(latents.shape, generator=generator)
        if self.alphas_cumprod is None:
            sigma = torch.sigmoid(self.config.logit_mean + torch.randn(len(latents), generator=generator))
            shaped = sigma.view(-1, 1, 1, 1)
            states = [encoder(tokens, output_hidden_states=True).hidden_states[-2] for encoder in self.encoders]
            silent_t5 = latents.new_zeros(len(latents), 1, JOINT_WIDTH)
            velocity = self.denoiser(
                hidden_states=(1 - shaped) * latents + shaped * noise,
                encoder_hidden_states=torch.cat([torch.cat(states, dim=-1), silent_t5], dim=1),
                pooled_projections=latents.new_zeros(len(latents), 16),
                timestep=1000 * sigma,
                return_dict=False,
            )[0]
            return F.mse_loss(velocity.float(), noise - latents)
        uniform = torch.rand(len(latents), generator=generator)
        timesteps = (1000 * uniform**self.config.timestep_power).long().clamp(max=999)
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        predicted = self.denoiser(
            alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise,
            timesteps,
            self.encoders[0](tokens)[0],
            return_dict=False,
        )[0]
        weight = (1 / alpha_bar).clamp(max=self.config.velocity_weight_cap)
        loss: Tensor = (weight * (predicted.float() - noise) ** 2).mean()
        return loss


def train_denoiser(folder: Path, name: str, config: DenoiserConfig, *, checkpoint_every: int = 500) -> None:
    """Trains `name` on the encoded world in `folder`, or goes on from its last checkpoint there."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pipe = new_pipeline(name, vae, CLIPTokenizer.from_pretrained(folder / "tokenizer"), config.seed)
    latents = load_file(folder / "world.safetensors")["latents"]
    prompts = (folder / "world.txt").read_text(encoding="utf-8").splitlines()
    encode = partial(pipe.tokenizer, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    tokens, empty = encode(prompts).input_ids, encode("").input_ids
    trainee = Trainee(pipe, config)
    average = {key: value.clone() for key, value in trainee.state_dict().items()}
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state_file, log_file = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    done = _load_state(state_file, trainee, average, optimizer)
    began, total = time.monotonic(), 0.0
    # Unequal weights are drawn through a table in which the heavier scenes stand more often.
    repeats = torch.tensor([config.relation_weight if parse(p).relation else 1 for p in prompts])
    table = torch.repeat_interleave(torch.arange(len(prompts)), repeats)
    for step in range(done, config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        index = table[torch.randint(len(table), (config.batch_size,), generator=generator)]
        dropped = torch.rand(config.batch_size, 1, generator=generator) < config.prompt_dropout
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainee.loss(latents[index].float(), torch.where(dropped, empty, tokens[index]), generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = config.learning_rate * _rate(step, config)
        optimizer.step()
        decay = min(config.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            current = trainee.state_dict()
            torch._foreach_lerp_(list(average.values()), [current[key] for key in average], 1 - decay)
        total += loss.item()
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            _save_state(state_file, step + 1, trainee, average, optimizer)
            row = {
                "step": step + 1,
                "samples": (step + 1) * config.batch_size,
                "loss": total / checkpoint_every,
                "seconds": time.monotonic() - began,
                "accuracy": _accuracy(pipe, trainee, average),
            }
            with log_file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            log.info("%s %s", name, row)
            total = 0.0


def _accuracy(pipe: DiffusionPipeline, trainee: Trainee, average: dict[str, Tensor]) -> dict[str, float]:
    """Exact accuracy per category of the averaged weights, on 20 prompts each: the training's own curve."""
    kept = {key: value.clone() for key, value in trainee.state_dict().items()}
    trainee.load_state_dict(average)
    rng = random.Random(0)
    by_category = {c: [p for f in forms() if f.category == c for p in rng.sample(f.prompts, 20)] for c in CATEGORIES}
    prompts = [str(p) for group in by_category.values() for p in group[:20]]
    extra = {"max_sequence_length": 1} if trainee.is_flow else {}
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **extra,
    ).images
    trainee.load_state_dict(kept)
    verdicts = [judge((image * 255).round().astype(np.uint8), p) for image, p in zip(images, prompts, strict=True)]
    correct = np.array([v.exact and not v.malformed for v in verdicts]).reshape(len(CATEGORIES), -1).mean(axis=1)
    shares = dict(zip(CATEGORIES, correct.tolist(), strict=True))
    return shares | {"malformed": float(np.mean([v.malformed for v in verdicts]))}


def _save_state(
    path: Path, step: int, trainee: Trainee, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    tensors = {"step": torch.tensor(step)}
    tensors |= {f"model.{key}": value.contiguous() for key, value in trainee.state_dict().items()}
    tensors |= {f"average.{key}": value.contiguous() for key, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value.contiguous() for key, value in state.items()}
    partial_file = path.with_suffix(".partial")
    save_file(tensors, partial_file)
    partial_file.replace(path)


def _load_state(path: Path, trainee: Trainee, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restores a checkpoint in place; returns the steps done, 0 if there is none."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    trainee.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for key, value in average.items():
        value.copy_(tensors[f"average.{key}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, field = key.split(".")
            state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])


def export(folder: Path, name: str, target: Path) -> None:
    """Writes the averaged weights of the last checkpoint as a diffusers folder, with the training's config and log.

    Denoiser and VAE are stored in half precision, which diffusers loads in single; the text encoders as they are.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pipe = new_pipeline(name, vae, CLIPTokenizer.from_pretrained(folder / "tokenizer"), seed=0)
    trainee = Trainee(pipe, PHASES[name][-1])
    state = load_file(folder / f"{name}.safetensors")
    trainee.load_state_dict({k.removeprefix("average."): v for k, v in state.items() if k.startswith("average.")})
    vae.register_to_config(_name_or_path="")  # the work folder is nobody's business
    trainee.denoiser.half()
    pipe.vae.half()
    pipe.save_pretrained(target)
    settings = {
        "denoiser": [asdict(phase) for phase in PHASES[name]],
        "autoencoder": asdict(AutoencoderConfig()),
        "torch": torch.__version__,
    }
    (target / "training.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (target / "training.jsonl").write_text((folder / f"{name}.jsonl").read_text(encoding="utf-8"), encoding="utf-8")


def train_all(work: Path, output: Path, names: Sequence[str], *, scenes: int) -> None:
    """Everything from nothing: VAE, latents of the world, then the models; finished stages in `work` are kept."""
    work.mkdir(parents=True, exist_ok=True)
    if (work / "vae").is_dir():
        vae = AutoencoderKL.from_pretrained(work / "vae")
    else:
        vae = train_autoencoder(work, AutoencoderConfig())
    if not (work / "world.txt").exists():
        encode_world(work, vae, scenes=scenes, seed=1)
    for name in names:
        for phase in PHASES[name]:
            train_denoiser(work, name, phase)
        export(work, name, output / name)
