"""`mitune list`: what goes by a short name, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text
from typer import Argument

from mitune.resolver import Table

app = typer.Typer()
PIPED = 10_000  # columns, so that no line is broken

# Where the table of each kind is; it is imported when it is listed, some with torch.
TABLES: Mapping[str, str] = {
    "scores": "mitune.pool.scores:POOL_SCORES",
    "metrics": "mitune.evaluation.metrics.table:METRICS",
    "objectives": "mitune.finetuning.objectives.base:OBJECTIVES",
    "methods": "mitune.methods.base:METHODS",
    "presets": "mitune.config.presets:PRESET_TABLE",
    "worlds": "mitune.worlds.base:WORLDS",
    "executors": "mitune.run.executors.base:EXECUTORS",
    "stores": "mitune.run.stores.base:STORES",
}


def summaries(kind: str) -> dict[str, str]:
    """One line of each name of a kind, such as "metrics"."""
    if kind == "models":
        from mitune.worlds.base import embedded_models

        return {name: model.summary for name, model in embedded_models().items()}
    module, _, attribute = TABLES[kind].partition(":")
    table: Table[object] = getattr(import_module(module), attribute)
    return table.summaries()


@app.command(name="list")
def list_names(
    kind: Annotated[
        Literal["scores", "metrics", "objectives", "methods", "models", "presets", "worlds", "executors", "stores"],
        Argument(help="What to list."),
    ],
) -> None:
    """What goes by a short name, one line each; your own go by module:attribute, e.g. mine:MyMetric in mine.py.

    Models are those that come with mitune; others go by hub id, folder or file.

    Example:  mitune list metrics
    """
    grid = Grid.grid(padding=(0, 2))
    for name, summary in summaries(kind).items():
        grid.add_row(Text(name, "bold"), Text(summary))
    console = Console()
    if not console.is_terminal:
        console.width = PIPED
    console.print(grid)
