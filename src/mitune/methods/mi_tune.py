"""Algorithm 1 of MI-TUNE: pool, selection, fine-tuning, and again.

prompts → pool → fine-tuning set → adapter → (next round, with the adapter)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mitune.config.schema import Config, PoolConfig
from mitune.denoiser.opening.identity import model_identity
from mitune.denoiser.opening.models import Model, load_model
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.metrics.table import metric_for
from mitune.evaluation.variant import Variant
from mitune.finetuning.objectives.base import OBJECTIVES
from mitune.finetuning.run import check_trainable, finetune
from mitune.pool.build import build_pool
from mitune.pool.scores import own_negatives, scores_of, want_negatives
from mitune.pool.selection import parse_rule
from mitune.run.stages import Run, Step
from mitune.worlds.base import Listed


class MITune:
    """Makes an adapter for each selection of `config.pool.select`, in `config.rounds` rounds.

    From the second round on, each selection has a pool of its own, made with its adapter, which is trained further.
    """

    def check(self, config: Config, prompts: Sequence[Listed], base: Model) -> None:
        """Raises MituneError for a model that cannot be trained, selections that cannot be, and prompts that the judge
        or the user's hard negatives do not fit."""
        check_trainable(config.model, config.finetune, base.pipe)
        if OBJECTIVES.resolve(config.finetune.objective).needs == "ranked":
            raise MituneError(
                f"finetune.objective = {config.finetune.objective} needs a ranked set, and a pool's sets hold what is "
                "kept alone; add advantages to a set and give it to `mitune train`, or set another objective."
            )
        texts = [listed.text for listed in prompts]
        _metric(config, texts)
        own_negatives(config.pool.negatives, scores_of(map(parse_rule, config.pool.select), texts), texts, base)

    def prepare(self, config: Config, prompts: Sequence[Listed], run: Run) -> list[Variant]:
        """The adapters of the last round."""
        texts = [listed.text for listed in prompts]
        metric = _metric(config, texts)
        adapters: dict[str, Path] = {}
        for number in range(1, config.rounds + 1):
            adapters = _round(config, run, number, adapters, texts, metric)
        return [Variant(name=slug, adapter=folder) for slug, folder in adapters.items()]


def _metric(config: Config, prompts: Sequence[str]) -> ImageMetric | None:
    return metric_for(config.metric, source=config.prompts, model=config.model.name, prompts=prompts)


def _round(
    config: Config,
    run: Run,
    number: int,
    adapters: Mapping[str, Path],
    prompts: Sequence[str],
    metric: ImageMetric | None,
) -> dict[str, Path]:
    """Pools, sets and trainings of one round; the adapters that it ends with, by selection."""
    folder, trained = run.folder / f"round-{number}", {}
    for name, before, settings in _pools(config.pool, adapters):
        title = f"Round {number}: making and scoring candidates"
        with (
            run.stages(f"{title} of {settings.select[0]}" if before else title) as step,
            run.cost(f"{name}, round {number}") as cost,
        ):
            pool = build_pool(
                load_model(config.model, adapter=before),
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
                run.stages(f"Round {number}: fine-tuning on {slug}") as step,
                run.cost(f"fine-tuning on {slug}, round {number}"),
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


def _without_loss(step: Step, done: int, total: int, _loss: float) -> None:
    step(done, total)
