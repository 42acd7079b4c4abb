"""The prose around the tables of the studies, one file a page; what is in braces is filled in."""

from __future__ import annotations

from importlib.resources import files


def page(name: str, **values: object) -> str:
    """The page of that name with its values."""
    return files("mitune.bench.pages").joinpath(f"{name}.md").read_text("utf-8").format(**values)
