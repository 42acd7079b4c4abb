"""Which score selects? Every score on the same candidates, held against an exact judge.

A prompt's candidates, their trajectories' terms, their evidence under rival prompts and the judge's verdicts are one
record; a killed study goes on with the prompts that have none yet. The scores are computed from the records, so that a
new one needs no new candidates. `selection_tables` makes tables and figures of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mitune.bench.variants import COMBINATIONS, CONTRASTS, FREE
from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.pictures import decode
from mitune.denoiser.reading import refuse_cut
from mitune.denoiser.sampling import generate_all, requests_of
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import FAILURES, MALFORMED, ImageMetric, judge
from mitune.information import Trace
from mitune.information.contrast import ASKED, LOG_SNR_RANGE, Evidence
from mitune.pool.evidence import DRAWS, gather
from mitune.prompts.rivals import KINDS, Rivals, rivals_of
from mitune.run.locks import sole_worker
from mitune.run.records import Records
from mitune.run.stages import Step
from mitune.run.store import claim, write_table
from mitune.run.stores.folder import Folder
from mitune.worlds.base import Listed, world_of_prompt

_KINDS = (ASKED, *KINDS)  # in records by their place


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """What the study makes of each prompt."""

    candidates: int = 50  # M
    draws: int = DRAWS  # noise levels of the evidence
    seed: int = 0
    batch_size: int = 100

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise MituneError(f"candidates = {self.candidates} leaves nothing to select; take at least 2.")


# --- Making the records ------------------------------------------------------------------------------------------


def run_study(
    models: Sequence[ModelConfig],
    prompts: Sequence[Listed],
    folder: Path,
    config: SelectConfig,
    *,
    progress: Step | None = None,
) -> Path:
    """Fills `folder` with records for each of the models, given with their guidance scales; returns the table.

    The table has one row a candidate: where it is from, the judge's verdict, "score.<name>" and "calls.<name>" (extra
    denoiser calls a candidate) of every score. Raises MituneError as `study_records` does.
    """
    tables = [score_table(*record) for record in study_records(models, prompts, folder, config, progress=progress)]
    target = folder / "candidates.parquet"
    write_table(target, pa.concat_tables(tables))
    return target


def study_records(
    models: Sequence[ModelConfig],
    prompts: Sequence[Listed],
    folder: Path,
    config: SelectConfig,
    *,
    kinds: Sequence[str] = KINDS,
    progress: Step | None = None,
) -> Iterator[tuple[pa.Table, dict[str, Tensor], dict[str, Any]]]:
    """Each prompt's record for each model, made where `folder` has none, and where it is from.

    Rivals are of these kinds. Raises MituneError for a prompt that no world judges or that a model's call would cut,
    and for a folder of other settings or of another process.
    """
    texts = [listed.text for listed in prompts]
    metrics = {text: judge_of(text) for text in texts}
    known = {text: rivals_of(text, texts, seed=config.seed) for text in texts}
    rivals = {text: {kind: known[text][kind] for kind in kinds} for text in texts}
    total = len(models) * len(prompts)
    with sole_worker(folder):
        for index, settings in enumerate(models):
            model = load_model(settings)
            refuse_cut(model.pipe, texts, model.call)
            scale = model.guidance_scale
            part = folder / f"{Path(settings.name).name}-{scale:g}"
            inputs = {"prompts": texts, "rivals": rivals, "log_snr": LOG_SNR_RANGE}
            claim(part, {"model": model_identity(settings)} | inputs | settings_that_matter(config), "study")
            records = Records(Folder(part / "records"))
            for number, listed in enumerate(prompts):
                record = records.read(number)
                if record is None:
                    records.write(
                        number, *_record(model, listed.text, rivals[listed.text], metrics[listed.text], config)
                    )
                    record = records.read(number)
                if record is not None:
                    where = {"model": settings.name, "guidance_scale": scale, "calls.making": 2.0 * model.steps}
                    where |= {"prompt_index": number, "category": listed.category, "split": listed.split}
                    yield *record, where
                if progress:
                    progress(index * len(prompts) + number + 1, total)


def judge_of(prompt: str) -> ImageMetric:
    """The judge of the world that a prompt is one of. Raises MituneError where it is of none."""
    world = world_of_prompt(prompt)
    if world is None:
        raise MituneError(f"{prompt!r} is a prompt of no known world, so nothing judges it; study shapes:heldout.")
    return world.metric


def _record(
    model: Model, prompt: str, rivals: Rivals, metric: ImageMetric, config: SelectConfig
) -> tuple[pa.Table, dict[str, Tensor]]:
    """Makes, judges and questions the candidates of a prompt."""
    requests = requests_of([prompt], config.candidates, config.seed)
    batches = [batch for _, batch in generate_all(model, requests, min(config.batch_size, config.candidates))]
    latents = torch.cat([batch.latents for batch in batches]).nan_to_num()
    terms: dict[str, list[Any]] = {}
    for batch in batches:
        for name, values in batch.trace.to_columns().items():
            terms.setdefault(name, []).extend(values)
    judgments = judge(metric, list(decode(model, latents)), [prompt] * config.candidates)
    evidence = gather(
        model, latents, prompt, rivals, draws=config.draws, seed=config.seed, batch_size=config.batch_size
    )
    columns: dict[str, list[Any]] = {
        "prompt": [prompt] * config.candidates,
        "candidate": list(range(config.candidates)),
        "seed": [request.seed for request in requests],
        "exact": [judgment.exact for judgment in judgments],
        "graded": [judgment.graded for judgment in judgments],
        "malformed": [judgment.malformed for judgment in judgments],
        **{name: [name in judgment.failures for judgment in judgments] for name in FAILURES if name != MALFORMED},
    }
    tensors = {"errors": evidence.errors, "distances": evidence.distances, "log_snr": evidence.log_snr}
    tensors["kinds"] = torch.tensor([_KINDS.index(kind) for kind in evidence.kinds])
    return pa.table(columns | terms), tensors


# --- The scores of a record --------------------------------------------------------------------------------------


def score_table(record: pa.Table, tensors: Mapping[str, Tensor], where: Mapping[str, Any]) -> pa.Table:
    """A record's rows with every score and its cost, and `where` in each row; without the terms of the trajectory."""
    trace = Trace.from_columns({name: record[name].to_pylist() for name in record.column_names})
    evidence = evidence_of(tensors, trace.dimensions)
    free = {name: score(trace) for name, score in FREE.items()}
    values = {name: (0.0, score) for name, score in free.items()}
    values |= {name: (float(c.needs(evidence).calls), c(evidence)) for name, c in CONTRASTS.items()}
    values |= {c.name: (c.calls(evidence), c(free, evidence)) for c in COMBINATIONS.values()}
    columns = {name: [value] * len(record) for name, value in where.items()}
    columns |= {name: record[name] for name in record.column_names if name not in Trace.__dataclass_fields__}
    for name, (calls, score) in values.items():
        columns[f"score.{name}"] = score.double().tolist()
        columns[f"calls.{name}"] = [calls] * len(record)
    return pa.table(columns)


def evidence_of(tensors: Mapping[str, Tensor], dimensions: int) -> Evidence:
    """The evidence in a record."""
    log_snr = tensors["log_snr"]
    return Evidence(
        kinds=tuple(_KINDS[index] for index in tensors["kinds"].tolist()),
        log_snr=log_snr,
        step=(LOG_SNR_RANGE[1] - LOG_SNR_RANGE[0]) / len(log_snr),
        errors=tensors["errors"],
        distances=tensors["distances"],
        dimensions=dimensions,
    )


def some_of_each(prompts: Sequence[Listed], count: int) -> list[Listed]:
    """`count` prompts of each category, as many of each split as there can be."""
    sample: list[Listed] = []
    for category in dict.fromkeys(p.category for p in prompts):
        of_category = [p for p in prompts if p.category == category]
        splits = [[p for p in of_category if p.split == split] for split in dict.fromkeys(p.split for p in of_category)]
        turns = [each[i] for i in range(max(map(len, splits))) for each in splits if i < len(each)]
        sample += sorted(turns[:count], key=of_category.index)
    return sample
