"""The whole of Algorithm 1: pool, selection, fine-tuning, and again; then the verdict and the report.

prompts → pool → fine-tuning set → adapter → (next round, with the adapter) → evaluation → report
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mitune.config.resolve import write_config
from mitune.config.schema import Config, PoolConfig
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, load_model
from mitune.errors import MituneError
from mitune.evaluation.evaluate import Variant, evaluate
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.metrics.table import metric_for
from mitune.finetuning.run import check_trainable, finetune
from mitune.pool.build import build_pool
from mitune.pool.scores import own_negatives, scores_of, want_negatives
from mitune.pool.selection import parse_rule
from mitune.prompts.lists import load_prompts
from mitune.report.build import build_report
from mitune.run.locks import LOCK, sole_worker
from mitune.run.store import SETTINGS, claim, read_again, write_json
from mitune.worlds.base import Listed

Step = Callable[[int, int], None]
CONFIG = "config.yaml"  # of a run


class Stages(Protocol):
    """How a run shows its progress: a context manager a stage that hands out a callback of (done, total)."""

    def __call__(self, title: str, /) -> AbstractContextManager[Step]: ...


@contextmanager
def silent(_title: str) -> Iterator[Step]:
    """Shows nothing."""
    yield lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class TuneResult:
    """Where a run left its adapters (of the last round, by selection), its verdict and its report."""

    run: Path
    adapters: dict[str, Path]
    verdict: Path | None
    report: Path


def claim_run(run: Path, config: Config, prompts: Sequence[str]) -> None:
    """Ties the run directory to what its adapters depend on, and writes the resolved settings into it.

    Raises MituneError for a directory of another run.
    """
    sections = {"pool": config.pool, "finetune": config.finetune}
    settings = {name: settings_that_matter(section) for name, section in sections.items()}
    identity = {"model": model_identity(config.model), "prompts": list(prompts), "rounds": config.rounds}
    claim(run, identity | settings, "run")
    write_config(config, run / CONFIG)


def _require_run(run: Path) -> None:
    """Raises MituneError for a directory with anything but a run in it."""
    known = {SETTINGS, CONFIG, LOCK}
    if run.is_dir() and (names := {path.name for path in run.iterdir()}) and not names & known:
        raise MituneError(f"{run} is not empty and holds no run; choose another folder with --run.")


def tune(config: Config, run: Path, *, stages: Stages = silent) -> TuneResult:
    """Runs Algorithm 1 for `config.rounds` rounds in the directory `run`; the same call goes on where it stopped.

    From the second round on, each selection has a pool of its own, made with its adapter, which is trained further.
    Where the verdict fails, the report is written without it.
    Raises MituneError for bad settings or prompts before anything is made, and if another process works on the run.
    """
    base = load_model(config.model)
    check_trainable(config.model, config.finetune, base.pipe)
    prompts = [listed.text for listed in load_prompts(config.prompts, base, config.prompt_field)]
    metric = metric_for(config.metric, source=config.prompts, model=config.model.name, prompts=prompts)
    scores = scores_of(map(parse_rule, config.pool.select))
    own_negatives(config.pool.negatives, scores, prompts, base)  # refused now rather than hours later
    if config.eval_prompts:
        _held_out(config, base)  # likewise
    _require_run(run)
    with sole_worker(run):
        claim_run(run, config, prompts)
        adapters: dict[str, Path] = {}
        for number in range(1, config.rounds + 1):
            adapters = _round(config, run, number, adapters, prompts, base, metric, stages)
        try:
            verdict = judge_run(config, run, stages=stages) if config.eval_prompts else None
        except Exception:
            build_report(run)  # what was made can be looked at all the same
            raise
        return TuneResult(run, adapters, verdict, build_report(run))


def _round(
    config: Config,
    run: Path,
    number: int,
    adapters: Mapping[str, Path],
    prompts: Sequence[str],
    base: Model,
    metric: ImageMetric | None,
    stages: Stages,
) -> dict[str, Path]:
    """Pools, sets and trainings of one round; the adapters that it ends with, by selection."""
    folder, trained = run / f"round-{number}", {}
    for name, before, settings in _pools(config.pool, adapters):
        title = f"Round {number}: making and scoring candidates"
        with (
            stages(f"{title} of {settings.select[0]}" if before else title) as step,
            _cost(run, f"{name}, round {number}") as cost,
        ):
            pool = build_pool(
                load_model(config.model, adapter=before) if before else base,
                prompts,
                folder / name,
                settings,
                metric=metric,
                identity=model_identity(config.model, before),
                progress=step,
            )
            cost |= {
                "candidates": pool.candidates,
                "denoiser_calls": pool.denoiser_calls,
                "unraced_calls": pool.unraced_calls,
            }
        for slug, dataset in pool.sets.items():
            with (
                stages(f"Round {number}: fine-tuning on {slug}") as step,
                _cost(run, f"fine-tuning on {slug}, round {number}"),
            ):
                result = finetune(
                    config.model,
                    dataset,
                    folder / "adapters" / slug,
                    config.finetune,
                    start_from=before,
                    progress=partial(_without_loss, step),
                )
            trained[slug] = result.adapter
    return trained


def _pools(config: PoolConfig, adapters: Mapping[str, Path]) -> list[tuple[str, Path | None, PoolConfig]]:
    """The pools of a round: folder name, adapter that makes the candidates, settings.

    At first one pool serves all selections. Then each selection has an adapter, and goes on alone.
    """
    if not adapters:
        return [("pool", None, config)]
    return [
        ("pool" if len(adapters) == 1 else f"pool-{slug}", adapter, _alone(config, text))
        for text, (slug, adapter) in zip(config.select, adapters.items(), strict=True)
    ]


def _alone(config: PoolConfig, selection: str) -> PoolConfig:
    """The settings of a pool for one selection, with the user's hard negatives if that needs them."""
    wanted = want_negatives(scores_of([parse_rule(selection)]))
    return replace(config, select=(selection,), negatives=config.negatives if wanted else None)


def judge_run(config: Config, run: Path, *, stages: Stages = silent) -> Path:
    """Judges the base, the adapters of the run's last round and `config.eval.guidance_scales`; returns the table.

    Raises MituneError if no metric is named, and neither the prompts nor the model come with one.
    """
    base = load_model(config.model)
    prompts, metric = _held_out(config, base)
    adapters = sorted((run / f"round-{config.rounds}" / "adapters").glob("*/"))
    variants = [Variant(name="base"), *(Variant(name=folder.name, adapter=folder) for folder in adapters)]
    variants += [Variant(name=f"base, guidance {s:g}", guidance_scale=s) for s in config.eval.guidance_scales]
    with _cost(run, "evaluation") as cost:
        images = len(variants) * len(prompts) * config.eval.images
        cost |= {"candidates": images, "denoiser_calls": images * base.steps}
        return evaluate(
            config, prompts, variants, run / "eval", metric, stages=lambda variant: stages(f"Judging {variant.name}")
        )


def _held_out(config: Config, base: Model) -> tuple[list[Listed], ImageMetric]:
    """The prompts to judge by, and what judges. Raises MituneError if nothing does."""
    source = config.eval_prompts or config.prompts
    prompts = load_prompts(source, base, config.prompt_field)
    metric = metric_for(config.metric, source=source, model=config.model.name, prompts=[p.text for p in prompts])
    if metric is None:
        raise MituneError(
            f"Neither {config.model.name} nor {source} comes with a judge; name a metric with --metric (`mitune list "
            "metrics` shows them), or leave eval_prompts out."
        )
    return prompts, metric


def _without_loss(step: Step, done: int, total: int, _loss: float) -> None:
    step(done, total)


@contextmanager
def _cost(run: Path, stage: str) -> Iterator[dict[str, int]]:
    """Adds what a stage took to cost.json; a stage that went on after a stop adds to its earlier entry."""
    file = run / "cost.json"
    counts: dict[str, int] = {}
    began = time.monotonic()
    yield counts
    entries = read_again(file, _cost_entries) or []
    entry = next((e for e in entries if e["stage"] == stage), None)
    if entry is None:
        entry = {"stage": stage, "seconds": 0.0, "candidates": 0, "denoiser_calls": 0}
        entries.append(entry)
    entry |= counts
    entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
    write_json(file, entries)


def _cost_entries(content: bytes) -> list[dict[str, Any]]:
    """The entries of cost.json. Raises ValueError, KeyError or TypeError if they are none."""
    entries: list[dict[str, Any]] = json.loads(content)
    for entry in entries:
        _ = entry["stage"], float(entry["seconds"])
    return list(entries)
