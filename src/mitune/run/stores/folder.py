"""The store that is a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mitune.run.store import set_aside, write_bytes


@dataclass(frozen=True, slots=True)
class Folder:
    """One file a key. That no two processes create the same one is up to the locks of the run (`run/locks.py`)."""

    folder: Path

    def read(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    def create(self, key: str, content: bytes) -> bool:
        path = self.folder / key
        if path.exists():
            return False
        write_bytes(path, content)
        return True

    def list(self, prefix: str) -> Iterator[str]:
        names = (path.name for path in self.folder.iterdir()) if self.folder.is_dir() else ()
        return (name for name in names if name.startswith(prefix))

    def set_aside(self, key: str) -> None:
        """As KEY.damaged, with a warning."""
        set_aside(self.folder / key)
