"""Small networks trained side by side, each without its own part of the samples, and judged on that part.

K members share every matrix product, so cross-fitting costs little more than one training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import silu

from mitune.errors import MituneError


class BatchedLinear(nn.Module):
    """K linear layers: (K, B, inputs) to (K, B, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        scale = 0.0 if zero else 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(scale * torch.randn(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class BatchedMLP(nn.Module):
    """K residual MLPs, zero at the start: (K, B, inputs) to (K, B, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = BatchedLinear(members, inputs, width)
        self.middle = nn.ModuleList(BatchedLinear(members, width, width) for _ in range(depth))
        self.last = BatchedLinear(members, width, outputs, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = silu(self.first(x))
        for layer in self.middle:
            hidden = hidden + silu(layer(hidden))
        out: Tensor = self.last(hidden)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Adam with a cosine rate, a running average of the weights, and held-out samples that choose among its states."""

    members: int = 4  # K
    width: int = 64
    depth: int = 2
    steps: int = 2500
    batch: int = 256
    learning_rate: float = 5e-3
    check: int = 100  # steps between looks at the held-out samples
    patience: int = 6  # looks without a gain
    gain: float = 1e-3  # what counts as one, in the loss
    draws: int = 32  # noisings of each sample for an estimate


@dataclass(frozen=True, slots=True, eq=False)
class Folds:
    """A partition of n samples into K parts, as row numbers; shorter parts are filled up by repetition."""

    held_out: Tensor  # (K, n/K) the part that member k never sees
    trained_on: Tensor  # (K, n − n/K) the rest

    @classmethod
    def of(cls, samples: int, members: int, generator: Generator) -> Folds:
        """At random. Raises MituneError where a part would hold less than two samples."""
        if samples < 2 * members:
            raise MituneError(f"{samples} samples are too few for {members} parts; give more.")
        parts = list(torch.randperm(samples, generator=generator).tensor_split(members))
        rests = [torch.cat([*parts[:k], *parts[k + 1 :]]) for k in range(members)]
        return cls(_stacked(parts), _stacked(rests))


def _stacked(rows: list[Tensor]) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack([torch.cat([part, part])[:longest] for part in rows])


class Problem(Protocol):
    """What is learnt from samples, and what is read off it."""

    def network(self, training: Training) -> BatchedMLP:
        """Untrained."""

    def loss(self, network: BatchedMLP, rows: Tensor, generator: Generator) -> Tensor:
        """A random draw for the samples `rows` (K, B), of which member k takes the k-th row: (K, B)."""

    def information(self, network: BatchedMLP, rows: Tensor, generator: Generator) -> Tensor:
        """Draws of the point-wise information in nats, likewise."""


def train(problem: Problem, folds: Folds, training: Training, generator: Generator) -> BatchedMLP:
    """K networks, each at its best state for the samples it has not seen: the first state where none is better."""
    network, average = problem.network(training), problem.network(training)
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), fused=True)
    size = min(1024, folds.held_out.shape[1])
    looked_at = folds.held_out[:, :size].repeat(1, math.ceil(4096 / size))
    seed = generator.initial_seed() + 1

    @torch.no_grad()
    def held_out_loss() -> Tensor:
        # The same draws at every look, so that states differ by what they know and not by luck.
        fixed = torch.Generator().manual_seed(seed)
        return problem.loss(average, looked_at, fixed).mean(dim=1)

    best, waited = held_out_loss(), 0
    chosen = [parameter.detach().clone() for parameter in average.parameters()]
    for step in range(1, training.steps + 1):
        rate = min(1, step / 50) * (1 + math.cos(math.pi * step / training.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * training.learning_rate
        drawn = torch.randint(folds.trained_on.shape[1], (training.members, training.batch), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(problem.loss(network, folds.trained_on.gather(1, drawn), generator).mean(dim=1).sum())
        nn.utils.clip_grad_norm_(network.parameters(), 2.0 * training.members)
        optimizer.step()
        with torch.no_grad():
            share = max(0.02, 10 / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)
        if step % training.check == 0:
            value = held_out_loss()
            better = value < best - training.gain
            best = torch.where(better, value, best)
            for kept, parameter in zip(chosen, average.parameters(), strict=True):
                kept[better] = parameter.detach()[better]
            waited = 0 if better.any() else waited + 1
            if waited >= training.patience:
                break
    with torch.no_grad():
        for kept, parameter in zip(chosen, average.parameters(), strict=True):
            parameter.copy_(kept)
    return average


@torch.no_grad()
def point_wise(problem: Problem, network: BatchedMLP, rows: Tensor, draws: int, generator: Generator) -> Tensor:
    """Information of each sample, (n,), in nats: the mean of its draws by the members whose `rows` (K, B) hold it."""
    each = torch.stack([problem.information(network, rows, generator) for _ in range(draws)]).mean(dim=0).double()
    flat = rows.flatten()
    return torch.zeros(int(flat.max()) + 1, dtype=torch.float64).index_add(0, flat, each.flatten()) / flat.bincount()


def stratified(members: int, count: int, generator: Generator) -> Tensor:
    """Uniform numbers (K, B), float64, one in each of B equal parts of (0, 1), in random order."""
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(members)])
    return (order + torch.rand(members, count, generator=generator, dtype=torch.float64)) / count
