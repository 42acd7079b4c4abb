"""The whole of Algorithm 1: pool, selection, fine-tuning, and again; then the verdict and the report.

prompts → pool → fine-tuning set → adapter → (next round, with the adapter) → evaluation → report
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from mitune.config import Config, PoolConfig
from mitune.errors import MituneError
from mitune.evaluation import Variant, evaluate
from mitune.finetuning import finetune
from mitune.metrics.judgment import metric_for
from mitune.models import adapter_checksum, load_model
from mitune.pool import build_pool
from mitune.prompts import load_prompts
from mitune.report.build import build_report
from mitune.settings import from_mapping, plain, read_yaml, write_config
from mitune.store import write_json

Step = Callable[[int, int], None]


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


def claim_run(run: Path, config: Config) -> None:
    """Writes the resolved settings into the run directory; refuses a directory of another run."""
    file = run / "config.yaml"
    if not file.exists():
        if run.is_dir() and any(run.iterdir()):
            raise MituneError(f"{run} is not empty and holds no run; choose another folder with --run.")
        write_config(config, file)
        return
    found, wanted = plain(from_mapping(read_yaml(file))), plain(config)
    if found == wanted:
        return
    for section, value in wanted.items():
        if found[section] != value:
            raise MituneError(
                f"{run} is a run of other settings (see {section!r} in {file}); choose another folder with --run, or "
                f"go on with its own: --config {file}."
            )


def tune(config: Config, run: Path, *, stages: Stages = silent) -> TuneResult:
    """Runs Algorithm 1 for `config.rounds` rounds in the directory `run`; the same call goes on where it stopped.

    From the second round on, each selection has a pool of its own, made with its adapter, which is trained further.
    Raises MituneError for bad settings or prompts before anything is made.
    """
    base = load_model(config.model)
    prompts = [listed.text for listed in load_prompts(config.prompts, base.pipe)]
    metric = metric_for(config.model.name, prompts)
    if config.eval_prompts:
        held_out = load_prompts(config.eval_prompts, base.pipe)  # refused now rather than hours later
        metric_for(config.model.name, [listed.text for listed in held_out])
    claim_run(run, config)
    adapters: dict[str, Path] = {}
    for number in range(1, config.rounds + 1):
        folder = run / f"round-{number}"
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
                    identity=adapter_checksum(before),
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
                adapters[slug] = result.adapter
    verdict = judge_run(config, run, stages=stages) if config.eval_prompts else None
    return TuneResult(run, adapters, verdict, build_report(run))


def _pools(config: PoolConfig, adapters: Mapping[str, Path]) -> list[tuple[str, Path | None, PoolConfig]]:
    """The pools of a round: folder name, adapter that makes the candidates, settings.

    At first one pool serves all selections. Then each selection has an adapter, and goes on alone.
    """
    if not adapters:
        return [("pool", None, config)]
    return [
        ("pool" if len(adapters) == 1 else f"pool-{slug}", adapter, replace(config, select=(text,)))
        for text, (slug, adapter) in zip(config.select, adapters.items(), strict=True)
    ]


def judge_run(config: Config, run: Path, *, stages: Stages = silent) -> Path:
    """Judges the base, the adapters of the run's last round and `config.eval.guidance_scales`; returns the table.

    Raises MituneError if the model comes with no judge.
    """
    base = load_model(config.model)
    prompts = load_prompts(config.eval_prompts or config.prompts, base.pipe)
    metric = metric_for(config.model.name, [listed.text for listed in prompts])
    if metric is None:
        raise MituneError(
            f"{config.model.name} comes with no exact judge; leave eval_prompts out, make images with "
            "`mitune generate --adapter`, and score them with a metric of your choice."
        )
    adapters = sorted((run / f"round-{config.rounds}" / "adapters").glob("*/"))
    variants = [Variant(name="base"), *(Variant(name=folder.name, adapter=folder) for folder in adapters)]
    variants += [Variant(name=f"base, guidance {s:g}", guidance_scale=s) for s in config.eval.guidance_scales]
    with _cost(run, "evaluation") as cost:
        images = len(variants) * len(prompts) * config.eval.images
        cost |= {"candidates": images, "denoiser_calls": images * base.steps}
        return evaluate(
            config, prompts, variants, run / "eval", metric, stages=lambda variant: stages(f"Judging {variant.name}")
        )


def _without_loss(step: Step, done: int, total: int, _loss: float) -> None:
    step(done, total)


@contextmanager
def _cost(run: Path, stage: str) -> Iterator[dict[str, int]]:
    """Adds what a stage took to cost.json; a stage that went on after a stop adds to its earlier entry."""
    file = run / "cost.json"
    counts: dict[str, int] = {}
    began = time.monotonic()
    yield counts
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    entry = next((e for e in entries if e["stage"] == stage), None)
    if entry is None:
        entry = {"stage": stage, "seconds": 0.0, "candidates": 0, "denoiser_calls": 0}
        entries.append(entry)
    entry |= counts
    entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
    write_json(file, entries)
