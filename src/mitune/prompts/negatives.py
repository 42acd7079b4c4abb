"""Hard negatives of a prompt: what an image must not be mistaken for.

They come from the user's own file, from the world that a prompt belongs to, or are made by rules on its words alone
(`mitune.prompts.rewording`): attributes swapped between objects, the relation turned, another count, an object dropped
or exchanged, an attribute exchanged. Wider ones say what a picture with too much in it, or with another object, shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mitune.denoiser.opening.models import Model
from mitune.denoiser.reading import cut_texts
from mitune.errors import MituneError
from mitune.files.texts import read_lines
from mitune.prompts.rewording import rewordings, widenings
from mitune.worlds.base import Negative, WorldOfScenes, worlds

OWN = "own"  # the kind of those from the user's file


def hard_negatives(prompt: str, listed: Mapping[str, Sequence[Negative]] | None = None) -> list[Negative]:
    """Every hard negative of a prompt, which may be none.

    They are those of `listed` (see `load_negatives`) if it has the prompt, else those of the world of the table that it
    is a prompt of, else those that rules on the words find.
    """
    if listed is not None and prompt in listed:
        return list(listed[prompt])
    for world in worlds():
        negatives = world.negatives(prompt)
        if negatives is not None:
            return negatives
    return _made(prompt, rewordings(prompt))


def wider_negatives(prompt: str, listed: Mapping[str, Sequence[Negative]] | None = None) -> list[Negative]:
    """Prompts that ask for more than this one, or for other objects, and are no hard negatives of it; may be none.

    They come of where the hard negatives do; but the user's own in `listed` are all that there are.
    """
    if listed is not None and prompt in listed:
        return []
    for world in worlds():
        if world.negatives(prompt) is not None:
            return world.wider_negatives(prompt) if isinstance(world, WorldOfScenes) else []
    hard = {negative.prompt for negative in hard_negatives(prompt)}
    return [negative for negative in _made(prompt, widenings(prompt)) if negative.prompt not in hard]


def _made(prompt: str, texts: Iterable[tuple[str, str]]) -> list[Negative]:
    """Those texts, given with their kinds, that are not the prompt itself; each once, of the first kind."""
    kinds = {text: kind for kind, text in reversed(list(texts))}
    return [Negative(text, kind) for text, kind in reversed(kinds.items()) if text != prompt]


def load_negatives(file: Path, model: Model | None = None) -> dict[str, list[Negative]]:
    """Hard negatives by prompt from a file of JSON lines, {"prompt": "…", "negatives": ["…", …]}.

    Raises MituneError that names the file and each bad line, with `model` also those with a text that a call of it
    would cut.
    """
    if not file.is_file():
        raise MituneError(f'There is no file {file}; give JSON lines of {{"prompt": ..., "negatives": [...]}}.')
    lines, faults = read_lines(file)
    negatives_of: dict[str, list[Negative]] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prompt, negatives = _read_line(line)
            if prompt in negatives_of:
                raise ValueError(f"{prompt!r} stands in an earlier line already; put its negatives into one line")
        except ValueError as error:
            faults.add(number, str(error))
            continue
        numbers |= {text: numbers.get(text, number) for text in (prompt, *negatives)}
        negatives_of[prompt] = [Negative(text, OWN) for text in negatives]
    for text, reading in (cut_texts(model.pipe, list(numbers), model.call) if model else {}).items():
        faults.add(numbers[text], f"{text!r} has {reading}")
    faults.refuse()
    if not negatives_of:
        raise MituneError(f'{file} is empty; write JSON lines of {{"prompt": ..., "negatives": [...]}}.')
    return negatives_of


def _read_line(line: str) -> tuple[str, list[str]]:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}); write one object in each line, and no blank lines") from error
    if not isinstance(entry, dict) or set(entry) != {"prompt", "negatives"}:
        raise ValueError("not an object with the keys prompt and negatives, and no others; write them so")
    prompt, negatives = entry["prompt"], entry["negatives"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt must be a text that is not empty; write it in quotes")
    if not isinstance(negatives, list) or not all(isinstance(text, str) and text.strip() for text in negatives):
        raise ValueError("the negatives must be a list of texts, none of them empty; write [] for none")
    if prompt in negatives:
        raise ValueError(f"{prompt!r} is among its own negatives; take it out")
    if len(set(negatives)) < len(negatives):
        raise ValueError(f"{prompt!r} has a negative twice; delete one")
    return prompt, negatives
