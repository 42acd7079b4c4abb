"""Draws of the embedded models on rendered scenes, recorded once, and any number of estimates made of them again.

    python -m tests.draws

writes draws.parquet anew: for each model and scene the integrand ½ f(λ) of both estimators, averaged over antithetic
pairs of noise, in `CELLS` equal cells of λ with as many draws in each as `MODELS` says. Some ten minutes a model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.path import path_of
from mitune.denoiser.pictures import encode_images
from mitune.information import Estimator, LogisticProposal, alpha_sigma, point_wise_terms, stratified_mean
from mitune.scoring import default_proposal
from mitune.worlds.shapes.grammar import sample_prompt
from mitune.worlds.shapes.scene import picture, sample_scene
from mitune.worlds.shapes.truth_losses import network

FILE = Path(__file__).parent / "draws.parquet"
MODELS = {"shapes-sd": 24, "shapes-sd3": 16}  # draws in each cell
ESTIMATORS: tuple[Estimator, ...] = ("standard", "orthogonal")
SCENES, CELLS = 12, 64


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a model says of one scene: ½ f(λ), (CELLS, n)."""

    integrand: NDArray[np.float64]
    width: float  # of a cell in λ

    @property
    def integral(self) -> float:
        return float(self.integrand.mean(axis=1).sum() * self.width)

    def draws(
        self, proposal: LogisticProposal, repeats: int, strata: int, each: int, rng: np.random.Generator
    ) -> Tensor:
        """Weighted draws, (repeats, strata, each), as `point_wise_draws` makes them, with the density of the cells."""
        uniform = (np.arange(strata)[:, None] + rng.random((repeats, strata, each))) / strata
        log_snr = proposal.at(torch.from_numpy(uniform)).numpy()
        cell = ((log_snr - proposal.low) / self.width).astype(int).clip(0, CELLS - 1)
        drawn = self.integrand[cell, rng.integers(0, self.integrand.shape[1], cell.shape)]
        return torch.from_numpy(drawn) / proposal.density(torch.from_numpy(log_snr))


def recorded(model: str, estimator: Estimator, proposal: LogisticProposal) -> Iterator[Recorded]:
    """The scenes of a model, whose cells divide the range of the proposal."""
    for row in pq.read_table(FILE, filters=[("model", "==", model)]).to_pylist():
        integrand = np.array(row[estimator], dtype=np.float64).reshape(CELLS, -1)
        yield Recorded(integrand, (proposal.high - proposal.low) / CELLS)


def covered(draws: Tensor, truth: float) -> tuple[float, float]:
    """Per cent of the estimates from draws (repeats, strata, n) whose intervals for 68.27 and 95 % hold the truth."""
    value, error, degrees = (x.numpy() for x in stratified_mean(draws))
    half = (error * student.ppf((1 + confidence) / 2, degrees) for confidence in (0.6827, 0.95))
    one, two = (100 * float((abs(value - truth) < width).mean()) for width in half)
    return one, two


@torch.no_grad()
def record(model: Model, each: int) -> dict[Estimator, NDArray[np.float16]]:
    """½ f(λ) by estimator, (SCENES, CELLS · each)."""
    path, rng, generator = path_of(model.pipe.scheduler), random.Random(7), torch.Generator().manual_seed(1)
    prompts = [sample_prompt(rng) for _ in range(SCENES)]
    latents = encode_images(model.pipe, [picture(sample_scene(prompt, rng)) for prompt in prompts], model.call)
    predict = network(model, [*map(str, prompts), *[""] * SCENES])
    rows: dict[Estimator, list[NDArray[np.float64]]] = {name: [] for name in ESTIMATORS}
    low, high = (getattr(default_proposal(path, "standard"), end) for end in ("low", "high"))
    for draw in range(CELLS * each):
        uniform = (draw + torch.rand((), generator=generator, dtype=torch.float64)) / (CELLS * each)
        log_snr = low + uniform * (high - low)
        alpha, sigma = (x.float() for x in alpha_sigma(log_snr, is_flow=path.is_flow))
        noise = torch.randn(latents.shape[1:], generator=generator)
        terms = {name: np.zeros(SCENES) for name in ESTIMATORS}
        for epsilon in (noise, -noise):
            conditional, null = predict((alpha * latents + sigma * epsilon).repeat(2, 1, 1, 1), log_snr).chunk(2)
            for name in ESTIMATORS:
                terms[name] += 0.25 * point_wise_terms(conditional, null, epsilon, name).sum(dim=(1, 2, 3)).numpy()
        for name in ESTIMATORS:
            rows[name].append(terms[name])
    return {name: np.stack(rows[name], axis=1).astype(np.float16) for name in ESTIMATORS}


def main() -> None:
    table: dict[str, list[object]] = {"model": [], "scene": [], "standard": [], "orthogonal": []}
    for name, each in MODELS.items():
        table["model"] += [name] * SCENES
        table["scene"] += range(SCENES)
        for estimator, values in record(load_model(ModelConfig(name=name, device="cpu")), each).items():
            table[estimator] += list(values)
    pq.write_table(pa.table(table), FILE, compression="zstd")


if __name__ == "__main__":
    main()
