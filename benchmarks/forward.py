"""What does a forward pass of the embedded denoisers cost, 64 on 2 threads?  python benchmarks/forward.py"""

import platform
import statistics
import timeit

import torch

from mitune.config.schema import ModelConfig
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.replay import condition
from mitune.worlds.shapes.world import MODELS

BATCH, REPEATS = 64, 20


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    for name in MODELS:
        model = load_model(ModelConfig(name=name, device="cpu"))
        denoiser = denoiser_of(model.pipe)
        ((_, arguments),) = condition(model, ["a red circle and a blue square"] * BATCH).arguments()
        latents, timestep = torch.randn(BATCH, 8, 8, 8), torch.full((BATCH,), 500.0)

        def forward(denoiser=denoiser, latents=latents, timestep=timestep, arguments=arguments) -> None:
            denoiser(latents, timestep=timestep, **arguments, return_dict=False)

        forward()  # the first call builds caches
        times = [timeit.timeit(forward, number=1) / BATCH * 1e3 for _ in range(REPEATS)]
        spread = f"{min(times):.2f} to {max(times):.2f}"
        print(f"{name}: {statistics.median(times):.2f} ms a sample, {spread} ({platform.machine()})")


if __name__ == "__main__":
    main()
