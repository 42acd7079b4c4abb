"""What a store is: named contents, each written whole or not at all. Records (`run/records.py`) are kept in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mitune.resolver import Row, Table


class Store(Protocol):
    """Named contents. A class is made of the folder that its contents belong to, a Path that is unique to them."""

    def read(self, key: str) -> bytes:
        """The content under a key. Raises FileNotFoundError if there is none, and OSError if it cannot be read."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Writes the content whole or not at all; False, and nothing changes, if there is one under that key."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """The keys that begin with a prefix, in any order."""
        ...

    def set_aside(self, key: str) -> None:
        """Makes way for a new content under a key whose content, if any, turned out damaged."""
        ...


STORES: Table[Store] = Table(
    "store",
    Store,
    {"folder": Row("files in the run's own folder", "mitune.run.stores.folder:Folder")},
)
