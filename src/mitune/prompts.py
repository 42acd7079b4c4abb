"""Reads prompt lists, and refuses bad ones at the start, by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from mitune.errors import MituneError
from mitune.shapes.grammar import CATEGORIES
from mitune.shapes.prompts import Listed, shapes_prompts


def load_prompts(source: str, pipe: DiffusionPipeline | None = None) -> list[Listed]:
    """Prompts of a text file, one a line (a tab ends the prompt, as in T2I-CompBench), or of an embedded list.

    Embedded are `shapes:train` and `shapes:heldout`, whole or by category (`shapes:train/color`). With `pipe`, prompts
    that its tokenizer would cut are refused. Raises MituneError that names the file and the line.
    """
    if source.startswith("shapes:"):
        try:
            return shapes_prompts(source.removeprefix("shapes:"))
        except KeyError as error:
            raise MituneError(
                f"There is no prompt list {source!r}; use shapes:train or shapes:heldout, with a category if you like "
                f"(shapes:train/color; categories: {', '.join(CATEGORIES)})."
            ) from error
    path = Path(source)
    if not path.is_file():
        raise MituneError(
            f"There is no prompt file {source}; give a text file with one prompt a line, or shapes:train."
        )
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise MituneError(f"{source}:{number}: not UTF-8; save the file in UTF-8 encoding.") from error
    if not any(line.strip() for line in lines):
        raise MituneError(f"{source} holds no prompt; write one a line.")
    split = "unseen" if path.stem.endswith("_unseen") else "seen" if path.stem.endswith("_seen") else ""
    category = path.stem
    for ending in ("_unseen", "_seen", "_val", "_train"):
        category = category.removesuffix(ending)
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        prompt = line.split("\t")[0].strip()
        if not prompt:
            raise MituneError(f"{source}:{number}: the line is blank; delete it.")
        if prompt in first_line:
            raise MituneError(f"{source}:{number}: {prompt!r} stands in line {first_line[prompt]} already; delete one.")
        if pipe is not None:
            _check_length(f"{source}:{number}", prompt, pipe)
        first_line[prompt] = number
    return [Listed(prompt, category, split) for prompt in first_line]


def _check_length(where: str, prompt: str, pipe: DiffusionPipeline) -> None:
    """Some pipelines have several text encoders; the one that takes most decides (SD3 reads the rest through T5)."""
    tokenizers: list[Any] = [t for name, t in sorted(pipe.components.items()) if name.startswith("tokenizer") and t]
    if not tokenizers:
        return
    longest = max(tokenizers, key=lambda tokenizer: int(tokenizer.model_max_length))
    limit = min(int(longest.model_max_length), 512)
    count = len(longest(prompt, truncation=False, verbose=False).input_ids)
    if count > limit:
        raise MituneError(f"{where}: {count} tokens, but this model's tokenizer takes {limit}; shorten the prompt.")
