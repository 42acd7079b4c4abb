"""Numbered records of a table and tensors each: the unit of work of pools and evaluations, each made by itself."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load
from torch import Tensor

from mitune.run.store import DAMAGED, json_bytes, table_bytes, tensor_bytes
from mitune.run.stores.base import Store

log = logging.getLogger(__name__)
Record = tuple[pa.Table, dict[str, Tensor]]
_SEAL = ".json"


class Records:
    """Records in a store: NUMBER.parquet and NUMBER.safetensors, sealed by their checksums in NUMBER.json."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def write(self, index: int, table: pa.Table, tensors: Mapping[str, Tensor]) -> None:
        """The seal comes last: a record without it does not exist."""
        table_key, tensor_key, seal = _keys(index)
        contents = {table_key: table_bytes(table), tensor_key: tensor_bytes(tensors)}
        for key, content in contents.items():
            self._create(key, content)
        self._create(seal, json_bytes({key: _checksum(content) for key, content in contents.items()}))

    def _create(self, key: str, content: bytes) -> None:
        """What a process left there that was killed before it came to the seal stays if it is the same."""
        if self.store.create(key, content):
            return
        try:
            same = self.store.read(key) == content
        except OSError:
            same = False
        if not same:
            self.store.set_aside(key)
            self.store.create(key, content)

    def numbers(self) -> set[int]:
        """The numbers of the records that have a seal, be they damaged or not."""
        stems = (key.removesuffix(_SEAL) for key in self.store.list("") if key.endswith(_SEAL))
        return {int(stem) for stem in stems if stem.isdecimal()}

    def checksum(self, records: int) -> str:
        """Of what the first so many records hold, by their seals."""
        return _checksum(b"".join(self.store.read(_keys(index)[2]) for index in range(records)))

    def read(self, index: int) -> Record | None:
        """The record, or None if it was never finished. A damaged one is set aside, with a warning, and gone."""
        try:
            return self._whole(index)
        except DAMAGED as error:
            log.warning("Record %05d is damaged (%s).", index, error)
            for key in reversed(_keys(index)):
                self.store.set_aside(key)
            return None

    def _whole(self, index: int) -> Record | None:
        """The record, or None if it has no seal. Raises one of DAMAGED for anything else."""
        table_key, tensor_key, seal = _keys(index)
        try:
            content = self.store.read(seal)
        except FileNotFoundError:
            return None
        sums = json.loads(content)
        contents = [self.store.read(key) for key in (table_key, tensor_key)]
        if [_checksum(content) for content in contents] != [sums[table_key], sums[tensor_key]]:
            raise ValueError("its checksum differs")
        return pq.read_table(pa.BufferReader(contents[0])), load(contents[1])

    def read_up_to(self, count: int) -> Iterator[Record]:
        """The first `count` records, in order, up to the first that is missing."""
        for index in range(count):
            record = self.read(index)
            if record is None:
                return
            yield record


def _keys(index: int) -> tuple[str, str, str]:
    return f"{index:05d}.parquet", f"{index:05d}.safetensors", f"{index:05d}{_SEAL}"


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
