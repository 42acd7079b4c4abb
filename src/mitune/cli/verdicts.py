"""What came of a run: eval, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from mitune.cli.boundary import resumable
from mitune.cli.options import (
    Assignments,
    Device,
    ExecutorName,
    MetricName,
    PromptField,
    PromptSource,
    Shard,
    StoreName,
    console,
    parse_shard,
    say,
    settings_of,
    stage,
    store_for,
)
from mitune.errors import MituneError

app = typer.Typer()


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
