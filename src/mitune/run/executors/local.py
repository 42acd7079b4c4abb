"""The executor that goes through the items in order, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mitune.run.executors.base import Task


class Local:
    """Groups what is missing, so that each call of the task fills the network's batches."""

    def map(self, task: Task, items: Sequence[int]) -> Iterator[int]:
        todo = task.missing(items)
        yield from sorted(set(items) - set(todo))
        while todo:
            group = todo[: task.together]
            task(group)
            yield from group
            todo = todo[len(group) :]
