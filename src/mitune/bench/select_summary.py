"""The figures of the study of scores, from its one table of candidates alone.

The prompt is the unit: its candidates give one figure, prompts are averaged, and resampled for the intervals. A pooled
figure weighs all prompts alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mitune.evaluation.comparison import POOLED
from mitune.evaluation.metrics.base import FAILURES
from mitune.evaluation.ranking import best_share
from mitune.evaluation.rows import flags, numbers, right
from mitune.evaluation.statistics import Array, Interval, Share, bootstrap, bootstrap_ratio, kendall_tau

RESAMPLES = 2000
MARGIN = "margin-negatives"  # above 0: the asked prompt beats all its hard negatives


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model at a guidance scale."""

    model: str
    guidance_scale: float
    making: float  # denoiser calls for one candidate

    def __str__(self) -> str:
        return f"{self.model}, guidance {self.guidance_scale:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What selection has to work with in one category."""

    setting: Setting
    category: str
    prompts: int
    drawn: Interval  # exact share of all candidates: what a random choice gives
    oracle: Interval  # of the best by the judge
    right_known: Share  # of the right candidates, those whose prompt beats its hard negatives
    wrong_known: Share  # of the wrong ones, those whose prompt does not
    untied: Interval  # the highest τ that a score without ties can have, as the judge's grades have some


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one score is worth in one category ("all": over all of them)."""

    setting: Setting
    category: str
    score: str
    calls: float  # extra denoiser calls for each candidate
    tau: Interval  # Kendall's τ with the judge's graded score
    top: Interval  # exact share of the best
    middle: Interval  # of the one in the middle of the ranks
    last: Interval  # of the worst
    closed: Interval  # share of the way from a random choice to the oracle, over prompts where there is any


@dataclass(frozen=True, slots=True, kw_only=True)
class Discernment:
    """How often a score puts a right candidate above one that fails in a single way; 0.5 is chance."""

    setting: Setting
    score: str
    failure: str
    share: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that the tables and figures show."""

    candidates: int
    conditions: tuple[Condition, ...]
    qualities: tuple[Quality, ...]
    discernments: tuple[Discernment, ...]


def summarize_study(table: pa.Table, *, resamples: int = RESAMPLES) -> Result:
    """The figures of a table of candidates, by setting, category and score."""
    conditions, qualities, discernments = [], [], []
    groups: list[_Prompt] = []
    for setting in _settings(table):
        of_setting = table.filter(
            pc.and_(pc.equal(table["model"], setting.model), pc.equal(table["guidance_scale"], setting.guidance_scale))
        )
        groups = _prompts(of_setting)
        for category in [*dict.fromkeys(group.category for group in groups), POOLED]:
            within = [group for group in groups if category in (group.category, POOLED)]
            conditions.append(_condition(setting, category, within, resamples))
            qualities += _qualities(setting, category, within, resamples)
        discernments += _discernments(setting, groups, resamples)
    return Result(
        candidates=max((len(group.exact) for group in groups), default=0),
        conditions=tuple(conditions),
        qualities=tuple(qualities),
        discernments=tuple(discernments),
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The M candidates of a prompt."""

    category: str
    exact: Array  # (M,) 1 where exactly right and well drawn
    graded: Array  # (M,)
    failures: dict[str, NDArray[np.bool_]]  # (M,) each
    names: list[str]  # of the S scores
    scores: Array  # (S, M), −∞ where there is none
    calls: Array  # (S,)


def _settings(table: pa.Table) -> list[Setting]:
    rows = zip(*(table[name].to_pylist() for name in ("model", "guidance_scale", "calls.making")), strict=True)
    return [Setting(model=m, guidance_scale=g, making=c) for m, g, c in dict.fromkeys(rows)]


def _prompts(table: pa.Table) -> list[_Prompt]:
    names = [name.removeprefix("score.") for name in table.column_names if name.startswith("score.")]
    index = numbers(table, "prompt_index")
    scores = np.stack([numbers(table, f"score.{name}") for name in names])
    calls = np.stack([numbers(table, f"calls.{name}") for name in names])
    exact = right(table)
    graded, categories = numbers(table, "graded"), table["category"].to_pylist()
    failures = {name: flags(table, name) for name in FAILURES}
    prompts = []
    for prompt in np.unique(index):
        at = np.flatnonzero(index == prompt)
        prompts.append(
            _Prompt(
                category=categories[at[0]],
                exact=exact[at],
                graded=graded[at],
                failures={name: values[at] for name, values in failures.items()},
                names=names,
                scores=np.where(np.isfinite(scores[:, at]), scores[:, at], -np.inf),
                calls=calls[:, at[0]],
            )
        )
    return prompts


def _condition(setting: Setting, category: str, prompts: Sequence[_Prompt], resamples: int) -> Condition:
    figures = np.array([(prompt.exact.mean(), prompt.exact.max(), _untied(prompt.graded)) for prompt in prompts])
    drawn, oracle, untied = bootstrap(figures, low=0, high=1, resamples=resamples)
    beats = np.concatenate([prompt.scores[prompt.names.index(MARGIN)] > 0 for prompt in prompts])
    is_right = np.concatenate([prompt.exact for prompt in prompts]) == 1
    return Condition(
        setting=setting,
        category=category,
        prompts=len(prompts),
        drawn=drawn,
        oracle=oracle,
        right_known=Share(hits=int((beats & is_right).sum()), trials=int(is_right.sum())),
        wrong_known=Share(hits=int((~beats & ~is_right).sum()), trials=int((~is_right).sum())),
        untied=untied,
    )


def _untied(graded: Array) -> float:
    """Kendall's τ-b of grades (M,) with themselves, their ties broken at random; NaN where all are equal."""
    different = np.triu(graded[:, None] != graded[None], k=1).sum()
    return math.sqrt(different / math.comb(len(graded), 2)) if different else math.nan


def _qualities(setting: Setting, category: str, prompts: Sequence[_Prompt], resamples: int) -> list[Quality]:
    # (prompts, scores) each
    taus = np.array([[kendall_tau(score, prompt.graded) for score in prompt.scores] for prompt in prompts])
    top = np.array([[best_share(score, prompt.exact, 1) for score in prompt.scores] for prompt in prompts])
    middle, last = (
        np.array([[prompt.exact[_ranked(score)[place]] for score in prompt.scores] for prompt in prompts])
        for place in (math.ceil(len(prompts[0].exact) / 2) - 1, -1)
    )
    drawn = np.array([prompt.exact.mean() for prompt in prompts])[:, None]
    oracle = np.array([prompt.exact.max() for prompt in prompts])[:, None]
    shares = [bootstrap(values, low=0, high=1, resamples=resamples) for values in (top, middle, last)]
    gap, least = (np.broadcast_to(values, top.shape) for values in (oracle - drawn, -drawn))
    closed = bootstrap_ratio(top - drawn, gap, least, resamples=resamples)
    tau = bootstrap(taus, low=-1, high=1, resamples=resamples)
    calls = np.mean([prompt.calls for prompt in prompts], axis=0)
    names = prompts[0].names
    return [
        Quality(
            setting=setting,
            category=category,
            score=name,
            calls=float(calls[i]),
            tau=tau[i],
            top=shares[0][i],
            middle=shares[1][i],
            last=shares[2][i],
            closed=closed[i],
        )
        for i, name in enumerate(names)
    ]


def _ranked(score: Array) -> NDArray[np.int64]:
    return np.argsort(-score, kind="stable")


def _discernments(setting: Setting, prompts: Sequence[_Prompt], resamples: int) -> list[Discernment]:
    discernments, names = [], prompts[0].names
    for failure in FAILURES:
        rows = []
        for prompt in prompts:
            others = [values for name, values in prompt.failures.items() if name != failure]
            failed = prompt.failures[failure] & ~np.any(others, axis=0)
            is_right = prompt.exact == 1
            if failed.any() and is_right.any():
                above, below = prompt.scores[:, is_right, None], prompt.scores[:, None, failed]
                rows.append(((above > below) + 0.5 * (above == below)).mean(axis=(1, 2)))
        if rows:
            shares = bootstrap(np.array(rows), low=0, high=1, resamples=resamples)
            discernments += [
                Discernment(setting=setting, score=name, failure=failure, share=share)
                for name, share in zip(names, shares, strict=True)
            ]
    return discernments


def only(result: Result, scores: Collection[str]) -> Result:
    """The same with these scores alone."""
    return replace(
        result,
        qualities=tuple(quality for quality in result.qualities if quality.score in scores),
        discernments=tuple(each for each in result.discernments if each.score in scores),
    )


def by_share_closed(result: Result) -> list[str]:
    """Scores by what they close of the gap over all settings, the best first."""
    closed: dict[str, list[float]] = {}
    for quality in result.qualities:
        if quality.category == POOLED:
            closed.setdefault(quality.score, []).append(np.nan_to_num(quality.closed.value, nan=-9.0))
    return sorted(closed, key=lambda score: -float(np.mean(closed[score])))
