"""A run's folder while it is worked on: how the work is shown, and what it cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mitune.run.store import read_again, write_json

Step = Callable[[int, int], None]  # done, total


class Stages(Protocol):
    """How a run shows its progress: a context manager a stage that hands out a callback of (done, total)."""

    def __call__(self, title: str, /) -> AbstractContextManager[Step]: ...


@contextmanager
def silent(_title: str) -> Iterator[Step]:
    """Shows nothing."""
    yield lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class Run:
    """The folder that a run's files go to, with its stages and its costs."""

    folder: Path
    stages: Stages = silent

    @contextmanager
    def cost(self, stage: str) -> Iterator[dict[str, int]]:
        """Adds what a stage took to cost.json; a stage that went on after a stop adds to its earlier entry.

        Hands out a mapping for the stage's counts: "candidates", "denoiser_calls" and others.
        """
        file = self.folder / "cost.json"
        counts: dict[str, int] = {}
        began = time.monotonic()
        yield counts
        entries = read_again(file, _entries) or []
        entry = next((e for e in entries if e["stage"] == stage), None)
        if entry is None:
            entry = {"stage": stage, "seconds": 0.0, "candidates": 0, "denoiser_calls": 0}
            entries.append(entry)
        entry |= counts
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
        write_json(file, entries)


def _entries(content: bytes) -> list[dict[str, Any]]:
    """The entries of cost.json. Raises ValueError, KeyError or TypeError if they are none."""
    entries: list[dict[str, Any]] = json.loads(content)
    for entry in entries:
        _ = entry["stage"], float(entry["seconds"])
    return list(entries)
