"""The task of making records: item i → record, idempotent, whoever calls it and however often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import RLock
from typing import Protocol

import pyarrow as pa
from torch import Tensor

from mitune.run.executors.base import Executor
from mitune.run.executors.local import Local
from mitune.run.executors.shards import Shards
from mitune.run.records import Records
from mitune.run.stages import Step


class Maker(Protocol):
    """Makes the images that belong to an item, and what is known of them."""

    @property
    def images(self) -> int:
        """Of each item."""
        ...

    @property
    def together(self) -> int:
        """Of how many items the images fill the batches of the network."""
        ...

    def records(
        self, items: Sequence[int], on_images: Callable[[int], None]
    ) -> Iterator[tuple[int, pa.Table, Mapping[str, Tensor]]]:
        """Each item with its record, in any order; `on_images` gets the number of images whenever a few are made."""
        ...


Watch = Callable[[pa.Table, bool], None]


def make_records(
    maker: Maker,
    records: Records,
    count: int,
    *,
    shard: tuple[int, int] = (0, 1),
    executor: Executor | None = None,
    progress: Step | None = None,
    watch: Watch | None = None,
) -> None:
    """Has the records of `count` items made, or of every n-th from the i-th on for `shard` = (i, n).

    executor: by default in order. progress, watch: as in `Making`.
    """
    share = len(range(shard[0], count, shard[1]))
    task = Making(maker, records, items=share, progress=progress, watch=watch)
    for _ in Shards(*shard, executor or Local()).map(task, range(count)):
        pass


class Making:
    """The task (`run/executors/base.py`) of writing a maker's records.

    progress: of images. watch: is called once with the table of each record, and whether it was made just now.
    """

    def __init__(
        self,
        maker: Maker,
        records: Records,
        *,
        items: int,
        progress: Step | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._maker, self._records, self._watch = maker, records, watch
        self._progress, self._total = progress, items * maker.images
        self._there: set[int] = set()  # items known to have a record
        self._partial = 0  # images made of items that have none yet
        self._turn = RLock()

    @property
    def together(self) -> int:
        """How many records are best made in one call."""
        return self._maker.together

    def missing(self, items: Sequence[int]) -> list[int]:
        """Those of the items that have no record yet, in their order."""
        with self._turn:
            missing = [item for item in items if not self._has_record(item)]
            if self._there:
                self._report()
            return missing

    def __call__(self, items: Sequence[int]) -> None:
        """Makes the records of those of the items that have none."""
        with self._turn:
            todo = [item for item in items if not self._has_record(item)]
            for item, table, tensors in self._maker.records(todo, self._note_images):
                self._records.write(item, table, tensors)
                self._partial -= self._maker.images
                self._note(item, table, new=True)

    def _has_record(self, item: int) -> bool:
        record = self._records.read(item)
        if record is not None:
            self._note(item, record[0], new=False)
        return record is not None

    def _note(self, item: int, table: pa.Table, *, new: bool) -> None:
        if item not in self._there:
            self._there.add(item)
            if self._watch:
                self._watch(table, new)

    def _note_images(self, images: int) -> None:
        self._partial += images
        self._report()

    def _report(self) -> None:
        if self._progress:
            self._progress(len(self._there) * self._maker.images + self._partial, self._total)
