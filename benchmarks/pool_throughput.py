"""What is the pool worth?  `build_pool` with a race against a plain loop over the bare pipeline that scores afterwards.

    python benchmarks/pool_throughput.py    # --compile has the pool compile its denoiser, with torch.compile

The loop does for each prompt what one would write without mitune: one call with num_images_per_prompt = M, then the
score of the M latents, noised again to each of the sampler's steps (eq. (2) of MI-TUNE), then the picture of the best.
Both end with the same: the best candidate's picture, latents and score.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import cost_ratio, print_table

from mitune.config.schema import ModelConfig, PoolConfig, RaceSetting
from mitune.denoiser.opening.models import load_model
from mitune.pool.build import build_pool
from mitune.worlds.shapes.prompts import prompt_list


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32, help="Of the pool, which fills it from several prompts.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-race", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = ModelConfig(name="shapes-sd", steps=arguments.steps)
    bare, model = load_model(settings), load_model(replace(settings, compile=arguments.compile))
    prompts = [listed.text for listed in prompt_list("color")[: arguments.prompts]]
    race: RaceSetting = "off" if arguments.no_race else "auto"
    select = ("self-confidence",)  # on-line, as it stands against a score that the loop pays for
    config = PoolConfig(candidates=arguments.candidates, batch_size=arguments.batch, select=select, race=race)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_pool(model, prompts, Path(folder) / "pool", config)

    def loop() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for index, prompt in enumerate(prompts):
                best_of(bare.pipe, prompt, config.candidates, bare.call).save(Path(folder) / f"{index}.png")

    ratio = cost_ratio(loop, ours, arguments.pairs)
    columns = ["prompts", "candidates", "steps", "race", "compiled", "pools in the time of the loop", "target"]
    raced, compiled = ("yes" if given else "no" for given in (race == "auto", arguments.compile))
    print_table(columns, [[len(prompts), config.candidates, arguments.steps, raced, compiled, ratio, "≥ 3"]])


@torch.no_grad()
def best_of(pipe: Any, prompt: str, candidates: int, call: dict[str, Any]) -> Any:
    latents = pipe(prompt, num_images_per_prompt=candidates, output_type="latent", **call).images
    told = torch.cat([part.expand(candidates, -1, -1) for part in reversed(encode(pipe, prompt))])
    scores = torch.zeros(candidates, device=latents.device)
    for timestep in pipe.scheduler.timesteps:
        noisy = pipe.scheduler.add_noise(latents, torch.randn_like(latents), timestep)
        null, conditional = pipe.unet(torch.cat([noisy] * 2), timestep, told).sample.chunk(2)
        scores += (conditional - null).square().flatten(1).sum(dim=1)
    best = latents[scores.argmax()].unsqueeze(0)
    decoded = pipe.vae.decode(best / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]


def encode(pipe: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    return pipe.encode_prompt(prompt, pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True)


if __name__ == "__main__":
    main()
