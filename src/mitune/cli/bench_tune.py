"""The benchmark of fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from mitune.cli.bench import one_each
from mitune.cli.boundary import Commands, resumable
from mitune.cli.options import Assignments, RunFolder, Selection, made_by, say, settings_of, stage

app = typer.Typer(cls=Commands)


@app.command(name="tune")
@resumable
def bench_tune(
    context: typer.Context,
    model: Annotated[list[str] | None, Option("--model", "-m", help="An embedded model. Repeatable.")] = None,
    preset: Annotated[
        list[str] | None, Option("--preset", help="Way of fine-tuning, shapes-study unless named. Repeatable.")
    ] = None,
    objective: Annotated[
        list[str] | None, Option(help="Objective in place of the preset's; each is a way of its own. Repeatable.")
    ] = None,
    select: Selection = None,
    made_at: Annotated[
        list[float] | None, Option(help="Guidance scale that candidates are made at, of each model in turn.")
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, Option(help="Further guidance scales to judge base and adapters at. Repeatable.")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Each has its own pool, adapters and images to judge.")] = 1,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/bench-tune"),
    output: Annotated[Path, Option("--output", "-o", help="Markdown.")] = Path("gains.md"),
) -> None:
    """What does fine-tuning gain? Presets × objectives × scores, after each round, judged on held-out prompts.

    Examples:

    mitune bench tune -m shapes-sd -s contrast -s mi-tune -s random -s oracle --seeds 3 -o gains.md

    mitune bench tune --preset shapes-rounds --objective advantage --objective dpo --guidance-scale 4

    mitune bench tune --preset shapes-rounds -m shapes-sd --made-at 6 -m shapes-sd3 --made-at 4 -s reward -s oracle
    """
    import pyarrow.parquet as pq

    from mitune.bench.pages import page
    from mitune.bench.tune import choices_of, run_study
    from mitune.bench.tune_figure import guidance_figure
    from mitune.bench.tune_tables import gains, markdown, picks
    from mitune.run.store import write_bytes

    names = model or ["shapes-sd"]
    choices = choices_of(preset or ["shapes-study"], objective or [])
    models = []
    for name, scale in zip(names, one_each("--made-at", made_at, names), strict=True):
        of_model = {"model.name": name, "model.guidance_scale": scale, "pool.select": select}
        ways = {way: settings_of(base, None, assignments, of_model | aim) for way, (base, aim) in choices.items()}
        models.append(ways)
    rows = pq.read_table(run_study(models, run, seeds=seeds, guidance_scales=guidance_scale or (), stages=stage))
    picture, figure = output.with_suffix(".png"), ""
    if guidance_scale:
        write_bytes(picture, guidance_figure(gains(rows)))
        figure = f"![Exact accuracy against the guidance scale at use]({picture.name})\n\n"
    tables = {"figure": figure, "gains": markdown(rows), "picks": picks(models, run, seeds=seeds)}
    write_bytes(output, page("tune", command=made_by(context), **tables).encode())
    say("Tables", output)
