"""Tables and figures of the study of scores, from its one table of candidates alone.

The prompt is the unit: its candidates give one figure, prompts are averaged, and resampled for the intervals. A pooled
figure weighs all prompts alike.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mitune.bench.select import FAILURES
from mitune.evaluation.statistics import (
    POOLED,
    Interval,
    best_share,
    bootstrap,
    bootstrap_ratio,
    flags,
    kendall_tau,
    numbers,
)
from mitune.worlds.shapes.check import Share

RESAMPLES = 2000
# One of each kind, for a summary.
SHOWN = (
    "mi-tune", "mi-tune-release", "rfmi", "rfmi-squared", "rfmi-release", "early", "late", "log-likelihood-ratio",
    "self-confidence", "self-confidence-late", "online-normalized", "online-ranks", "standard", "orthogonal",
    "confidence", "confidence-below-0", "confidence-solace", "information-others", "normalized-words",
    "margin-negatives", "normalized-negatives", "standardized-negatives", "information-negatives", "margin-wide",
    "normalized-wide", "standardized-wide", "information-wide", "normalized-negatives-early",
    "normalized-negatives-middle", "normalized-negatives-single", "ranks-normalized-negatives",
    "ranks-normalized-wide", "ranks-information-wide", "contrast", "stages-normalized-wide",
    "stages-standardized-negatives", "fits-negatives", "fits-negatives-below-0", "fits-negatives-single", "fits-wide",
)  # fmt: skip
MARGIN = "margin-negatives"  # above 0: the asked prompt beats all its hard negatives

Array = NDArray[np.float64]


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
    right_known: Share  # own right candidates whose prompt beats its hard negatives
    wrong_known: Share  # own wrong candidates whose prompt does not
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
        own = table.filter(
            pc.and_(pc.equal(table["model"], setting.model), pc.equal(table["guidance_scale"], setting.guidance_scale))
        )
        groups = _prompts(own)
        for category in [*dict.fromkeys(group.category for group in groups), POOLED]:
            some = [group for group in groups if category in (group.category, POOLED)]
            conditions.append(_condition(setting, category, some, resamples))
            qualities += _qualities(setting, category, some, resamples)
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
    exact = numbers(table, "exact") * ~flags(table, "malformed")
    graded, categories = numbers(table, "graded"), table["category"].to_pylist()
    failures = {name: flags(table, name) for name in FAILURES}
    found = []
    for prompt in np.unique(index):
        at = np.flatnonzero(index == prompt)
        found.append(
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
    return found


def _condition(setting: Setting, category: str, prompts: Sequence[_Prompt], resamples: int) -> Condition:
    figures = np.array([(prompt.exact.mean(), prompt.exact.max(), _untied(prompt.graded)) for prompt in prompts])
    drawn, oracle, untied = bootstrap(figures, low=0, high=1, resamples=resamples)
    beats = np.concatenate([prompt.scores[prompt.names.index(MARGIN)] > 0 for prompt in prompts])
    right = np.concatenate([prompt.exact for prompt in prompts]) == 1
    return Condition(
        setting=setting,
        category=category,
        prompts=len(prompts),
        drawn=drawn,
        oracle=oracle,
        right_known=Share(hits=int((beats & right).sum()), trials=int(right.sum())),
        wrong_known=Share(hits=int((~beats & ~right).sum()), trials=int((~right).sum())),
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
    found, names = [], prompts[0].names
    for failure in FAILURES:
        rows = []
        for prompt in prompts:
            others = [values for name, values in prompt.failures.items() if name != failure]
            failed = prompt.failures[failure] & ~np.any(others, axis=0)
            right = prompt.exact == 1
            if failed.any() and right.any():
                above, below = prompt.scores[:, right, None], prompt.scores[:, None, failed]
                rows.append(((above > below) + 0.5 * (above == below)).mean(axis=(1, 2)))
        if rows:
            shares = bootstrap(np.array(rows), low=0, high=1, resamples=resamples)
            found += [
                Discernment(setting=setting, score=name, failure=failure, share=share)
                for name, share in zip(names, shares, strict=True)
            ]
    return found


# --- Markdown ----------------------------------------------------------------------------------------------------


def only(result: Result, scores: Collection[str]) -> Result:
    """The same with these scores alone."""
    return replace(
        result,
        qualities=tuple(quality for quality in result.qualities if quality.score in scores),
        discernments=tuple(each for each in result.discernments if each.score in scores),
    )


def tables_of(result: Result) -> str:
    """All tables in Markdown, a section for each setting; scores from the one that closes most of the gap down."""
    sections = []
    for setting in dict.fromkeys(quality.setting for quality in result.qualities):
        pooled = _best_first(q for q in result.qualities if q.setting == setting and q.category == POOLED)
        sections += [
            f"## {setting}",
            f"### What there is to gain, with {result.candidates} candidates a prompt",
            _conditions_table([c for c in result.conditions if c.setting == setting]),
            "### Every score, over all categories",
            _scores_table(setting, pooled),
            "### Share of the gap closed, by category",
            _categories_table([q.score for q in pooled], [q for q in result.qualities if q.setting == setting]),
            "### Right above wrong, by kind of failure",
            _failures_table([q.score for q in pooled], [d for d in result.discernments if d.setting == setting]),
            f"### Exactly right at rank 1, {math.ceil(result.candidates / 2)} and {result.candidates} by the score",
            _table(
                ["score", "first", "middle", "last"],
                [[q.score, str(q.top), str(q.middle), str(q.last)] for q in pooled],
            ),
        ]
    return "\n\n".join(sections) + "\n"


def prediction_of(result: Result, score: str) -> str:
    """Does what a model recognizes predict what a score gains? A Markdown table and Kendall's τ over its rows.

    A row is a category in a setting. Promised is the share of own wrong candidates that the model recognizes, times
    the gap from random to oracle; gained is what the top-1 of the score adds to a random choice.
    """
    gained = {
        (q.setting, q.category): q.top.value for q in result.qualities if q.score == score and q.category != POOLED
    }
    rows = []
    for c in result.conditions:
        if c.category != POOLED and c.wrong_known.trials:
            gap = c.oracle.value - c.drawn.value
            gain = gained[c.setting, c.category] - c.drawn.value
            rows.append((c, gap, c.wrong_known.value * gap, gain))
    figures = np.array([(c.wrong_known.value, gap, promised, gain) for c, gap, promised, gain in rows])
    taus = [_number(kendall_tau(column, figures[:, 3])) for column in figures[:, :3].T] if len(rows) > 1 else ["–"] * 3
    head = ["setting", "category", "own wrong recognized", "gap to close", "promised", f"gained by {score}"]
    lines = [
        [str(c.setting), c.category, *map(_number, (c.wrong_known.value, gap, promised, gain))]
        for c, gap, promised, gain in rows
    ]
    lines.append(["τ with what is gained", "", *taus, ""])
    return _table(head, lines) + "\n"


def _best_first(qualities: Iterable[Quality]) -> list[Quality]:
    return sorted(qualities, key=lambda q: -np.nan_to_num(q.closed.value, nan=-np.inf))


def _conditions_table(conditions: Sequence[Condition]) -> str:
    head = ["category", "prompts", "random", "oracle", "own right recognized", "own wrong recognized"]
    head.append("highest τ without ties")
    rows = [
        [c.category, str(c.prompts), *map(_interval, (c.drawn, c.oracle)), *map(_share, (c.right_known, c.wrong_known))]
        + [_interval(c.untied)]
        for c in conditions
    ]
    return _table(head, rows)


def _share(share: Share) -> str:
    return str(share) if share.trials else "–"


def _scores_table(setting: Setting, qualities: Sequence[Quality]) -> str:
    head = ["score", "τ with the judge", "top-1 exact", "gap closed", f"extra calls (making one: {setting.making:g})"]
    rows = [[q.score, _interval(q.tau), _interval(q.top), _interval(q.closed), f"{q.calls:.1f}"] for q in qualities]
    return _table(head, rows)


def _categories_table(scores: Sequence[str], qualities: Sequence[Quality]) -> str:
    categories = list(dict.fromkeys(q.category for q in qualities))
    at = {(q.score, q.category): q.closed.value for q in qualities}
    return _table(["score", *categories], [[s, *(_number(at[s, c]) for c in categories)] for s in scores])


def _failures_table(scores: Sequence[str], discernments: Sequence[Discernment]) -> str:
    counts = {d.failure: d.share.prompts for d in discernments}
    at = {(d.score, d.failure): d.share for d in discernments}
    head = ["score", *(f"{name} ({count} prompts)" for name, count in counts.items())]
    return _table(head, [[score, *(_interval(at[score, name]) for name in counts)] for score in scores])


def _interval(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    return f"{_number(interval.value)} [{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# --- Figures -----------------------------------------------------------------------------------------------------


def tau_figure(result: Result) -> bytes:
    """Kendall's τ by score and category, a heat map for each setting; PNG."""
    settings = list(dict.fromkeys(q.setting for q in result.qualities))
    scores = _order(result)
    figure = Figure(figsize=(3.2 + 3.4 * len(settings), 1.2 + 0.19 * len(scores)), layout="constrained")
    panels: Any = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        own = [q for q in result.qualities if q.setting == setting]
        categories = list(dict.fromkeys(q.category for q in own))
        at = {(q.score, q.category): q.tau.value for q in own}
        values = np.array([[at[score, category] for category in categories] for score in scores])
        picture = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(categories)), categories, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(scores)), scores if axes is panels[0] else [""] * len(scores), fontsize=7)
        axes.set_title(str(setting), fontsize=8)
    figure.colorbar(picture, ax=list(panels), label="Kendall's τ with the judge", shrink=0.3)
    return _png(figure)


def gap_figure(result: Result) -> bytes:
    """Share of the gap from random to oracle that each score closes over all categories, with 95 % intervals; PNG."""
    settings = list(dict.fromkeys(q.setting for q in result.qualities))
    scores = _order(result)
    figure = Figure(figsize=(7, 1 + 0.19 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for index, setting in enumerate(settings):
        at = {q.score: q.closed for q in result.qualities if q.setting == setting and q.category == POOLED}
        offset = (index - (len(settings) - 1) / 2) * 0.6 / len(settings)
        places = [row + offset for row in range(len(scores))]
        low, high = [at[s].low for s in scores], [at[s].high for s in scores]
        axes.hlines(places, low, high, color=f"C{index}", linewidth=1.5, alpha=0.6, label=str(setting))
        axes.plot([at[s].value for s in scores], places, "o", color=f"C{index}", markersize=3.5)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(scores)), scores, fontsize=7)
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlabel("share of the gap from random to oracle that is closed")
    axes.legend(fontsize=7, loc="upper left")
    axes.grid(axis="x", linewidth=0.4)
    return _png(figure)


def _order(result: Result) -> list[str]:
    """Scores by what they close over all settings, the best first."""
    closed: dict[str, list[float]] = {}
    for quality in result.qualities:
        if quality.category == POOLED:
            closed.setdefault(quality.score, []).append(np.nan_to_num(quality.closed.value, nan=-9.0))
    return sorted(closed, key=lambda score: -float(np.mean(closed[score])))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
