"""The command line: each command reads its options, calls one library function and says what came of it."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer
from typer import Option

from mitune.cli import bench, bench_reward, bench_tune, images, listing, runs, steps, verdicts
from mitune.cli.boundary import Commands
from mitune.resolver import Table
from mitune.run.versions import check_versions
from mitune.worlds.base import WORLDS, WorldWithCommands, worlds

_APPS: Table[typer.Typer] = Table("app", typer.Typer, {})  # of worlds, which have no short names
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="**Align a text-to-image model with its prompts, by its own mutual information.**\n\n"
    "Try it on the embedded model:  `mitune demo`\n\n"
    "Then on a real one:  `mitune tune --preset mi-tune-sd21 --prompts prompts.txt --run runs/sd21`",
)
for part in (runs, steps, images, verdicts, listing):
    app.add_typer(part.app)
for name, world in zip(WORLDS.rows, worlds(), strict=True):
    if isinstance(world, WorldWithCommands):
        app.add_typer(_APPS.resolve(world.commands), name=name)
        bench.app.add_typer(_APPS.resolve(world.benchmarks))
bench.app.add_typer(bench_reward.app)
bench.app.add_typer(bench_tune.app)
app.add_typer(bench.app, name="bench")


@app.callback()
def options(
    debug: Annotated[bool, Option("--debug", help="Show where an error was raised; anywhere in the line.")] = False,  # noqa: ARG001
) -> None:
    """Before any command. `debug` is read by `mitune.cli.boundary` when one fails."""
    check_versions()


def main() -> None:
    """Runs the command line; errors that the user can act on are one sentence and status 2."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # their hints speak to programmers
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no "±" gets another sign, no traceback
    app(prog_name="mitune")
