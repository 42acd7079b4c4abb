"""What is the training loop worth?  `finetune` against the loop of diffusers' LoRA example, and against bare passes.

    python benchmarks/training.py           # --compile has finetune compile the denoiser, with torch.compile

The example is examples/text_to_image/train_text_to_image_lora.py, without what it does to pictures and prompts: both
train the same adapter on the same cached latents and text embeddings. Each iteration of mitune is followed by one of
the example's and by one bare pass forward and backward, so that all three meet the same machine. What the reference of
the objective `advantage` costs is measured against `denoising`, forward and backward in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from timing import DEVICE, Spread, cost_ratio, now, print_table, seconds
from torch.utils.data import DataLoader

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.replay import condition
from mitune.finetuning.adapter import add_adapter, trainable
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import draw
from mitune.finetuning.network import fast_layers, open_network
from mitune.finetuning.objectives.base import OBJECTIVES, losses_of
from mitune.finetuning.run import finetune
from mitune.run.store import write_bytes, write_tensors
from mitune.worlds.shapes.prompts import prompt_list

BURN_IN = 2  # iterations
MODEL = ModelConfig(name="shapes-sd")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=FinetuneConfig().rank)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "set", arguments.batch)
        for kind in ("lora", "dora"):
            config = FinetuneConfig(
                adapter=kind,
                rank=arguments.rank,
                batch_size=arguments.batch,
                iterations=BURN_IN + arguments.iterations,
            )
            ours, example, adapted, plain = compare(Path(folder), config, compiled=arguments.compile)
            first, ours = ours[0], ours[BURN_IN:]
            columns = (
                ("samples per second, in those of diffusers' example", example, ours, "≥ 1.3"),
                ("cost, in bare passes with PEFT's adapter", ours, adapted, "≤ 1.1"),
                ("cost, in bare passes without adapter, all weights trained", ours, plain, "≤ 1.1"),
            )
            for what, one, other, target in columns:
                rows.append([kind, what, Spread.of([a / b for a, b in zip(one, other, strict=True)]), target])
            for form, merged in (("merged layers", True), ("PEFT's layers", False)):
                what = f"cost of `advantage`, in passes of `denoising`, {form}"
                rows.append([kind, what, reference_cost(Path(folder), config, merged=merged), "≤ 1.4"])
            if arguments.compile:
                rows.append(
                    [kind, "the first iteration, which compiles, in later ones", f"{first / median(ours):.0f}", ""]
                )
    print_table(["adapter", "", "median (lowest to highest)", "target"], rows)


def write_set(folder: Path, images: int) -> None:
    """A fine-tuning set of noise: time does not ask what the latents show."""
    prompts = [listed.text for listed in prompt_list("color")]
    prompts = [prompts[i % len(prompts)] for i in range(images)]
    folder.mkdir()
    write_tensors(folder / "latents.safetensors", {"latents": torch.randn(images, 8, 8, 8)})
    write_tensors(folder / "conditioning.safetensors", condition(load_model(MODEL), prompts).to_tensors())
    write_bytes(folder / "metadata.jsonl", "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts).encode())


def compare(folder: Path, config: FinetuneConfig, *, compiled: bool) -> tuple[list[float], ...]:
    """Seconds an iteration of: finetune, from the first on; the example, a bare pass with adapter, one without."""
    images = TrainingSet.read(folder / "set")
    others = [example_loop(images, config), passes(images, config, adapted=True), passes(images, config, adapted=False)]
    times: list[list[float]] = [[] for _ in range(1 + len(others))]
    last = now()

    def follow(*_: object) -> None:
        nonlocal last
        times[0].append(now() - last)
        for measured, iterations in zip(times[1:], others, strict=True):
            measured.append(seconds(lambda iterations=iterations: next(iterations)))
        last = now()

    model = replace(MODEL, compile=compiled)
    finetune(model, folder / "set", folder / config.adapter, config, progress=follow)
    return (times[0], *(measured[BURN_IN:] for measured in times[1:]))


def example_loop(images: TrainingSet, config: FinetuneConfig) -> Iterator[None]:
    """The body of the example's loop over batches, as it is written there."""
    components = Components.of(MODEL)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=DEVICE.type == "cpu")
    noise_scheduler, unet = components.scheduler(), components.denoiser().to(DEVICE)
    add_adapter(unet, config)
    layers = list(trainable({"unet": unet}).values())
    optimizer = torch.optim.AdamW(
        layers, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay, eps=1e-8
    )
    rows = [
        {"latents": latents, "encoder_hidden_states": told}
        for latents, told in zip(images.latents, images.conditioning.rows["encoder_hidden_states"], strict=True)
    ]
    loader = DataLoader(rows, shuffle=True, batch_size=config.batch_size)
    schedule = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    unet.train()
    train_loss = 0.0
    while True:
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = batch["latents"]
                noise = torch.randn_like(latents)
                steps = noise_scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, steps, (len(latents),), device=latents.device).long()
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                predicted = unet(noisy, timesteps, batch["encoder_hidden_states"], return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
                train_loss += accelerator.gather(loss.repeat(config.batch_size)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(layers, config.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            _ = {"step_loss": loss.detach().item(), "lr": schedule.get_last_lr()[0]}  # for the progress bar
            yield


def passes(images: TrainingSet, config: FinetuneConfig, *, adapted: bool) -> Iterator[None]:
    """Forward and backward through the denoiser on one batch, nothing else."""
    unet: Any = Components.of(MODEL).denoiser().to(DEVICE)
    if adapted:
        add_adapter(unet, config)
    latents = images.latents.to(DEVICE)
    ((_, told),) = images.conditioning.to(DEVICE).arguments()
    timesteps = torch.full((len(latents),), 500.0, device=DEVICE)
    while True:
        F.mse_loss(unet(latents, timestep=timesteps, **told, return_dict=False)[0], latents).backward()
        unet.zero_grad()
        yield


def reference_cost(folder: Path, config: FinetuneConfig, *, merged: bool) -> Spread:
    """The time of `advantage` ÷ that of `denoising`, forward and backward on one batch."""
    images, network = TrainingSet.read(folder / "set"), open_network(Components.of(MODEL), config, DEVICE, None)
    path, rows = network.denoiser.path, torch.arange(config.batch_size)
    batch = draw(images, path, 1.0, config, 0).batch(rows, images, path, DEVICE)

    def train(name: str) -> None:
        losses_of(OBJECTIVES.resolve(name), batch, network).mean().backward()
        network.denoiser.network.zero_grad()

    with fast_layers(network, merged=merged, compiled=False):
        return cost_ratio(lambda: train("advantage"), lambda: train("denoising"), config.iterations - BURN_IN)


if __name__ == "__main__":
    main()
