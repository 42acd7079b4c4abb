"""Algorithm 1 of MI-TUNE: pool, selection, fine-tuning, and again.

    prompts → pool → fine-tuning set → adapter → (next round, with the adapter)

A round may take some of the prompts alone (`round_prompts`), so that many short rounds cost what one large pool does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mitune.config.schema import Config, PoolConfig
from mitune.denoiser.opening.identity import model_identity
from mitune.denoiser.opening.models import Model, load_model
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.metrics.table import metric_for
from mitune.evaluation.variant import Variant
from mitune.finetuning.objectives.base import OBJECTIVES, check_set, pool_settings
from mitune.finetuning.run import check_trainable, finetune, is_trained
from mitune.pool.build import build_pool
from mitune.pool.scores import own_negatives, scores_of, want_negatives
from mitune.pool.selection import parse_rule
from mitune.run.stages import Run, Step
from mitune.worlds.base import Listed


class MITune:
    """Makes an adapter for each selection of `config.pool.select`, in `config.rounds` rounds.

    From the second round on, each selection has a pool of its own, made with its adapter, which is trained further.
    Seeds move on from round to round: of the candidates, and of the training.
    """

    def check(self, config: Config, prompts: Sequence[Listed], base: Model) -> None:
        """Raises MituneError for a model that cannot be trained, selections that cannot be, and prompts that the judge
        or the user's hard negatives do not fit."""
        check_trainable(config.model, config.finetune, base.pipe)
        pool = pool_settings(config)
        objective = OBJECTIVES.resolve(config.finetune.objective)
        check_set(objective, config.finetune.objective, ranked=pool.ranked is not None, rivals=pool.rivals)
        texts = [listed.text for listed in prompts]
        _metric(config, texts)
        wanted = pool.rivals or want_negatives(scores_of(map(parse_rule, pool.select), texts))
        own_negatives(pool.negatives, texts, base, wanted=wanted)

    def prepare(self, config: Config, prompts: Sequence[Listed], run: Run) -> list[Variant]:
        """The adapters of the last round, and with `config.eval.each_round` those of the rounds before."""
        texts = [listed.text for listed in prompts]
        metric = _metric(config, texts)
        adapters: dict[str, Path] = {}
        earlier: list[Variant] = []
        for number in range(1, config.rounds + 1):
            earlier += [Variant(name=f"{slug}, round {number - 1}", adapter=path) for slug, path in adapters.items()]
            trained = _adapters(config, run, number)
            if number < config.rounds and all(map(is_trained, trained.values())):
                adapters = trained  # a run that goes on need not open its models again
                continue
            chosen = prompts_of_round(texts, config.round_prompts or len(texts), number, config.pool.seed)
            adapters = _round(_of_round(config, number), run, number, adapters, chosen, metric)
        last = [Variant(name=slug, adapter=folder) for slug, folder in adapters.items()]
        return last + (earlier if config.eval.each_round else [])


def _metric(config: Config, prompts: Sequence[str]) -> ImageMetric | None:
    return metric_for(config.metric, source=config.prompts, model=config.model.name, prompts=prompts)


def _adapters(config: Config, run: Run, number: int) -> dict[str, Path]:
    """Where the adapters of a round go, by selection."""
    slugs = [parse_rule(text).slug for text in config.pool.select]
    return {slug: run.folder / f"round-{number}" / "adapters" / slug for slug in slugs}


def prompts_of_round(prompts: Sequence[str], count: int, number: int, seed: int) -> list[str]:
    """The `count` prompts of a round, numbered from 1, in their order: all in turn, shuffled, then shuffled anew.

    All of them if there are no more.
    """
    count = min(count, len(prompts))
    turn, place = divmod(number - 1, len(prompts) // count)
    order = np.random.default_rng([seed, turn]).permutation(len(prompts))
    return [prompts[index] for index in sorted(order[place * count : (place + 1) * count])]


def _of_round(config: Config, number: int) -> Config:
    """The settings of a round: those of the run with other seeds."""
    pool, finetune = pool_settings(config), config.finetune
    return replace(
        config,
        pool=replace(pool, seed=pool.seed + number - 1),
        finetune=replace(finetune, seed=finetune.seed + number - 1),
    )


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
    """The settings of a pool for one selection, with the user's hard negatives if that or the objective needs them."""
    wanted = config.rivals or want_negatives(scores_of([parse_rule(selection)]))
    return replace(config, select=(selection,), negatives=config.negatives if wanted else None)


def _without_loss(step: Step, done: int, total: int, _loss: float) -> None:
    step(done, total)
