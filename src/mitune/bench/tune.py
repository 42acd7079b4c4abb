"""What does fine-tuning gain? Ways of it for every model and seed, judged on held-out prompts.

A way is a whole run's settings: objective, scores, rounds. Each (model, seed, way) is a run folder of its own: its pool
serves all selections, each of which becomes an adapter. Base and adapters, those of each round, are judged at every
guidance scale, with the same prompts and seeds. A killed study goes on, and one with a further way adds that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mitune.config.schema import Config
from mitune.denoiser.opening.models import load_model
from mitune.errors import MituneError
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.metrics.table import metric_for
from mitune.evaluation.rows import flags, numbers, right
from mitune.evaluation.variant import BASE, Variant
from mitune.pool.selection import parse_rule
from mitune.prompts.lists import load_prompts
from mitune.report.files import pool_of
from mitune.run.stages import Stages, Step, silent
from mitune.run.store import write_table
from mitune.tuning import tune

Ways = Mapping[str, Config]  # of one model, by name


def choices_of(presets: Sequence[str], objectives: Sequence[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """The preset and the further options of each way, by its name: each preset with each objective, or with its own."""
    if not objectives:
        return {preset: (preset, {}) for preset in presets}
    return {
        objective if len(presets) == 1 else f"{preset} {objective}": (preset, {"finetune.objective": objective})
        for preset in presets
        for objective in objectives
    }


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a selection came to after a round of a way."""

    run: Path
    way: str  # its name, where there are several
    number: int
    selection: str

    @property
    def variant(self) -> str:
        rounds = f"{self.selection}, {self.number} rounds" if self.number > 1 else self.selection
        return f"{self.way}: {rounds}" if self.way else rounds

    @property
    def adapter(self) -> Path:
        return self._round(self.number) / "adapters" / self.selection

    @property
    def calls(self) -> int:
        """Denoiser calls of its pools, those of post-hoc scores included."""
        costs = {entry["stage"]: entry["denoiser_calls"] for entry in json.loads((self.run / "cost.json").read_text())}
        rounds = range(1, self.number + 1)
        return sum(costs[f"{pool_of(self._round(n), self.selection).name}, round {n}"] for n in rounds)

    def candidates(self) -> pa.Table:
        """What the selection chose among: its choice as the column `kept`, and what is `right` (NaN where unknown)."""
        file = pool_of(self._round(self.number), self.selection) / "candidates.parquet"
        kept = f"kept.{self.selection}"
        table = pq.read_table(file, columns=["prompt", "exact", "malformed", kept])
        return pa.table({"prompt": table["prompt"], "right": right(table), "kept": table[kept]})

    def _round(self, number: int) -> Path:
        return self.run / f"round-{number}"


def run_study(
    models: Sequence[Ways],
    folder: Path,
    *,
    seeds: int,
    guidance_scales: Sequence[float] = (),
    stages: Stages = silent,
) -> Path:
    """Goes each model's ways with `seeds` seeds and returns the table of all judged images, one row an image.

    All are judged at the guidance scale that they were made at and at `guidance_scales`. Raises MituneError for a
    model without a judge, or settings without held-out prompts.
    """
    tables = []
    for ways in models:
        config = next(iter(ways.values()))
        if config.eval_prompts is None:
            raise MituneError("A study of fine-tuning needs eval_prompts to judge by, e.g. shapes:heldout.")
        base = load_model(config.model)
        prompts = load_prompts(config.eval_prompts, base, config.prompt_field)
        texts = [listed.text for listed in prompts]
        metric = metric_for(config.metric, source=config.eval_prompts, model=config.model.name, prompts=texts)
        if metric is None:
            raise MituneError(
                f"Neither {config.model.name} nor {config.eval_prompts} comes with a judge; study an embedded model."
            )
        for seed in range(seeds):
            for way, own in ways.items():
                run = run_folder(folder, config, seed, way)
                tune(replace(_with_seed(own, seed), eval_prompts=None), run, stages=partial(_titled, stages, way))
            adapters = tuned_of(ways, folder, seed)
            facts = _facts(adapters)
            variants = [Variant(name=BASE), *(Variant(name=tuned.variant, adapter=tuned.adapter) for tuned in adapters)]
            seeded = _with_seed(config, seed)
            for scale in dict.fromkeys([base.guidance_scale, *guidance_scales]):
                at_scale = replace(seeded, model=replace(config.model, guidance_scale=scale))
                target = run_folder(folder, config, seed) / f"eval-{scale:g}"
                titled = partial(_titled, stages, f"guidance {scale:g}")
                table = pq.read_table(evaluate(at_scale, prompts, variants, target, metric, stages=titled))
                of_run = {"model": Path(config.model.name).name, "guidance_scale": scale, "tuning_seed": seed}
                rows = [of_run | facts[variant] for variant in table["variant"].to_pylist()]
                for column in rows[0]:
                    table = table.append_column(column, [[row[column] for row in rows]])
                tables.append(table)
    target = folder / "images.parquet"
    write_table(target, pa.concat_tables(tables))
    return target


def run_folder(folder: Path, config: Config, seed: int, way: str = "") -> Path:
    """Where a model's runs of a seed lie, or the one of a way."""
    return folder / f"{Path(config.model.name).name}-{seed}" / re.sub(r"[^\w.-]+", "-", way)


def tuned_of(ways: Ways, folder: Path, seed: int) -> list[Tuned]:
    """The adapters of one model and seed: of each way, round and selection."""
    adapters = []
    for way, config in ways.items():
        run, name = run_folder(folder, config, seed, way), way if len(ways) > 1 else ""
        slugs = [parse_rule(text).slug for text in config.pool.select]
        adapters += [Tuned(run, name, number, slug) for number in range(1, config.rounds + 1) for slug in slugs]
    return adapters


def _with_seed(config: Config, seed: int) -> Config:
    """The settings with other candidates, another adapter and other images to judge."""
    return replace(
        config,
        pool=replace(config.pool, seed=config.pool.seed + seed),
        finetune=replace(config.finetune, seed=config.finetune.seed + seed),
        eval=replace(config.eval, seed=config.eval.seed + seed),
    )


def _facts(adapters: Sequence[Tuned]) -> dict[str, dict[str, object]]:
    """What each variant's rows say of it: its way, selection and rounds, which share of the candidates that were kept
    is right (of all in the first pool for the base), and the calls that its pools cost."""
    first = float(np.nanmean(numbers(adapters[0].candidates(), "right")))
    facts: dict[str, dict[str, object]] = {
        BASE: {"way": "", "selection": "", "rounds": 0, "picked_right": first, "calls": 0}
    }
    for tuned in adapters:
        pool = tuned.candidates()
        facts[tuned.variant] = {
            "way": tuned.way,
            "selection": tuned.selection,
            "rounds": tuned.number,
            "picked_right": float(np.nanmean(numbers(pool, "right")[flags(pool, "kept")])),
            "calls": tuned.calls,
        }
    return facts


def _titled(stages: Stages, place: str, title: str) -> AbstractContextManager[Step]:
    return stages(f"{title} ({place})")
