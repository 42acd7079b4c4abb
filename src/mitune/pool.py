"""Makes M candidates for every prompt, scores them while they are made, and keeps the best (Algorithm 1 of MI-TUNE).

With a race, most of them are dropped half-way (`racing.py`). Everything about a prompt is one record: its candidates'
seeds, scores and per-step terms, and the latents and text embeddings of those that some selection keeps. A killed run
goes on with the prompts that have no record yet.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mitune.conditioning import stack
from mitune.config import PoolConfig
from mitune.contrast import FIRST_STAGES, POST_HOC, post_hoc, rivals_of
from mitune.denoiser import denoiser_of, rows_counted
from mitune.errors import MituneError
from mitune.generate import Batch, Request, candidate_seed, decode, default_batch_size, generate_all
from mitune.information import SCORES, Trace
from mitune.metrics.judgment import Metric
from mitune.models import Model
from mitune.racing import race_of
from mitune.selection import ORACLE, Rule, apply, parse_rule, select
from mitune.store import Records, claim, write_bytes, write_image, write_json, write_table, write_tensors

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
EXTREMES = 4  # best and worst candidates whose pictures are kept for the report,
SHOWN_PROMPTS = 12  # for the first so many prompts


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Where the pool lies and what it cost; `sets` has one fine-tuning set a selection."""

    folder: Path
    table: Path
    sets: dict[str, Path]
    candidates: int
    broken: int  # NaN latents
    seconds: float
    denoiser_calls: int  # one a candidate and step, with and without the prompt; those of post-hoc scores likewise
    unraced_calls: int  # what they would be without a race


def build_pool(
    model: Model,
    prompts: Sequence[str],
    folder: Path,
    config: PoolConfig,
    *,
    metric: Metric | None = None,
    shard: tuple[int, int] = (0, 1),
    identity: str = "",
    progress: Progress | None = None,
) -> PoolResult:
    """Fills `folder` with the pool of `prompts`, and `sets` beside it with a fine-tuning set for each selection.

    `shard` = (i, n) makes every n-th prompt alone, from the i-th on, so that n processes can share a folder; whoever
    finds all records present writes the sets. `identity` names what else made the images, e.g. an adapter's checksum.
    Raises MituneError for an unknown selection, one that a race would starve, an oracle without a metric, or a folder
    of other settings.
    """
    rules = [parse_rule(text, [*SCORES, *POST_HOC]) for text in config.select]
    if metric is None and any(rule.by == ORACLE for rule in rules):
        raise MituneError("pool.select names 'oracle', but this model comes with no judge; leave it out.")
    race = race_of(config.race, rules, FIRST_STAGES, candidates=config.candidates, keep=config.keep)
    settings = {"model": model.name, "call": model.call, "made_with": identity, "prompts": list(prompts)}
    claim(folder, settings | _identity_of(config), "pool")
    began = time.monotonic()
    batch_size = _BatchSize.begin(folder, config, model)
    pool = _Pool(model, prompts, config, batch_size, rules, metric, Records(folder / "records"))
    mine = range(shard[0], len(prompts), shard[1])
    todo, steps, further = [], [], 0.0
    for index in mine:
        record = pool.records.read(index)
        if record is None:
            todo.append(index)
        else:
            steps += record[0]["steps"].to_pylist()
            further += sum(record[0]["further_calls"].to_pylist())
    total, done = len(mine) * config.candidates, (len(mine) - len(todo)) * config.candidates
    requests = [pool.request(index, candidate) for index in todo for candidate in range(config.candidates)]
    current = _Candidates()
    for chunk, batch in generate_all(model, requests, batch_size.value, race):
        batch_size.note(batch.batch_size)
        for row in range(len(chunk)):
            current.add(batch, row)
            if len(current.latents) == config.candidates:
                further += pool.finish(todo.pop(0), current)
                steps += current.steps
                current = _Candidates()
        done += len(chunk)
        if progress:
            progress(done, total)
    table = folder / "candidates.parquet"
    sets = {rule.slug: folder.parent / "sets" / rule.slug for rule in rules}
    broken = pool.assemble(folder, table, sets)
    return PoolResult(
        folder=folder,
        table=table,
        sets=sets if broken is not None else {},
        candidates=total,
        broken=broken or 0,
        seconds=time.monotonic() - began,
        denoiser_calls=sum(steps) + round(further),
        unraced_calls=total * max(steps, default=0) + round(further),
    )


def _identity_of(config: PoolConfig) -> dict[str, object]:
    """The settings that the candidates depend on; the batch size is none of them (it changes rounding at most)."""
    settings = asdict(config)
    del settings["batch_size"]
    return settings


@dataclass(slots=True)
class _BatchSize:
    """The denoiser's batch size, which out of memory may halve; kept in a file, so that a restart goes on with it."""

    value: int
    file: Path | None  # None where the settings name the size

    @classmethod
    def begin(cls, folder: Path, config: PoolConfig, model: Model) -> _BatchSize:
        if config.batch_size is not None:
            return cls(config.batch_size, None)
        file = folder / "batch_size.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return cls(found or default_batch_size(model.pipe._execution_device), file)

    def note(self, used: int) -> None:
        self.value = used
        if self.file is not None and not (self.file.exists() and json.loads(self.file.read_text()) == used):
            write_json(self.file, used)


@dataclass(slots=True)
class _Candidates:
    """The candidates of one prompt, as far as they are made."""

    latents: list[Tensor] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)  # the step after which a race dropped it, or 0
    steps: list[int] = field(default_factory=list)  # that the denoiser made for it
    terms: dict[str, list[Any]] = field(default_factory=dict)  # of the trace, one entry a candidate
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    def add(self, batch: Batch, row: int) -> None:
        self.latents.append(batch.latents[row])
        self.dropped.append(batch.dropped[row])
        self.steps.append(batch.dropped[row] or len(batch.trace.log_snr))
        for name, values in batch.trace.select([row]).to_columns().items():
            self.terms.setdefault(name, []).extend(values)
        if not self.conditioning:
            self.conditioning = {name: tensor[row].clone() for name, tensor in batch.conditioning.items()}
            nulls = {f"null.{name}": tensor[row].clone() for name, tensor in batch.null_conditioning.items()}
            self.conditioning |= nulls  # clones, as a file takes no tensors that share memory


@dataclass(frozen=True, slots=True)
class _Pool:
    """What stays the same from prompt to prompt."""

    model: Model
    prompts: Sequence[str]
    config: PoolConfig
    batch_size: _BatchSize
    rules: Sequence[Rule]
    metric: Metric | None
    records: Records

    def request(self, index: int, candidate: int) -> Request:
        prompt = self.prompts[index]
        return Request(prompt=prompt, seed=candidate_seed(self.config.seed, prompt, candidate))

    def finish(self, index: int, candidates: _Candidates) -> float:
        """Scores and judges the candidates of a prompt, selects among them and writes the record.

        Returns the further denoiser calls that post-hoc scores took.
        """
        count, prompt = self.config.candidates, self.prompts[index]
        latents = torch.stack(candidates.latents)
        finite = torch.isfinite(latents).flatten(1).all(dim=1)
        status = [_status(ok, step) for ok, step in zip(finite.tolist(), candidates.dropped, strict=True)]
        if broken := status.count("nan"):
            log.warning("%s: %d candidates came out as NaN and are left out.", prompt, broken)
        trace = Trace.from_columns(candidates.terms)
        free = {name: score(trace).where(finite, torch.nan) for name, score in SCORES.items()}
        scores = {name: values.tolist() for name, values in free.items()}
        with rows_counted(denoiser_of(self.model.pipe)) as rows:
            scores |= {name: self.post_hoc(name, index, latents, finite, free) for name in self.post_hoc_names}
        further = sum(rows) / 2  # a call while sampling has two rows
        columns: dict[str, Sequence[Any]] = {
            "prompt_index": [index] * count,
            "prompt": [prompt] * count,
            "candidate": range(count),
            "seed": [self.request(index, candidate).seed for candidate in range(count)],
            "status": status,
            "steps": candidates.steps,
            "further_calls": [further / count] * count,
        }
        if self.metric is not None:
            shown = [j for j, step in enumerate(candidates.dropped) if not step]
            images = list(decode(self.model, latents[shown].nan_to_num()))
            verdicts = self.metric(images, [prompt] * len(shown))
            judged = dict(zip(shown, verdicts, strict=True))
            for name in ("exact", "graded", "malformed"):
                columns[name] = [getattr(judged[j], name) if j in judged else None for j in range(count)]
            graded = torch.full((count,), torch.nan)
            graded[shown] = torch.tensor([v.graded - v.malformed for v in verdicts])  # what cannot be read comes last
            scores[ORACLE] = graded.where(finite, torch.nan).tolist()
        columns |= {f"score.{name}": values for name, values in scores.items()} | candidates.terms
        stored = set(self._extremes(scores) if index < SHOWN_PROMPTS else ())
        for rule in self.rules:
            kept = apply(rule, scores, self.config.keep, candidate_seed(self.config.seed, prompt, -1))
            columns[f"kept.{rule.slug}"] = [candidate in kept for candidate in range(count)]
            stored |= set(kept)
        tensors = {"latents": latents[sorted(stored)], "candidates": torch.tensor(sorted(stored))}
        tensors |= {f"conditioning.{name}": tensor for name, tensor in candidates.conditioning.items()}
        self.records.write(index, pa.table({name: list(values) for name, values in columns.items()}), tensors)
        return further

    @property
    def post_hoc_names(self) -> list[str]:
        """Scores that select and cost further denoiser calls: only these are paid for."""
        return list(dict.fromkeys(rule.by for rule in self.rules if rule.by in POST_HOC))

    def post_hoc(
        self, name: str, index: int, latents: Tensor, finite: Tensor, free: Mapping[str, Tensor]
    ) -> list[float]:
        prompt, seed = self.prompts[index], self.config.seed
        rivals = rivals_of(prompt, self.prompts, seed=seed)
        clean = latents.nan_to_num()
        size, keep = self.batch_size.value, self.config.keep
        values = post_hoc(name, self.model, clean, prompt, rivals, free, keep=keep, seed=seed, batch_size=size)
        return values.where(finite, torch.nan).tolist()

    def _extremes(self, scores: Mapping[str, Sequence[float]]) -> list[int]:
        """The best and the worst by the first score that selects, for the report to show."""
        by = next((rule.by for rule in self.rules if rule.by in (*SCORES, *POST_HOC)), "mi-tune")
        order = select(scores[by], self.config.candidates)
        return order[:EXTREMES] + order[-EXTREMES:]

    def assemble(self, folder: Path, table: Path, sets: Mapping[str, Path]) -> int | None:
        """Writes the table and the sets once all records are there; returns the number of NaN candidates, or None."""
        tables = [rows for rows, _ in self._all_records()]  # one record's tensors in memory at a time
        if len(tables) < len(self.prompts):
            return None
        rows = pa.concat_tables(tables)
        if not table.exists():
            for index, (_, tensors) in enumerate(islice(self._all_records(), SHOWN_PROMPTS)):
                images = decode(self.model, tensors["latents"])
                for candidate, image in zip(tensors["candidates"].tolist(), images, strict=True):
                    write_image(folder / "extremes" / f"{index:05d}-{candidate:03d}.png", image)
            for slug, target in sets.items():
                _write_set(self.model, self._all_records(), slug, target)
            write_table(table, rows)  # last: its presence says that the sets are whole
        return int(rows.column("status").to_pylist().count("nan"))

    def _all_records(self) -> Iterator[tuple[pa.Table, dict[str, Tensor]]]:
        """In order, up to the first that is missing."""
        for index in range(len(self.prompts)):
            record = self.records.read(index)
            if record is None:
                return
            yield record


def _status(finite: bool, dropped: int) -> str:
    if dropped:
        return f"dropped at step {dropped}"
    return "ok" if finite else "nan"


def _write_set(model: Model, records: Iterable[tuple[pa.Table, dict[str, Tensor]]], slug: str, target: Path) -> None:
    """An imagefolder with metadata, latents and text embeddings of what one selection keeps."""
    if target.exists():
        shutil.rmtree(target)
    rows, latents, conditioning = [], [], []
    for table, tensors in records:
        position = {j: at for at, j in enumerate(tensors["candidates"].tolist())}
        for row in table.select(["prompt_index", "prompt", "candidate", "seed", f"kept.{slug}"]).to_pylist():
            if row.pop(f"kept.{slug}"):
                name = f"{row['prompt_index']:05d}-{row['candidate']:03d}.png"
                rows.append({"file_name": name, **row, "selection": slug})
                latents.append(tensors["latents"][position[row["candidate"]]])
                conditioning.append({k: v for k, v in tensors.items() if k.startswith("conditioning.")})
    if not rows:
        raise MituneError(f"The selection {slug!r} keeps no candidate at all; lower its threshold.")
    stacked = torch.stack(latents)
    for row, image in zip(rows, decode(model, stacked), strict=True):
        write_image(target / row["file_name"], image)
    write_tensors(target / "latents.safetensors", {"latents": stacked})
    write_tensors(
        target / "conditioning.safetensors",
        {name.removeprefix("conditioning."): tensor for name, tensor in stack(conditioning).items()},
    )
    write_bytes(target / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
