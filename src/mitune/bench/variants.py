"""The scores of the study: every way to hold evidence against rivals, over bands of log-SNR, alone and combined.

The product keeps what came out best (`mitune.pool.scores`); the rest is named here, for the study alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from mitune.information import SCORES, Trace
from mitune.information.contrast import (
    LOG_SNR_RANGE,
    Band,
    Contrast,
    Evidence,
    divergence,
    fits,
    log_self_confidence,
    mean_normalized_margin,
    normalized_margin,
    point_wise_information,
    self_confidence,
    smallest_margin,
    standardized_margin,
)
from mitune.pool.scores import CONTRAST, SINGLE, TwoStages, best
from mitune.pool.selection import mean_rank
from mitune.prompts.rivals import NEGATIVES, NULL, OTHERS, WIDER, WORDS

_MIDDLE = sum(LOG_SNR_RANGE) / 2
BANDS: Mapping[str, Band] = MappingProxyType(
    {
        "below-0": Band(high=0.0),  # more noise than signal
        "early": Band(high=_MIDDLE),  # as sampling meets them
        "late": Band(low=_MIDDLE),
        "middle": Band(-3.0, -1.0),  # where a first look at 84 images told them apart best
        "single": SINGLE,
        "sparse": Band(stride=2),  # half the cost
    }
)
_SETS: Mapping[str, tuple[str, ...]] = {
    "negatives": (NEGATIVES,),
    "wide": (NEGATIVES, WIDER),
    "others": (OTHERS,),  # of the run
    "words": (WORDS,),  # the prompt with a word left out
    "null": (NULL,),  # the empty prompt
}


# --- Of the trajectory, for free ---------------------------------------------------------------------------------


def online_normalized(trace: Trace) -> Tensor:
    """The log-likelihood ratio against the empty prompt over ½∫‖Δε‖²dλ, (B,), both of the trajectory: m/D for free."""
    return SCORES["log-likelihood-ratio"].values(trace) / SCORES["mi-tune"].values(trace)


def online_ranks(trace: Trace) -> Tensor:
    """Mean rank of self-confidence and RFMI's dot form, (B,), which err in opposite ways."""
    return mean_rank(SCORES["self-confidence-late"].values(trace), SCORES["rfmi"].values(trace))


FREE: Mapping[str, Callable[[Trace], Tensor]] = MappingProxyType(
    {name: score.values for name, score in SCORES.items()}
    | {"online-normalized": online_normalized, "online-ranks": online_ranks}
)


# --- Of the evidence ---------------------------------------------------------------------------------------------


def _family(name: str, formula: str, function: Callable[[Evidence], Tensor], *sets: str) -> list[Contrast]:
    """A score against each set of rivals over all log-SNRs, and against the first set over each band as well."""
    whole = [Contrast(f"{name}-{rivals}", formula, function, _SETS[rivals]) for rivals in sets]
    first = sets[0]
    return whole + [Contrast(f"{name}-{first}-{b}", formula, function, _SETS[first], BANDS[b]) for b in BANDS]


_WITH = ("negatives", "wide", "others", "words")
_ALL_CONTRASTS = (
    *_family("margin", "min m", smallest_margin, *_WITH),
    *_family("normalized", "min m/D", normalized_margin, *_WITH, "null"),
    *_family("standardized", "min m/√2D", standardized_margin, *_WITH),
    *_family("mean-normalized", "mean m/D", mean_normalized_margin, *_WITH),
    *_family("information", "−log mean exp(−m)", point_wise_information, *_WITH),
    *_family("fits", "[min m > 0] − [least likely tenth]", fits, "negatives", "wide"),
    Contrast("confidence", "−mean ‖ε̂_p − ε‖²/d", self_confidence),
    *(Contrast(f"confidence-{b}", "−mean ‖ε̂_p − ε‖²/d", self_confidence, band=BANDS[b]) for b in BANDS),
    Contrast("confidence-solace", "−mean of w log ‖ε̂_p − ε‖²/d", log_self_confidence),
    Contrast("standard", "m against the empty prompt (ITD)", smallest_margin, (NULL,)),
    Contrast("orthogonal", "D from the empty prompt (ITD)", divergence, (NULL,)),
)
CONTRASTS: Mapping[str, Contrast] = MappingProxyType({contrast.name: contrast for contrast in _ALL_CONTRASTS})


# --- Of both -----------------------------------------------------------------------------------------------------


def two_stage(free: Tensor, decisive: Tensor, keep: int) -> Tensor:
    """Ranks (N,): of the `keep` best by `free`, the order by `decisive`; below them the others, by `free`.

    Ties in `decisive`, and candidates without a value, are ordered by `free`.
    """
    chosen = torch.zeros(len(free), dtype=torch.bool)
    chosen[best(free, keep)] = True
    later = torch.where(chosen, decisive.double().nan_to_num(-math.inf), -math.inf)
    rows = sorted(
        range(len(free)), key=lambda i: (chosen[i].item(), later[i].item(), free[i].nan_to_num(-math.inf).item())
    )
    ranks = torch.empty(len(free), dtype=torch.float64)
    ranks[rows] = torch.arange(1, len(free) + 1, dtype=torch.float64)
    return ranks


@dataclass(frozen=True, slots=True)
class Combination:
    """A free score of the trajectory together with a contrast: by mean rank, or as the two stages of the product."""

    name: str
    stages: TwoStages
    how: Literal["mean rank", "two stages"]

    def calls(self, evidence: Evidence) -> float:
        """Denoiser calls for each candidate of the prompt."""
        count = len(evidence.errors)
        scored = count if self.how == "mean rank" else self.stages.count(count)
        return self.stages.contrast.needs(evidence).calls * scored / count

    def __call__(self, free: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
        """(N,) ranks, from the free scores (N,) by name and the evidence of all candidates of one prompt."""
        first, second = free[self.stages.online], self.stages.contrast(evidence)
        if self.how == "mean rank":
            return mean_rank(first, second)
        return two_stage(first, second, self.stages.count(len(first)))


_GUARD = "self-confidence"
_COMBINED = tuple(
    CONTRASTS[f"{name}-{rivals}"]
    for name in ("margin", "normalized", "standardized", "information")
    for rivals in ("negatives", "wide")
)
_ALL_COMBINATIONS = (
    Combination("contrast", CONTRAST, "two stages"),
    *(Combination(f"ranks-{each.name}", TwoStages(_GUARD, each), "mean rank") for each in _COMBINED),
    *(
        Combination(f"stages-{each.name}", TwoStages(_GUARD, replace(each, band=SINGLE)), "two stages")
        for each in _COMBINED
    ),
)
COMBINATIONS: Mapping[str, Combination] = MappingProxyType({each.name: each for each in _ALL_COMBINATIONS})
