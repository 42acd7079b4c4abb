"""Which number is a reward? Scores of every candidate, held within each prompt against an exact judge.

Candidates, evidence and verdicts are the records of `select`; a killed study goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mitune.bench.pages import page
from mitune.bench.select import SelectConfig, evidence_of, study_records
from mitune.bench.variants import FREE
from mitune.config.schema import ModelConfig
from mitune.evaluation.rows import numbers, right
from mitune.evaluation.statistics import NOTHING, Array, Interval, bootstrap
from mitune.evaluation.tables import interval, number, table
from mitune.information import Trace
from mitune.information.contrast import (
    ALL,
    SIGNS,
    Band,
    Evidence,
    capped_margin,
    fits,
    normalized_margin,
    self_confidence,
    smallest_margin,
)
from mitune.information.reward import FURTHER, HARDEST, LOOK, SHARPNESS, hardest, log_odds, reward
from mitune.pool.reward import ONLINE, RIVALS
from mitune.pool.scores import SINGLE
from mitune.prompts.rivals import NEGATIVES, NULL
from mitune.run.stages import Step
from mitune.worlds.base import Listed

LEVELS = Band(LOOK.low, FURTHER.high)
UNCONFIDENT = 0.25  # the share of a prompt's images that `guarded` holds to be wrong
THIRD = 3

Free = Mapping[str, Tensor]
_interval = partial(interval, digits=2)


@dataclass(frozen=True, slots=True)
class Variant:
    """A number (M,) for each candidate of a prompt, of free scores (M,) and evidence."""

    name: str
    function: Callable[[Free, Evidence], Tensor]
    rivals: tuple[str, ...] = RIVALS
    band: Band = LEVELS
    hardest: int | None = None  # rivals of each image that are asked about at more levels than the first; None: all

    def __call__(self, free: Free, evidence: Evidence) -> Tensor:
        return self.function(free, self._of(evidence))

    def _of(self, evidence: Evidence) -> Evidence:
        return self.band.of(evidence.against(*self.rivals))

    def calls(self, evidence: Evidence) -> float:
        """Further denoiser calls a candidate, of two rows each, as in sampling."""
        needed = self._of(evidence)
        if self.hardest is None:
            return needed.calls / 2
        further = (1 + min(self.hardest, len(needed.kinds) - 1)) * (len(needed.log_snr) - 1)
        return len(SIGNS) * (len(needed.kinds) + further) / 2


def odds(evidence: Evidence, sharpness: float = SHARPNESS) -> Tensor:
    """P of `log_odds` with all rivals at all levels, (M,)."""
    return torch.sigmoid(log_odds(evidence.margins, len(evidence.kinds) - 1, sharpness))


def staged_margins(evidence: Evidence, count: int) -> Tensor:
    """Margins of each image's `count` hardest rivals at the first level, summed over all levels, (M, count)."""
    return evidence.at(hardest(Band(high=LOOK.high).of(evidence), count)).margins


def staged(free: Free, evidence: Evidence, count: int = HARDEST, *, confidence: Tensor | None = None) -> Tensor:
    """The product's reward (M,), with another count or confidence than its own."""
    likely = free[ONLINE] if confidence is None else confidence
    return reward(staged_margins(evidence, count), len(evidence.kinds) - 1, likely)


def guarded(free: Free, evidence: Evidence) -> Tensor:
    """The contrast of every image, from 0 to 1, and 0 for the least confident quarter: the first trial's reward."""
    likely = free["self-confidence"]
    return torch.where(likely < likely.nanquantile(UNCONFIDENT), 0.0, (capped_margin(evidence).clamp(min=-1) + 1) / 2)


def _of(function: Callable[[Evidence], Tensor]) -> Callable[[Free, Evidence], Tensor]:
    return lambda _free, evidence: function(evidence)


def _free(name: str) -> Variant:
    return Variant(f"`{name}`", lambda free, _: free[name], (), Band(high=-math.inf))


VARIANTS = (
    _free("mi-tune"),
    _free("self-confidence"),
    _free(ONLINE),
    Variant("`contrast` of every image: min(m/D, 1)", _of(capped_margin), (NEGATIVES,), SINGLE),
    Variant("the same, 0 for the least confident quarter", guarded, (NEGATIVES,), SINGLE),
    Variant("`fits`", _of(fits), (NEGATIVES,), SINGLE),
    Variant("P against hard negatives alone, 4 levels", _of(odds), (NEGATIVES,)),
    Variant("P against the empty prompt, 4 levels", _of(odds), (NULL,)),
    Variant("P against all rivals, 1 level", _of(odds), band=LOOK),
    Variant("P against all rivals, 2 levels", _of(odds), band=Band(LOOK.low, -2.5)),
    Variant("P against all rivals, 3 levels", _of(odds), band=Band(LOOK.low, -1.5)),
    Variant("P against all rivals, 4 levels", _of(odds)),
    Variant("the same, sharpness 1", _of(partial(odds, sharpness=1.0))),
    Variant("the same, sharpness 4", _of(partial(odds, sharpness=4.0))),
    Variant("P against all rivals, 6 levels", _of(odds), band=Band(LOOK.low)),
    Variant("P against all rivals, 8 levels", _of(odds), band=ALL),
    Variant("min m, all rivals, 4 levels", _of(smallest_margin)),
    Variant("min m/D, all rivals, 4 levels", _of(normalized_margin)),
    Variant("post-hoc self-confidence, 8 levels", _of(self_confidence), (), ALL),
    Variant("`reward`", staged, hardest=HARDEST),
    Variant("`reward` with the 2 hardest", partial(staged, count=2), hardest=2),
    Variant("`reward` with the 4 hardest", partial(staged, count=4), hardest=4),
    Variant("`reward` without self-confidence",
            lambda free, e: staged(free, e, confidence=torch.zeros_like(free[ONLINE])), hardest=HARDEST),
    Variant("`reward` with all rivals at all 4 levels",
            lambda free, e: reward(e.margins, len(e.kinds) - 1, free[ONLINE])),
)  # fmt: skip
REWARD = next(variant for variant in VARIANTS if variant.name == "`reward`")


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The M candidates of a prompt."""

    model: str
    guidance_scale: float
    category: str
    exact: Array  # (M,) 1 where exactly right and well drawn
    graded: Array  # (M,)
    values: Mapping[str, Array]  # (M,) of each variant
    calls: Mapping[str, float]


def judged(
    models: Sequence[ModelConfig],
    prompts: Sequence[Listed],
    folder: Path,
    config: SelectConfig,
    *,
    progress: Step | None = None,
) -> Iterator[Judged]:
    """Every variant of every prompt's candidates. Raises MituneError as `study_records` does."""
    for rows, tensors, where in study_records(
        models, prompts, folder, config, kinds=(*RIVALS, NULL), progress=progress
    ):
        trace = Trace.from_columns({name: rows[name].to_pylist() for name in rows.column_names})
        evidence = evidence_of(tensors, trace.dimensions)
        free = {name: score(trace) for name, score in FREE.items()}
        yield Judged(
            model=Path(where["model"]).name,
            guidance_scale=where["guidance_scale"],
            category=where["category"],
            exact=right(rows),
            graded=numbers(rows, "graded"),
            values={variant.name: variant(free, evidence).double().numpy() for variant in VARIANTS},
            calls={variant.name: variant.calls(evidence) for variant in VARIANTS},
        )


# --- Figures of a prompt that has right candidates and wrong ones -------------------------------------------------


def correlation(values: Array, truth: Array) -> float:
    """Pearson's, over the candidates that have a value; NaN where one of both does not vary."""
    known = np.isfinite(values)
    a, b = values[known] - values[known].mean(), truth[known] - truth[known].mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if np.ptp(values[known]) > 0 and np.ptp(truth[known]) > 0 else math.nan


def discernment(values: Array, exact: Array) -> float:
    """How often a right candidate is above a wrong one, a tie counting half."""
    above = values[exact == 1][:, None] - values[exact == 0][None]
    return float(((above > 0) + (above == 0) / 2).mean())


def wrong_negatives(values: Array, exact: Array) -> float:
    """The wrong share of the lowest third."""
    return float(1 - exact[values.argsort(kind="stable")[: len(values) // THIRD]].mean())


# --- The page ----------------------------------------------------------------------------------------------------


def _figures(prompts: Sequence[Judged], name: str) -> list[Interval]:
    mixed = [p for p in prompts if 0 < p.exact.mean() < 1]
    if not mixed:
        return [NOTHING] * 4
    correlations = [[correlation(p.values[name], truth) for truth in (p.exact, p.graded)] for p in mixed]
    shares = [[share(p.values[name], p.exact) for share in (discernment, wrong_negatives)] for p in mixed]
    return bootstrap(np.array(correlations), low=-1, high=1) + bootstrap(np.array(shares), low=0, high=1)


def _category(prompts: Sequence[Judged]) -> list[str]:
    """A row of the table of categories."""
    mixed = [p for p in prompts if 0 < p.exact.mean() < 1]
    shares = [f"{len(mixed)} of {len(prompts)}", number(float(np.mean([p.exact.mean() for p in prompts])), 2)]
    with_exact, _, above, wrong = _figures(prompts, REWARD.name)
    return [*shares, *map(_interval, (with_exact, above)), _wrong(mixed), _interval(wrong)]


def _wrong(prompts: Sequence[Judged]) -> str:
    """The wrong share of their candidates."""
    return number(float(np.mean([1 - p.exact.mean() for p in prompts] or [math.nan])), 2)


def markdown(study: Sequence[Judged]) -> str:
    """The tables, a section for each model."""
    head = ["score", "r with exact", "r with graded", "right above wrong", "wrong in the lowest third", "calls"]
    by_category = ["category", "prompts with both", "right", "r with exact", "right above wrong", "wrong"]
    sections = []
    for model, scale in dict.fromkeys((p.model, p.guidance_scale) for p in study):
        prompts = [p for p in study if (p.model, p.guidance_scale) == (model, scale)]
        mixed = [p for p in prompts if 0 < p.exact.mean() < 1]
        lines = []
        for variant in VARIANTS:
            calls = float(np.mean([p.calls[variant.name] for p in prompts]))
            lines.append([variant.name, *map(_interval, _figures(prompts, variant.name)), number(calls, 1)])
        categories = dict.fromkeys(p.category for p in prompts)
        parts = [[name, *_category([p for p in prompts if p.category == name])] for name in categories]
        sections.append(
            f"## {model}, guidance {scale:g}\n\n{len(prompts)} prompts × {len(prompts[0].exact)} candidates; "
            f"{len(mixed)} prompts have right ones and wrong ones, and count. Of their candidates "
            f"{_wrong(mixed)} are wrong.\n\n{table(head, lines)}\n"
            f"`reward` by category:\n\n{table([*by_category, 'wrong in the lowest third'], parts)}"
        )
    return "\n".join(sections)


def page_of(study: Sequence[Judged], command: str) -> str:
    """docs/reward.md."""
    return page("reward", command=command, tables=markdown(study), hardest=HARDEST)
