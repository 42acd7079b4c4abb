"""How does the cost of a pool grow with prompts, candidates, steps and resolution?  A power law fitted to each.

    python benchmarks/scaling.py

A slope of 1 is linear. The batch is the same throughout; the resolution counts in pixels.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import correlation, linear_regression, median

import torch
from timing import print_table, seconds

from mitune.config.schema import ModelConfig, PoolConfig
from mitune.denoiser.opening.models import load_model
from mitune.pool.build import build_pool
from mitune.worlds.shapes.prompts import prompt_list

BATCH = 16
GRIDS = {
    "prompts": (1, 2, 4, 8),
    "candidates": (BATCH, 2 * BATCH, 4 * BATCH, 8 * BATCH),
    "steps": (5, 10, 20, 40),
    "pixels": (64**2, 96**2, 128**2, 192**2),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=int, choices=(2, 3, 4), default=4, help="Of each grid, from the smallest.")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    pool_seconds()  # the first call builds caches
    rows = []
    for name, grid in GRIDS.items():
        sizes = grid[: arguments.points]
        # In rounds, so that a slow minute of the machine meets all sizes alike.
        rounds = [[pool_seconds(**{name: size}) for size in sizes] for _ in range(arguments.repeats)]
        costs = [median(times) for times in zip(*rounds, strict=True)]
        x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
        slope, fit = linear_regression(x, y).slope, correlation(x, y) ** 2
        shown = ", ".join(f"{cost:.2f}" for cost in costs)
        rows.append([name, ", ".join(map(str, sizes)), shown, f"{slope:.2f}", f"{fit:.4f}"])
    print_table(["of", "sizes", "seconds", "slope", "R²"], rows)


def pool_seconds(*, prompts: int = 1, candidates: int = BATCH, steps: int = 5, pixels: int = 64**2) -> float:
    side = math.isqrt(pixels)
    model = load_model(ModelConfig(name="shapes-sd", steps=steps, call={"height": side, "width": side}))
    listed = [prompt.text for prompt in prompt_list("color")[:prompts]]
    with tempfile.TemporaryDirectory() as folder:
        config = PoolConfig(candidates=candidates, batch_size=BATCH, race="off")
        return seconds(lambda: build_pool(model, listed, Path(folder) / "pool", config))


if __name__ == "__main__":
    main()
