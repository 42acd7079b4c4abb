"""Seals of folders that mitune made: `seal.json`, written last, with the SHA-256 of every file.

A fine-tuning set's seal is

    {"made": "fine-tuning set",
     "selection": "contrast",
     "model": {"name": "shapes-sd", "parts": {"unet": SHA-256, ...}, "adapter": "", "call": {...}, "dtype": "float32"},
     "records": SHA-256,
     "files": {"00000-003.png": SHA-256, "metadata.jsonl": SHA-256, ...}}

where `model` is the `identity` of what made its images, and the model's name for messages (of a local folder, its last
part), and `records` stands for the pool that it was selected from. So a file that is missing or damaged is noticed, and
nothing is ever removed but what the seal names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mitune.run.store import DAMAGED, write_json

SEAL = "seal.json"


def write_seal(folder: Path, names: Iterable[str], *, seal: str = SEAL, **facts: object) -> None:
    """Seals these files in `folder`, with `facts` beside their checksums, in the file `seal`."""
    write_json(folder / seal, {**facts, "files": {name: _checksum(folder / name) for name in sorted(names)}})


def read_seal(folder: Path, seal: str = SEAL) -> dict[str, Any] | None:
    """The seal of a folder; None if there is none that can be read."""
    try:
        content = json.loads((folder / seal).read_text(encoding="utf-8"))
        return content if isinstance(content["files"], dict) else None
    except DAMAGED:
        return None


def faults(folder: Path, seal: str = SEAL) -> list[str]:
    """The files that a folder's seal names and that are missing or differ, in order; the seal itself if it is none."""
    content = read_seal(folder, seal)
    if content is None:
        return [seal]
    return [name for name, sealed in content["files"].items() if _checksum(folder / name) != sealed]


def is_whole(folder: Path, facts: Mapping[str, object], seal: str = SEAL) -> bool:
    """Whether a folder's seal says just that, and every file that it names is as it was written."""
    content = read_seal(folder, seal) or {}
    recorded = {name: value for name, value in content.items() if name != "files"}
    return recorded == json.loads(json.dumps(facts)) and not faults(folder, seal)


def _checksum(file: Path) -> str:
    """SHA-256 of a file; of none, or of what is no file, an empty one."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""
