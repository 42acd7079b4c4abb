"""One folder, one process: locks of the operating system, which a killed process gives back by dying.

A folder's lock is the file `.lock` in it. Under it, whatever a killed process left half-written there is swept away.
Workers that share a folder by design, the shards of a pool, are locked against those alone that would make the same.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from mitune.errors import MituneError
from mitune.run.store import UNFINISHED, writing

LOCK = ".lock"
_WORKER = re.compile(r"\.worker-(\d+)-of-(\d+)\.lock")


@contextmanager
def sole_worker(folder: Path) -> Iterator[None]:
    """Keeps `folder`, made where it is missing, to this process, and sweeps it.

    Raises MituneError if another process works on it.
    """
    with _held(folder / LOCK) as lock:
        if lock is None:
            raise _taken(folder)
        sweep(folder)
        yield


@contextmanager
def one_of_many(folder: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Makes this process the worker i of n on `folder`; the first one sweeps it.

    Raises MituneError if a running worker shares a place with it: i + k n = j + l m for some k, l.
    """
    index, count = shard
    file = folder / f".worker-{index}-of-{count}.lock"
    with ExitStack() as stack:
        with waiting(folder):
            others = [match for path in folder.iterdir() if (match := _WORKER.fullmatch(path.name)) and _works(path)]
            for other, of in (map(int, match.groups()) for match in others):
                if (index - other) % math.gcd(count, of) == 0:
                    raise _taken(folder)
            if not others:
                sweep(folder)
            stack.enter_context(_held(file))  # nobody has it, and none can take it but under the folder's lock
            stack.callback(file.unlink, missing_ok=True)
        yield


@contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, made where it is missing, once whoever has it is done."""
    with _held(folder / LOCK, wait=True):
        yield


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder` and below, except where another lock holds."""
    with writing(folder):
        for path in folder.iterdir():
            real_folder = path.is_dir() and not path.is_symlink()
            if UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path) if real_folder else path.unlink(missing_ok=True)
            elif real_folder and not (path / LOCK).exists():
                sweep(path)


@contextmanager
def _held(file: Path, *, wait: bool = False) -> Iterator[object | None]:
    """Holds a lock, or gives None if another process does."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(file).acquire(blocking=wait)
        except Timeout:
            lock = None
    with lock or nullcontext() as held:
        yield held


def _works(file: Path) -> bool:
    """Whether the worker whose lock it is lives; the lock of one that was killed goes."""
    with _held(file) as lock:
        if lock is not None:
            file.unlink(missing_ok=True)
        return lock is None


def _taken(folder: Path) -> MituneError:
    return MituneError(f"Another process works on {folder}; wait until it is done, or choose another folder.")
