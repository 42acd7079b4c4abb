"""What does racing lose? Schedules replayed on full pools, of which every score is known after every step.

A prompt's candidates run to the end, and their scores so far are noted at each step: from these records, any schedule
by any score is replayed as `mitune.pool.race` would have run it, since those that stay come out the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mitune.config.schema import GRADUAL, ModelConfig, Rungs
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.pictures import decode
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.sampling import Request, candidate_seed, generate
from mitune.evaluation.statistics import Interval, bootstrap, bootstrap_ratio, numbers
from mitune.information import SCORES
from mitune.pool.evidence import gather
from mitune.pool.race import GROUP, Race
from mitune.pool.scores import CONTRAST, score_named
from mitune.pool.selection import select
from mitune.prompts.rivals import rivals_of
from mitune.run.locks import sole_worker
from mitune.run.records import Records
from mitune.run.store import claim
from mitune.run.stores.folder import Folder
from mitune.worlds.base import Listed
from mitune.worlds.shapes.judge import judge

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
PAGE = """# Racing: fewer denoiser calls

Written by `{command}`.

A pool makes M candidates of a prompt and keeps k. Those that cannot win by their score so far are dropped half-way, at
rungs, each a share of the steps and the share of the candidates that stays:

    mitune pool --prompts prompts.txt                 # the default rungs, {default}
    mitune pool --prompts prompts.txt --set 'pool.race=[[0.5, 0.5], [0.75, 0.25]]'
    mitune pool --prompts prompts.txt --no-race

It is on by default where self-confidence decides it, alone or as the first stage of `contrast`; by other scores so far,
which say less of the final ones, with `--race` alone. Every score of `pool.select` keeps its own best. At each rung,
at least k stay, in two stages 2k.

**What a score so far is.** The same formula on the steps so far. Scores that need the finished image (self-confidence,
log-likelihood-ratio) take the ẑ₀ that the last step's output with the prompt predicts. A score without a value yet
drops nobody.

**What holds.** The denoiser is called in batches of one shape, `pool.batch_size` candidates, whatever is left of a
race, and each text is encoded alone. So on a CPU the latents of those that stay are, bit for bit, those of a run
without a race, and do not depend on neighbors, restarts or shards; the tests hold this. Another batch size, or a GPU,
may round otherwise. Which candidates stay depends on the other candidates of the same prompt, and on nothing else.

**What is left out.** A dropped candidate's record says after which step (`status`, `steps`), and has no scores, terms,
latents or verdict; the report then speaks of those that stayed. The first stage of `contrast` is on-line: it decides
the race, and the second stage sees those that stayed. `random`, `oracle`, quantiles and other post-hoc scores need all
candidates finished, and are refused together with a race.

**Memory.** The pipeline holds all candidates of one or more prompts, up to {group} batches or one prompt; what the
denoiser needs is that of one batch. For scoring, three tensors of the latents' size are kept a candidate and step.

## What it is worth

For about the same number of denoiser calls, a race makes twice as many candidates. How far the pick of `contrast` is
more often right than a random choice, in points, for M candidates that all run to the end and for 2M in a race by the
default rungs; random subsets of the candidates below.

{budgets}
## What it saves and what it loses

Each prompt's candidates ran to the end, and the schedules were replayed on them. *Calls saved*: times fewer denoiser
calls. *Same pick*: prompts whose best candidate (k = 1) is the one without a race. *Score regret*: what the pick lacks,
as a share of best − mean. *Points lost*: exact share without − with a race, paired. *Share of the gain lost*: that over
(best by the score − a random choice); "no gain" where that is not clearly above 0. Intervals: 95 %, prompts resampled.
The default rungs were chosen on these prompts, among several schedules that save about as much.

{tables}"""

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceConfig:
    """What the study makes of each prompt."""

    candidates: int = 32  # M
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True, slots=True, eq=False)
class Run:
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
    settings: ModelConfig, prompts: Sequence[Listed], folder: Path, config: RaceConfig, progress: Progress | None = None
) -> list[Run]:
    """Each prompt's run; a killed study goes on with the prompts that have no record in `folder` yet."""
    model = load_model(settings)
    texts = [listed.text for listed in prompts]
    records, runs = Records(Folder(folder / "records")), []
    with sole_worker(folder):
        claim(folder, {"model": model_identity(settings), "prompts": texts} | settings_that_matter(config), "study")
        for index, text in enumerate(texts):
            record = records.read(index)
            if record is None:
                table = _run(model, text, config)
                records.write(index, table, {})
            else:
                table = record[0]
            scores = {name: np.array(table[name].to_pylist()) for name in SCORES}
            runs.append(Run(np.array(table["exact"].to_pylist(), np.float64), scores, numbers(table, NAME)))
            if progress:
                progress(index + 1, len(texts))
    return runs


def _run(model: Model, prompt: str, config: RaceConfig) -> pa.Table:
    """The candidates of a prompt: the verdict, every score after every step, and the second stage of `contrast`."""
    seeds = [candidate_seed(config.seed, prompt, j) for j in range(config.candidates)]
    so_far: list[dict[str, torch.Tensor]] = []

    def note(probe: MIProbe) -> None:
        trace = probe.trace_so_far()
        so_far.append({name: score.values(trace) for name, score in SCORES.items()})

    batch = generate(model, [Request(prompt=prompt, seed=seed) for seed in seeds], config.batch_size, note)
    so_far[-1] = {name: score.values(batch.trace) for name, score in SCORES.items()}
    latents = batch.latents.nan_to_num()
    verdicts = [judge(np.asarray(image), prompt) for image in decode(model, latents)]
    second, known = CONTRAST.contrast, rivals_of(prompt, ())
    rivals = {kind: known[kind] for kind in second.rivals}
    evidence = gather(model, latents, prompt, rivals, band=second.band, seed=config.seed, batch_size=config.batch_size)
    columns = {name: torch.stack([scores[name] for scores in so_far], dim=1).tolist() for name in SCORES}
    columns[NAME] = second.of_needed(evidence).tolist()
    return pa.table({"exact": [v.exact and not v.malformed for v in verdicts]} | columns)


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


def outcome_of(runs: Sequence[Run], model: str, score: str, schedule: str) -> Outcome:
    """Replays one schedule by one score on each of the runs."""
    rows, calls, most = [], 0, 0
    for run in runs:
        so_far = run.scores[score_named(score).online or score]
        left, made = replay(so_far, SCHEDULES[schedule])
        calls, most = calls + made, most + so_far.size
        final = run.contrast if score == NAME else so_far[:, -1]
        best, pick = (_pick(run, score, some) for some in (range(len(final)), left))
        regret, spread = final[best] - final[pick], final[best] - np.nanmean(final)
        drawn, unraced, raced = run.exact.mean(), run.exact[best], run.exact[pick]
        rows.append((pick == best, drawn, unraced, raced, unraced - raced, unraced - drawn, regret, spread))
    table = np.array(rows, np.float64)
    same, drawn, unraced, raced = bootstrap(table[:, :4], low=0, high=1, resamples=RESAMPLES)
    (loss,) = bootstrap(table[:, 4:5], low=-1, high=1, resamples=RESAMPLES)
    (regret,) = bootstrap_ratio(table[:, 6:7], table[:, 7:8], np.zeros((len(table), 1)), resamples=RESAMPLES)
    return Outcome(
        model=model, score=score, schedule=schedule, saved=most / calls, agreement=same, regret=regret, drawn=drawn,
        unraced=unraced, raced=raced, loss=loss, share_lost=_quotient(table[:, 4], table[:, 5]),
    )  # fmt: skip


def _pick(run: Run, score: str, left: Sequence[int]) -> int:
    """The best of those left; by `contrast`, of as many of them as its first stage keeps."""
    if score != NAME:
        final = run.scores[score][:, -1]
    else:
        first, final = run.scores[CONTRAST.online][:, -1], run.contrast
        left = [left[at] for at in select(first[list(left)].tolist(), CONTRAST.count(len(final)))]
    return left[select(final[list(left)].tolist(), 1)[0]]


def _quotient(above: Array, below: Array) -> Interval:
    """Ratio of the means over prompts, (prompts,) each, with its percentile interval; nan where below may be 0.

    Unlike those of `bootstrap_ratio`, a prompt's own terms may have either sign: only the mean must be positive.
    """
    drawn = np.random.default_rng(0).integers(len(above), size=(RESAMPLES, len(above)))
    bottoms = below[drawn].mean(axis=1)
    if (bottoms <= 0).mean() > 0.025:
        return Interval(math.nan, math.nan, math.nan, len(above))
    low, high = np.quantile(above[drawn].mean(axis=1)[bottoms > 0] / bottoms[bottoms > 0], (0.025, 0.975)).tolist()
    return Interval(float(above.mean() / below.mean()), low, high, len(above))


def gain(runs: Sequence[Run], candidates: int, rungs: Rungs) -> Interval:
    """How much more often the pick of `contrast` is right than a random choice, with so many of the candidates."""
    lots = np.random.default_rng(0)
    rows = []
    for run in runs:
        gained = []
        for _ in range(SUBSETS if candidates < len(run.exact) else 1):
            some = lots.choice(len(run.exact), candidates, replace=False)
            part = Run(run.exact[some], {CONTRAST.online: run.scores[CONTRAST.online][some]}, run.contrast[some])
            left, _ = replay(part.scores[CONTRAST.online], rungs)
            gained.append(part.exact[_pick(part, NAME, left)] - run.exact.mean())
        rows.append([np.mean(gained)])
    return bootstrap(np.array(rows), low=-1, high=1, resamples=RESAMPLES)[0]


def budgets(studies: Mapping[str, Sequence[Run]]) -> str:
    """What the same number of calls gains with a race and without one, as Markdown."""
    lines = ["| model | M, no race | points over random | 2M, race | points over random |", "|---|--:|---|--:|---|"]
    for model, runs in studies.items():
        most = len(runs[0].exact)
        for count in (most // 4, 3 * most // 8, most // 2):
            whole, raced = _percent(gain(runs, count, ())), _percent(gain(runs, 2 * count, GRADUAL))
            lines.append(f"| {model} | {count} | {whole} | {2 * count} | {raced} |")
    return "\n".join(lines) + "\n"


def page(tables: str, equal: str, command: str) -> str:
    """docs/racing.md."""
    default = [list(rung) for rung in GRADUAL]
    return PAGE.format(command=command, group=GROUP, tables=tables, budgets=equal, default=default)


def markdown(outcomes: Sequence[Outcome], candidates: int, steps: int) -> str:
    """A table for each model and score, a row a schedule."""
    parts = []
    for model, score in dict.fromkeys((o.model, o.score) for o in outcomes):
        own = [o for o in outcomes if (o.model, o.score) == (model, score)]
        first = own[0]
        parts += [
            f"### {model}, {score}",
            "",
            f"{first.raced.prompts} prompts × {candidates} candidates, {steps} steps. Exactly right: "
            f"{_percent(first.drawn)} of all candidates, {_percent(first.unraced)} of the best by the score.",
            "",
            "| schedule | calls saved | same pick | score regret | exact of the picks | points lost | share of the gain lost |",  # noqa: E501
            "|---|---|---|---|---|---|---|",
        ]
        for o in own:
            cells = [
                o.schedule,
                f"{o.saved:.2f}×",
                *map(_percent, (o.agreement, o.regret, o.raced, o.loss, o.share_lost)),
            ]
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _percent(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "no gain"
    value, low, high = (f"{100 * x:.1f}".replace("-", "−") for x in (interval.value, interval.low, interval.high))
    return f"{value} % [{low}, {high}]"
