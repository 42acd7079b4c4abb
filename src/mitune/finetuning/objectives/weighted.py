"""The denoising loss, where images with more advantage weigh more."""

from __future__ import annotations

from torch import Tensor

from mitune.finetuning.objectives.base import Batch, Needs, Network, squared_distance

TEMPERATURE = 1.0  # τ, in units of the advantages
LARGEST = 20.0  # of exp(A/τ), as in AWR: no image is to be all of a batch


class Weighted:
    """w min(exp(A/τ), 20) ‖f − u‖², the mean over an image's values.

    Fitted without bounds, f is the mean of u at each z with these weights. They are not divided by their sum over a
    prompt: only their ratios count, but for the step of the optimizer, which adapts to the size of the gradient.
    All weights are positive, so a model that trains on its own guided samples drifts as it does with `denoising`.

    Source: reward-weighted regression, Peters & Schaal 2007, as AWR clips it, arXiv 1910.00177. GORS, arXiv 2307.06350,
    takes the reward itself as the weight: that is `denoising` on a set whose `weight` is the reward.
    """

    needs: Needs = "ranked"

    def __call__(self, batch: Batch, network: Network) -> Tensor:
        weights = (batch.advantages / TEMPERATURE).exp().clamp(max=LARGEST)
        return batch.weights * weights * squared_distance(network(batch), batch.target)
