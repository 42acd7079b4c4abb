"""The files of a run folder, checked as they are read. What is absent is None, what is damaged is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mitune.errors import MituneError


def read_config(run: Path) -> tuple[str, Mapping[str, Any]]:
    """config.yaml as it is written, and what it says. Raises MituneError if it is absent or no mapping."""
    path = run / "config.yaml"
    if not path.is_file():
        raise MituneError(f"{run} holds no config.yaml, so it is no run folder; give the folder that a run wrote.")
    try:
        text = path.read_text("utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MituneError(f"{path} is no YAML ({' '.join(str(error).split())}); restore it from the run.") from error
    if not isinstance(config, Mapping):
        raise MituneError(f"{path} holds no settings; restore it from the run.")
    return text, config


def setting(config: Mapping[str, Any], name: str) -> Any:
    """The setting with a dotted name, as in "pool.keep"; None where there is none."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def read_table(path: Path, optional: Mapping[str, pa.DataType] | None = None) -> pa.Table | None:
    """The plain columns of a Parquet file, or None if it is absent; `optional` ones that it lacks are null.

    Raises MituneError if the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        # The terms of every step stand there as lists; a pool has gigabytes of them, and no figure needs them.
        plain = [field.name for field in pq.read_schema(path) if not pa.types.is_nested(field.type)]
        table = pq.read_table(path, columns=plain)
    except (pa.ArrowException, OSError) as error:
        raise MituneError(f"{path} is no Parquet file ({error}); run the stage again that writes it.") from error
    for name, kind in (optional or {}).items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, kind))
    return table


def read_json(path: Path, numbers: Sequence[str]) -> list[Mapping[str, Any]] | None:
    """The records of a JSON list, or of a .jsonl file, one a line; None if the file is absent.

    numbers: what is a number in each record, null or absent. Raises MituneError if a record is damaged.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_text("utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        records: list[Mapping[str, Any]] = [*map(json.loads, lines)] if path.suffix == ".jsonl" else json.loads(text)
        for value in (record.get(name) for record in records for name in numbers):
            if not isinstance(value, int | float | None):
                raise TypeError(f"{value!r} is no number")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise MituneError(f"{path} is damaged ({error}); run the stage again that writes it.") from error
    return records


def rounds(run: Path) -> list[Path]:
    """The folders round-1, round-2, … in their order."""
    numbered = [(re.fullmatch(r"round-(\d+)", path.name), path) for path in run.glob("round-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match and path.is_dir())]


def pool_of(round_folder: Path, selection: str) -> Path:
    """Where the candidates of a round lie that a selection chose among: a pool of its own, or the one of all."""
    separate = round_folder / f"pool-{selection}"
    return separate if separate.is_dir() else round_folder / "pool"
