"""Contrast: does an image fit its prompt better than rival prompts? Scores from paired denoising errors. In nats.

    m(p′) = ½ ∫ ‖ε̂(z | p′) − ε‖² − ‖ε̂(z | p) − ε‖² dλ  ≈  log p(z₀ | p) − log p(z₀ | p′)        margin           (1)
    D(p′) = ½ ∫ ‖ε̂(z | p) − ε̂(z | p′)‖² dλ                                                    divergence       (2)

(1) is the standard estimator of ITD (Kong et al., 2024) with a rival prompt in place of the empty one. An exact ε̂ is a
conditional mean, so by Pythagoras E m = E D for a sample of p and E m = −E D for one of p′, whatever the prompts' size:
m/D lies near +1 or −1, while m itself grows with how much is drawn. All prompts of an image share their (λ, ε), and
noise comes as ε and −ε: what is linear in ε, the largest part of a margin's noise, cancels.

This file has the mathematics and knows no model; `mitune.pool.evidence` gathers the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG_SNR_RANGE = (-5.0, 2.0)  # where prompts are told apart: below, all is noise; above, the image tells by itself
SIGNS = (1, -1)  # of ε: the antithetic pair
ASKED = "asked"  # the kind of the prompt itself, beside the kinds of its rivals
CHOSEN = "chosen"  # that of rivals which differ from image to image
UNLIKELY = 0.1  # the share of a prompt's images that `fits` holds to be badly drawn


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Evidence:
    """What a denoiser says of N images under P prompts, the asked one first, at D log-SNRs.

    `kinds` says of each prompt why it is there: "asked", or the kind of rival.
    """

    kinds: tuple[str, ...]  # P
    log_snr: Tensor  # (D,)
    step: float  # dλ: what each of them stands for
    errors: Tensor  # (N, P, D) ‖ε̂(z | p) − ε‖², mean over ε and −ε
    distances: Tensor  # (N, P, D) ‖ε̂(z | asked) − ε̂(z | p)‖², likewise
    dimensions: int  # of z₀

    @property
    def calls(self) -> int:
        """Denoiser calls behind each image."""
        return len(SIGNS) * len(self.kinds) * len(self.log_snr)

    @property
    def margins(self) -> Tensor:
        """(1) against each rival, (N, P − 1), in nats."""
        return 0.5 * self.step * (self.errors[:, 1:] - self.errors[:, :1]).double().sum(dim=2)

    @property
    def divergences(self) -> Tensor:
        """(2) from each rival, (N, P − 1), in nats."""
        return 0.5 * self.step * self.distances[:, 1:].double().sum(dim=2)

    def against(self, *kinds: str) -> Evidence:
        """The same of the asked prompt and these kinds of rivals alone."""
        kept = [i for i, kind in enumerate(self.kinds) if kind in (ASKED, *kinds)]
        return replace(
            self,
            kinds=tuple(self.kinds[i] for i in kept),
            errors=self.errors[:, kept],
            distances=self.distances[:, kept],
        )

    def at(self, places: Tensor) -> Evidence:
        """The same of the prompts at `places` (N, K), which differ from image to image, the asked one first."""
        index = places[:, :, None].expand(-1, -1, len(self.log_snr))
        return replace(
            self,
            kinds=(ASKED, *[CHOSEN] * (places.shape[1] - 1)),
            errors=self.errors.gather(1, index),
            distances=self.distances.gather(1, index),
        )


@dataclass(frozen=True, slots=True)
class Band:
    """The log-SNRs that count: those in [low, high), and of them every `stride`-th."""

    low: float = -math.inf
    high: float = math.inf
    stride: int = 1

    def places(self, log_snr: Tensor) -> Tensor:
        """Where they are among these (D,)."""
        return ((log_snr >= self.low) & (log_snr < self.high)).nonzero()[:: self.stride, 0]

    def of(self, evidence: Evidence) -> Evidence:
        """The same at these log-SNRs alone."""
        kept = self.places(evidence.log_snr)
        return replace(
            evidence,
            log_snr=evidence.log_snr[kept],
            step=evidence.step * self.stride,
            errors=evidence.errors[..., kept],
            distances=evidence.distances[..., kept],
        )


ALL = Band()


# --- The scores --------------------------------------------------------------------------------------------------


def smallest_margin(evidence: Evidence) -> Tensor:
    """min over rivals of m, (N,), in nats."""
    return evidence.margins.amin(dim=1)


def normalized_margins(evidence: Evidence) -> Tensor:
    """m/D against each rival, (N, P − 1): near +1 for a sample of the asked prompt, −1 for one of the rival."""
    return _over(evidence.margins, evidence.divergences)


def normalized_margin(evidence: Evidence) -> Tensor:
    """min over rivals of m/D, (N,)."""
    return normalized_margins(evidence).nan_to_num(math.inf).amin(dim=1)


def capped_margin(evidence: Evidence) -> Tensor:
    """min over rivals of min(m/D, 1), (N,): a sample of the asked prompt has m/D = 1 in the mean, so that what lies
    above is no better for it, but noise, or more than was asked for."""
    return normalized_margin(evidence).clamp(max=1.0)


def standardized_margin(evidence: Evidence) -> Tensor:
    """min over rivals of m/√(2D), (N,), in standard errors: a Gaussian log-likelihood ratio with mean D has variance
    2D, so that a rival which differs in little, and is told apart with much noise, counts less than in m/D."""
    return _over(evidence.margins, (2 * evidence.divergences).sqrt()).nan_to_num(math.inf).amin(dim=1)


def mean_normalized_margin(evidence: Evidence) -> Tensor:
    """mean over rivals of m/D, (N,)."""
    return normalized_margins(evidence).nanmean(dim=1)


def _over(margins: Tensor, scale: Tensor) -> Tensor:
    """Their ratio, NaN for a rival that the model reads as the asked prompt itself (unknown words, a cut text)."""
    return torch.where(scale > 0, margins / scale, math.nan)


def point_wise_information(evidence: Evidence) -> Tensor:
    """log p(z₀ | p) − log mean over rivals p′ of p(z₀ | p′), (N,), in nats.

    With p itself among the P − 1 rivals it would be the point-wise MI under a uniform prior over P prompts, a rising
    function of this one, but flat at log P, where most candidates then tie.
    """
    return math.log(len(evidence.kinds) - 1) - torch.logsumexp(-evidence.margins, dim=1)


def self_confidence(evidence: Evidence) -> Tensor:
    """−mean of ‖ε̂_p − ε‖²/d over log-SNR, (N,): no rivals. After SOLACE (arXiv 2603.00918)."""
    return -evidence.errors[:, 0].double().mean(dim=1) / evidence.dimensions


def log_self_confidence(evidence: Evidence) -> Tensor:
    """−mean of w log(‖ε̂_p − ε‖²/d), w ∝ t(1 − t) in flow time t, (N,): SOLACE's form (arXiv 2603.00918)."""
    time = torch.sigmoid(-evidence.log_snr.double() / 2)
    weights = time * (1 - time)
    values = (evidence.errors[:, 0].double() / evidence.dimensions).log()
    return -(values * weights).sum(dim=1) / weights.sum()


def fits(evidence: Evidence) -> Tensor:
    """Does an image fit, as far as the model can tell? (N,): 1 where all rivals are beaten, else 0; one less where the
    image is among the least likely tenth of its prompt's. What it cannot tell apart it leaves equal."""
    likely = self_confidence(evidence)
    unlikely = likely < likely.nanquantile(UNLIKELY)
    return torch.where(likely.isfinite(), (smallest_margin(evidence) > 0).double() - unlikely.double(), math.nan)


def divergence(evidence: Evidence) -> Tensor:
    """D from the one rival, (N,), in nats: from the empty prompt it is the orthogonal estimator of ITD."""
    return evidence.divergences[:, 0]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A number for each image from `Evidence`; higher is better. `rivals` and `band` say what it needs of it.

    rivals: their kinds; empty for a score without rivals.
    """

    name: str
    formula: str
    function: Callable[[Evidence], Tensor]
    rivals: tuple[str, ...] = ()
    band: Band = ALL

    def needs(self, evidence: Evidence) -> Evidence:
        """The part of the evidence that the score rests on; its `calls` are what the score costs an image."""
        return self.band.of(evidence.against(*self.rivals))

    def __call__(self, evidence: Evidence) -> Tensor:
        """(N,), float64; NaN where the prompt has no rival of the kind, or a value is not finite."""
        return self.of_needed(self.needs(evidence))

    def of_needed(self, evidence: Evidence) -> Tensor:
        """The same, where there is no other evidence than it needs."""
        if self.rivals and len(evidence.kinds) == 1:
            return torch.full((len(evidence.errors),), math.nan, dtype=torch.float64)
        value = self.function(evidence)
        return torch.where(value.isfinite(), value, math.nan)
