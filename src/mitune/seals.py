"""Seals of folders that mitune made: `seal.json`, written last, with the SHA-256 of every file.

A fine-tuning set's seal is

    {"made": "fine-tuning set",
     "selection": "contrast",
     "model": {"name": "shapes-sd", "parts": {"unet": SHA-256, ...}, "adapter": "", "call": {...}, "dtype": "float32"},
     "files": {"00000-003.png": SHA-256, "metadata.jsonl": SHA-256, ...}}

where `model` is `identity.model_identity` of what made its images, and the model's name for messages (of a local
folder, its last part). So a file that is missing or damaged is noticed, and nothing is ever removed but what the seal
names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mitune.store import DAMAGED, write_json

SEAL = "seal.json"


def write_seal(folder: Path, **facts: object) -> None:
    """Seals all files in `folder` and below, with `facts` beside their checksums."""
    write_json(folder / SEAL, {**facts, "files": {name: _checksum(folder / name) for name in sorted(files(folder))}})


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The seal of a folder; None if there is none that can be read."""
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return seal if isinstance(seal["files"], dict) else None
    except DAMAGED:
        return None


def faults(folder: Path) -> list[str]:
    """The files that a folder's seal names and that are missing or differ, in order; the seal itself if it is none."""
    seal = read_seal(folder)
    if seal is None:
        return [SEAL]
    return [name for name, sealed in seal["files"].items() if _checksum(folder / name) != sealed]


def files(folder: Path) -> Iterable[str]:
    """Names of all files in `folder` and below, with forward slashes, without its seal."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return (name for name in found if name != SEAL)


def _checksum(file: Path) -> str:
    """SHA-256 of a file; of none, or of what is no file, an empty one."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""
