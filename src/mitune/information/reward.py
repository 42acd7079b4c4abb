"""The reward: how probable is it, to the model itself, that an image was made by its prompt? A number for training.

Selection needs the best candidate alone; an objective that weighs all candidates of a prompt needs a number for each,
which goes up with the chance that it is right. For an image x of p or of one of K rivals, p as likely as all of them
together, the margins m(p′) = log p(x | p)/p(x | p′) of `contrast` give

    log P/(1 − P) = log K − log Σ exp(−m(p′))                                                                   (1)

Prompts that the image does not resemble add nothing to the sum. So one look at one noise level, at all rivals, tells
which few are worth asking about at further levels: the `hardest` ones of each image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mitune.information.contrast import Band, Evidence

LOOK = Band(-4.0, -3.0)  # one log-SNR of eight: all rivals
FURTHER = Band(-3.0, -1.0)  # the next three: the hardest rivals of each image
HARDEST = 6  # more change nothing, for more calls (docs/reward.md)
SHARPNESS = 2.0  # of margins: four levels of eight hold but a part of each (likewise)
CONFIDENCE = 0.5  # nats that a standard deviation of self-confidence counts; from a quarter to one does as well


def hardest(evidence: Evidence, count: int = HARDEST) -> Tensor:
    """Places (N, 1 + count) of the asked prompt and of the rivals with the least margins of each image, least first."""
    rivals = evidence.margins.nan_to_num(math.inf).argsort(dim=1, stable=True)[:, :count] + 1
    return torch.cat([torch.zeros_like(rivals[:, :1]), rivals], dim=1)


def log_odds(margins: Tensor, rivals: int, sharpness: float = SHARPNESS) -> Tensor:
    """(1) for `sharpness` times the margins (N, k), (N,); rivals that are not among those count as beaten."""
    if not rivals:
        return margins.new_zeros(len(margins))
    return math.log(rivals) - torch.logsumexp(-sharpness * margins, dim=1)


def reward(margins: Tensor, rivals: int, confidence: Tensor) -> Tensor:
    """P of (1) with the self-confidence (N,) of a prompt's images, in their own standard deviations: (N,), in [0, 1].

    Margins see what a rival says, an object too few or a color exchanged; self-confidence sees what none says, an
    object too many or half of one. Without rivals it decides alone. NaN where one of both is.
    """
    return torch.sigmoid(log_odds(margins, rivals) + CONFIDENCE * _standardized(confidence.double()))


def _standardized(values: Tensor) -> Tensor:
    """(v − mean)/std over those that are finite, the others NaN; zero where all are equal."""
    finite = values[values.isfinite()]
    if len(finite) < 2:
        return values - values  # 0, or NaN
    return (values - finite.mean()) / finite.std().clamp(min=torch.finfo(values.dtype).tiny)
