"""Trains the embedded models from nothing: one VAE, then `shapes-sd` and `shapes-sd3` on its latents.

`train_autoencoder`, `encode_world` and `train_denoiser` are the stages. The last writes checkpoints into the work
folder and goes on from them when called again; `export` writes the ordinary diffusers folders.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from mitune.denoiser.network import components_of, save_pipeline, without_progress_bar
from mitune.finetuning.checkpoint import TrainingState
from mitune.worlds.shapes.grammar import CATEGORIES, Form, Prompt, forms
from mitune.worlds.shapes.judge import judge
from mitune.worlds.shapes.negatives import shapes_negatives, wider_negatives
from mitune.worlds.shapes.training.architecture import JOINT_WIDTH, MAX_TOKENS, new_pipeline
from mitune.worlds.shapes.training.autoencoder import (
    AutoencoderConfig,
    encode_world,
    train_autoencoder,
    training_prompts,
)
from mitune.worlds.shapes.training.phases import PHASES, DenoiserConfig

log = logging.getLogger(__name__)


def _rate(step: int, config: DenoiserConfig) -> float:
    """Share of the learning rate at a step: linear warm-up, constant, linear cool-down."""
    cool_down = config.cool_down * (config.steps - config.start)
    left = (config.steps - step) / cool_down if cool_down else 1.0
    return min(1.0, (step - config.start + 1) / config.warmup, left)


def stable_targets(noisy: Tensor, scenes: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[z₀ | z_t, prompt] and E[ε | z_t, prompt], with `scenes` (B, K, …) of each prompt standing for all of them.

    The minimizer of the denoising loss stays what it was, and the gradient loses the chance of which scene was drawn,
    which at high noise is most of it (Xu et al. 2023, "Stable Target Field", eq. 7). One of the scenes must be the one
    that `noisy` (B, …) was made of; `alpha` and `sigma` are (B, 1, 1, 1).
    """
    distance = (noisy[:, None] - alpha[:, None] * scenes).square().sum(dim=(2, 3, 4))
    weights = torch.softmax(-distance / (2 * sigma.square().view(-1, 1)), dim=1)
    clean = (weights[:, :, None, None, None] * scenes).sum(dim=1)
    return clean, (noisy - alpha * clean) / sigma


class Trainee(nn.Module):
    """Denoiser and text encoders of a pipeline as one module, with its loss."""

    def __init__(self, pipe: StableDiffusionPipeline | StableDiffusion3Pipeline, config: DenoiserConfig) -> None:
        super().__init__()
        self.is_flow = isinstance(pipe, StableDiffusion3Pipeline)
        parts = components_of(pipe)
        self.denoiser = parts["transformer" if self.is_flow else "unet"]
        self.encoders = nn.ModuleList([parts["text_encoder"], *([parts["text_encoder_2"]] if self.is_flow else [])])
        self.config = config
        self.alphas_cumprod: Tensor | None = None if self.is_flow else parts["scheduler"].alphas_cumprod

    def _noise_level(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (B,), α and σ (B, 1, 1, 1)."""
        if self.alphas_cumprod is None:
            sigma = torch.sigmoid(self.config.logit_mean + torch.randn(count, generator=generator))
            return 1000 * sigma, (1 - sigma).view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        uniform = torch.rand(count, generator=generator)
        timesteps = (1000 * uniform**self.config.timestep_power).long().clamp(max=999)
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return timesteps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def loss(self, scenes: Tensor, tokens: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
        """Denoising loss, a scalar, of scenes (B, K, 8, 8, 8), of which the first counts and the others serve
        `stable_targets`, and token ids (B, L); some rows are trained without their prompt, on `empty` (1, L)."""
        latents = scenes[:, 0]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps, alpha, sigma = self._noise_level(len(latents), generator)
        noisy = alpha * latents + sigma * noise
        dropped = torch.rand(len(latents), 1, generator=generator) < self.config.prompt_dropout
        tokens = torch.where(dropped, empty, tokens)
        if self.config.stable:
            clean, blend = stable_targets(noisy, scenes, alpha, sigma)
            promptless = dropped.view(-1, 1, 1, 1)
            latents, noise = torch.where(promptless, latents, clean), torch.where(promptless, noise, blend)
        if self.is_flow:
            states = [encoder(tokens, output_hidden_states=True).hidden_states[-2] for encoder in self.encoders]
            silent_t5 = latents.new_zeros(len(latents), 1, JOINT_WIDTH)
            velocity = self.denoiser(
                hidden_states=noisy,
                encoder_hidden_states=torch.cat([torch.cat(states, dim=-1), silent_t5], dim=1),
                pooled_projections=latents.new_zeros(len(latents), 16),
                timestep=timesteps,
                return_dict=False,
            )[0]
            return F.mse_loss(velocity.float(), noise - latents)
        predicted = self.denoiser(noisy, timesteps, self.encoders[0](tokens)[0], return_dict=False)[0]
        weight = alpha.pow(-2).clamp(max=self.config.velocity_weight_cap)
        loss: Tensor = (weight * (predicted.float() - noise) ** 2).mean()
        return loss


def _kinds(form: Form, prompt: Prompt) -> list[str]:
    """What `DenoiserConfig.emphasis` may name: category, relation, and with a relation the first color."""
    first = f"{prompt.phrases[0].color} first" if prompt.relation else None
    return [kind for kind in (form.category, prompt.relation, first) if kind]


def miscaptioned(prompts: Sequence[str]) -> list[list[str]]:
    """What the scenes of each prompt are called where a caption is wrong: by a prompt that differs in one part."""
    return [[n.prompt for n in (*shapes_negatives(prompt), *wider_negatives(prompt))] for prompt in prompts]


def train_denoiser(
    folder: Path, name: str, config: DenoiserConfig, *, checkpoint_every: int = 500, curve_prompts: int = 20
) -> None:
    """Trains `name` on the encoded world in `folder`, or goes on from its last checkpoint there.

    With each checkpoint goes a point of the accuracy curve, of `curve_prompts` prompts a category.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pipe = new_pipeline(name, vae, CLIPTokenizer.from_pretrained(folder / "tokenizer"), config.seed)
    world = load_file(folder / "world.safetensors")
    prompts = (folder / "world.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = components_of(pipe)["tokenizer"]
    encode = partial(tokenizer, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    tokens, empty = encode(prompts).input_ids, encode("").input_ids
    wrong_tokens = [encode(wrong).input_ids for wrong in (miscaptioned(prompts) if config.wrong_captions else [])]
    trainee = Trainee(pipe, config)
    parameters = {key: value for key, value in trainee.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = {key: value.detach().clone() for key, value in parameters.items()}
    state = TrainingState(
        parameters=parameters, optimizer=optimizer, micro_batch_size=config.batch_size, average=average
    )
    state_file, log_file = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    if state_file.exists():
        state.load(state_file)
    began, losses = time.monotonic(), list[float]()
    weights = world["weights"] * torch.tensor(_emphasis(prompts, config))
    for step in range(state.iterations, config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        index = torch.multinomial(weights, config.batch_size, replacement=True, generator=generator)
        turn = int(torch.randint(world["latents"].shape[1], (), generator=generator))
        scenes = world["latents"][index].float().roll(turn, dims=1)
        captions = tokens[index]
        for row in (torch.rand(len(index), generator=generator) < config.wrong_captions).nonzero().flatten().tolist():
            wrong = wrong_tokens[index[row]]
            captions[row] = wrong[torch.randint(len(wrong), (), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainee.loss(scenes, captions, empty, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.param_groups[0]["lr"] = config.learning_rate * _rate(step, config)
        optimizer.step()
        decay = min(config.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            state.iterations = step + 1
            state.save(state_file)
            row = {
                "step": step + 1,
                "samples": (step + 1) * config.batch_size,
                "loss": sum(losses) / len(losses),
                "seconds": time.monotonic() - began,
                "accuracy": _accuracy(pipe, parameters, average, curve_prompts),
            }
            with log_file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            log.info("%s %s", name, row)
            losses.clear()


def _emphasis(prompts: list[str], config: DenoiserConfig) -> list[float]:
    """How much oftener than in the world each prompt is drawn."""
    kinds = {str(prompt): _kinds(form, prompt) for form in forms() for prompt in form.prompts}
    return [math.prod(config.emphasis.get(kind, 1.0) for kind in kinds[p]) for p in prompts]


def _accuracy(
    pipe: DiffusionPipeline, parameters: dict[str, nn.Parameter], average: dict[str, Tensor], count: int
) -> dict[str, float]:
    """Exact accuracy per category of the averaged weights, on `count` prompts each: the training's own curve."""
    current = {key: value.detach().clone() for key, value in parameters.items()}
    _set(parameters, average)
    rng = random.Random(0)
    by_category = {c: [p for f in forms() if f.category == c for p in rng.sample(f.prompts, count)] for c in CATEGORIES}
    prompts = [str(p) for group in by_category.values() for p in group[:count]]
    extra = {"max_sequence_length": 1} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    without_progress_bar(pipe)
    images = pipe(
        prompts,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **extra,
    ).images
    _set(parameters, current)
    verdicts = [judge((image * 255).round().astype(np.uint8), p) for image, p in zip(images, prompts, strict=True)]
    correct = np.array([v.exact and not v.malformed for v in verdicts]).reshape(len(CATEGORIES), -1).mean(axis=1)
    shares = dict(zip(CATEGORIES, correct.tolist(), strict=True))
    return shares | {"malformed": float(np.mean([v.malformed for v in verdicts]))}


def _set(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.data.copy_(values[key])


def export(folder: Path, name: str, target: Path) -> None:
    """Writes the averaged weights of the last checkpoint as a diffusers folder, with the training's config and log.

    Denoiser and VAE are stored in half precision, which diffusers loads in single; the text encoders as they are.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pipe = new_pipeline(name, vae, CLIPTokenizer.from_pretrained(folder / "tokenizer"), seed=0)
    trainee = Trainee(pipe, PHASES[name][-1])
    state = load_file(folder / f"{name}.safetensors")
    parameters = {key: value for key, value in trainee.named_parameters() if value.requires_grad}
    _set(parameters, {key: state[f"average/{key}"] for key in parameters})
    vae.register_to_config(_name_or_path="")  # the work folder is nobody's business
    trainee.denoiser.half()
    vae.half()
    save_pipeline(pipe, target)
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
        encode_world(work, vae, training_prompts(seed=1), scenes=scenes, seed=1)
    for name in names:
        for phase in PHASES[name]:
            train_denoiser(work, name, phase)
        export(work, name, output / name)
