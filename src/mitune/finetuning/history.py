"""training.jsonl: one row an iteration, which a training that goes on goes on with."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from mitune.run.store import DAMAGED, write_bytes, writing

log = logging.getLogger(__name__)


class History:
    """A training.jsonl that rows are added to."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    @classmethod
    @contextmanager
    def opened(cls, file: Path, iterations: int) -> Iterator[Self]:
        """Opens the file behind the rows of the iterations that are done; later ones are made again."""
        write_bytes(file, _rows_before(file, iterations))
        with writing(file), file.open("a", encoding="utf-8") as out:
            yield cls(out)

    def add(self, iteration: int, loss: float, gradient_norm: float, *, skipped: bool, seconds: float) -> None:
        """Adds a row; JSON has no number for a loss or norm that is not finite."""
        row = {
            "iteration": iteration,
            "loss": loss if math.isfinite(loss) else None,
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            "skipped": skipped,
            "seconds": round(seconds, 4),
        }
        self._out.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Onto the disk with all rows: a checkpoint never knows of more iterations than the history."""
        self._out.flush()
        os.fsync(self._out.fileno())


def rows_of(history: Path) -> list[dict[str, Any]]:
    """The rows of a training.jsonl, by iteration; half-written ones are left out."""
    content = history.read_bytes() if history.is_file() else b""
    rows = {}
    for line in content.split(b"\n"):
        with suppress(*DAMAGED):
            row = json.loads(line)
            rows[int(row["iteration"])] = {**row, "seconds": float(row["seconds"])}
    return [rows[iteration] for iteration in sorted(rows)]


def _rows_before(history: Path, iterations: int) -> bytes:
    rows = [row for row in rows_of(history) if row["iteration"] < iterations]
    if len(rows) < iterations:
        missing = iterations - len(rows)
        log.warning("%s lacks %d of %d rows; the adapter does not depend on them.", history, missing, iterations)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
