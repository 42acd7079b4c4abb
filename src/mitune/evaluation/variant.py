"""What evaluation compares: variants of a model. Those of a run stand in its variants.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mitune.errors import MituneError
from mitune.run.store import DAMAGED, write_json

VARIANTS = "variants.json"  # of a run
BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the models that are compared: its name in the tables, its adapter, its guidance scale."""

    name: str
    adapter: Path | None = None
    guidance_scale: float | None = None  # None: that of the run

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.-]+", "-", self.name.lower()).strip("-")


def check_names(variants: Sequence[Variant]) -> None:
    """Raises MituneError if two variants would share a folder, with each other or with the base."""
    slugs = [BASE, *(variant.slug for variant in variants)]
    repeated = next((variant for variant in variants if slugs.count(variant.slug) > 1), None)
    if repeated is not None:
        raise MituneError(
            f"Two variants are called {repeated.name!r}, if capitals and signs are left out; give each a name of its "
            f"own, other than {BASE!r}."
        )


def write_variants(run: Path, variants: Sequence[Variant]) -> None:
    """Writes the variants of a run; adapters within it by their place there, so that the folder may be moved."""
    rows = []
    for variant in variants:
        adapter = variant.adapter
        if adapter is not None:
            adapter = adapter.relative_to(run) if adapter.is_relative_to(run) else adapter.absolute()
        rows.append(
            {
                "name": variant.name,
                "adapter": None if adapter is None else adapter.as_posix(),
                "guidance_scale": variant.guidance_scale,
            }
        )
    write_json(run / VARIANTS, rows)


def read_variants(run: Path) -> list[Variant]:
    """The variants of a run. Raises MituneError if it has not come to them yet, or if their file is damaged."""
    file = run / VARIANTS
    if not file.is_file():
        raise MituneError(f"{run} has no variants to judge yet; give the command that made it again, to its end.")
    try:
        return [
            Variant(
                name=str(row["name"]),
                adapter=None if row["adapter"] is None else run / row["adapter"],
                guidance_scale=None if row["guidance_scale"] is None else float(row["guidance_scale"]),
            )
            for row in json.loads(file.read_text(encoding="utf-8"))
        ]
    except DAMAGED as error:
        raise MituneError(f"{file} is damaged ({error!r}); give the command that made the run again.") from error
