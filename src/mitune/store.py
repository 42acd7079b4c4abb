"""The run directory: records that are written whole or not at all, and checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from mitune.errors import MituneError

log = logging.getLogger(__name__)


@contextmanager
def room_on(path: Path) -> Iterator[None]:
    """Turns "no space left" into a sentence; what was written so far stays whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MituneError(
            f"No space left on the disk of {path}; free some and run the same command again, it goes on from here."
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under another name first and renames it, so that no reader ever meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with room_on(path):
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """JSON of `content`, readable, in UTF-8."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file."""
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def write_table(path: Path, table: pa.Table) -> None:
    """A Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def write_image(path: Path, image: Image.Image) -> None:
    """A PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


class Records:
    """Numbered records of a table and tensors each, in one folder, each sealed by the checksums of its two files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _files(self, index: int) -> tuple[Path, Path, Path]:
        stem = self.folder / f"{index:05d}"
        return stem.with_suffix(".parquet"), stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def write(self, index: int, table: pa.Table, tensors: Mapping[str, Tensor]) -> None:
        """The seal comes last: a record without it does not exist."""
        table_file, tensor_file, seal = self._files(index)
        write_table(table_file, table)
        write_tensors(tensor_file, tensors)
        write_json(seal, {file.name: _checksum(file.read_bytes()) for file in (table_file, tensor_file)})

    def read(self, index: int) -> tuple[pa.Table, dict[str, Tensor]] | None:
        """The record, or None if it was never finished. A damaged one is set aside, with a warning, and gone."""
        table_file, tensor_file, seal = self._files(index)
        if not seal.exists():
            return None
        try:
            sums = json.loads(seal.read_text(encoding="utf-8"))
            contents = [file.read_bytes() for file in (table_file, tensor_file)]
            sealed = [sums[file.name] for file in (table_file, tensor_file)]
            if [_checksum(content) for content in contents] != sealed:
                raise ValueError("checksum")
            return pq.read_table(pa.BufferReader(contents[0])), load(contents[1])
        except (OSError, ValueError, KeyError, TypeError):
            for file in (seal, table_file, tensor_file):
                if file.exists():
                    file.replace(file.with_name(file.name + ".damaged"))
            log.warning(
                "Record %05d in %s is damaged; it is set aside as *.damaged and made again.", index, self.folder
            )
            return None


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def claim(folder: Path, settings: Mapping[str, Any], what: str) -> None:
    """Ties a folder to its settings: a later call with others is refused instead of mixing two results.

    Raises MituneError, naming the first setting that differs.
    """
    file = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(file, wanted)
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MituneError(f"{file} is damaged; delete {folder} or choose another folder for this {what}.") from error
    if found == wanted:
        return
    name = next((key for key in {**found, **wanted} if found.get(key) != wanted.get(key)), "settings")
    raise MituneError(
        f"{folder} holds a {what} of other settings ({name}: {_short(found.get(name))} there, "
        f"{_short(wanted.get(name))} now); choose another folder, or delete this one."
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
