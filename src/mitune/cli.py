"""The command line: each command reads its options, calls one library function and says what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer import Argument, Option

from mitune.config import HALVING, Config
from mitune.errors import MituneError
from mitune.settings import PRESETS, resolve

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="**Align a text-to-image model with its prompts, by its own mutual information.**\n\n"
    "Try it on the embedded model:  `mitune demo`\n\n"
    "Then on a real one:  `mitune tune --preset mi-tune-sd21 --prompts prompts.txt --run runs/sd21`",
)
shapes_app = typer.Typer(no_args_is_help=True, help="The embedded shapes world: its models, prompts and judge.")
app.add_typer(shapes_app, name="shapes")
bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks: is the number right, and which score picks well?")
app.add_typer(bench_app, name="bench")
console = Console(stderr=True)

Preset = Annotated[str | None, Option(help=f"Settings by name: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[Path | None, Option("--config", exists=True, dir_okay=False, help="YAML file of settings.")]
Assignments = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. --set finetune.rank=16. Repeatable.")
]
ModelName = Annotated[
    str | None, Option("--model", "-m", help="Hub id, diffusers folder, or an embedded model: shapes-sd, shapes-sd3.")
]
Guidance = Annotated[float | None, Option(help="Guidance scale; the model's own default if left out.")]
PromptSource = Annotated[
    str | None, Option("--prompts", "-p", help="Text file, one prompt a line, or an embedded list: shapes:train/color.")
]
Candidates = Annotated[int | None, Option("--candidates", "-M", help="Images made for each prompt (M).")]
Keep = Annotated[int | None, Option("--keep", "-k", help="Images kept for each prompt (k).")]
Selection = Annotated[
    list[str] | None,
    Option("--select", "-s", help="Score or control that picks, e.g. self-confidence, mi-tune, random. Repeatable."),
]
Race = Annotated[
    bool | None,
    Option("--race/--no-race", help="Drop half-way what cannot win by its score so far; other rungs: pool.race."),
]
Seed = Annotated[int | None, Option(help="Seed of the candidates.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.")]
RunFolder = Annotated[Path, Option("--run", "-r", help="Run folder; the same command goes on where it stopped.")]


def _settings(preset: str | None, file: Path | None, assignments: list[str] | None, options: dict[str, Any]) -> Config:
    """The resolved settings; options that were not given (None) leave the preset's or the file's value."""
    nested: dict[str, Any] = {}
    for key, value in options.items():
        if value is not None:
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
    return resolve(preset=preset, file=file, assignments=assignments or (), options=nested)


def _rungs(race: bool | None) -> list[list[float]] | None:
    """The rungs that --race and --no-race stand for; None where neither is given."""
    return None if race is None else [list(rung) for rung in HALVING if race]


@contextmanager
def _stage(title: str) -> Iterator[Any]:
    """A progress bar with the time left."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


@app.command()
def demo(
    run: RunFolder = Path("runs/demo"),
    model: ModelName = None,
    candidates: Candidates = None,
) -> None:
    """The whole method on an embedded model, in a few minutes on a laptop.

    Candidates are made, scored and selected, the model is fine-tuned on the best, and judged before and after against
    an exact truth. Look at report.html in the run folder.

    Example:  mitune demo --model shapes-sd3 --run runs/demo-sd3
    """
    config = _settings("demo", None, None, {"model.name": model, "pool.candidates": candidates})
    _tune(config, run)


@app.command()
def tune(
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    prompts: PromptSource = None,
    eval_prompts: Annotated[
        str | None, Option(help="Held-out prompts to judge by; needs a model with a judge.")
    ] = None,
    candidates: Candidates = None,
    keep: Keep = None,
    select: Selection = None,
    rounds: Annotated[int | None, Option(help="Rounds of pool and fine-tuning (R).")] = None,
    guidance_scale: Guidance = None,
    race: Race = None,
    seed: Seed = None,
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/tune"),
) -> None:
    """The whole of Algorithm 1: pool, selection, fine-tuning, R rounds; then the verdict and the report.

    Examples:

    mitune tune --preset mi-tune-sd21 --prompts prompts.txt --run runs/sd21

    mitune tune --prompts shapes:train/color --eval-prompts shapes:heldout/color -s self-confidence -s random
    """
    options = {
        "model.name": model, "model.guidance_scale": guidance_scale, "model.device": device, "prompts": prompts,
        "eval_prompts": eval_prompts, "pool.candidates": candidates, "pool.keep": keep, "pool.select": select,
        "pool.race": _rungs(race), "pool.seed": seed, "rounds": rounds,
    }  # fmt: skip
    _tune(_settings(preset, config_file, assignments, options), run)


def _tune(config: Config, run: Path) -> None:
    from mitune.report.build import headline
    from mitune.tuning import tune as run_tune

    result = run_tune(config, run, stages=_stage)
    if result.verdict is not None:
        console.print(headline(run))
    for name, folder in result.adapters.items():
        console.print(f"Adapter [bold]{name}[/]: {folder}")
    console.print(f"Report: [bold]{result.report}[/]")


@app.command()
def pool(
    preset: Preset = None,
    config_file: ConfigFile = None,
    model: ModelName = None,
    prompts: PromptSource = None,
    candidates: Candidates = None,
    keep: Keep = None,
    select: Selection = None,
    guidance_scale: Guidance = None,
    seed: Seed = None,
    device: Device = None,
    race: Race = None,
    adapter: Annotated[Path | None, Option(help="Adapter of an earlier round.")] = None,
    shard: Annotated[
        str, Option(help="i/n: make every n-th prompt from the i-th on; n such commands share a folder.")
    ] = "1/1",
    assignments: Assignments = None,
    run: RunFolder = Path("runs/pool"),
) -> None:
    """Make M candidates for every prompt, score them while they are made, keep the best k.

    Example:  mitune pool --model shapes-sd --prompts shapes:train/color -M 16 -s self-confidence --run runs/color
    """
    from mitune.metrics.judgment import metric_for
    from mitune.models import adapter_checksum, load_model
    from mitune.pool import build_pool
    from mitune.prompts import load_prompts

    options = {
        "model.name": model, "model.guidance_scale": guidance_scale, "model.device": device, "prompts": prompts,
        "pool.candidates": candidates, "pool.keep": keep, "pool.select": select, "pool.seed": seed,
        "pool.race": _rungs(race),
    }  # fmt: skip
    config = _settings(preset, config_file, assignments, options)
    loaded = load_model(config.model, adapter=adapter)
    texts = [listed.text for listed in load_prompts(config.prompts, loaded.pipe)]
    with _stage("Making and scoring candidates") as step:
        result = build_pool(
            loaded,
            texts,
            run / "pool",
            config.pool,
            metric=metric_for(config.model.name, texts),
            shard=_parse_shard(shard),
            identity=adapter_checksum(adapter),
            progress=step,
        )
    if not result.sets:
        console.print("This shard is done; the sets are written when all prompts have their records.")
    for name, folder in result.sets.items():
        console.print(f"Set [bold]{name}[/]: {folder}")
    if result.denoiser_calls < result.unraced_calls:
        console.print(
            f"The race took {result.denoiser_calls:,} denoiser calls instead of {result.unraced_calls:,}, "
            f"{result.unraced_calls / result.denoiser_calls:.1f}× fewer."
        )
    if result.broken:
        console.print(f"{result.broken} of {result.candidates} candidates came out as NaN and were left out.")


def _parse_shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise MituneError(f"--shard {text!r} needs the form i/n with 1 <= i <= n, e.g. 2/4.")
    return int(first) - 1, int(count)


@app.command()
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

    Example:  mitune train runs/color/sets/self-confidence --set finetune.adapter=dora -o runs/color/adapter
    """
    from mitune.adapter import export_fused
    from mitune.finetuning import finetune

    config = _settings(preset, config_file, assignments, {"model.name": model, "model.device": device})
    with _stage("Fine-tuning") as step:
        result = finetune(
            config.model,
            dataset,
            output,
            config.finetune,
            start_from=start_from,
            progress=lambda done, total, _loss: step(done, total),
        )
    console.print(f"Adapter: [bold]{result.adapter}[/]  (load it with pipe.load_lora_weights)")
    if fused is not None:
        export_fused(config.model, result.adapter, fused)
        console.print(f"Whole model with the adapter merged: [bold]{fused}[/]")


@app.command()
def generate(
    prompts: Annotated[list[str], Argument(help="One or more prompts, in quotes.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the pictures.")] = Path("images"),
    model: ModelName = None,
    adapter: Annotated[Path | None, Option(help="Adapter folder.")] = None,
    images: Annotated[int, Option("--images", "-n", min=1, help="Images a prompt.")] = 4,
    guidance_scale: Guidance = None,
    seed: Annotated[int, Option(help="Seed.")] = 0,
    device: Device = None,
) -> None:
    """Make images for prompts, and print the scores that come free with them.

    Example:  mitune generate "a red circle and a blue square" --model shapes-sd -o images
    """
    from mitune.generate import Request, candidate_seed, decode, default_batch_size, generate_all
    from mitune.information import SCORES
    from mitune.models import load_model
    from mitune.store import write_image

    options = {"model.name": model, "model.guidance_scale": guidance_scale, "model.device": device}
    config = _settings(None, None, None, options)
    loaded = load_model(config.model, adapter=adapter)
    batch_size = default_batch_size(loaded.pipe._execution_device)
    requests = [Request(prompt=p, seed=candidate_seed(seed, p, j)) for p in prompts for j in range(images)]
    done = 0
    with _stage("Making images") as step:
        for chunk, batch in generate_all(loaded, requests, min(len(requests), batch_size)):
            shown = {name: SCORES[name](batch.trace) for name in ("mi-tune", "self-confidence")}
            for row, image in enumerate(decode(loaded, batch.latents)):
                file = output / f"{(done + row) // images + 1:03d}-{(done + row) % images + 1:03d}.png"
                write_image(file, image)
                values = "  ".join(f"{name} {values[row].item():.3f}" for name, values in shown.items())
                console.print(f"{file}  {values}  {chunk[row].prompt}")
            done += len(chunk)
            step(done, len(requests))


@app.command()
def score(
    image: Annotated[Path, Argument(exists=True, dir_okay=False, help="A picture.")],
    prompt: Annotated[str, Argument(help="The prompt to hold it against, in quotes.")],
    model: ModelName = None,
    adapter: Annotated[Path | None, Option(help="Adapter folder.")] = None,
    estimator: Annotated[
        Literal["standard", "orthogonal", "self-confidence"], Option(help="What is estimated.")
    ] = "orthogonal",
    draws: Annotated[int, Option(min=4, help="Noisings, a multiple of 4; the error falls with their root.")] = 64,
    seed: Annotated[int, Option(help="Seed of the noise.")] = 0,
    heat_map: Annotated[
        Path | None, Option(help="Also save where in the picture the information lies, as a PNG.")
    ] = None,
    device: Device = None,
) -> None:
    """Point-wise mutual information between a picture and a prompt, in nats, with its standard error.

    Example:  mitune score images/001-001.png "a red circle and a blue square" --model shapes-sd --heat-map map.png
    """
    from PIL import Image

    from mitune.models import load_model
    from mitune.scoring import save_heat_map
    from mitune.scoring import score as score_images

    config = _settings(None, None, None, {"model.name": model, "model.device": device})
    loaded = load_model(config.model, adapter=adapter)
    picture = Image.open(image).convert("RGB")
    result = score_images(
        loaded.pipe, [picture], [prompt], estimator=estimator, draws=draws, seed=seed, call=loaded.call
    )
    typer.echo(str(result.estimates[0]))
    if heat_map is not None:
        save_heat_map(heat_map, picture, result.maps[0])


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, Argument(exists=True, file_okay=False, help="A run folder with adapters.")],
    prompts: PromptSource = None,
    images: Annotated[int | None, Option("--images", "-n", help="Images a prompt.")] = None,
    guidance: Annotated[
        list[float] | None, Option(help="Also judge the base at this guidance scale. Repeatable.")
    ] = None,
) -> None:
    """Judge base and tuned models of a run on held-out prompts: same prompts, same seeds, paired intervals.

    Example:  mitune eval runs/demo --images 8 --guidance 1.5 --guidance 3 --guidance 4
    """
    from mitune.report.build import build_report, headline
    from mitune.settings import from_mapping, read_yaml
    from mitune.tuning import judge_run

    config = from_mapping(read_yaml(run / "config.yaml"))
    judged = replace(
        config.eval,
        images=images or config.eval.images,
        guidance_scales=tuple(guidance or config.eval.guidance_scales),
    )
    source = prompts or config.eval_prompts or "shapes:heldout"
    judge_run(replace(config, eval=judged, eval_prompts=source), run, stages=_stage)
    console.print(headline(run))
    console.print(f"Report: [bold]{build_report(run)}[/]")


@app.command()
def report(run: Annotated[Path, Argument(exists=True, file_okay=False, help="A run folder.")]) -> None:
    """Write a run's report.html anew: one self-contained file.

    Example:  mitune report runs/demo
    """
    from mitune.report.build import build_report

    console.print(f"Report: [bold]{build_report(run)}[/]")


@shapes_app.command(name="prompts")
def shapes_prompts(
    name: Annotated[str, Argument(help="train or heldout, with a category if you like.")] = "train",
) -> None:
    """Print an embedded prompt list, e.g. for a file of your own.

    Example:  mitune shapes prompts heldout/color
    """
    from mitune.prompts import load_prompts

    for listed in load_prompts(f"shapes:{name}"):
        typer.echo(listed.text)


@shapes_app.command(name="check")
def shapes_check(
    model: Annotated[
        str, Option("--model", "-m", help="shapes-sd, shapes-sd3, or a folder of such a model.")
    ] = "shapes-sd",
    scenes: Annotated[int, Option(min=1, help="Rendered scenes a category, for what the model knows.")] = 500,
    images: Annotated[int, Option(min=1, help="Samples a held-out prompt, for what it shows.")] = 4,
    guidance_scale: Guidance = None,
    category: Annotated[list[str] | None, Option(help="Only this category. Repeatable.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Also write the table here, as Markdown.")] = None,
) -> None:
    """What a model knows (prompt against its hard negatives, on rendered scenes) and what it shows (its samples).

    Example:  mitune shapes check --model shapes-sd --scenes 100
    """
    from mitune.models import load_model
    from mitune.shapes.check import check_category, markdown
    from mitune.shapes.grammar import CATEGORIES
    from mitune.store import write_bytes

    unknown = set(category or ()) - set(CATEGORIES)
    if unknown:
        raise MituneError(f"Unknown category {min(unknown)!r}; choose from {', '.join(CATEGORIES)}.")
    loaded = load_model(
        _settings(None, None, None, {"model.name": model, "model.guidance_scale": guidance_scale}).model
    )
    checks = []
    wanted = category or list(CATEGORIES)
    with _stage(f"Checking {model}") as step:
        for done, name in enumerate(wanted):
            step(done, len(wanted))
            checks.append(check_category(loaded, name, scenes=scenes, images=images))
        step(len(wanted), len(wanted))
    table = markdown(checks)
    typer.echo(table)
    if output is not None:
        write_bytes(output, table.encode())


@shapes_app.command(name="figure")
def shapes_figure(
    output: Annotated[Path, Argument(help="PNG file.")],
    model: Annotated[str, Option("--model", "-m", help="An embedded model.")] = "shapes-sd",
    images: Annotated[int, Option("--images", "-n", min=1, help="Samples a prompt.")] = 8,
    seed: Annotated[int, Option(help="Seed.")] = 0,
) -> None:
    """A grid of prompts and samples, each framed by the judge's verdict.

    Example:  mitune shapes figure docs/shapes-sd.png --model shapes-sd
    """
    from mitune.models import load_model
    from mitune.shapes.figure import save_grid

    loaded = load_model(_settings(None, None, None, {"model.name": model}).model)
    save_grid(loaded, output, images=images, seed=seed)


@shapes_app.command(name="train")
def shapes_train(
    work: Annotated[Path, Argument(help="Folder for checkpoints; the same command goes on where it stopped.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the finished models.")] = Path("models"),
    model: Annotated[list[str] | None, Option("--model", "-m", help="Only this model. Repeatable.")] = None,
    scenes: Annotated[int, Option(min=1, help="Scenes to train on for each prompt.")] = 20,
) -> None:
    """Train the embedded models from nothing: the VAE, then shapes-sd and shapes-sd3. Takes hours on 2 cores.

    Example:  mitune shapes train work --output src/mitune/shapes/models
    """
    import logging

    from mitune.models import EMBEDDED
    from mitune.shapes.train import train_all

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    unknown = set(model or ()) - set(EMBEDDED)
    if unknown:
        raise MituneError(f"Unknown embedded model {min(unknown)!r}; choose from {', '.join(EMBEDDED)}.")
    train_all(work, output, model or list(EMBEDDED), scenes=scenes)


@bench_app.command(name="mi")
def bench_mi(
    tasks: Annotated[str, Option(help="Names with commas between them, or all: the 40 of the benchmark.")] = "all",
    estimators: Annotated[str, Option(help="Names with commas between them, e.g. RFMI,KSG.")] = "RFMI,Gaussian-copula",
    n: Annotated[str, Option("--n", help="Sample sizes.")] = "1000,5000,10000",
    seeds: Annotated[int, Option(min=1, help="Samples drawn of each task and size: seeds 0, 1, ...")] = 1,
    results: Annotated[Path, Option(help="Table of results; what it holds is shown too, and not made again.")] = Path(
        "runs/mi-benchmark.parquet"
    ),
    output: Annotated[Path, Option("--output", "-o", help="Markdown; the plot goes beside it.")] = Path("mi.md"),
) -> None:
    """Is the estimate right? Estimators on samples of distributions whose mutual information is known.

    Example:  mitune bench mi --estimators RFMI,MINDE-C,KSG --n 1000,5000,10000 --output docs/mi-benchmark.md
    """
    from mitune.bench.mi import HEADER, figure, markdown, run_benchmark
    from mitune.bench.mi_tasks import TASKS
    from mitune.store import write_bytes

    if not all(size.strip().isdigit() for size in n.split(",")):
        raise MituneError(f"--n {n!r} needs whole numbers with commas between them, e.g. 1000,5000.")
    names = [name.strip() for name in estimators.split(",")]
    with _stage("Estimating") as step:
        found = run_benchmark(
            list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")],
            names,
            [int(size) for size in n.split(",")],
            seeds=seeds,
            file=results,
            progress=step,
        )
    picture = output.with_suffix(".png")
    command = f"mitune bench mi --tasks {tasks} --estimators {estimators} --n {n} --seeds {seeds} --output {output}"
    write_bytes(picture, figure(found, names[:3]))
    write_bytes(output, (HEADER.format(command=command, picture=picture.name) + markdown(found)).encode())
    console.print(f"Table: [bold]{output}[/]")


@bench_app.command(name="knows")
def bench_knows(
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="Hub id, diffusers folder, or an embedded model. Repeatable.")
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, Option(help="Guidance scale; the model's own default if left out. Repeatable.")
    ] = None,
    prompts: Annotated[
        str, Option("--prompts", "-p", help="Text file, one prompt a line, or an embedded list: shapes:heldout/color.")
    ] = "shapes:heldout",
    negatives: Annotated[
        Path | None, Option(help='Hard negatives as JSON lines, {"prompt": ..., "negatives": [...]}; else by rule.')
    ] = None,
    scenes: Annotated[int, Option(min=0, help="Rendered scenes a category; for embedded prompts.")] = 200,
    images: Annotated[int, Option("--images", "-n", min=1, help="Samples a prompt.")] = 4,
    seed: Annotated[int, Option(help="Seed.")] = 0,
    device: Device = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Also write the table here, as Markdown.")] = None,
) -> None:
    """Can selection pay? What a model knows of its prompts, what it shows, and what it recognizes as wrong.

    Prompts of one's own have no judge; for them, only how often a sample's prompt beats its hard negatives is told.

    Example:  mitune bench knows -m shapes-sd --guidance-scale 2 --guidance-scale 4 --scenes 100
    """
    from mitune.bench.knows import knowledge, markdown
    from mitune.bench.select import at_scales
    from mitune.metrics.judgment import shapes_metric
    from mitune.negatives import hard_negatives, load_negatives
    from mitune.prompts import load_prompts
    from mitune.store import write_bytes

    own = load_negatives(negatives) if negatives is not None else None
    embedded = prompts.startswith("shapes:")
    with _stage("Asking what is known") as step:
        found = knowledge(
            at_scales(model or ["shapes-sd"], guidance_scale or [], device or "auto"),
            load_prompts(prompts),
            negatives=lambda prompt: hard_negatives(prompt, own),
            metric=shapes_metric if embedded else None,
            scenes=scenes if embedded else 0,
            images=images,
            seed=seed,
            progress=step,
        )
    table = markdown(found)
    typer.echo(table)
    if output is not None:
        write_bytes(output, table.encode())


@bench_app.command(name="select")
def bench_select(
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="An embedded model, or a folder of such a one. Repeatable.")
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, Option(help="Guidance scale; the model's own default if left out. Repeatable.")
    ] = None,
    prompts: Annotated[str, Option("--prompts", "-p", help="Embedded list.")] = "shapes:heldout",
    per_category: Annotated[int, Option(min=1, help="Prompts of each category, at most.")] = 40,
    candidates: Annotated[int, Option("--candidates", "-M", min=2, help="Images made for each prompt (M).")] = 50,
    draws: Annotated[int, Option(min=2, help="Noise levels of the post-hoc scores; each costs 2 calls a prompt.")] = 8,
    seed: Annotated[int, Option(help="Seed of candidates and noise.")] = 0,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    run: RunFolder = Path("runs/select"),
) -> None:
    """Which score selects? Every score on the same candidates, held against the exact judge.

    Leaves candidates.parquet (a row a candidate with every score), tables.md with all scores, and summary.md, tau.png
    and gap.png with some of each kind; once all candidates are there, the same command makes these anew from them.

    Example:  mitune bench select -m shapes-sd -m shapes-sd3 --guidance-scale 2 --guidance-scale 4 --run runs/select
    """
    import pyarrow.parquet as pq

    from mitune.bench.select import SelectConfig, at_scales, run_study, some_of_each
    from mitune.bench.select_tables import (
        SHOWN,
        gap_figure,
        only,
        prediction_of,
        summarize_study,
        tables_of,
        tau_figure,
    )
    from mitune.prompts import load_prompts
    from mitune.store import write_bytes

    config = SelectConfig(candidates=candidates, draws=draws, seed=seed)
    models = at_scales(model or ["shapes-sd"], guidance_scale or [], device)
    with _stage("Making and scoring candidates") as step:
        table = run_study(models, some_of_each(load_prompts(prompts), per_category), run, config, progress=step)
    result = summarize_study(pq.read_table(table))
    shown = only(result, SHOWN)
    write_bytes(run / "tables.md", tables_of(result).encode())
    promise = "## Does the condition predict the gain?\n\n" + prediction_of(result, "normalized-negatives")
    write_bytes(run / "summary.md", f"{tables_of(shown)}\n{promise}".encode())
    write_bytes(run / "tau.png", tau_figure(shown))
    write_bytes(run / "gap.png", gap_figure(shown))
    console.print(f"Tables: [bold]{run / 'tables.md'}[/]")


@bench_app.command(name="tune")
def bench_tune(
    model: Annotated[list[str] | None, Option("--model", "-m", help="An embedded model. Repeatable.")] = None,
    select: Selection = None,
    guidance_scale: Annotated[
        list[float] | None, Option(help="Further guidance scales to judge base and adapters at. Repeatable.")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Each has its own pool, adapters and images to judge.")] = 1,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/bench-tune"),
    output: Annotated[Path, Option("--output", "-o", help="Markdown.")] = Path("gains.md"),
) -> None:
    """What does fine-tuning gain? The preset shapes-study with each score's picks, judged on held-out prompts.

    Example:  mitune bench tune -m shapes-sd -s self-confidence -s mi-tune -s random -s oracle --seeds 3 -o gains.md
    """
    import pyarrow.parquet as pq

    from mitune.bench.tune import HEADER, markdown, run_study
    from mitune.store import write_bytes

    names = model or ["shapes-sd"]
    configs = [_settings("shapes-study", None, assignments, {"model.name": m, "pool.select": select}) for m in names]
    table = run_study(configs, run, seeds=seeds, guidance_scales=guidance_scale or (), stages=_stage)
    given: dict[str, Sequence[object]] = {
        "-m": names, "-s": configs[0].pool.select, "--guidance-scale": guidance_scale or (), "--set": assignments or (),
    }  # fmt: skip
    words = [f"{option} {value}" for option, values in given.items() for value in values]
    command = " ".join(["mitune bench tune", *words, f"--seeds {seeds} -o {output}"])
    write_bytes(output, (HEADER.format(command=command) + markdown(pq.read_table(table))).encode())
    console.print(f"Tables: [bold]{output}[/]")


@bench_app.command(name="race")
def bench_race(
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="An embedded model, or a folder of such a one. Repeatable.")
    ] = None,
    steps: Annotated[int, Option(min=4, help="Sampling steps: a race needs some to save any.")] = 20,
    guidance_scale: Guidance = None,
    prompts: Annotated[str, Option("--prompts", "-p", help="Embedded list.")] = "shapes:heldout",
    per_category: Annotated[int, Option(min=1, help="Prompts of each category, at most.")] = 10,
    candidates: Annotated[int, Option("--candidates", "-M", min=2, help="Images made for each prompt (M).")] = 32,
    seed: Annotated[int, Option(help="Seed of the candidates.")] = 0,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    run: RunFolder = Path("runs/race"),
    output: Annotated[Path, Option("--output", "-o", help="Markdown.")] = Path("racing.md"),
) -> None:
    """What does racing save, and what does it lose? Schedules replayed on full pools, held against the exact judge.

    Example:  mitune bench race -m shapes-sd -m shapes-sd3 --steps 20 --output docs/racing.md
    """
    from mitune.bench.race import SCHEDULES, SHOWN, RaceConfig, markdown, outcome_of, page, run_study
    from mitune.bench.select import some_of_each
    from mitune.config import ModelConfig
    from mitune.prompts import load_prompts
    from mitune.store import write_bytes

    names, listed = model or ["shapes-sd"], some_of_each(load_prompts(prompts), per_category)
    outcomes = []
    for name in names:
        settings = ModelConfig(name=name, steps=steps, guidance_scale=guidance_scale, device=device)
        with _stage(f"Making candidates with {name}") as step:
            config = RaceConfig(candidates=candidates, seed=seed)
            runs = run_study(settings, listed, run / Path(name).name, config, step)
        outcomes += [outcome_of(runs, Path(name).name, score, schedule) for score in SHOWN for schedule in SCHEDULES]
    scale = "" if guidance_scale is None else f" --guidance-scale {guidance_scale:g}"
    command = " ".join(
        ["mitune bench race", *(f"-m {name}" for name in names), f"--steps {steps}{scale} -p {prompts}"]
        + [f"--per-category {per_category} -M {candidates} --seed {seed} --output {output}"]
    )
    write_bytes(output, page(markdown(outcomes, candidates, steps), command).encode())
    console.print(f"Tables: [bold]{output}[/]")


@bench_app.command(name="truth")
def bench_truth(
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="An embedded model, or a folder of such a one. Repeatable.")
    ] = None,
    scenes: Annotated[int, Option(min=2, help="Rendered scenes a category.")] = 40,
    draws: Annotated[int, Option(min=4, help="Noisings of each scene and prompt, a multiple of 4.")] = 64,
    seed: Annotated[int, Option(help="Seed of scenes and noise.")] = 0,
    output: Annotated[Path, Option("--output", "-o", help="Markdown; the plots go beside it.")] = Path("truth.md"),
) -> None:
    """Is the number right? Estimates on rendered scenes against the exact mutual information of the shapes world.

    Example:  mitune bench truth -m shapes-sd -m shapes-sd3 --scenes 40 --output docs/truth.md
    """
    from mitune.bench.truth import study
    from mitune.bench.truth_tables import HEADER, calibration_figure, tables_of
    from mitune.models import load_model
    from mitune.store import write_bytes

    names = model or ["shapes-sd"]
    command = " ".join(["mitune bench truth", *(f"-m {name}" for name in names), f"--scenes {scenes} --draws {draws}"])
    sections = [HEADER.format(command=f"{command} --seed {seed}")]
    for name in names:
        loaded = load_model(_settings(None, None, None, {"model.name": name}).model)
        with _stage(f"Estimating with {name}") as step:
            found = study(loaded, scenes=scenes, draws=draws, seed=seed, progress=step)
        figure = output.with_name(f"{output.stem}-{Path(name).name}.png")
        write_bytes(figure, calibration_figure(found))
        sections.append(tables_of(found, figure.name))
        write_bytes(output, "\n".join(sections).encode())
    console.print(f"Tables: [bold]{output}[/]")


def main() -> None:
    """Runs the command line; errors that the user can act on are one sentence and status 2."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # their hints speak to programmers
    try:
        app(standalone_mode=True)
    except MituneError as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        sys.exit(130)
