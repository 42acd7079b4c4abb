"""The command line: each command reads its options, calls one library function and says what came of it."""

from __future__ import annotations

import os
import sys

import typer
from rich.markup import escape

from mitune.cli import bench, method, shapes
from mitune.cli.options import console
from mitune.errors import MituneError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="**Align a text-to-image model with its prompts, by its own mutual information.**\n\n"
    "Try it on the embedded model:  `mitune demo`\n\n"
    "Then on a real one:  `mitune tune --preset mi-tune-sd21 --prompts prompts.txt --run runs/sd21`",
)
app.add_typer(method.app)
app.add_typer(shapes.app, name="shapes")
app.add_typer(bench.app, name="bench")


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
