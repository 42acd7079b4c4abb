"""Contrast: does an image fit its prompt better than rival prompts? Scores from paired denoising errors. In nats.

    m(p′) = ½ ∫ ‖ε̂(z | p′) − ε‖² − ‖ε̂(z | p) − ε‖² dλ  ≈  log p(z₀ | p) − log p(z₀ | p′)        margin           (1)
    D(p′) = ½ ∫ ‖ε̂(z | p) − ε̂(z | p′)‖² dλ                                                    divergence       (2)

(1) is the standard estimator of ITD (Kong et al., 2024) with a rival prompt in place of the empty one. An exact ε̂ is a
conditional mean, so by Pythagoras E m = E D for a sample of p and E m = −E D for one of p′, whatever the prompts' size:
m/D lies near +1 or −1, while m itself grows with how much is drawn. All prompts of an image share their (λ, ε), and
noise comes as ε and −ε: what is linear in ε, the largest part of a margin's noise, cancels.

The scores are pure functions of `Evidence`; `gather` is the only thing here that calls a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from scipy.stats import rankdata
from torch import Tensor

from mitune.denoiser.network import denoiser_of, execution_device, network_output
from mitune.denoiser.opening.models import Model
from mitune.denoiser.path import NoisePath, path_of
from mitune.denoiser.reading import cut_texts
from mitune.denoiser.sampling import condition
from mitune.information.core import alpha_sigma, epsilon_and_sample
from mitune.prompts.negatives import hard_negatives
from mitune.worlds.shapes.negatives import wider_negatives

LOG_SNR_RANGE = (-5.0, 2.0)  # where prompts are told apart: below, all is noise; above, the image tells by itself
DRAWS = 8  # noise levels
SIGNS = (1, -1)  # of ε: the antithetic pair
ASKED = "asked"
RIVALS = NEGATIVES, WIDER, OTHERS, WORDS, NULL = "negatives", "wider", "others", "words", "null"
OTHER_PROMPTS = 5  # of the run that are rivals
UNLIKELY = 0.1  # the share of a prompt's images that `fits` holds to be badly drawn
_UNSAID = {"a", "an", "the", "and", "or", "of", "in", "on", "to", "at", "by", "with", "from", "is", "are", "its"}


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


_MIDDLE = sum(LOG_SNR_RANGE) / 2
ALL = Band()
BANDS: Mapping[str, Band] = MappingProxyType(
    {
        "below-0": Band(high=0.0),  # more noise than signal
        "early": Band(high=_MIDDLE),  # as sampling meets them
        "late": Band(low=_MIDDLE),
        "middle": Band(-3.0, -1.0),  # where a first look at 84 images told them apart best
        "single": Band(-2.5, -1.5),  # one level of eight
        "sparse": Band(stride=2),  # half the cost
    }
)


# --- The scores --------------------------------------------------------------------------------------------------


def smallest_margin(evidence: Evidence) -> Tensor:
    """min over rivals of m, (N,), in nats."""
    return evidence.margins.amin(dim=1)


def normalized_margin(evidence: Evidence) -> Tensor:
    """min over rivals of m/D, (N,): near +1 for a sample of the asked prompt, −1 for one of a rival."""
    return _over(evidence.margins, evidence.divergences).nan_to_num(math.inf).amin(dim=1)


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
    return _over(evidence.margins, evidence.divergences).nanmean(dim=1)


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


_SETS: Mapping[str, tuple[str, ...]] = {
    "negatives": (NEGATIVES,),
    "wide": (NEGATIVES, WIDER),  # hard negatives, and what asks for more or for something else
    "others": (OTHERS,),  # of the run
    "words": (WORDS,),  # the prompt with a word left out
    "null": (NULL,),  # the empty prompt
}


def _family(name: str, formula: str, function: Callable[[Evidence], Tensor], *sets: str) -> list[Contrast]:
    """A score against each set of rivals over all log-SNRs, and against hard negatives over each band as well."""
    found = [Contrast(f"{name}-{rivals}", formula, function, _SETS[rivals]) for rivals in sets]
    first = sets[0]
    return found + [Contrast(f"{name}-{first}-{b}", formula, function, _SETS[first], BANDS[b]) for b in BANDS]


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


# --- Several scores together -------------------------------------------------------------------------------------


def mean_rank(*scores: Tensor) -> Tensor:
    """Mean of the ranks that scores (N,) give, from 1 for the lowest; ties share theirs, NaN comes first. (N,)."""
    ranks = [rankdata(score.double().nan_to_num(-math.inf).numpy()) for score in scores]
    return torch.tensor(sum(ranks) / len(ranks), dtype=torch.float64)


def two_stage(free: Tensor, decisive: Tensor, keep: int) -> Tensor:
    """Ranks (N,): of the `keep` best by `free`, the order by `decisive`; below them the others, by `free`.

    Ties in `decisive`, and candidates without a value, are ordered by `free`.
    """
    chosen = torch.zeros(len(free), dtype=torch.bool)
    chosen[_best(free, keep)] = True
    later = torch.where(chosen, decisive.double().nan_to_num(-math.inf), -math.inf)
    rows = sorted(
        range(len(free)), key=lambda i: (chosen[i].item(), later[i].item(), free[i].nan_to_num(-math.inf).item())
    )
    ranks = torch.empty(len(free), dtype=torch.float64)
    ranks[rows] = torch.arange(1, len(free) + 1, dtype=torch.float64)
    return ranks


def _best(free: Tensor, keep: int) -> Tensor:
    """Places of the `keep` best, ties to the earlier one."""
    return free.double().nan_to_num(-math.inf).argsort(descending=True, stable=True)[:keep]


@dataclass(frozen=True, slots=True)
class Combination:
    """A free score of the trajectory together with a contrast: by mean rank, or as two stages.

    In two stages the free score keeps the best `share` of the candidates, and only they are paid for.
    """

    name: str
    free: str  # a name in information.SCORES
    contrast: Contrast
    how: Literal["mean rank", "two stages"]
    share: float = 1.0

    @property
    def formula(self) -> str:
        """Both scores, and how they decide."""
        if self.how == "mean rank":
            return f"mean rank of {self.free} and {self.contrast.formula}"
        return f"{self.contrast.formula} of the best {self.share:.0%} by {self.free}"

    def kept(self, candidates: int, keep: int = 1) -> int:
        """How many of the candidates the contrast sees: at least two for each of the `keep` that will be picked."""
        return min(candidates, max(math.ceil(self.share * candidates), 2 * keep))

    def calls(self, evidence: Evidence) -> float:
        """Denoiser calls for each candidate of the prompt."""
        count = len(evidence.errors)
        return self.contrast.needs(evidence).calls * self.kept(count) / count

    def __call__(self, free: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
        """(N,) ranks, from the free scores (N,) by name and the evidence of all candidates of one prompt."""
        first, second = free[self.free], self.contrast(evidence)
        if self.how == "mean rank":
            return mean_rank(first, second)
        return two_stage(first, second, self.kept(len(first)))


_GUARD = "self-confidence"
_SHARE = 0.25  # of the candidates that the second stage sees
_TIE = 1e-6  # a margin less than any that counts
_COMBINED = tuple(
    CONTRASTS[f"{name}-{rivals}"]
    for name in ("margin", "normalized", "standardized", "information")
    for rivals in ("negatives", "wide")
)


def _two_stages(name: str, contrast: Contrast) -> Combination:
    return Combination(name, _GUARD, replace(contrast, band=BANDS["single"]), "two stages", _SHARE)


_ALL_COMBINATIONS = (
    # The one to use: docs/selection.md
    _two_stages("contrast", Contrast("capped-negatives", "min(m/D, 1)", capped_margin, _SETS["negatives"])),
    *(Combination(f"ranks-{each.name}", _GUARD, each, "mean rank") for each in _COMBINED),
    *(_two_stages(f"stages-{each.name}", each) for each in _COMBINED),
)
COMBINATIONS: Mapping[str, Combination] = MappingProxyType({each.name: each for each in _ALL_COMBINATIONS})
POST_HOC = (*CONTRASTS, *COMBINATIONS)  # what `post_hoc` knows
FIRST_STAGES = {each.name: each.free for each in _ALL_COMBINATIONS if each.how == "two stages"}


# --- The evidence ------------------------------------------------------------------------------------------------


def words_left_out(prompt: str) -> list[str]:
    """The prompt without one of its words, for each word that says something; in order, without repeats."""
    words = prompt.split()
    said = [i for i, word in enumerate(words) if word.strip(",.").lower() not in _UNSAID]
    shorter = [" ".join(words[:i] + words[i + 1 :]) for i in said]
    return [text for text in dict.fromkeys(shorter) if text]


def rivals_of(prompt: str, prompts: Sequence[str], *, seed: int = 0) -> dict[str, list[str]]:
    """All rivals of a prompt by kind; those of the run, out of `prompts`, by a lot that hangs on seed and prompt."""
    others = [other for other in prompts if other != prompt]
    lot = random.Random(f"{seed} {prompt}")
    return {
        NEGATIVES: [negative.prompt for negative in hard_negatives(prompt)],
        WIDER: [negative.prompt for negative in wider_negatives(prompt)],
        OTHERS: lot.sample(others, min(OTHER_PROMPTS, len(others))),
        WORDS: words_left_out(prompt),
        NULL: [""],
    }


def read_whole(model: Model, rivals: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The rivals without those that a call of the model would cut: made of a long prompt, they may be longer still."""
    cut = cut_texts(model.pipe, [text for kind in rivals for text in rivals[kind]], model.call)
    return {kind: [text for text in texts if text not in cut] for kind, texts in rivals.items()}


@torch.no_grad()
def gather(
    model: Model,
    latents: Tensor,
    prompt: str,
    rivals: Mapping[str, Sequence[str]],
    *,
    band: Band = ALL,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 64,
) -> Evidence:
    """Noises latents (N, C, H, W) again and denoises them under the prompt and its rivals, given by kind.

    All images and prompts see the same `draws` noises ε, and −ε, one at the middle of each equal part of
    `LOG_SNR_RANGE`, of which `band` leaves some. Costs `Evidence.calls` an image, in batches of `batch_size`.
    """
    texts = [prompt, *(text for kind in rivals for text in rivals[kind])]
    kinds = (ASKED, *(kind for kind in rivals for _ in rivals[kind]))
    path, device = path_of(model.pipe.scheduler), execution_device(model.pipe)
    conditioning = {name: value.to(device) for name, value in condition(model, texts, batch_size).items()}
    step = (LOG_SNR_RANGE[1] - LOG_SNR_RANGE[0]) / draws
    log_snr = LOG_SNR_RANGE[0] + step * (torch.arange(draws) + 0.5)
    noises = torch.randn(draws, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
    kept = band.places(log_snr)
    log_snr, noises, step = log_snr[kept], noises[kept], step * band.stride
    rows = []
    for some in torch.split(latents, max(1, batch_size // len(texts))):
        levels = [
            _squared_norms(
                denoiser_of(model.pipe), some.to(device), conditioning, noise.to(device), level, path, batch_size
            )
            for level, noise in zip(log_snr, noises, strict=True)
        ]
        rows.append(torch.stack(levels, dim=-1).cpu())
    errors, distances = torch.cat(rows, dim=1)
    return Evidence(
        kinds=kinds, log_snr=log_snr, step=step, errors=errors, distances=distances, dimensions=latents[0].numel()
    )


def _squared_norms(
    denoiser: torch.nn.Module,
    latents: Tensor,
    conditioning: dict[str, Tensor],
    noise: Tensor,
    log_snr: Tensor,
    path: NoisePath,
    batch_size: int,
) -> Tensor:
    """‖ε̂_p − ε‖² and ‖ε̂_asked − ε̂_p‖² of n images under P prompts, means over ε and −ε, (2, n, P)."""
    alpha, sigma = (x.to(latents.device) for x in alpha_sigma(log_snr, is_flow=path.is_flow))
    timestep = path.timestep(log_snr).to(latents.device)
    prompts = len(next(iter(conditioning.values())))
    image, text = (
        index.flatten().to(latents.device)
        for index in torch.meshgrid(torch.arange(len(latents)), torch.arange(prompts), indexing="ij")
    )
    found = []
    for sign in SIGNS:
        noisy = (alpha * latents + sigma * sign * noise)[image]
        epsilons = []
        for some in torch.split(torch.arange(len(noisy)), batch_size):
            inputs = {name: value[text[some]] for name, value in conditioning.items()}
            output = network_output(denoiser, noisy[some], inputs, timestep.expand(len(some)))
            epsilons.append(
                epsilon_and_sample(output, noisy[some], alpha, sigma, path.predicts, is_flow=path.is_flow)[0]
            )
        epsilon = torch.cat(epsilons).reshape(len(latents), prompts, -1)
        errors = (epsilon - sign * noise.flatten()).square().sum(dim=2)
        distances = (epsilon - epsilon[:, :1]).square().sum(dim=2)
        found.append(torch.stack([errors, distances]))
    return (found[0] + found[1]) / 2


def told_apart(
    model: Model,
    latents: Tensor,
    prompts: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[bool]]:
    """For each of the latents (N, C, H, W): whether the prompt beside it beats each of its rivals, in their order.

    To beat is to have the lower denoising error, a margin (1) above 0; `rivals` has those of every prompt.
    """
    found: list[list[bool]] = [[] for _ in prompts]
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        against = read_whole(model, {NEGATIVES: rivals[prompt]})
        evidence = gather(model, latents[rows], prompt, against, draws=draws, seed=seed, batch_size=batch_size)
        for row, margins in zip(rows, evidence.margins, strict=True):
            found[row] = (margins > 0).tolist()
    return found


def post_hoc(
    name: str,
    model: Model,
    latents: Tensor,
    prompt: str,
    rivals: Mapping[str, Sequence[str]],
    free: Mapping[str, Tensor],
    *,
    keep: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """The contrast or combination of that name for the candidates (N, C, H, W) of a prompt, (N,), float64.

    rivals: by kind, as `Contrast.rivals` names them; free: the on-line scores (N,); keep: how many will be picked.
    Only what the score needs is paid for: in two stages, candidates that the free score leaves out come back as NaN,
    and if there is no rival the free score decides alone, as it does among those that the second stage holds equal.
    """
    combination = COMBINATIONS.get(name)
    contrast = CONTRASTS[name] if combination is None else combination.contrast
    needed = read_whole(model, {kind: rivals[kind] for kind in contrast.rivals})
    kept = torch.arange(len(latents))
    if combination is not None and combination.how == "two stages":
        first = free[combination.free].double()
        kept = _best(first, combination.kept(len(latents), keep))
        kept = kept[first[kept].isfinite()]
        if not len(kept) or (contrast.rivals and not any(needed.values())):
            return first
    evidence = gather(model, latents[kept], prompt, needed, band=contrast.band, seed=seed, batch_size=batch_size)
    values = torch.full((len(latents),), math.nan, dtype=torch.float64)
    values[kept] = contrast.of_needed(evidence)
    if combination is None:
        return values
    if combination.how == "mean rank":
        return mean_rank(free[combination.free], values)
    values[kept] -= _TIE * torch.arange(len(kept))  # `kept` begins with the best by the free score
    return values
