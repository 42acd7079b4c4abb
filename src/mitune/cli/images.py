"""Images and their scores: generate, score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text
from typer import Argument, Option

from mitune.cli.options import (
    Assignments,
    ConfigFile,
    Device,
    Guidance,
    ModelName,
    Negatives,
    Preset,
    console,
    settings_of,
    stage,
)
from mitune.errors import MituneError

app = typer.Typer()


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
    from mitune.denoiser.sampling import default_batch_size, generate_all, requests_of
    from mitune.information import SCORES
    from mitune.prompts.lists import check_prompts
    from mitune.run.store import write_image

    options = {"model.name": model, "model.guidance_scale": guidance_scale, "model.device": device}
    config = settings_of(preset, config_file, assignments, options)
    loaded = load_model(config.model, adapter=adapter)
    prompts = check_prompts(prompts, loaded)
    check_pictures(loaded)
    batch_size = default_batch_size(execution_device(loaded.pipe))
    requests = requests_of(prompts, images, seed)
    names, done = ("mi-tune", "self-confidence"), 0
    with stage("Making images") as step:
        for chunk, batch in generate_all(loaded, requests, min(len(requests), batch_size), scores=names):
            scores = {name: SCORES[name](batch.trace) for name in names}
            for row, image in enumerate(decode(loaded, batch.latents)):
                file = output / f"{(done + row) // images + 1:03d}-{(done + row) % images + 1:03d}.png"
                write_image(file, image)
                values = "  ".join(f"{name} {values[row].item():.3f}" for name, values in scores.items())
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
