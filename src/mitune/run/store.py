"""Files of a run: written whole or not at all, set aside where they are damaged, in folders tied to their settings."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from mitune.errors import MituneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.unfinished")  # what is being written; of a killed process, until swept
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a garbled file may raise
SETTINGS = "settings.json"  # in a claimed folder
T = TypeVar("T")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system has against writing to `path` into a sentence; what was written so far stays whole."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MituneError(
                f"No space left on the disk of {path}; free some and run the same command again, it goes on from here."
            ) from error
        raise MituneError(
            f"Cannot write {error.filename or path} ({error.strerror or error}); make it writable, or choose another "
            "folder, and run the same command again."
        ) from error


def unfinished(path: Path) -> Path:
    """Another name beside `path`, to write under until all is there; `locks.sweep` knows it."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.unfinished")


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write in, gone afterwards unless it was renamed."""
    folder = unfinished(path)
    with writing(path):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under another name first and renames it, so that no reader ever meets half of it.

    Raises MituneError if the disk is full or `path` cannot be written.
    """
    partial = unfinished(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def json_bytes(content: object) -> bytes:
    """JSON of `content`, readable, in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def table_bytes(table: pa.Table) -> bytes:
    """A Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def write_json(path: Path, content: object) -> None:
    """Writes `json_bytes`."""
    write_bytes(path, json_bytes(content))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensor_bytes`."""
    write_bytes(path, tensor_bytes(tensors))


def write_table(path: Path, table: pa.Table) -> None:
    """Writes `table_bytes`."""
    write_bytes(path, table_bytes(table))


def write_image(path: Path, image: Image.Image) -> None:
    """A PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def write_figure(path: Path, figure: Figure, *, dpi: int) -> None:
    """A figure of matplotlib as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_bytes(path, buffer.getvalue())


def set_aside(path: Path) -> None:
    """Renames a damaged file, or what stands in its place, to *.damaged, so that it can be made again."""
    if not (path.exists() or path.is_symlink()):
        return
    with writing(path):
        aside = next(p for i in count() if not (p := path.with_name(f"{path.name}.damaged{i or ''}")).exists())
        path.replace(aside)
    log.warning("%s is damaged; it is set aside as %s and made again.", path, aside.name)


def read_again(path: Path, parse: Callable[[bytes], T]) -> T | None:
    """What `parse` makes of a file that can be made again; None if there is none. A damaged one is set aside."""
    if not path.exists():
        return None
    try:
        return parse(path.read_bytes())
    except DAMAGED:
        set_aside(path)
        return None


def claim(folder: Path, settings: Mapping[str, Any], what: str) -> None:
    """Ties a folder to its settings: a later call with others is refused instead of mixing two results.

    Raises MituneError, naming the first setting that differs.
    """
    file = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(file, wanted)
        return
    try:
        settings_on_disk = json.loads(file.read_text(encoding="utf-8"))
        there, now = dict(_flat(settings_on_disk)), dict(_flat(wanted))
    except DAMAGED as error:
        raise MituneError(
            f"{file} is damaged, so that nobody knows what made this {what}; choose another folder, or delete that "
            "file if you are sure that its settings were the present ones."
        ) from error
    name = next((key for key in {**there, **now} if there.get(key) != now.get(key)), None)
    if name is not None:
        raise MituneError(
            f"{folder} holds a {what} of other settings ({name}: {_short(there.get(name))} there, "
            f"{_short(now.get(name))} now); choose another folder, or delete this one."
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
