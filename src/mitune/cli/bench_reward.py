"""The benchmark of rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from mitune.cli.bench import models_of, one_each
from mitune.cli.boundary import Commands, resumable
from mitune.cli.options import Assignments, Device, RunFolder, made_by, say, stage

app = typer.Typer(cls=Commands)


@app.command(name="reward")
@resumable
def bench_reward(
    context: typer.Context,
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="An embedded model, or a folder of such a one. Repeatable.")
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, Option(help="Guidance scale of each model in turn; its own default if left out.")
    ] = None,
    prompts: Annotated[str, Option("--prompts", "-p", help="Embedded list.")] = "shapes:train",
    per_category: Annotated[int, Option(min=1, help="Prompts of each category, at most.")] = 4,
    candidates: Annotated[int, Option("--candidates", "-M", min=3, help="Images made for each prompt (M).")] = 16,
    seed: Annotated[int, Option(help="Seed of candidates and noise.")] = 0,
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/reward"),
    output: Annotated[Path, Option("--output", "-o", help="Markdown.")] = Path("reward.md"),
) -> None:
    """Which number is a reward? Scores of every candidate of a prompt, held against the exact judge.

    Example:  mitune bench reward -m shapes-sd --guidance-scale 6 -m shapes-sd3 --guidance-scale 4 -o docs/reward.md
    """
    from mitune.bench.reward import judged, page_of
    from mitune.bench.select import SelectConfig, some_of_each
    from mitune.prompts.lists import load_prompts
    from mitune.run.store import write_bytes

    names = model or ["shapes-sd"]
    scales = one_each("--guidance-scale", guidance_scale, names)
    models = [models_of([name], [scale], device, assignments)[0] for name, scale in zip(names, scales, strict=True)]
    config = SelectConfig(candidates=candidates, seed=seed)
    listed = some_of_each(load_prompts(prompts), per_category)
    with stage("Making and judging candidates") as step:
        study = list(judged(models, listed, run, config, progress=step))
    write_bytes(output, page_of(study, made_by(context)).encode())
    say("Tables", output)
