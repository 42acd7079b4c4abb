"""Reads prompt lists, and refuses bad ones at the start, with every bad line."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from mitune.denoiser.opening.models import Model
from mitune.denoiser.reading import cut_texts, refuse_cut
from mitune.errors import MituneError
from mitune.files.texts import Faults
from mitune.prompts.files import Row, read_rows
from mitune.worlds.base import Listed, within

log = logging.getLogger(__name__)
_COMPBENCH = re.compile(r"(?P<category>\w+)_(?:train|val(?:_(?P<split>seen|unseen))?)\.txt")


def load_prompts(source: str, model: Model | None = None, field: str | None = None) -> list[Listed]:
    """Prompts of a file, or of a world's list.

    A file has one prompt a line (a tab ends it, as in T2I-CompBench), JSON lines, a JSON list, or a table with a header
    (CSV, TSV); `field` names the JSON field or the column, else it is guessed, and logged. Fields or columns named
    category (or tag) and split give these; those of a file called as T2I-CompBench calls its own, CATEGORY_train.txt,
    CATEGORY_val.txt, CATEGORY_val_seen.txt or CATEGORY_val_unseen.txt, are in its name; other prompts have neither.
    Lists of a world are named as in `mitune.worlds.base`: `shapes:train`, `shapes:heldout/color`, `mine:world/train`.
    With `model`, prompts that a call of it would cut are refused. Repeats are dropped, with a word.

    Raises MituneError that names the file and each bad line.
    """
    named = within(source)
    if named is not None:
        world, name = named
        listed = world.prompts(name)
        if model is not None:
            refuse_cut(model.pipe, [each.text for each in listed], model.call, source)
        return listed
    file = Path(source)
    if not file.is_file():
        raise MituneError(
            f"There is no prompt file {source}; give a text file with one prompt a line, or a list of a world, such as "
            "shapes:train."
        )
    rows, faults = read_rows(file, field)
    kept = _checked(rows, faults, model)
    labels = _COMPBENCH.fullmatch(file.name)
    category, split = (labels["category"], labels["split"] or "") if labels else ("", "")
    return [Listed(row.text, row.category or category, row.split or split) for row in kept]


def check_prompts(texts: Iterable[str], model: Model | None = None, source: str = "prompt") -> list[str]:
    """Prompts that stand in no file, by the same rules: without repeats, and refused with their numbers."""
    rows = [Row(number, text) for number, text in enumerate(texts, start=1)]
    return [row.text for row in _checked(rows, Faults(source, " "), model)]


def _checked(rows: Sequence[Row], faults: Faults, model: Model | None) -> list[Row]:
    """The rows without repeats. Raises MituneError with all faults, those that are known already included."""
    first: dict[str, Row] = {}
    repeats = [row for row in rows if first.setdefault(row.text, row) is not row and row.text]
    for row in rows:
        if (what := _fault(row.text)) is not None:
            faults.add(row.number, what)
    if model is not None:
        good = [row for row in first.values() if row.number not in faults.by_number]
        for text, reading in cut_texts(model.pipe, [row.text for row in good], model.call).items():
            faults.add(first[text].number, str(reading))
    faults.refuse()
    if not first:
        raise MituneError(f"{faults.source} holds no prompt; write one a line.")
    if repeats:
        where = [f"{faults.source}{faults.separator}{row.number}" for row in (repeats[0], first[repeats[0].text])]
        log.warning("%s repeats %s; %d such repeats are left out.", *where, len(repeats))
    return list(first.values())


def _fault(text: str) -> str | None:
    """What makes a text no prompt. Control characters are refused but for those that stand for a blank."""
    if not text:
        return "the line is blank; delete it"
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            return f"half of a surrogate pair ({ord(character):#06x}) is no character; write the whole one"
        if kind == "Cc" and not character.isspace():
            return f"the control character U+{ord(character):04X} stands in the prompt; delete it"
    return None
