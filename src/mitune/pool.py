"""Makes M candidates for every prompt, scores them while they are made, and keeps the best (Algorithm 1 of MI-TUNE).

Everything about a prompt is one record: its candidates' seeds, scores and per-step terms, and the latents and text
embeddings of those that some selection keeps. A killed run goes on with the prompts that have no record yet.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mitune.config import PoolConfig
from mitune.errors import MituneError
from mitune.generate import Batch, Request, candidate_seed, decode, generate_all
from mitune.information import SCORES, Trace
from mitune.metrics.judgment import Metric
from mitune.models import Model
from mitune.select import ORACLE, Rule, apply, parse_rule
from mitune.store import Records, claim, write_bytes, write_image, write_table, write_tensors

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
    dropped: int  # NaN latents
    seconds: float


@dataclass(slots=True)
class _Open:
    """A prompt whose candidates are being made."""

    latents: list[Tensor] = field(default_factory=list)
    terms: dict[str, list[Any]] = field(default_factory=dict)  # of the trace, one entry a candidate
    conditioning: dict[str, Tensor] = field(default_factory=dict)


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
    """Fills `folder` with the pool of `prompts` and one fine-tuning set for each of `config.select`.

    `shard` = (i, n) makes every n-th prompt alone, from the i-th on, so that n processes can share a folder; whoever
    finds all records present writes the sets. `identity` names what else made the images, e.g. an adapter's checksum.
    Raises MituneError for an unknown selection, an oracle without a metric, or a folder of other settings.
    """
    rules = {rule.slug: rule for rule in (parse_rule(text, list(SCORES)) for text in config.select)}
    if metric is None and any(rule.by == ORACLE for rule in rules.values()):
        raise MituneError("pool.select names 'oracle', but this model comes with no judge; leave it out.")
    settings = {"model": model.name, "call": model.call, "made_with": identity, "prompts": list(prompts)}
    claim(folder, settings | _identity_of(config), "pool")
    records = Records(folder / "records")
    began = time.monotonic()
    mine = [i for i in range(len(prompts)) if i % shard[1] == shard[0]]
    todo = [i for i in mine if records.read(i) is None]
    total, done = len(mine) * config.candidates, (len(mine) - len(todo)) * config.candidates
    requests = [
        Request(prompt=prompts[i], seed=candidate_seed(config.seed, prompts[i], j))
        for i in todo
        for j in range(config.candidates)
    ]
    owner = {prompts[i]: i for i in todo}
    open_prompts: dict[int, _Open] = {}
    for chunk, batch in generate_all(model, requests, config.batch_size):
        for row, request in enumerate(chunk):
            index = owner[request.prompt]
            current = open_prompts.setdefault(index, _Open())
            _add(current, batch, row)
            if len(current.latents) == config.candidates:
                _finish(records, index, prompts[index], open_prompts.pop(index), model, config, rules, metric)
        done += len(chunk)
        if progress:
            progress(done, total)
    result = assemble(model, prompts, folder, config, rules)
    seconds = time.monotonic() - began
    if result is None:
        return PoolResult(folder, folder / "candidates.parquet", {}, total, 0, seconds)
    table, sets, dropped = result
    return PoolResult(folder, table, sets, total, dropped, seconds)


def _identity_of(config: PoolConfig) -> dict[str, object]:
    """The settings that the candidates depend on; the batch size is none of them (it changes rounding at most)."""
    settings = asdict(config)
    del settings["batch_size"]
    return settings


def _add(current: _Open, batch: Batch, row: int) -> None:
    current.latents.append(batch.latents[row])
    for name, values in batch.trace.select([row]).to_columns().items():
        current.terms.setdefault(name, []).extend(values)
    if not current.conditioning:
        current.conditioning = {name: tensor[row] for name, tensor in batch.conditioning.items()}
        current.conditioning |= {f"null.{name}": tensor[row] for name, tensor in batch.null_conditioning.items()}


def _finish(
    records: Records,
    index: int,
    prompt: str,
    current: _Open,
    model: Model,
    config: PoolConfig,
    rules: dict[str, Rule],
    metric: Metric | None,
) -> None:
    """Scores and judges the candidates of a prompt, selects among them and writes its record."""
    latents = torch.stack(current.latents)
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    if not finite.all():
        log.warning("%s: %d candidates came out as NaN and are left out.", prompt, int((~finite).sum()))
    trace = Trace.from_columns(current.terms)
    scores = {name: score(trace).where(finite, torch.nan).tolist() for name, score in SCORES.items()}
    columns: dict[str, object] = {
        "prompt_index": [index] * config.candidates,
        "prompt": [prompt] * config.candidates,
        "candidate": list(range(config.candidates)),
        "seed": [candidate_seed(config.seed, prompt, j) for j in range(config.candidates)],
        "status": ["ok" if ok else "nan" for ok in finite.tolist()],
    }
    if metric is not None:
        judged = metric(decode(model, latents.nan_to_num()), [prompt] * config.candidates)
        columns |= {name: [getattr(j, name) for j in judged] for name in ("exact", "graded", "malformed")}
        graded = [j.graded - j.malformed for j in judged]  # a drawing that cannot be read comes after all others
        scores[ORACLE] = torch.tensor(graded).where(finite, torch.nan).tolist()
    columns |= {f"score.{name}": values for name, values in scores.items()}
    columns |= current.terms
    chosen = {slug: apply(rule, scores, config.keep, candidate_seed(config.seed, prompt, -1)) for slug, rule in rules.items()}
    columns |= {f"kept.{slug}": [j in kept for j in range(config.candidates)] for slug, kept in chosen.items()}
    extremes: list[int] = []
    if index < SHOWN_PROMPTS:
        by = scores[next(iter(rules.values())).by] if next(iter(rules.values())).by in scores else scores["mi-tune"]
        order = torch.tensor(by).nan_to_num(nan=-torch.inf).argsort(descending=True).tolist()
        extremes = order[:EXTREMES] + order[-EXTREMES:]
    stored = sorted({j for kept in chosen.values() for j in kept} | set(extremes))
    tensors = {"latents": latents[stored], "candidates": torch.tensor(stored)}
    tensors |= {f"conditioning.{name}": tensor for name, tensor in current.conditioning.items()}
    records.write(index, pa.table(columns), tensors)


def assemble(
    model: Model, prompts: Sequence[str], folder: Path, config: PoolConfig, rules: dict[str, Rule]
) -> tuple[Path, dict[str, Path], int] | None:
    """Writes candidates.parquet and the fine-tuning sets, or returns None while records are missing."""
    records = Records(folder / "records")
    sets_folder = folder.parent / "sets"
    sets = {slug: sets_folder / slug for slug in rules}
    table_file = folder / "candidates.parquet"
    loaded = [records.read(i) for i in range(len(prompts))]
    if any(record is None for record in loaded):
        return None
    complete = [record for record in loaded if record is not None]
    table = pa.concat_tables([record[0] for record in complete])
    dropped = table.column("status").to_pylist().count("nan")
    if not table_file.exists():
        for index, (_, tensors) in enumerate(complete[:SHOWN_PROMPTS]):
            for j, image in zip(tensors["candidates"].tolist(), decode(model, tensors["latents"]), strict=True):
                write_image(folder / "extremes" / f"{index:05d}-{j:03d}.png", image)
        for slug, target in sets.items():
            _write_set(model, complete, slug, rules[slug], target)
        write_table(table_file, table)  # last: its presence says that the sets are whole
    return table_file, sets, dropped


def _write_set(
    model: Model, records: Sequence[tuple[pa.Table, dict[str, Tensor]]], slug: str, rule: Rule, target: Path
) -> None:
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
        raise MituneError(f"The selection {rule.by!r} keeps no candidate at all; lower its threshold.")
    stacked = torch.stack(latents)
    for row, image in zip(rows, decode(model, stacked), strict=True):
        write_image(target / row["file_name"], image)
    write_tensors(target / "latents.safetensors", {"latents": stacked})
    names = conditioning[0]
    write_tensors(
        target / "conditioning.safetensors",
        {name.removeprefix("conditioning."): torch.stack([c[name] for c in conditioning]) for name in names},
    )
    write_bytes(target / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
