"""The commands of the shapes world: prompts, check, figure, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from mitune.cli.bench import models_of
from mitune.cli.boundary import Commands, resumable
from mitune.cli.options import Assignments, Device, Guidance, RunFolder, made_by, say, settings_of, stage
from mitune.errors import MituneError

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The embedded shapes world: its models, prompts and judge.")
benchmarks = typer.Typer()  # of `mitune bench`


@app.command(name="prompts")
def shapes_prompts(
    name: Annotated[str, Argument(help="train or heldout, with a category if you like.")] = "train",
) -> None:
    """Print an embedded prompt list, e.g. for a file of your own.

    Example:  mitune shapes prompts heldout/color
    """
    from mitune.prompts.lists import load_prompts

    for listed in load_prompts(f"shapes:{name}"):
        typer.echo(listed.text)


@app.command(name="check")
@resumable
def shapes_check(
    context: typer.Context,
    model: Annotated[
        str, Option("--model", "-m", help="shapes-sd, shapes-sd3, or a folder of such a model.")
    ] = "shapes-sd",
    scenes: Annotated[int, Option(min=1, help="Rendered scenes a category, for what the model knows.")] = 500,
    images: Annotated[int, Option(min=1, help="Samples a held-out prompt, for what it shows.")] = 4,
    guidance_scale: Guidance = None,
    category: Annotated[str | None, Option(help="Only this category.")] = None,
    device: Device = None,
    assignments: Assignments = None,
    run: RunFolder = Path("runs/shapes-check"),
    output: Annotated[Path | None, Option("--output", "-o", help="Also write the table here, as Markdown.")] = None,
) -> None:
    """What a model knows (prompt against its hard negatives, on rendered scenes) and what it shows (its samples).

    It is `mitune bench knows` on the world's held-out prompts.

    Example:  mitune shapes check --model shapes-sd --scenes 100
    """
    from mitune.cli.bench import bench_knows

    bench_knows(
        context,
        model=[model],
        guidance_scale=None if guidance_scale is None else [guidance_scale],
        prompts="shapes:heldout" if category is None else f"shapes:heldout/{category}",
        scenes=scenes,
        images=images,
        device=device,
        assignments=assignments,
        run=run,
        output=output,
    )


@app.command(name="figure")
def shapes_figure(
    output: Annotated[Path, Argument(help="PNG file.")],
    model: Annotated[str, Option("--model", "-m", help="An embedded model.")] = "shapes-sd",
    images: Annotated[int, Option("--images", "-n", min=1, help="Samples a prompt.")] = 8,
    seed: Annotated[int, Option(help="Seed.")] = 0,
    device: Device = None,
    assignments: Assignments = None,
) -> None:
    """A grid of prompts and samples, each framed by the judge's verdict.

    Example:  mitune shapes figure docs/shapes-sd.png --model shapes-sd
    """
    from mitune.denoiser.opening.models import load_model
    from mitune.worlds.shapes.figure import save_grid

    loaded = load_model(settings_of(None, None, assignments, {"model.name": model, "model.device": device}).model)
    save_grid(loaded, output, images=images, seed=seed)


@app.command(name="train")
@resumable
def shapes_train(
    work: Annotated[Path, Argument(help="Folder for checkpoints; the same command goes on where it stopped.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the finished models.")] = Path("models"),
    model: Annotated[list[str] | None, Option("--model", "-m", help="Only this model. Repeatable.")] = None,
    scenes: Annotated[int, Option(min=1, help="Scenes to train on for each prompt.")] = 20,
) -> None:
    """Train the embedded models from nothing: the VAE, then shapes-sd and shapes-sd3. Takes hours on 2 cores.

    Example:  mitune shapes train work --output src/mitune/worlds/shapes/models
    """
    import logging

    from mitune.worlds.shapes.training.train import train_all
    from mitune.worlds.shapes.world import MODELS

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    unknown = set(model or ()) - set(MODELS)
    if unknown:
        raise MituneError(f"Unknown embedded model {min(unknown)!r}; choose from {', '.join(MODELS)}.")
    train_all(work, output, model or list(MODELS), scenes=scenes)


@benchmarks.command(name="truth")
def bench_truth(
    context: typer.Context,
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="An embedded model, or a folder of such a one. Repeatable.")
    ] = None,
    scenes: Annotated[int, Option(min=2, help="Rendered scenes a category.")] = 40,
    draws: Annotated[int, Option(min=4, help="Noisings of each scene and prompt, a multiple of 4.")] = 64,
    seed: Annotated[int, Option(help="Seed of scenes and noise.")] = 0,
    device: Device = None,
    assignments: Assignments = None,
    output: Annotated[Path, Option("--output", "-o", help="Markdown; the plots go beside it.")] = Path("truth.md"),
) -> None:
    """Is the number right? Estimates on rendered scenes against the exact mutual information of the shapes world.

    Example:  mitune bench truth -m shapes-sd -m shapes-sd3 --scenes 40 --output docs/truth.md
    """
    from mitune.bench.pages import page
    from mitune.denoiser.opening.models import load_model
    from mitune.run.store import write_bytes
    from mitune.worlds.shapes.truth_study import study
    from mitune.worlds.shapes.truth_tables import calibration_figure, tables_of

    names = model or ["shapes-sd"]
    sections: list[str] = []
    for name, settings in zip(names, models_of(names, None, device, assignments), strict=True):
        loaded = load_model(settings)
        with stage(f"Estimating with {name}") as step:
            result = study(loaded, scenes=scenes, draws=draws, seed=seed, progress=step)
        figure = output.with_name(f"{output.stem}-{Path(name).name}.png")
        write_bytes(figure, calibration_figure(result))
        sections.append(tables_of(result, figure.name))
        write_bytes(output, page("truth", command=made_by(context), sections="\n".join(sections)).encode())
    say("Tables", output)
