"""Makes M candidates for every prompt, scores them while they are made, and keeps the best (Algorithm 1 of MI-TUNE).

With a race, most of them are dropped half-way (`racing.py`). Everything about a prompt is one record: its candidates'
seeds, scores and per-step terms, and the latents and text embeddings of those that some selection keeps. A killed run
goes on with the prompts that have no record yet.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mitune.config.schema import PoolConfig
from mitune.denoiser.conditioning import Passes
from mitune.denoiser.network import denoiser_of, execution_device, rows_counted
from mitune.denoiser.opening.identity import loaded_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, nothing_but_nan
from mitune.denoiser.pictures import check_pictures, decode
from mitune.denoiser.sampling import Batch, Request, candidate_seed, default_batch_size, generate_all
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ImageMetric, judge, merit
from mitune.evaluation.metrics.table import metric_claim
from mitune.information import SCORES, Trace
from mitune.pool.assembly import SHOWN_PROMPTS, TABLE, Assembly
from mitune.pool.race import Race, race_of
from mitune.pool.scores import Candidates, PoolScore, own_negatives, scores_of
from mitune.pool.selection import ORACLE, Rule, apply, parse_rule, select
from mitune.prompts.lists import check_prompts
from mitune.prompts.rivals import read_whole, rivals_of
from mitune.run.locks import one_of_many, waiting
from mitune.run.store import Records, claim, read_again, write_json
from mitune.worlds.base import Negative

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
EXTREMES = 4  # best and worst candidates whose pictures are kept for the report
PATIENCE = 3  # prompts without a single image that is a number, after which the model is at fault


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Where the pool lies and what it cost; `sets` has one fine-tuning set a selection."""

    folder: Path
    table: Path
    sets: dict[str, Path]
    candidates: int
    broken: int  # NaN latents
    seconds: float
    denoiser_calls: int  # one a candidate and step, with and without the prompt; those of post-hoc scores likewise
    unraced_calls: int  # what they would be without a race


def build_pool(
    model: Model,
    prompts: Sequence[str],
    folder: Path,
    config: PoolConfig,
    *,
    metric: ImageMetric | None = None,
    shard: tuple[int, int] = (0, 1),
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PoolResult:
    """Fills `folder` with the pool of `prompts`, and `sets` beside it with a fine-tuning set for each selection.

    `shard` = (i, n) makes every n-th prompt alone, from the i-th on, so that n processes can share a folder; whoever
    finds all records present writes the sets, as does each later call where files of a set are missing or damaged.
    `identity` is `model_identity` of the model; without it, the weights in memory are asked.
    Raises MituneError for an unknown selection, one that a race would starve, one without a value at the run's
    steps, an oracle without a metric, hard negatives that nothing needs, prompts that the model's call would cut, a
    folder of other settings or of another process, something else in the place of a set, or a model that makes nothing
    but NaN.
    """
    prompts = check_prompts(prompts, model)
    check_pictures(model)
    rules = [parse_rule(text) for text in config.select]
    scores = scores_of(rules)
    negatives = own_negatives(config.negatives, scores, prompts, model)
    if metric is None and any(rule.by == ORACLE for rule in rules):
        raise MituneError(
            "pool.select names 'oracle', but neither model nor prompts come with a judge; leave it out, or name a "
            "metric (--metric)."
        )
    race = race_of(config.race, rules, scores, candidates=config.candidates, keep=config.keep)
    made_by = dict(identity or loaded_identity(model))
    settings = {"model": made_by, "prompts": list(prompts), "pool": settings_that_matter(config)} | metric_claim(metric)
    with one_of_many(folder, shard):
        began = time.monotonic()
        with waiting(folder):
            claim(folder, settings, "pool")
        batch_size = _BatchSize.begin(folder, config, model)
        records = Records(folder / "records")
        sets = {rule.slug: folder.parent / "sets" / rule.slug for rule in rules}
        assembly = Assembly(folder=folder, sets=sets, model=model, made_by=made_by)
        if not (folder / TABLE).exists():  # else all is made, and what is whole may stay whatever is beside it
            assembly.require_room()
        mine = range(shard[0], len(prompts), shard[1])
        pool = _Pool(model, prompts, config, batch_size, rules, scores, negatives, metric, records)
        steps, further = pool.make(mine, race, progress)
        with waiting(folder):
            table = assembly.run(records, len(prompts))
    total = len(mine) * config.candidates
    return PoolResult(
        folder=folder,
        table=folder / TABLE,
        sets=sets if table is not None else {},
        candidates=total,
        broken=table["status"].to_pylist().count("nan") if table is not None else 0,
        seconds=time.monotonic() - began,
        denoiser_calls=sum(steps) + round(further),
        unraced_calls=total * max(steps, default=0) + round(further),
    )


@dataclass(slots=True)
class _BatchSize:
    """The denoiser's batch size, which out of memory may halve; kept in a file, so that a restart goes on with it."""

    value: int
    file: Path | None  # None where the settings name the size

    @classmethod
    def begin(cls, folder: Path, config: PoolConfig, model: Model) -> _BatchSize:
        if config.batch_size is not None:
            return cls(config.batch_size, None)
        file = folder / "batch_size.json"
        size = cls(read_again(file, _batch_size) or default_batch_size(execution_device(model.pipe)), file)
        size.note(size.value)
        return size

    def note(self, used: int) -> None:
        self.value = used
        if self.file is not None and read_again(self.file, _batch_size) != used:
            write_json(self.file, {"batch_size": used})


def _batch_size(content: bytes) -> int:
    value = json.loads(content)["batch_size"]
    if type(value) is not int or value < 1:
        raise ValueError(value)
    return value


@dataclass(slots=True)
class _Candidates:
    """The candidates of one prompt, as far as they are made."""

    latents: list[Tensor] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)  # the step after which a race dropped it, or 0
    steps: list[int] = field(default_factory=list)  # that the denoiser made for it
    terms: dict[str, list[Any]] = field(default_factory=dict)  # of the trace, one entry a candidate
    passes: Passes | None = None

    def add(self, batch: Batch, row: int) -> None:
        self.latents.append(batch.latents[row])
        self.dropped.append(batch.dropped[row])
        self.steps.append(batch.dropped[row] or len(batch.trace.log_snr))
        for name, values in batch.trace.select([row]).to_columns().items():
            self.terms.setdefault(name, []).extend(values)
        if self.passes is None:
            self.passes = batch.passes.take([row])


@dataclass(frozen=True, slots=True)
class _Pool:
    """What stays the same from prompt to prompt."""

    model: Model
    prompts: Sequence[str]
    config: PoolConfig
    batch_size: _BatchSize
    rules: Sequence[Rule]
    scores: Mapping[str, PoolScore]  # by name
    negatives: Mapping[str, Sequence[Negative]] | None  # the user's own
    metric: ImageMetric | None
    records: Records

    def request(self, index: int, candidate: int) -> Request:
        prompt = self.prompts[index]
        return Request(prompt=prompt, seed=candidate_seed(self.config.seed, prompt, candidate))

    def make(self, mine: Sequence[int], race: Race | None, progress: Progress | None) -> tuple[list[int], float]:
        """Makes the records of these prompts that are not there yet.

        Returns the denoiser calls of each of their candidates, and the further ones of post-hoc scores.
        """
        todo, steps, further, usable = [], [], 0.0, False
        for index in mine:
            record = self.records.read(index)
            if record is None:
                todo.append(index)
            else:
                steps += record[0]["steps"].to_pylist()
                further += sum(record[0]["further_calls"].to_pylist())
                usable |= "ok" in record[0]["status"].to_pylist()
        count = self.config.candidates
        total, done = len(mine) * count, (len(mine) - len(todo)) * count
        requests = [self.request(index, candidate) for index in todo for candidate in range(count)]
        current, left = _Candidates(), len(todo)
        for chunk, batch in generate_all(self.model, requests, self.batch_size.value, race, self.online):
            self.batch_size.note(batch.batch_size)
            for row in range(len(chunk)):
                current.add(batch, row)
                if len(current.latents) == count:
                    further += self.finish(todo.pop(0), current)
                    steps += current.steps
                    usable |= any(map(_is_finite, current.latents))
                    if not usable and left - len(todo) == PATIENCE:
                        raise nothing_but_nan(self.model, f"Every candidate of {PATIENCE} prompts")
                    current = _Candidates()
            done += len(chunk)
            if progress:
                progress(done, total)
        return steps, further

    def finish(self, index: int, candidates: _Candidates) -> float:
        """Scores and judges the candidates of a prompt, selects among them and writes the record.

        Returns the further denoiser calls that post-hoc scores took.
        """
        count, prompt = self.config.candidates, self.prompts[index]
        latents = torch.stack(candidates.latents)
        finite = torch.tensor([_is_finite(one) for one in candidates.latents])
        status = [_status(ok, step) for ok, step in zip(finite.tolist(), candidates.dropped, strict=True)]
        if broken := status.count("nan"):
            log.warning("%s: %d candidates came out as NaN and are left out.", prompt, broken)
        trace = Trace.from_columns(candidates.terms)
        free = {name: score.values(trace).where(finite, torch.nan) for name, score in SCORES.items()}
        scores = {name: values.tolist() for name, values in free.items()}
        with rows_counted(denoiser_of(self.model.pipe)) as rows:
            scores |= self.further(index, latents, trace, finite, free)
        further = sum(rows) / 2  # a call while sampling has two rows
        columns: dict[str, Sequence[Any]] = {
            "prompt_index": [index] * count,
            "prompt": [prompt] * count,
            "candidate": range(count),
            "seed": [self.request(index, candidate).seed for candidate in range(count)],
            "status": status,
            "steps": candidates.steps,
            "further_calls": [further / count] * count,
        }
        if self.metric is not None:
            shown = [j for j, state in enumerate(status) if state == "ok"]
            images = list(decode(self.model, latents[shown])) if shown else []
            verdicts = judge(self.metric, images, [prompt] * len(shown))
            judged = dict(zip(shown, verdicts, strict=True))
            for name, kind in {"exact": pa.bool_(), "graded": pa.float64(), "malformed": pa.bool_()}.items():
                values = [getattr(judged[j], name) if j in judged else None for j in range(count)]
                columns[name] = pa.array(values, kind)  # which has its type where nothing is judged
            graded = torch.full((count,), torch.nan)
            merits = [merit(self.metric, v) - v.malformed for v in verdicts]  # what cannot be read comes last
            graded[shown] = torch.tensor(merits)
            scores[ORACLE] = graded.tolist()
        columns |= {f"score.{name}": values for name, values in scores.items()} | candidates.terms
        stored = set(self._extremes(scores) if index < SHOWN_PROMPTS else ())
        for rule in self.rules:
            seed = candidate_seed(self.config.seed, prompt, -1)
            kept = apply(rule, scores, self.config.keep, seed, self.ties(rule.by, scores))
            columns[f"kept.{rule.slug}"] = [candidate in kept for candidate in range(count)]
            stored |= set(kept)
        tensors = {"latents": latents[sorted(stored)], "candidates": torch.tensor(sorted(stored), dtype=torch.int64)}
        if candidates.passes is not None:
            tensors |= {f"conditioning.{name}": tensor for name, tensor in candidates.passes.to_tensors().items()}
        self.records.write(index, pa.table({name: pa.array(values) for name, values in columns.items()}), tensors)
        return further

    @property
    def online(self) -> list[str]:
        """The on-line scores that rules go by, alone or together with another."""
        return [score.online for score in self.scores.values() if score.online is not None]

    def ties(self, name: str, values: Mapping[str, Sequence[float]]) -> Sequence[float] | None:
        """What decides among candidates that a score or control holds equal, out of the values of all scores."""
        score = self.scores.get(name)
        return None if score is None or score.online is None else values[score.online]

    def further(
        self, index: int, latents: Tensor, trace: Trace, finite: Tensor, online: Mapping[str, Tensor]
    ) -> dict[str, list[float]]:
        """The scores of a prompt that select and are not on-line; they may cost further denoiser calls."""
        scores = {name: score for name, score in self.scores.items() if not score.is_online}
        if not scores:
            return {}
        prompt, seed = self.prompts[index], self.config.seed
        rivals = rivals_of(prompt, self.prompts, seed=seed, negatives=self.negatives)
        candidates = Candidates(
            model=self.model,
            prompt=prompt,
            rivals=read_whole(self.model, rivals),
            latents=latents.nan_to_num(),
            trace=trace,
            online=online,
            keep=self.config.keep,
            seed=seed,
            batch_size=self.batch_size.value,
        )
        return {name: score(candidates).where(finite, torch.nan).tolist() for name, score in scores.items()}

    def _extremes(self, scores: Mapping[str, Sequence[float]]) -> list[int]:
        """The best and the worst by the first score that selects, for the report to show."""
        by = next(iter(self.scores), "mi-tune")
        order = select(scores[by], self.config.candidates, ties=self.ties(by, scores))
        return order[:EXTREMES] + order[-EXTREMES:]


def _is_finite(latents: Tensor) -> bool:
    return bool(torch.isfinite(latents).all())


def _status(finite: bool, dropped: int) -> str:
    if dropped:
        return f"dropped at step {dropped}"
    return "ok" if finite else "nan"
