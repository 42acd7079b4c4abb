"""Its steps: pool, train; and merge, which adds up what they made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from mitune.cli.boundary import resumable
from mitune.cli.options import (
    Assignments,
    Candidates,
    ConfigFile,
    Device,
    ExecutorName,
    Guidance,
    Keep,
    MetricName,
    ModelName,
    Negatives,
    ObjectiveName,
    Preset,
    PromptField,
    PromptSource,
    Race,
    RunFolder,
    Seed,
    Selection,
    Shard,
    StoreName,
    console,
    parse_shard,
    parse_weight,
    race_setting,
    say,
    settings_of,
    stage,
    store_for,
)

if TYPE_CHECKING:
    from mitune.pool.build import PoolResult

app = typer.Typer()


@app.command()
@resumable
def pool(
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    prompts: PromptSource = None,
    prompt_field: PromptField = None,
    metric: MetricName = None,
    candidates: Candidates = None,
    keep: Keep = None,
    select: Selection = None,
    guidance_scale: Guidance = None,
    seed: Seed = None,
    device: Device = None,
    race: Race = None,
    negatives: Negatives = None,
    objective: ObjectiveName = None,
    adapter: Annotated[Path | None, Option(help="Adapter of an earlier round.")] = None,
    shard: Shard = "1/1",
    executor: ExecutorName = "local",
    store: StoreName = "folder",
    assignments: Assignments = None,
    run: RunFolder = Path("runs/pool"),
) -> None:
    """Make M candidates for every prompt, score them while they are made, keep the best k.

    Example:  mitune pool --model shapes-sd --prompts shapes:train/color -M 16 --run runs/color
    """
    from mitune.denoiser.opening.identity import model_identity
    from mitune.denoiser.opening.models import load_model
    from mitune.evaluation.metrics.table import metric_for
    from mitune.finetuning.objectives.base import pool_settings
    from mitune.pool.build import build_pool
    from mitune.prompts.lists import load_prompts
    from mitune.run.executors.base import EXECUTORS

    options = {
        "model.name": model, "model.guidance_scale": guidance_scale, "model.device": device, "prompts": prompts,
        "prompt_field": prompt_field, "metric": metric, "pool.candidates": candidates, "pool.keep": keep,
        "pool.select": select, "pool.seed": seed, "pool.race": race_setting(race), "pool.negatives": negatives,
        "finetune.objective": objective,
    }  # fmt: skip
    config, part = settings_of(preset, config_file, assignments, options), parse_shard(shard)
    launcher, place = EXECUTORS.resolve(executor), store_for(store)
    loaded = load_model(config.model, adapter=adapter)
    texts = [listed.text for listed in load_prompts(config.prompts, loaded, config.prompt_field)]
    judge = metric_for(config.metric, source=config.prompts, model=config.model.name, prompts=texts)
    with stage("Making and scoring candidates") as step:
        result = build_pool(
            loaded,
            texts,
            run / "pool",
            pool_settings(config),
            metric=judge,
            shard=part,
            executor=launcher,
            store=place,
            identity=model_identity(config.model, adapter),
            progress=step,
        )
    _say_pool(result)


def _say_pool(result: PoolResult) -> None:
    if not result.sets:
        console.print("This shard is done; the sets are written when all prompts have their records.")
    for name, folder in result.sets.items():
        say(f"Set {name}", folder)
    if result.denoiser_calls < result.unraced_calls:
        console.print(
            f"The race took {result.denoiser_calls:,} denoiser calls instead of {result.unraced_calls:,}, "
            f"{result.unraced_calls / result.denoiser_calls:.1f}× fewer."
        )
    if result.broken:
        console.print(f"{result.broken} of {result.candidates} candidates came out as NaN and were left out.")


@app.command()
@resumable
def train(
    dataset: Annotated[Path, Argument(exists=True, file_okay=False, help="A fine-tuning set, made by `mitune pool`.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the adapter.")] = Path("adapter"),
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    device: Device = None,
    objective: ObjectiveName = None,
    start_from: Annotated[Path | None, Option(help="Adapter to go on from.")] = None,
    fused: Annotated[
        Path | None, Option(help="Also write the whole model with the adapter merged into it, here.")
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Fine-tune a LoRA or DoRA adapter on a set, from its cached latents and embeddings alone.

    Without --model it is one for the model that made the set, as the set's seal has it.

    Example:  mitune train runs/color/sets/contrast --set finetune.adapter=dora -o runs/color/adapter
    """
    from mitune.denoiser.fusing import check_new, export_fused
    from mitune.finetuning.dataset import model_of
    from mitune.finetuning.run import finetune

    made_by = model_of(dataset)
    options = {"model.name": model, "model.device": device, "finetune.objective": objective}
    config = settings_of(preset, config_file, assignments, options, {"model": {"name": made_by}} if made_by else None)
    if model is None and config.model.name == made_by:
        console.print(f"The set was made by {made_by}; the adapter will be one for it.", markup=False)
    if fused is not None:
        check_new(fused)  # now rather than after the training
    with stage("Fine-tuning") as step:
        result = finetune(
            config.model,
            dataset,
            output,
            config.finetune,
            start_from=start_from,
            progress=lambda done, total, _loss: step(done, total),
        )
    say("Adapter, for pipe.load_lora_weights", result.adapter)
    if fused is not None:
        export_fused(config.model, result.adapter, fused)
        say("Whole model with the adapter merged", fused)


@app.command()
def merge(
    adapters: Annotated[
        list[str],
        Argument(
            metavar="ADAPTER[:WEIGHT]",
            help="Adapter folders or .safetensors files, each with the number that its change of the model is "
            "multiplied by, after the last colon: 1 if left out, below 0 to go away from it.",
        ),
    ],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the adapter.")] = Path("merged"),
    rank: Annotated[
        int | None,
        Option(min=1, help="Its rank at most, for the nearest such adapter; by default the ranks add up, exactly."),
    ] = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    assignments: Assignments = None,
) -> None:
    """Add up adapters of one model, with weights of either sign: again an adapter, without training.

    The sum is exact. With DoRA in it, it is a DoRA and depends on the model's weights; the model is the one that the
    adapters' cards name, or --model. To train on, set finetune.adapter, rank and alpha as the merged card has them.

    Example:  mitune merge runs/color:0.5 runs/shape:0.5 runs/random:-0.3 -o merged
    """
    from mitune.finetuning.merging import merge_adapters

    summands = [parse_weight(text) for text in adapters]
    is_named = any((preset, config_file, model, assignments))
    config = settings_of(preset, config_file, assignments, {"model.name": model}) if is_named else None
    result = merge_adapters(summands, output, rank=rank, model=config.model if config else None)
    say("Adapter, for pipe.load_lora_weights", result.adapter)
    console.print(str(result), markup=False, soft_wrap=True)
