"""What the commands share: their options, the settings that these make, and how progress is shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer import Context, Option

from mitune.config.presets import PRESETS
from mitune.config.ranges import ends_of
from mitune.config.resolve import resolve
from mitune.config.schema import GRADUAL, Config, ModelConfig, PoolConfig, RaceSetting
from mitune.errors import MituneError

if TYPE_CHECKING:
    from mitune.run.stores.base import Store

console = Console(stderr=True)

Preset = Annotated[str | None, Option(help=f"Settings and a model by name: {', '.join(PRESETS)}; or module:attribute.")]
ConfigFile = Annotated[Path | None, Option("--config", help="YAML file of settings, e.g. a run's config.yaml.")]
Assignments = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting, e.g. --set model.variant=fp16; a wrong one is answered with what it may be. Repeatable.",
    ),
]
ModelName = Annotated[
    str | None, Option("--model", "-m", help="Hub id, diffusers folder, or an embedded model: shapes-sd, shapes-sd3.")
]
Guidance = Annotated[
    float | None,
    Option(help=f"Guidance scale, {ends_of(ModelConfig, 'guidance_scale')}; the model's own default if left out."),
]
PromptSource = Annotated[
    str | None,
    Option(
        "--prompts",
        "-p",
        help="File with one prompt a line, JSON lines, or a CSV or TSV table; or a list of a world: "
        "shapes:train/color, or mine:world/train for your own in mine.py.",
    ),
]
PromptField = Annotated[
    str | None, Option(help="JSON field or column that holds the prompts, where the file has several; else a guess.")
]
MetricName = Annotated[
    str | None,
    Option(
        "--metric",
        help="What judges: a name of `mitune list metrics`, or mine:MyMetric for your own in mine.py; by default what "
        "comes with the prompts or the model.",
    ),
]
Candidates = Annotated[
    int | None,
    Option("--candidates", "-M", help=f"Images made for each prompt (M), {ends_of(PoolConfig, 'candidates')}."),
]
Keep = Annotated[int | None, Option("--keep", "-k", help="Images kept for each prompt (k), at least 1 and at most M.")]
Selection = Annotated[
    list[str] | None,
    Option("--select", "-s", help="Score or control that picks, e.g. contrast, mi-tune, random. Repeatable."),
]
ObjectiveName = Annotated[
    str | None,
    Option(
        "--objective",
        help="What training aims at: a name of `mitune list objectives`, or mine:MyObjective for your own in mine.py. "
        "Those that rank candidates have the pool keep all of them.",
    ),
]
Negatives = Annotated[
    str | None,
    Option(
        metavar="FILE",
        help='Hard negatives of your own, for scores against rival prompts: JSON lines, {"prompt": ..., "negatives": '
        "[...]}, or a world, mine:world; by rule where these have none.",
    ),
]
Race = Annotated[
    bool | None,
    Option(
        "--race/--no-race",
        help="Drop half-way what cannot win by its score so far; other rungs: pool.race. By default where "
        "self-confidence decides who is left, as with contrast.",
    ),
]
Seed = Annotated[int | None, Option(help=f"Seed of the candidates, {ends_of(PoolConfig, 'seed')}.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.")]
Shard = Annotated[
    str, Option(help="i/n: make every n-th prompt's images, from the i-th on; n such commands share a folder.")
]
ExecutorName = Annotated[
    str, Option("--executor", metavar="NAME", help="Who has the images made: local, or module:attribute of your own.")
]
StoreName = Annotated[
    str, Option("--store", metavar="NAME", help="Where their records lie: folder, or module:attribute of your own.")
]
RunFolder = Annotated[Path, Option("--run", "-r", help="Run folder; the same command goes on where it stopped.")]


def settings_of(
    preset: str | None,
    file: Path | None,
    assignments: list[str] | None,
    options: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> Config:
    """The resolved settings; options that were not given (None) leave the preset's or the file's value."""
    nested: dict[str, Any] = {}
    for key, value in options.items():
        if value is not None:
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
    return resolve(preset=preset, file=file, assignments=assignments or (), options=nested, defaults=defaults)


def parse_shard(text: str) -> tuple[int, int]:
    """(i − 1, n) of --shard i/n. Raises MituneError for anything else."""
    first, _, count = text.partition("/")
    if not (_is_number(first) and _is_number(count) and 1 <= int(first) <= int(count)):
        raise MituneError(f"--shard {text!r} needs the form i/n with 1 <= i <= n, e.g. 2/4.")
    return int(first) - 1, int(count)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def parse_weight(text: str) -> tuple[Path, float]:
    """(place, weight) of ADAPTER[:WEIGHT]. Raises MituneError if nothing is there."""
    place, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        place, weight = text, 1.0
    if not Path(place).exists():
        remedy = "give a folder or .safetensors file, and its weight as a number after a colon, e.g. runs/color:0.5"
        if Path(text).exists():
            remedy = f"for the one called {text}, write {text}:1"
        raise MituneError(f"There is no adapter {place}; {remedy}.")
    return Path(place), weight


def store_for(name: str) -> Callable[[Path], Store]:
    """What makes the store called `name` of a folder. Raises MituneError, before anything is made, if nothing does."""
    from mitune.run.stores.base import STORES

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        STORES.resolve(name, Path(folder))
    return partial(STORES.resolve, name)


def made_by(context: Context) -> str:
    """The command that runs now, with every option that has a value: what "Made by" lines say."""
    program = context.find_root().command_path
    words = ["mitune", *context.command_path.removeprefix(program).split()]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is None or each is False:
                continue
            if parameter.param_type_name == "option":
                words.append(max(parameter.opts, key=len))
            words += [] if each is True else [f"{each:g}" if isinstance(each, float) else str(each)]
    return shlex.join(words)


def say(what: str, path: Path) -> None:
    """Says where something was written."""
    console.print(Text.assemble(f"{what}: ", (str(path), "bold")), soft_wrap=True)  # paths are for copying


@contextmanager
def stage(title: str) -> Iterator[Any]:
    """A progress bar with the time left."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(escape(title), total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def race_setting(race: bool | None) -> RaceSetting | None:
    """What --race and --no-race stand for; None where neither is given."""
    return None if race is None else GRADUAL if race else "off"
