"""What an executor is: whatever has all records made, one by one or in groups, in any order, as often as it likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from mitune.resolver import Row, Table


class Task(Protocol):
    """Makes records, each a function of its number and the settings alone; those that are there stay."""

    @property
    def together(self) -> int:
        """How many records are best made in one call, as they fill the batches of the network."""
        ...

    def missing(self, items: Sequence[int]) -> list[int]:
        """Those of the items that have no record yet, in their order."""
        ...

    def __call__(self, items: Sequence[int]) -> None:
        """Makes the records of those of the items that have none; calls from several threads take turns."""
        ...


class Executor(Protocol):
    """Has a task done for items, in the process that calls it: the task holds a model."""

    def map(self, task: Task, items: Sequence[int]) -> Iterator[int]:
        """Calls the task until each of the items that it sees to has a record, and yields each of these once."""
        ...


EXECUTORS: Table[Executor] = Table(
    "executor",
    Executor,
    {"local": Row("one group of prompts after another, in order", "mitune.run.executors.local:Local")},
)
