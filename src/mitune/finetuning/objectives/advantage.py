"""Towards the better images of a prompt and away from the worse, as far as their advantages say."""

from __future__ import annotations

from torch import Tensor

from mitune.finetuning.objectives.base import Batch, Needs, Network, per_image, squared_distance


class Advantage:
    """w ‖f − y*‖² with y* = f₀ + A (u − f₀), the mean over an image's values.

    f₀ is the policy that the images were sampled from. Fitted without bounds, f = f₀ + E[A (u − f₀)] at each z: no
    change where all A are 0, and none to first order where those of a prompt sum to 0 and say nothing of its images. So
    what a model loses by training on its own samples, whichever they are, stays out.

    Source: DiffusionNFT, arXiv 2509.16117, with β = 1. For d = f − f₀, e = u − f₀ and its v± = f₀ ± β d, its loss
    r ‖v⁺ − u‖² + (1 − r) ‖v⁻ − u‖² = r ‖βd − e‖² + (1 − r) ‖βd + e‖² = β² ‖d − (2r − 1)/β e‖² + (free of f),
    of which the gradient is β² times that of ‖f − y*‖² with A = (2r − 1)/β.
    """

    needs: Needs = "ranked"

    def __call__(self, batch: Batch, network: Network) -> Tensor:
        base = network.reference(batch)
        target = base + per_image(batch.advantages, base) * (batch.target - base)
        return batch.weights * squared_distance(network(batch), target)
