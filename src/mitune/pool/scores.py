"""The scores that a pool selects by: on-line ones, those that ask the model again, metrics, and anybody's own.

A score of one's own is a function of the `Candidates` of a prompt in a file mine.py, named as `mine:sharp`:

    def sharp(candidates):  # (M,), higher is better; NaN is never picked
        return candidates.latents.flatten(1).std(dim=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import decode
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ChoosyMetric, ImageMetric, judge, merit
from mitune.evaluation.metrics.table import METRICS
from mitune.information import SCORES, Trace
from mitune.information.contrast import Band, Contrast, Evidence, capped_margin, fits
from mitune.pool.evidence import gather
from mitune.pool.reward import RIVALS as REWARD_RIVALS
from mitune.pool.reward import reward_of
from mitune.pool.selection import CONTROLS, Rule
from mitune.prompts.negatives import load_negatives
from mitune.prompts.rivals import KINDS, NEGATIVES, Rivals
from mitune.resolver import Row, Table, is_location
from mitune.worlds.base import WORLDS, Negative

SINGLE = Band(-2.5, -1.5)  # one log-SNR of eight
SHARE = 0.25  # of the candidates that a second stage sees


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The M finished candidates of a prompt, and what they can be asked."""

    model: Model
    prompt: str
    rivals: Rivals  # of the prompt, by kind, without those that a call of the model would cut
    latents: Tensor  # (M, C, H, W); zeros where one came out as NaN or was dropped
    trace: Trace  # of their sampling
    online: Mapping[str, Tensor]  # (M,) each: the scores of `SCORES`; NaN where one came out as NaN or was dropped
    keep: int  # how many will be picked
    seed: int
    batch_size: int  # of the denoiser

    def evidence(self, rivals: Sequence[str], band: Band, places: Tensor, prompts: Tensor | None = None) -> Evidence:
        """What the model says of the candidates at `places` (N,) under these kinds of rivals, at log-SNRs of `band`.

        prompts: (N, K) those of the prompts that each is to see, as `gather` takes them; all by default.
        """
        return gather(
            self.model,
            self.latents[places],
            self.prompt,
            {kind: self.rivals[kind] for kind in rivals},
            band=band,
            places=prompts,
            seed=self.seed,
            batch_size=self.batch_size,
        )

    def contrast(self, contrast: Contrast, places: Tensor | None = None) -> Tensor:
        """(M,), float64, of the candidates at `places` (all of them by default), the others being NaN.

        Only what the contrast needs is paid for.
        """
        places = torch.arange(len(self.latents)) if places is None else places
        values = torch.full((len(self.latents),), math.nan, dtype=torch.float64)
        values[places] = contrast.of_needed(self.evidence(contrast.rivals, contrast.band, places))
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolScore:
    """A number for each candidate of a prompt; higher is better.

    rivals: the kinds that it needs. online: the on-line score that decides in its place while candidates are being
    made, and among those that it holds equal; None where all candidates must be finished.
    """

    name: str
    function: Callable[[Candidates], Tensor]
    formula: str = ""
    rivals: tuple[str, ...] = ()
    online: str | None = None
    metric: ImageMetric | None = None  # where it is the judgment of one

    @property
    def is_online(self) -> bool:
        """Whether it is known without a further call of the model."""
        return self.online == self.name

    def __call__(self, candidates: Candidates) -> Tensor:
        """(M,), float64. Raises MituneError where its function returns something else."""
        values = torch.as_tensor(self.function(candidates), dtype=torch.float64).cpu()
        if values.shape != (len(candidates.latents),):
            raise MituneError(
                f"The score {self.name} returned values of shape {tuple(values.shape)} for {len(candidates.latents)} "
                "candidates; return one number for each."
            )
        return values


@dataclass(frozen=True, slots=True)
class TwoStages:
    """The on-line score keeps the best `share` of the candidates, and the contrast orders them; the others have none.

    Without a rival, the on-line score decides alone.
    """

    online: str
    contrast: Contrast
    share: float = SHARE

    def count(self, candidates: int, keep: int = 1) -> int:
        """How many the contrast sees: at least two for each of the `keep` that will be picked."""
        return min(candidates, max(math.ceil(self.share * candidates), 2 * keep))

    def __call__(self, candidates: Candidates) -> Tensor:
        """(M,), float64."""
        first = candidates.online[self.online].double()
        places = best(first, self.count(len(first), candidates.keep))
        places = places[first[places].isfinite()]
        decides_alone = not len(places) or not any(candidates.rivals[kind] for kind in self.contrast.rivals)
        return first if decides_alone else candidates.contrast(self.contrast, places)


def best(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of values (M,), ties to the earlier one, NaN last."""
    return values.double().nan_to_num(-math.inf).argsort(descending=True, stable=True)[:count]


CONTRAST = TwoStages("self-confidence", Contrast("capped", "min(m/D, 1)", capped_margin, (NEGATIVES,), SINGLE))
FITS = Contrast("fits", "[min m > 0] − [least likely tenth]", fits, (NEGATIVES,), SINGLE)
POST_HOC: Mapping[str, PoolScore] = MappingProxyType(
    {
        "contrast": PoolScore(  # the one to use: docs/selection.md
            name="contrast",
            function=CONTRAST,
            formula=f"{CONTRAST.contrast.formula} of the best {SHARE:.0%} by {CONTRAST.online}",
            rivals=CONTRAST.contrast.rivals,
            online=CONTRAST.online,
        ),
        "fits": PoolScore(
            name="fits",
            function=lambda candidates: candidates.contrast(FITS),
            formula=FITS.formula,
            rivals=FITS.rivals,
        ),
        "reward": PoolScore(  # for objectives that weigh every candidate: docs/reward.md
            name="reward",
            function=reward_of,
            formula="P(made by the prompt, and by none of its rivals), with self-confidence",
            rivals=REWARD_RIVALS,
        ),
    }
)


def of_metric(name: str, metric: ImageMetric) -> PoolScore:
    """What a metric says of the pictures; what cannot be read comes last."""

    def judged(candidates: Candidates) -> Tensor:
        images = list(decode(candidates.model, candidates.latents))
        judgments = judge(metric, images, [candidates.prompt] * len(images))
        return torch.tensor([merit(metric, judgment) - judgment.malformed for judgment in judgments])

    return PoolScore(name=name, function=judged, formula=f"the metric {metric.name}", metric=metric)


def _online(name: str) -> PoolScore:
    return PoolScore(
        name=name, function=lambda candidates: candidates.online[name], formula=SCORES[name].formula, online=name
    )


class Function(Protocol):
    """A score of one's own: (M,), higher is better; NaN is never picked."""

    def __call__(self, candidates: Candidates, /) -> Tensor: ...


POOL_SCORES: Table[Function] = Table(
    "score",
    Function,
    {name: Row(score.formula, score) for name, score in (*POST_HOC.items(), *((n, _online(n)) for n in SCORES))},
)


def score_named(name: str) -> PoolScore:
    """The score or metric of that name, or the one in anybody's own file, `package.module:attribute`.

    Raises MituneError for an unknown name, and for a file or an attribute of it that cannot be had.
    """
    if name in METRICS.rows:
        return of_metric(name, METRICS.resolve(name))
    value = POOL_SCORES.find(name)
    if hasattr(value, "higher_is_better"):
        return of_metric(name, METRICS.fitting(name, value))
    function = POOL_SCORES.fitting(name, value)
    return function if isinstance(function, PoolScore) else PoolScore(name=name, function=function, rivals=KINDS)


def scores_of(rules: Iterable[Rule], prompts: Sequence[str] = ()) -> dict[str, PoolScore]:
    """The scores that rules go by, by name, without the controls.

    Raises MituneError like `score_named`, and for prompts that a metric among them cannot judge by.
    """
    scores = {rule.by: score_named(rule.by) for rule in rules if rule.by not in CONTROLS}
    for score in scores.values():
        if isinstance(score.metric, ChoosyMetric):
            score.metric.check(prompts)
    return scores


def want_negatives(scores: Mapping[str, PoolScore]) -> bool:
    """Whether some of these scores hold an image against hard negatives of its prompt."""
    return any(NEGATIVES in score.rivals for score in scores.values())


def own_negatives(
    file: str | None, prompts: Collection[str], model: Model, *, wanted: bool
) -> dict[str, list[Negative]] | None:
    """The user's own hard negatives, by prompt, from a file or a world (`mine:world`); None without these.

    wanted: whether anything needs them. Raises MituneError for one that nothing needs, that cannot be read, or that has
    none for any of the prompts.
    """
    if file is None:
        return None
    if not wanted:
        raise MituneError(
            f"pool.negatives = {file}, but no score of pool.select asks for hard negatives; leave it out, or select by "
            "one that does, e.g. contrast."
        )
    if is_location(file):
        world = WORLDS.resolve(file)
        negatives = {p: known for p in prompts if (known := world.negatives(p)) is not None}
    else:
        negatives = load_negatives(Path(file), model)
    if not any(prompt in negatives for prompt in prompts):
        raise MituneError(f"{file} has hard negatives for none of the prompts; write them as the list of prompts does.")
    return negatives
