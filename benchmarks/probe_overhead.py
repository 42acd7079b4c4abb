"""What does scoring cost?  A pipeline call with the probe and its trace against one without.

    python benchmarks/probe_overhead.py

Both make the same latents, and no pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from timing import cost_ratio, print_table
from torch import Tensor

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.quiet import quiet_pipelines
from mitune.information import Trace
from mitune.worlds.shapes.world import MODELS

PROMPT = "a red circle and a blue square"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        model = load_model(ModelConfig(name=name, steps=arguments.steps))
        with quiet_pipelines():
            ratio = cost_ratio(
                partial(probed, model, arguments.batch), partial(plain, model, arguments.batch), arguments.pairs
            )
        rows.append([name, arguments.batch, arguments.steps, ratio, "≤ 1.02"])
    print_table(["model", "batch", "steps", "with the probe ÷ without", "target"], rows)


def plain(model: Model, batch: int) -> Tensor:
    latents: Tensor = model.pipe(
        [PROMPT] * batch, generator=torch.Generator().manual_seed(0), output_type="latent", **model.call
    )[0]
    return latents


def probed(model: Model, batch: int) -> Trace:
    with MIProbe(model.pipe) as probe:
        latents = plain(model, batch)
    return probe.trace(latents)


if __name__ == "__main__":
    main()
