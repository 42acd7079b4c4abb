"""Makes M candidates for every prompt, scores them while they are made, and keeps the best (Algorithm 1 of MI-TUNE).

With a race, most of them are dropped half-way (`race.py`). Everything about a prompt is one record (`record.py`),
which an executor has made; a killed run goes on with the prompts that have no record yet. Once all are there, the sets
are written (`assembly.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mitune.config.schema import PoolConfig
from mitune.denoiser.opening.identity import loaded_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, nothing_but_nan
from mitune.denoiser.pictures import check_pictures
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.metrics.table import metric_claim
from mitune.pool.assembly import TABLE, Assembly
from mitune.pool.batch_size import BatchSize
from mitune.pool.race import race_of
from mitune.pool.record import PoolMaker
from mitune.pool.scores import own_negatives, scores_of, want_negatives
from mitune.pool.selection import ORACLE, parse_rule
from mitune.prompts.lists import check_prompts
from mitune.prompts.negatives import hard_negatives
from mitune.run.executors.base import Executor
from mitune.run.locks import one_of_many, waiting
from mitune.run.making import make_records
from mitune.run.records import Records
from mitune.run.stages import Step
from mitune.run.store import claim
from mitune.run.stores.base import Store
from mitune.run.stores.folder import Folder

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
    executor: Executor | None = None,
    store: Callable[[Path], Store] = Folder,
    identity: Mapping[str, Any] | None = None,
    progress: Step | None = None,
) -> PoolResult:
    """Fills `folder` with the pool of `prompts`, and `sets` beside it with a fine-tuning set for each selection.

    The sets are ranked where `config.ranked` says so, and have the prompts' hard negatives where `config.rivals` does.

    `shard` = (i, n) makes every n-th prompt alone, from the i-th on, so that n processes can share a folder; whoever
    finds all records present writes the sets, as does each later call where files of a set are missing or damaged.
    `executor` has the records made, by default in order; `store` makes, of their folder, the store that they lie in.
    `identity` is `model_identity` of the model; without it, that of the weights in memory.
    Raises MituneError for an unknown selection, one that a race would starve, a threshold for a ranked set, one
    without a value at the run's steps, an oracle without a metric, hard negatives that nothing needs, or
    none where sets are to have them, prompts that the model's call would cut, a folder of other settings or of another
    process, something else in the place of a set, or a model that makes nothing but NaN.
    """
    prompts = check_prompts(prompts, model)
    check_pictures(model)
    rules = [parse_rule(text) for text in config.select]
    if config.ranked and any(rule.threshold is not None or rule.quantile is not None for rule in rules):
        raise MituneError(
            f"pool.select = {list(config.select)} names a threshold, but a ranked set holds the worst images as well; "
            "leave the threshold out."
        )
    scores = scores_of(rules, prompts)
    negatives = own_negatives(config.negatives, prompts, model, wanted=config.rivals or want_negatives(scores))
    if config.rivals and not any(hard_negatives(prompt, negatives) for prompt in prompts):
        raise MituneError(
            "pool.rivals = true, but none of the prompts has a hard negative; give your own with pool.negatives, or "
            "set another finetune.objective."
        )
    if metric is None and any(rule.by == ORACLE for rule in rules):
        raise MituneError(
            "pool.select names 'oracle', but neither model nor prompts come with a judge; leave it out, or name a "
            "metric (--metric)."
        )
    race = race_of(config, rules, scores)
    made_by, tally, began = dict(identity or loaded_identity(model)), _Tally(model), time.monotonic()
    settings = {"model": made_by, "prompts": list(prompts), "pool": settings_that_matter(config)} | metric_claim(metric)
    with one_of_many(folder, shard):
        with waiting(folder):
            claim(folder, settings, "pool")
        records = Records(store(folder / "records"))
        sets = {rule.slug: folder.parent / "sets" / rule.slug for rule in rules}
        assembly = Assembly(folder=folder, sets=sets, model=model, made_by=made_by)
        if not (folder / TABLE).exists():  # else all is made, and what is whole may stay whatever is beside it
            assembly.require_room()
        batch_size = BatchSize.begin(folder, config, model)
        maker = PoolMaker(model, prompts, config, rules, scores, negatives, race, metric, batch_size)
        make_records(maker, records, len(prompts), shard=shard, executor=executor, progress=progress, watch=tally.add)
        with waiting(folder):
            table = assembly.run(records, len(prompts))
    return PoolResult(
        folder=folder,
        table=folder / TABLE,
        sets=sets if table is not None else {},
        candidates=len(tally.steps),
        broken=table["status"].to_pylist().count("nan") if table is not None else 0,
        seconds=time.monotonic() - began,
        denoiser_calls=sum(tally.steps) + round(tally.further),
        unraced_calls=len(tally.steps) * max(tally.steps, default=0) + round(tally.further),
    )


@dataclass(slots=True)
class _Tally:
    """What the records of a pool cost, and whether the model makes images at all."""

    model: Model
    steps: list[int] = field(default_factory=list)  # denoiser calls of each candidate while it was made
    further: float = 0.0  # those of post-hoc scores
    usable: bool = False  # whether some candidate is a number
    tried: int = 0  # prompts made here

    def add(self, table: pa.Table, new: bool) -> None:
        """Raises MituneError once PATIENCE prompts have come to nothing."""
        self.steps += table["steps"].to_pylist()
        self.further += sum(table["further_calls"].to_pylist())
        self.usable |= "ok" in table["status"].to_pylist()
        self.tried += new
        if not self.usable and self.tried == PATIENCE:
            raise nothing_but_nan(self.model, f"Every candidate of {PATIENCE} prompts")
