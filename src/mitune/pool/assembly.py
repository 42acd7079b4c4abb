"""From the records of a pool to its table, the pictures of its extremes, and its fine-tuning sets.

A set is an imagefolder with metadata, latents and text embeddings: of what a selection keeps, or, ranked, of a prompt's
best and worst, with the score and the advantage of each. It is written whole, beside its place, and renamed,
by whoever finds all records there and has the folder's lock; and it is sealed (`seals.py`), as the table and the
pictures are. Whatever is missing or damaged is made again from the records.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mitune.denoiser.conditioning import Conditioning, Passes, stack, stack_passes
from mitune.denoiser.opening.models import Model, nothing_but_nan
from mitune.denoiser.pictures import decode
from mitune.errors import MituneError
from mitune.pool.advantage import advantages
from mitune.pool.record import SHOWN_PROMPTS
from mitune.run.records import Record, Records
from mitune.run.seals import SEAL, is_whole, read_seal, write_seal
from mitune.run.store import (
    UNFINISHED,
    unfinished,
    unfinished_folder,
    write_bytes,
    write_image,
    write_table,
    write_tensors,
    writing,
)

log = logging.getLogger(__name__)
TABLE = "candidates.parquet"
POOL, SET = "pool", "fine-tuning set"  # what seals say was made


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A pool's folder, and the places of its sets, by the slugs of their selections."""

    folder: Path
    sets: Mapping[str, Path]
    model: Model
    made_by: Mapping[str, Any]  # the model's identity

    def require_room(self) -> None:
        """Makes the folder of the sets; raises MituneError if what another made is in the place of one.

        Ours is what a set's seal names, or what the pool's says of it.
        """
        with writing(self.folder.parent):
            for target in self.sets.values():
                target.parent.mkdir(parents=True, exist_ok=True)
        written = _sealed(self.folder, POOL).get("sets", {})
        for slug, target in self.sets.items():
            self._require_ours(target, {SEAL, *written.get(slug, ()), *_sealed(target, SET).get("files", ())})

    def _require_ours(self, target: Path, known: set[str]) -> None:
        remedy = f"move it away, as the set is written there, or choose another folder than {target.parent.parent}."
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise MituneError(f"{target} is a {'link' if target.is_symlink() else 'file'}; {remedy}")
        foreign = sorted(path.name for path in target.iterdir() if path.name not in known) if target.exists() else []
        if foreign:
            raise MituneError(f"{target} holds what mitune did not make ({foreign[0]}); {remedy}")

    def run(self, records: Records, count: int) -> pa.Table | None:
        """The pool's table, once all `count` records are there; None before. Writes what is not there and whole.

        Raises MituneError if a selection keeps nothing, or if there is nothing to keep.
        """
        if not records.numbers().issuperset(range(count)):
            return None
        tables = [rows for rows, _ in records.read_up_to(count)]  # one record's tensors in memory at a time
        if len(tables) < count:
            return None  # one is damaged
        table, checksum = pa.concat_tables(tables), records.checksum(count)
        if "ok" not in table["status"].to_pylist():
            raise nothing_but_nan(self.model, f"Every candidate of {count} prompts")
        facts = {"model": {"name": Path(self.model.name).name, **self.made_by}, "records": checksum}
        of_sets = {slug: {"made": SET, "selection": slug, **facts} for slug in self.sets}
        wanting = {slug: target for slug, target in self.sets.items() if not is_whole(target, of_sets[slug])}
        if wanting:
            self.require_room()
        for slug, target in wanting.items():
            _write_set(self.model, records.read_up_to(count), slug, target, of_sets[slug])
        sets = {slug: list(_sealed(target, SET)["files"]) for slug, target in self.sets.items()}
        of_pool: dict[str, Any] = {"made": POOL, "sets": sets, **facts}
        if not is_whole(self.folder, of_pool):
            pictures = self._write_extremes(records.read_up_to(min(count, SHOWN_PROMPTS)))
            write_table(self.folder / TABLE, table)
            write_seal(self.folder, [TABLE, *pictures], **of_pool)
        return table

    def _write_extremes(self, records: Iterable[Record]) -> list[str]:
        names = []
        for table, tensors in records:
            kept = tensors["candidates"].tolist()
            images = decode(self.model, tensors["latents"]) if kept else ()
            for candidate, image in zip(kept, images, strict=True):
                names.append(f"extremes/{table['prompt_index'][0].as_py():05d}-{candidate:03d}.png")
                write_image(self.folder / names[-1], image)
        return names


def _sealed(folder: Path, kind: str) -> dict[str, Any]:
    """The seal of a folder where mitune made this; else none."""
    seal = read_seal(folder) or {}
    return seal if seal.get("made") == kind else {}


def _write_set(model: Model, records: Iterable[Record], slug: str, target: Path, facts: Mapping[str, Any]) -> None:
    """Writes what one selection keeps in the place of an earlier set; `facts` go into the seal."""
    rows, latents, passes, empty = [], [], [], []
    rivals: dict[str, Conditioning] = {}
    for table, tensors in records:
        position = {j: at for at, j in enumerate(tensors["candidates"].tolist())}
        names = ["prompt_index", "prompt", "candidate", "seed", *({"rivals"} & set(table.column_names))]
        candidates = table.select(names).to_pylist()
        kept = [row | more for row, more in zip(candidates, _members(table, slug), strict=True) if more is not None]
        if not kept:
            empty.append(candidates[0]["prompt"])
        for row in kept:
            name = f"{row['prompt_index']:05d}-{row['candidate']:03d}.png"
            rows.append({"file_name": name, **row, "selection": slug})
            latents.append(tensors["latents"][position[row["candidate"]]])
            passes.append(_passes(tensors))
        if kept:
            rivals |= _rivals(table, tensors)
    if not rows:
        raise MituneError(f"The selection {slug!r} keeps no candidate at all; lower its threshold, or take another.")
    if "score" in rows[0]:
        ranks = advantages([row["score"] for row in rows], [row["prompt_index"] for row in rows])
        rows = [row | {"advantage": advantage} for row, advantage in zip(rows, ranks, strict=True)]
    if empty:
        log.warning("The set %s has no image of %d prompts: %s.", slug, len(empty), "; ".join(empty))
    stacked = torch.stack(latents)
    with unfinished_folder(target) as folder:
        for row, image in zip(rows, decode(model, stacked), strict=True):
            write_image(folder / row["file_name"], image)
        write_tensors(folder / "latents.safetensors", {"latents": stacked})
        write_tensors(folder / "conditioning.safetensors", stack_passes(passes).to_tensors())
        if rivals:
            write_tensors(folder / "rivals.safetensors", stack(list(rivals.values())).to_tensors())
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_bytes(folder / "metadata.jsonl", "".join(lines).encode())
        write_seal(folder, [path.name for path in folder.iterdir()], **facts)
        if target.exists():
            target.replace(unfinished(target))
        folder.replace(target)
    _sweep_beside(target)


def _members(table: pa.Table, slug: str) -> list[dict[str, Any] | None]:
    """For each candidate of a record what its set says of it; None if it is not in it."""
    if f"ranked.{slug}" in table.column_names:
        return [None if score is None else {"score": score} for score in table[f"ranked.{slug}"].to_pylist()]
    return [{} if kept else None for kept in table[f"kept.{slug}"].to_pylist()]


def _rivals(table: pa.Table, tensors: Mapping[str, Tensor]) -> dict[str, Conditioning]:
    """The denoiser's conditioning on each rival of a record's prompt; none where the pool stores none."""
    start = "rivals."
    encoded = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    if not encoded:
        return {}
    texts, conditioning = table["rivals"][0].as_py(), Conditioning.from_tensors(encoded)
    return {text: conditioning.take([place]) for place, text in enumerate(texts)}


def _passes(tensors: Mapping[str, Tensor]) -> Passes:
    """The denoiser's conditioning on a record's prompt."""
    start = "conditioning."
    try:
        return Passes.from_tensors({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    except ValueError as error:
        raise MituneError(
            "The pool was made by another version of mitune, which kept its conditioning in another way; make it anew "
            "in another folder."
        ) from error


def _sweep_beside(target: Path) -> None:
    """Removes the set that was there before, and what killed processes left of theirs."""
    with writing(target):
        for path in target.parent.glob(f".{target.name}.*"):
            if UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)
