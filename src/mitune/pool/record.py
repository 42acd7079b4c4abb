"""Prompt i → record: its candidates made, scored, judged and selected. A function of i and the settings alone.

A record's table has a row a candidate: its seed, status, scores, verdict, per-step terms, and which selections keep it.
Its tensors are the latents of those that are kept, ranked or shown, and the text embeddings of the prompt, and of its
hard negatives if the sets are to have them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mitune.config.schema import PoolConfig
from mitune.denoiser.network import adapters_off, components_of, denoiser_of, rows_counted
from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import decode
from mitune.denoiser.replay import condition
from mitune.denoiser.sampling import candidate_seed
from mitune.evaluation.metrics.base import ImageMetric, judge, merit
from mitune.information import SCORES
from mitune.pool.advantage import best_and_worst
from mitune.pool.batch_size import BatchSize
from mitune.pool.race import Race
from mitune.pool.sampled import Sampled, prompts_together, sample
from mitune.pool.scores import Candidates, PoolScore
from mitune.pool.selection import ORACLE, Rule, apply, select, values_of
from mitune.prompts.rivals import NEGATIVES, Rivals, read_whole, rivals_of
from mitune.run.records import Record
from mitune.worlds.base import Negative

log = logging.getLogger(__name__)
EXTREMES = 4  # best and worst candidates whose pictures are kept for the report
SHOWN_PROMPTS = 12  # the first so many, whose extreme candidates are kept for it
VERDICT = {"exact": pa.bool_(), "graded": pa.float64(), "malformed": pa.bool_()}
Values = dict[str, list[float]]  # of scores, one a candidate; NaN where there is none


@dataclass(frozen=True, slots=True)
class PoolMaker:
    """Makes the records of a pool (`run/making.py`)."""

    model: Model
    prompts: Sequence[str]
    config: PoolConfig
    rules: Sequence[Rule]
    scores: Mapping[str, PoolScore]  # that the rules go by, by name
    negatives: Mapping[str, Sequence[Negative]] | None  # the user's own
    race: Race | None
    metric: ImageMetric | None
    batch_size: BatchSize

    @property
    def images(self) -> int:
        """M."""
        return self.config.candidates

    @property
    def together(self) -> int:
        """How many prompts fill the denoiser's batches."""
        size = self.batch_size.value
        if self.race is not None:
            return self.race.prompts_together(self.model.steps, size)
        return prompts_together(self.config.candidates, size)

    def records(
        self, items: Sequence[int], on_images: Callable[[int], None]
    ) -> Iterator[tuple[int, pa.Table, dict[str, Tensor]]]:
        """The records of these prompts, in order."""
        samples = sample(
            self.model,
            [self.prompts[index] for index in items],
            count=self.config.candidates,
            seed=self.config.seed,
            batch_size=self.batch_size.value,
            race=self.race,
            scores=[score.online for score in self.scores.values() if score.online is not None],
            on_images=on_images,
        )
        for sampled, index in zip(samples, items, strict=True):  # which asks for one more before it ends
            self.batch_size.note(sampled.batch_size)
            yield index, *self._record(index, sampled)

    def _record(self, index: int, sampled: Sampled) -> Record:
        count, prompt = self.config.candidates, self.prompts[index]
        status = _status(sampled)
        if broken := status.count("nan"):
            log.warning("%s: %d candidates came out as NaN and are left out.", prompt, broken)
        values, further = self._values(prompt, sampled)
        columns: dict[str, Any] = {
            "prompt_index": [index] * count,
            "prompt": [prompt] * count,
            "candidate": range(count),
            "seed": sampled.seeds,
            "status": status,
            "steps": sampled.steps,
            "further_calls": [further / count] * count,
        }
        if self.metric is not None:
            verdict, values[ORACLE] = self._verdict(self.metric, prompt, sampled, status)
            columns |= verdict
        columns |= {f"score.{name}": of_all for name, of_all in values.items()} | sampled.terms
        kept = {rule.slug: self._kept(rule, values, prompt) for rule in self.rules}
        columns |= {f"kept.{slug}": [candidate in those for candidate in range(count)] for slug, those in kept.items()}
        ranked = {rule.slug: self._ranked(rule, values, prompt) for rule in self.rules if self.config.ranked}
        columns |= {f"ranked.{slug}": pa.array(scores, pa.float64()) for slug, scores in ranked.items()}
        pictured = self._extremes(values) if index < SHOWN_PROMPTS else ()
        in_sets = {candidate for those in kept.values() for candidate in those}
        in_sets |= {j for scores in ranked.values() for j, score in enumerate(scores) if score is not None}
        stored = sorted({*pictured, *in_sets})
        tensors = {"latents": sampled.latents[stored], "candidates": torch.tensor(stored, dtype=torch.int64)}
        if sampled.passes is not None:
            tensors |= {f"conditioning.{name}": tensor for name, tensor in sampled.passes.to_tensors().items()}
        if self.config.rivals:
            rivals = list(dict.fromkeys(self._rivals(prompt)[NEGATIVES]))
            columns["rivals"] = pa.array([rivals] * count, pa.list_(pa.string()))
            encoded = condition(self.model, rivals).to_tensors() if rivals else {}
            tensors |= {f"rivals.{name}": tensor for name, tensor in encoded.items()}
        return pa.table({name: pa.array(column) for name, column in columns.items()}), tensors

    def _rivals(self, prompt: str) -> Rivals:
        rivals = rivals_of(prompt, self.prompts, seed=self.config.seed, negatives=self.negatives)
        return read_whole(self.model, rivals)

    def _values(self, prompt: str, sampled: Sampled) -> tuple[Values, float]:
        """All on-line scores, the others that select, and the further denoiser calls that these took."""
        trace, finite = sampled.trace, sampled.finite
        online = {name: score.values(trace).where(finite, torch.nan) for name, score in SCORES.items()}
        values = {name: of_all.tolist() for name, of_all in online.items()}
        others = {name: score for name, score in self.scores.items() if not score.is_online}
        if not others:
            return values, 0.0
        seed = self.config.seed
        with self._judge(), rows_counted(denoiser_of(self.model.pipe)) as rows:
            candidates = Candidates(
                model=self.model,
                prompt=prompt,
                rivals=self._rivals(prompt),
                latents=sampled.latents.nan_to_num(),
                trace=trace,
                online=online,
                keep=self.config.keep,
                seed=seed,
                batch_size=self.batch_size.value,
            )
            for name, score in others.items():
                values[name] = score(candidates).where(finite, torch.nan).tolist()
        return values, sum(rows) / 2  # a call while sampling has two rows

    def _judge(self) -> AbstractContextManager[None]:
        """The model is the one that gives the scores; an adapter that is part of a pipeline in memory stays."""
        if self.model.adapter is None or self.config.scored_by == "present":
            return nullcontext()
        return adapters_off(components_of(self.model.pipe).values())

    def _verdict(
        self, metric: ImageMetric, prompt: str, sampled: Sampled, status: Sequence[str]
    ) -> tuple[dict[str, pa.Array], list[float]]:
        """The metric's columns, null where there is no image to judge, and the score that its verdict makes."""
        valid = [j for j, state in enumerate(status) if state == "ok"]
        images = list(decode(self.model, sampled.latents[valid])) if valid else []
        judgments = dict(zip(valid, judge(metric, images, [prompt] * len(valid)), strict=True))
        of_all = [judgments.get(j) for j in range(len(status))]
        columns = {  # typed, as they may be null throughout
            name: pa.array([None if one is None else getattr(one, name) for one in of_all], kind)
            for name, kind in VERDICT.items()
        }
        graded = torch.full((len(status),), torch.nan)
        merits = [merit(metric, one) - one.malformed for one in judgments.values()]  # what cannot be read comes last
        graded[valid] = torch.tensor(merits)
        return columns, graded.tolist()

    def _kept(self, rule: Rule, values: Values, prompt: str) -> list[int]:
        seed = candidate_seed(self.config.seed, prompt, -1)
        return apply(rule, values, self.config.keep, seed, self._ties(rule.by, values))

    def _ranked(self, rule: Rule, values: Values, prompt: str) -> list[float | None]:
        """The scores of the candidates that go into a ranked set; None for the others."""
        scores = values_of(rule, values, candidate_seed(self.config.seed, prompt, -1))
        order = select(scores, self.config.candidates, ties=self._ties(rule.by, values))
        members = best_and_worst(order, self.config.ranked or 0)
        return [score if j in members else None for j, score in enumerate(scores)]

    def _ties(self, name: str, values: Values) -> list[float] | None:
        """What decides among candidates that a score or control holds equal, out of the values of all scores."""
        score = self.scores.get(name)
        return None if score is None or score.online is None else values[score.online]

    def _extremes(self, values: Values) -> list[int]:
        """The best and the worst by the first score that selects, for the report to show."""
        by = next(iter(self.scores), "mi-tune")
        order = select(values[by], self.config.candidates, ties=self._ties(by, values))
        return order[:EXTREMES] + order[-EXTREMES:]


def _status(sampled: Sampled) -> list[str]:
    """What became of each: "ok", "nan" or "dropped at step n"."""
    return [
        f"dropped at step {step}" if step else "ok" if finite else "nan"
        for finite, step in zip(sampled.finite.tolist(), sampled.dropped, strict=True)
    ]
