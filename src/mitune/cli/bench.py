"""Benchmarks: mi, knows, select, race. A world may add its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from mitune.cli.boundary import Commands, resumable
from mitune.cli.options import (
    Assignments,
    Device,
    Guidance,
    Negatives,
    PromptField,
    RunFolder,
    made_by,
    say,
    settings_of,
    stage,
)
from mitune.config.schema import ModelConfig
from mitune.errors import MituneError

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Benchmarks: is the number right, and which score picks well?"
)


def models_of(
    names: list[str] | None,
    scales: Sequence[float | None] | None,
    device: str | None,
    assignments: list[str] | None,
    **others: object,
) -> list[ModelConfig]:
    """Each model at each guidance scale; at its own default where none is given."""
    options = {f"model.{name}": value for name, value in {"device": device, **others}.items()}
    return [
        settings_of(None, None, assignments, options | {"model.name": name, "model.guidance_scale": scale}).model
        for name in names or ["shapes-sd"]
        for scale in scales or [None]
    ]


def one_each(option: str, scales: list[float] | None, names: Sequence[str]) -> Sequence[float | None]:
    """The guidance scale of each model in turn, None where none is given. Raises MituneError for another number."""
    if scales and len(scales) != len(names):
        raise MituneError(
            f"{option} is given {len(scales)} times, for {len(names)} of --model; give it for each, or not."
        )
    return scales or [None] * len(names)


@app.command(name="mi")
@resumable
def bench_mi(
    context: typer.Context,
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
    from mitune.bench.mi import figure, markdown, run_benchmark
    from mitune.bench.mi_tasks import TASKS
    from mitune.bench.pages import page
    from mitune.run.store import write_bytes

    if not all(size.strip().isdecimal() and int(size[:10]) >= 10 for size in n.split(",")):
        raise MituneError(f"--n {n!r} needs whole numbers, at least 10, with commas between them, e.g. 1000,5000.")
    names = [name.strip() for name in estimators.split(",")]
    with stage("Estimating") as step:
        estimates = run_benchmark(
            list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")],
            names,
            [int(size) for size in n.split(",")],
            seeds=seeds,
            file=results,
            progress=step,
        )
    picture = output.with_suffix(".png")
    write_bytes(picture, figure(estimates, names[:3]))
    text = page("mi", command=made_by(context), picture=picture.name, tables=markdown(estimates))
    write_bytes(output, text.encode())
    say("Table", output)


@app.command(name="knows")
@resumable
def bench_knows(
    context: typer.Context,
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="Hub id, diffusers folder, or an embedded model. Repeatable.")
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, Option(help="Guidance scale; the model's own default if left out. Repeatable.")
    ] = None,
    prompts: Annotated[
        str,
        Option("--prompts", "-p", help="File as for `mitune tune`, or an embedded list: shapes:heldout/color."),
    ] = "shapes:heldout",
    prompt_field: PromptField = None,
    negatives: Negatives = None,
    scenes: Annotated[int, Option(min=0, help="Rendered scenes a category; for embedded prompts.")] = 200,
    images: Annotated[int, Option("--images", "-n", min=1, help="Samples a prompt.")] = 4,
    seed: Annotated[int, Option(help="Seed.")] = 0,
    device: Device = None,
    assignments: Assignments = None,
    gains: Annotated[
        list[Path] | None,
        Option(help="images.parquet of `mitune bench tune`: is what it gained what was promised? Repeatable."),
    ] = None,
    run: RunFolder = Path("runs/knows"),
    output: Annotated[Path | None, Option("--output", "-o", help="Also write the table here, as Markdown.")] = None,
) -> None:
    """Can selection pay? What a model knows of its prompts, what it shows, and what it recognizes as wrong.

    Prompts of one's own have no judge; for them it only says how often a sample's prompt beats its hard negatives.

    Example:  mitune bench knows -m shapes-sd --guidance-scale 2 --guidance-scale 4 --scenes 100
    """
    import pyarrow.parquet as pq

    from mitune.bench.knows import knowledge, markdown, prediction
    from mitune.bench.pages import page
    from mitune.denoiser.opening.models import load_model
    from mitune.prompts.lists import load_prompts
    from mitune.prompts.negatives import hard_negatives, load_negatives
    from mitune.run.store import write_bytes
    from mitune.worlds.base import within

    models = models_of(model, guidance_scale, device, assignments)
    for loaded in map(load_model, models[:: len(guidance_scale or [1])]):  # each once: they may read texts unlike
        listed = load_prompts(prompts, loaded, prompt_field)
        user_negatives = load_negatives(Path(negatives), loaded) if negatives is not None else None
    named = within(prompts)
    with stage("Asking what is known") as step:
        rows = knowledge(
            models,
            listed,
            run,
            negatives=lambda prompt: hard_negatives(prompt, user_negatives),
            metric=named[0].metric if named else None,
            scenes=scenes if named else 0,
            images=images,
            seed=seed,
            progress=step,
        )
    table = markdown(rows)
    if gains:
        table += "\n" + prediction(rows, [pq.read_table(file) for file in gains])
    typer.echo(table)
    if output is not None:
        write_bytes(output, page("knows", command=made_by(context), table=table).encode())


@app.command(name="select")
@resumable
def bench_select(
    context: typer.Context,
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
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/select"),
) -> None:
    """Which score selects? Every score on the same candidates, held against the exact judge.

    Leaves candidates.parquet (a row a candidate with every score), tables.md with all scores, and summary.md, tau.png
    and gap.png with some of each kind; once all candidates are there, the same command makes these anew from them.

    Example:  mitune bench select -m shapes-sd -m shapes-sd3 --guidance-scale 2 --guidance-scale 4 --run runs/select
    """
    import pyarrow.parquet as pq

    from mitune.bench.select import SelectConfig, run_study, some_of_each
    from mitune.bench.select_figures import gap_figure, tau_figure
    from mitune.bench.select_summary import only, summarize_study
    from mitune.bench.select_tables import SHOWN, prediction_of, tables_of
    from mitune.prompts.lists import load_prompts
    from mitune.run.store import write_bytes

    config = SelectConfig(candidates=candidates, draws=draws, seed=seed)
    models = models_of(model, guidance_scale, device, assignments)
    with stage("Making and scoring candidates") as step:
        table = run_study(models, some_of_each(load_prompts(prompts), per_category), run, config, progress=step)
    result = summarize_study(pq.read_table(table))
    excerpt = only(result, SHOWN)
    command = made_by(context)
    promise = "## Does the condition predict the gain?\n\n" + prediction_of(result, "contrast")
    write_bytes(run / "tables.md", f"Made by `{command}`.\n\n{tables_of(result)}".encode())
    write_bytes(run / "summary.md", f"Made by `{command}`.\n\n{tables_of(excerpt)}\n{promise}".encode())
    write_bytes(run / "tau.png", tau_figure(excerpt))
    write_bytes(run / "gap.png", gap_figure(excerpt))
    say("Tables", run / "tables.md")


@app.command(name="race")
@resumable
def bench_race(
    context: typer.Context,
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="An embedded model, or a folder of such a one. Repeatable.")
    ] = None,
    steps: Annotated[int, Option(min=4, help="Sampling steps: a race needs some to save any.")] = 20,
    guidance_scale: Guidance = None,
    prompts: Annotated[str, Option("--prompts", "-p", help="Embedded list.")] = "shapes:heldout",
    per_category: Annotated[int, Option(min=1, help="Prompts of each category, at most.")] = 20,
    candidates: Annotated[int, Option("--candidates", "-M", min=8, help="Images made for each prompt (M).")] = 32,
    seed: Annotated[int, Option(help="Seed of the candidates.")] = 0,
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/race"),
    output: Annotated[Path, Option("--output", "-o", help="Markdown.")] = Path("racing.md"),
) -> None:
    """What does racing save, and what does it lose? Schedules replayed on full pools, held against the exact judge.

    Example:  mitune bench race -m shapes-sd -m shapes-sd3 --steps 20 --output docs/racing.md
    """
    from mitune.bench.race import SCHEDULES, SHOWN, RaceConfig, budgets, markdown, outcome_of, page_of, run_study
    from mitune.bench.select import some_of_each
    from mitune.prompts.lists import load_prompts
    from mitune.run.store import write_bytes

    names, listed = model or ["shapes-sd"], some_of_each(load_prompts(prompts), per_category)
    outcomes, studies = [], {}
    for name, settings in zip(names, models_of(names, [guidance_scale], device, assignments, steps=steps), strict=True):
        with stage(f"Making candidates with {name}") as step:
            config = RaceConfig(candidates=candidates, seed=seed)
            runs = studies[Path(name).name] = run_study(settings, listed, run / Path(name).name, config, step)
        outcomes += [outcome_of(runs, Path(name).name, score, schedule) for score in SHOWN for schedule in SCHEDULES]
    text = page_of(markdown(outcomes, candidates, steps), budgets(studies), made_by(context))
    write_bytes(output, text.encode())
    say("Tables", output)
