"""The kinds of files that hold prompts, known by their content: text, JSON lines, a JSON list, tables with a header.

A list that comes with a structure is never taken for plain text: its keys and its header would become prompts.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitune.errors import MituneError
from mitune.files.texts import Faults, read_lines

log = logging.getLogger(__name__)
FIELDS = ("prompt", "prompts", "caption", "captions", "text")  # that hold the prompts, in any case, best first
CATEGORIES, SPLITS = ("category", "tag"), ("split",)  # fields and columns that say so, in any case
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt as it stands in its file, at the edges of which blanks are left out."""

    number: int  # of the line, or of the entry of a JSON list, from 1
    text: str
    category: str = ""
    split: str = ""


def read_rows(file: Path, field: str | None = None) -> tuple[list[Row], Faults]:
    """All prompts of a file, good and bad, and what else is wrong, with each line.

    `field` is the JSON field or the column that holds the prompts; else it is guessed by `FIELDS`, and logged. Raises
    MituneError for a file that is no list of prompts at all.
    """
    lines, faults = read_lines(file)
    first = next((line for line in lines if line.strip()), "")
    suffix = file.suffix.lower()
    if not first:
        raise MituneError(f"{file} holds no prompt; write one a line.")
    if suffix in (".jsonl", ".ndjson") or isinstance(_parsed(first), dict):
        entries = _json_lines(lines, faults)
    elif suffix == ".json" or isinstance(_parsed("\n".join(lines)), list):
        entries = _json_list(lines, faults)
    elif suffix in (".csv", ".tsv", ".tab") or _is_header(first):
        return list(_table(lines, "\t" if suffix in (".tsv", ".tab") else _delimiter(first), field, faults)), faults
    else:
        return list(_plain(lines, faults)), faults
    return list(_from_json(entries, field, faults)), faults


# --- Plain text --------------------------------------------------------------------------------------------------


def _plain(lines: Sequence[str], faults: Faults) -> Iterator[Row]:
    if all(re.match(rf"{_QUOTED.pattern}\s*([,;\t]|$)", line) for line in lines):
        raise MituneError(
            f"{faults.source}: every line begins with a text in quotes, as in a table; put a line with the names of "
            "the columns on top, such as prompt, or take the quotes off."
        )
    for number, line in enumerate(lines, start=1):
        if isinstance(_parsed(line), dict):
            faults.add(number, "JSON among plain text; write the prompt alone, or JSON in every line")
        yield Row(number, line.split("\t")[0].strip())


# --- JSON --------------------------------------------------------------------------------------------------------


def _parsed(text: str) -> Any:
    """The object or the list that a text is in JSON, or None."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_lines(lines: Sequence[str], faults: Faults) -> list[tuple[int, Any]]:
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            blank = "the line is blank; delete it"
            faults.add(number, "no JSON; write one object in each line" if line.strip() else blank)
    return entries


def _json_list(lines: Sequence[str], faults: Faults) -> list[tuple[int, Any]]:
    entries = _parsed("\n".join(lines))
    if not isinstance(entries, list):
        raise MituneError(f"{faults.source} holds no JSON list; write [...] with a prompt or an object in each entry.")
    faults.separator = ", entry "
    return list(enumerate(entries, start=1))


def _from_json(entries: Sequence[tuple[int, Any]], field: str | None, faults: Faults) -> Iterator[Row]:
    """Entries are texts, or objects with a text in one field."""
    objects = [entry for _, entry in entries if isinstance(entry, dict)]
    name = (
        _named([key for key, value in objects[0].items() if isinstance(value, str)], field, faults) if objects else ""
    )
    for number, entry in entries:
        text = entry.get(name) if isinstance(entry, dict) else entry
        if isinstance(text, str):
            labels = entry if isinstance(entry, dict) else {}
            yield Row(number, text.strip(), _label(labels, CATEGORIES), _label(labels, SPLITS))
        else:
            faults.add(
                number, f"no text in the field {name!r}; write one" if objects else "no text; write one in quotes"
            )


def _label(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first text under one of the names; empty where there is none."""
    return next((v.strip() for k, v in entry.items() if k.strip().lower() in names and isinstance(v, str)), "")


# --- Tables ------------------------------------------------------------------------------------------------------


def _delimiter(header: str) -> str:
    return max(",\t;", key=header.count)


def _is_header(line: str) -> bool:
    """Whether a first line has the names of columns, one of which is known to hold prompts."""
    cells = line.split(_delimiter(line))
    names = [_unquoted(cell).lower() for cell in cells]
    return any(name in FIELDS for name in names) and (len(cells) == 1 or all(cell == cell.strip() for cell in cells))


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _table(lines: Sequence[str], delimiter: str, field: str | None, faults: Faults) -> Iterator[Row]:
    rows = _tab_separated(lines) if delimiter == "\t" else _quoted_rows(lines, delimiter, faults)
    first, names = next(rows)
    names = [name.strip() for name in names]
    name = _named(names, field, faults, first)
    column = names.index(name)
    for number, cells in rows:
        if len(cells) > len(names):
            faults.add(number, f"{len(cells)} columns under a header of {len(names)}; put the text in double quotes")
        elif column < len(cells):
            entry = dict(zip(names, cells, strict=False))
            yield Row(number, cells[column].strip(), _label(entry, CATEGORIES), _label(entry, SPLITS))
        else:
            faults.add(number, f"no column {name!r}; write the prompt, or delete the line")


def _tab_separated(lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Quotes mean something only where they enclose a whole cell: prompts such as '"Hi" on a sign' have their own."""
    for number, line in enumerate(lines, start=1):
        yield number, [_unquoted(cell) for cell in line.split("\t")]


def _quoted_rows(lines: Sequence[str], delimiter: str, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """The rows with the line that each begins in; a quoted cell may go on over several lines."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(number, f"quotes that do not fit ({error}); double those inside of a quoted text")


# --- Which field ---------------------------------------------------------------------------------------------------


def _named(names: Sequence[str], field: str | None, faults: Faults, line: int = 1) -> str:
    """The field or column that holds the prompts: the one that was asked for, else the best guess, which is logged."""
    column = field if field in names else None
    if field is None:
        by_rank = {name.strip().lower(): name for name in reversed(names)}
        column = next((by_rank[known] for known in FIELDS if known in by_rank), None)
    if column is None:
        wanted = (
            f"no field or column {field!r}" if field else "none of the fields or columns has a name known for prompts"
        )
        raise MituneError(
            f"{faults.source}{faults.separator}{line}: {wanted}; name the one that holds them with --prompt-field "
            f"(setting prompt_field): {', '.join(map(repr, names)) or 'there is none with a text'}."
        )
    if field is None:
        log.warning("%s: prompts are read from %r; --prompt-field names another one.", faults.source, column)
    return column
