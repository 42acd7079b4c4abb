"""What does racing lose? Schedules replayed on full pools, of which every score is known after every step.

A prompt's candidates run to the end, and their scores so far are noted at each step: from these records, any schedule
by any score is replayed as `mitune.pool.race` would have run it, since those that stay come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch

from mitune.bench.pages import page
from mitune.bench.select import judge_of
from mitune.config.schema import GRADUAL, ModelConfig, Rungs
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.pictures import decode
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.reading import refuse_cut
from mitune.denoiser.sampling import generate, requests_of
from mitune.evaluation.metrics.base import judge
from mitune.evaluation.rows import numbers
from mitune.evaluation.statistics import Array, Interval, bootstrap, bootstrap_ratio, share_of_gain
from mitune.evaluation.tables import interval, table
from mitune.information import SCORES
from mitune.pool.evidence import gather
from mitune.pool.race import GROUP, Race
from mitune.pool.scores import CONTRAST, score_named
from mitune.pool.selection import select
from mitune.prompts.rivals import rivals_of
from mitune.run.locks import sole_worker
from mitune.run.records import Records
from mitune.run.stages import Step
from mitune.run.store import claim
from mitune.run.stores.folder import Folder
from mitune.worlds.base import Listed

SHOWN = ("contrast", "self-confidence", "log-likelihood-ratio", "mi-tune", "rfmi", "early")
SCHEDULES: Mapping[str, Rungs] = MappingProxyType(
    {
        "half at 50 %": ((0.5, 0.5),),
        "half at 50 %, quarter at 75 %": ((0.5, 0.5), (0.75, 0.25)),
        "half at 25 %, two fifths at 50 %": ((0.25, 0.5), (0.5, 0.4)),
        "half at 25 %, quarter at 50 %": ((0.25, 0.5), (0.5, 0.25)),
        "60 % at 20 %, 45 % at 35 %, 30 % at 50 %, 25 % at 65 % (the default)": GRADUAL,
        "half at 20 %, quarter at 40 %, eighth at 60 %": ((0.2, 0.5), (0.4, 0.25), (0.6, 0.125)),
        "quarter at 25 %": ((0.25, 0.25),),
        "quarter at 50 %": ((0.5, 0.25),),
    }
)
NAME = "contrast"
RESAMPLES = 10_000
SUBSETS = 25  # of the candidates of a prompt, for what fewer of them would gain

_percent = partial(interval, digits=1, percent=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceConfig:
    """What the study makes of each prompt."""

    candidates: int = 32  # M
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True, slots=True, eq=False)
class Unraced:
    """A prompt's candidates, run to the end."""

    exact: Array  # (M,) the judge's verdict
    scores: Mapping[str, Array]  # (M, T) each: after every step; the last is the score
    contrast: Array  # (M,) what the second stage of that score says, of all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a schedule by a score saves and loses, over prompts. The kept one is the best by the score."""

    model: str
    score: str
    schedule: str
    saved: float  # times fewer denoiser calls
    agreement: Interval  # share of prompts with the same pick as without a race
    regret: Interval  # of the score: what the pick lacks, as a share of best − mean
    drawn: Interval  # exact share of a random choice
    unraced: Interval  # exact share of the picks without a race
    raced: Interval
    loss: Interval  # unraced − raced
    share_lost: Interval  # (unraced − raced) / (unraced − drawn), of the means


def run_study(
    settings: ModelConfig, prompts: Sequence[Listed], folder: Path, config: RaceConfig, progress: Step | None = None
) -> list[Unraced]:
    """Each prompt's run; a killed study goes on with the prompts that have no record in `folder` yet.

    Raises MituneError for prompts that the model's call would cut.
    """
    model = load_model(settings)
    texts = [listed.text for listed in prompts]
    refuse_cut(model.pipe, texts, model.call)
    records, runs = Records(Folder(folder / "records")), []
    with sole_worker(folder):
        claim(folder, {"model": model_identity(settings), "prompts": texts} | settings_that_matter(config), "study")
        for index, text in enumerate(texts):
            record = records.read(index)
            if record is None:
                rows = _run(model, text, config)
                records.write(index, rows, {})
            else:
                rows = record[0]
            scores = {name: np.array(rows[name].to_pylist()) for name in SCORES}
            runs.append(Unraced(numbers(rows, "exact"), scores, numbers(rows, NAME)))
            if progress:
                progress(index + 1, len(texts))
    return runs


def _run(model: Model, prompt: str, config: RaceConfig) -> pa.Table:
    """The candidates of a prompt: the verdict, every score after every step, and the second stage of `contrast`."""
    so_far: list[dict[str, torch.Tensor]] = []

    def note(probe: MIProbe) -> None:
        trace = probe.trace_so_far()
        so_far.append({name: score.values(trace) for name, score in SCORES.items()})

    batch = generate(model, requests_of([prompt], config.candidates, config.seed), config.batch_size, note)
    so_far[-1] = {name: score.values(batch.trace) for name, score in SCORES.items()}
    latents = batch.latents.nan_to_num()
    judgments = judge(judge_of(prompt), list(decode(model, latents)), [prompt] * config.candidates)
    second, known = CONTRAST.contrast, rivals_of(prompt, ())
    rivals = {kind: known[kind] for kind in second.rivals}
    evidence = gather(model, latents, prompt, rivals, band=second.band, seed=config.seed, batch_size=config.batch_size)
    columns = {name: torch.stack([scores[name] for scores in so_far], dim=1).tolist() for name in SCORES}
    columns[NAME] = second.of_needed(evidence).tolist()
    return pa.table({"exact": [judgment.right for judgment in judgments]} | columns)


def replay(scores: Array, rungs: Rungs) -> tuple[list[int], int]:
    """Those of M candidates with scores (M, T) that a race for the best one leaves, and its denoiser calls."""
    candidates, steps = scores.shape
    race = Race(rungs=rungs, scores=("score",), candidates=candidates, keep=1)
    left, calls = list(range(candidates)), 0
    for step in range(1, steps + 1):
        calls += len(left)
        stay = race.stay(step, steps)
        if stay is not None:
            kept = race.survivors(left, {"score": scores[left, step - 1].tolist()}, stay)
            left = [left[at] for at in kept]
    return left, calls


def outcome_of(runs: Sequence[Unraced], model: str, score: str, schedule: str) -> Outcome:
    """Replays one schedule by one score on each of the runs."""
    rows, calls, most = [], 0, 0
    for run in runs:
        so_far = run.scores[score_named(score).online or score]
        left, spent = replay(so_far, SCHEDULES[schedule])
        calls, most = calls + spent, most + so_far.size
        final = run.contrast if score == NAME else so_far[:, -1]
        best, pick = (_pick(run, score, subset) for subset in (range(len(final)), left))
        regret, spread = final[best] - final[pick], final[best] - np.nanmean(final)
        drawn, unraced, raced = run.exact.mean(), run.exact[best], run.exact[pick]
        rows.append((pick == best, drawn, unraced, raced, unraced - raced, unraced - drawn, regret, spread))
    figures = np.array(rows, np.float64)
    same, drawn, unraced, raced = bootstrap(figures[:, :4], low=0, high=1, resamples=RESAMPLES)
    (loss,) = bootstrap(figures[:, 4:5], low=-1, high=1, resamples=RESAMPLES)
    share_lost = share_of_gain(figures[:, 4], figures[:, 5], resamples=RESAMPLES)
    (regret,) = bootstrap_ratio(figures[:, 6:7], figures[:, 7:8], np.zeros((len(figures), 1)), resamples=RESAMPLES)
    return Outcome(
        model=model, score=score, schedule=schedule, saved=most / calls, agreement=same, regret=regret, drawn=drawn,
        unraced=unraced, raced=raced, loss=loss, share_lost=share_lost,
    )  # fmt: skip


def _pick(run: Unraced, score: str, left: Sequence[int]) -> int:
    """The best of those left; by `contrast`, of as many of them as its first stage keeps."""
    if score != NAME:
        final = run.scores[score][:, -1]
    else:
        first, final = run.scores[CONTRAST.online][:, -1], run.contrast
        left = [left[at] for at in select(first[list(left)].tolist(), CONTRAST.count(len(final)))]
    return left[select(final[list(left)].tolist(), 1)[0]]


def gain(runs: Sequence[Unraced], candidates: int, rungs: Rungs) -> Interval:
    """How much more often the pick of `contrast` is right than a random choice, with so many of the candidates."""
    lots = np.random.default_rng(0)
    rows = []
    for run in runs:
        gained = []
        for _ in range(SUBSETS if candidates < len(run.exact) else 1):
            subset = lots.choice(len(run.exact), candidates, replace=False)
            part = Unraced(
                run.exact[subset], {CONTRAST.online: run.scores[CONTRAST.online][subset]}, run.contrast[subset]
            )
            left, _ = replay(part.scores[CONTRAST.online], rungs)
            gained.append(part.exact[_pick(part, NAME, left)] - run.exact.mean())
        rows.append([np.mean(gained)])
    return bootstrap(np.array(rows), low=-1, high=1, resamples=RESAMPLES)[0]


def budgets(studies: Mapping[str, Sequence[Unraced]]) -> str:
    """What the same number of calls gains with a race and without one, as Markdown."""
    rows = []
    for model, runs in studies.items():
        most = len(runs[0].exact)
        for count in (most // 4, 3 * most // 8, most // 2):
            whole, raced = gain(runs, count, ()), gain(runs, 2 * count, GRADUAL)
            rows.append([model, str(count), _percent(whole), str(2 * count), _percent(raced)])
    return table(["model", "M, no race", "points over random", "2M, race", "points over random"], rows)


def page_of(tables: str, equal: str, command: str) -> str:
    """docs/racing.md."""
    default = [list(rung) for rung in GRADUAL]
    return page("race", command=command, group=GROUP, tables=tables, budgets=equal, default=default)


def markdown(outcomes: Sequence[Outcome], candidates: int, steps: int) -> str:
    """A table for each model and score, a row a schedule."""
    sections = []
    head = ["schedule", "calls saved", "same pick", "score regret", "exact of the picks", "points lost"]
    for model, score in dict.fromkeys((o.model, o.score) for o in outcomes):
        replayed = [o for o in outcomes if (o.model, o.score) == (model, score)]
        first = replayed[0]
        rows = [
            [o.schedule, f"{o.saved:.2f}×", *map(_percent, (o.agreement, o.regret, o.raced, o.loss, o.share_lost))]
            for o in replayed
        ]
        sections.append(
            f"### {model}, {score}\n\n{first.raced.prompts} prompts × {candidates} candidates, {steps} steps. Exactly "
            f"right: {_percent(first.drawn)} of all candidates, {_percent(first.unraced)} of the best by the score.\n\n"
            + table([*head, "share of the gain lost"], rows)
        )
    return "\n".join(sections)
