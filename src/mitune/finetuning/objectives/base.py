"""What an objective is, and all that it may depend on: a batch, and the network with and without its adapter.

    z = α z₀ + σ ε      u: what the network should predict at z, so ε, z₀, v = αε − σz₀ or (flow) v = ε − z₀

Most objectives are a squared distance of the prediction from a target between that of the frozen network which made
the images, f₀, and u, so that one file holds each:

    y* = f₀ + A (u − f₀)      loss = ‖f − y*‖²                A = 1: the denoising loss of the papers

What a network predicts is affine in its denoiser ẑ₀, f = c ẑ₀ + (what z says), with c = −α/σ for ε, 1 for z₀, and −1/σ
for either v. So the same y* is asked of the denoiser whatever is predicted, ẑ₀* = ẑ₀⁰ + A (z₀ − ẑ₀⁰), and the loss is
c² ‖ẑ₀ − ẑ₀*‖²: c² is how the model weighs noise levels in its own training, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from mitune.config.schema import Config, PoolConfig
from mitune.denoiser.conditioning import Conditioning
from mitune.denoiser.path import NoisePath
from mitune.errors import MituneError
from mitune.resolver import Row, Table


@dataclass(frozen=True, slots=True, eq=False)
class Rivals:
    """Prompts that the images of a batch are held against, R in all; an image may have several, or none."""

    images: Tensor  # (R,) the place in the batch of the image that each is a rival for
    prompts: Sequence[str]  # R texts
    conditioning: Conditioning  # of the R


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """B noised images, on the network's device. `dataclasses.replace` makes another with, say, other latents."""

    latents: Tensor  # (B, C, H, W) z₀, in the denoiser's space
    noise: Tensor  # (B, C, H, W) ε
    timesteps: Tensor  # (B,) t, float32
    path: NoisePath  # α, σ and what the network predicts
    prompts: Sequence[str]  # B texts, which text encoders that are trained read
    conditioning: Conditioning  # of the B: the denoiser's arguments for the prompts
    weights: Tensor  # (B,) of the images, with mean one over the set
    advantages: Tensor  # (B,) over other images of the prompt, of either sign; one in a set that is not ranked
    worse: Tensor  # (B, C, H, W) latents of an image of the same prompt with less advantage; its own where none has
    rivals: Rivals | None = None  # some hard negatives of the prompts, where the set has them

    @property
    def noisy(self) -> Tensor:
        """z, (B, C, H, W)."""
        return self.path.add_noise(self.latents, self.noise, self.timesteps)

    @property
    def target(self) -> Tensor:
        """u, (B, C, H, W): what a network that knew z₀ would predict at z."""
        path = self.path
        if path.predicts == "epsilon":
            return self.noise
        if path.predicts == "sample":
            return self.latents
        if path.is_flow:
            return self.noise - self.latents
        alpha, sigma = (per_image(part(self.timesteps), self.latents) for part in (path.alpha, path.sigma))
        return alpha * self.noise - sigma * self.latents


Needs = Literal["kept", "ranked", "rivals"]  # of a set


class Network(Protocol):
    """The network that is trained. Both predictions are (B, C, H, W), float32, to be held against `batch.target`."""

    def __call__(self, batch: Batch) -> Tensor:
        """f: with the adapter, and with gradients for it."""
        ...

    def reference(self, batch: Batch) -> Tensor:
        """f₀: the frozen network that made the images, without the adapter or, in later rounds, with the one that they
        began with. It costs one more pass forward, without gradients."""
        ...


class Objective(Protocol):
    """A loss for each image, (B,): the gradient is that of its mean over the batch.

    needs: "kept" for a set of what a selection keeps; "ranked" for one of all candidates, with their advantages;
    "rivals" for one of what is kept, with the hard negatives of its prompts.
    Losses are about as large as a squared error, for one of ten times what a network that predicts nothing has counts
    as lost.
    """

    needs: Needs

    def __call__(self, batch: Batch, network: Network) -> Tensor: ...


OBJECTIVES: Table[Objective] = Table(
    "objective",
    Objective,
    {
        "denoising": Row(
            "the model's own loss on the images, as in the papers", "mitune.finetuning.objectives.denoising:Denoising"
        ),
        "advantage": Row(
            "towards the better images of a prompt and away from the worse, by their advantages",
            "mitune.finetuning.objectives.advantage:Advantage",
        ),
        "weighted": Row(
            "the model's own loss, where images with more advantage weigh more",
            "mitune.finetuning.objectives.weighted:Weighted",
        ),
        "dpo": Row(
            "Diffusion-DPO: images preferred to worse ones of their prompt", "mitune.finetuning.objectives.dpo:DPO"
        ),
        "rival-target": Row(
            "the model's own loss, with a target that leads away from the hard negatives of the prompt",
            "mitune.finetuning.objectives.rival_target:RivalTarget",
        ),
    },
)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """One value an image, (B,), as what multiplies images (B, C, H, W): (B, 1, 1, 1)."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def squared_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """‖f − y‖² of (B, C, H, W), the mean over an image's values: (B,)."""
    return (predicted - target).square().flatten(1).mean(dim=1)


def pool_settings(config: Config) -> PoolConfig:
    """The pool's settings, with a ranked set of all candidates or the prompts' hard negatives in it, where
    `config.finetune.objective` needs these."""
    objective = OBJECTIVES.resolve(config.finetune.objective)
    if objective.needs == "ranked" and config.pool.ranked is None:
        return replace(config.pool, ranked=config.pool.candidates)
    return replace(config.pool, rivals=True) if objective.needs == "rivals" else config.pool


def check_set(objective: Objective, name: str, *, ranked: bool, rivals: bool) -> None:
    """Raises MituneError for an objective, called `name`, that has no use for a set of this kind."""
    if objective.needs == "ranked" and not ranked:
        raise MituneError(
            f'finetune.objective = {name} needs a ranked set, with an "advantage" of each image over the others of '
            "its prompt in metadata.jsonl; let `mitune pool` write one (--set pool.ranked=4), or set another objective."
        )
    if objective.needs == "rivals" and not rivals:
        raise MituneError(
            f"finetune.objective = {name} needs a set with the hard negatives of its prompts; let `mitune pool` write "
            "one (--set pool.rivals=true), or set another objective."
        )
    if objective.needs != "ranked" and ranked:
        raise MituneError(
            f"finetune.objective = {name} would learn from the worst images of a ranked set as from the best; set an "
            "objective that ranks them, such as advantage, or let `mitune pool` write a set of what is kept."
        )


def losses_of(objective: Objective, batch: Batch, network: Network) -> Tensor:
    """The losses, (B,). Raises MituneError if they are of another shape, or do not depend on the prediction."""
    losses = objective(batch, network)
    if losses.shape != batch.timesteps.shape:
        raise MituneError(
            f"The objective {type(objective).__name__} returned losses of shape {tuple(losses.shape)} for a batch of "
            f"{len(batch.timesteps)} images; return one for each, ({len(batch.timesteps)},)."
        )
    if not losses.requires_grad:
        raise MituneError(
            f"The losses of the objective {type(objective).__name__} have no gradient; let them depend on "
            "network(batch)."
        )
    return losses
