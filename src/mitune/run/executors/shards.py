"""The executor that leaves most of the work to other processes: what `--shard i/n` stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mitune.run.executors.base import Executor, Task


@dataclass(frozen=True, slots=True)
class Shards:
    """Every `count`-th item from `index` on, by another executor. The locks of the folder keep its processes apart."""

    index: int
    count: int
    executor: Executor

    def map(self, task: Task, items: Sequence[int]) -> Iterator[int]:
        return self.executor.map(task, items[self.index :: self.count])
