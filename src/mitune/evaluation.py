"""Base against tuned on held-out prompts: the same prompts, the same seeds, judged image by image."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mitune.config import Config
from mitune.errors import MituneError
from mitune.generate import Request, candidate_seed, generate_all
from mitune.identity import model_identity, settings_that_matter
from mitune.information import SCORES
from mitune.locks import sole_worker
from mitune.metrics.judgment import Judgment, Metric
from mitune.models import Model, adapter_checksum, guidance_name, load_model, nothing_but_nan
from mitune.pictures import decode
from mitune.seals import is_whole, write_seal
from mitune.shapes.prompts import Listed
from mitune.store import claim, write_image, write_table

log = logging.getLogger(__name__)
BROKEN = Judgment(graded=0.0, exact=False, malformed=True, missed=(), drawn="")  # what came out as NaN
SHOWN_PROMPTS = 1  # of each category and split, whose pictures the report shows
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the models that are compared: its name in the tables, its adapter, its guidance scale."""

    name: str
    adapter: Path | None = None
    guidance_scale: float | None = None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.-]+", "-", self.name.lower()).strip("-")


def evaluate(
    config: Config,
    prompts: Sequence[Listed],
    variants: Iterable[Variant],
    folder: Path,
    metric: Metric,
    *,
    stages: Callable[[Variant], AbstractContextManager[Progress]] = lambda _: nullcontext(lambda _done, _total: None),
) -> Path:
    """Judges `config.eval.images` images a prompt of every variant; returns the table, one row an image.

    A variant that is in the folder already, judged with the same adapter, is not judged again, unless a file of it is
    missing or damaged. Raises MituneError for a folder of other settings or of another process, and for a model that
    makes nothing but NaN.
    """
    settings = {
        "model": model_identity(config.model),
        "eval": settings_that_matter(config.eval),
        "prompts": [listed.text for listed in prompts],
    }
    with sole_worker(folder):
        claim(folder, settings, "verdict")
        tables = [_variant_table(config, prompts, variant, folder, metric, stages) for variant in variants]
        if not tables:
            raise MituneError("There is nothing to evaluate; name at least one variant.")
        target = folder / "images.parquet"
        write_table(target, pa.concat_tables(tables))
    return target


def _variant_table(
    config: Config,
    prompts: Sequence[Listed],
    variant: Variant,
    folder: Path,
    metric: Metric,
    stages: Callable[[Variant], AbstractContextManager[Progress]],
) -> pa.Table:
    """The rows of a variant: those that are there, whole and of this variant, or else new ones."""
    name, seal = f"variants/{variant.slug}.parquet", f"variants/{variant.slug}.json"
    facts = {"adapter": adapter_checksum(variant.adapter), "guidance_scale": variant.guidance_scale}
    if not is_whole(folder, facts, seal):
        if (folder / name).exists():
            log.warning("%s is judged again: in %s files are damaged, or its adapter is another.", variant.name, folder)
        model = load_model(config.model, adapter=variant.adapter)
        if variant.guidance_scale is not None:
            model = replace(model, call=model.call | {guidance_name(type(model.pipe)): variant.guidance_scale})
        with stages(variant) as progress:
            table = _judge_variant(config, model, variant, prompts, folder, metric, progress)
        write_table(folder / name, table)
        write_seal(folder, [name, *filter(None, table["picture"].to_pylist())], seal=seal, **facts)
    return pq.read_table(folder / name)


def _judge_variant(
    config: Config,
    model: Model,
    variant: Variant,
    prompts: Sequence[Listed],
    folder: Path,
    metric: Metric,
    progress: Progress,
) -> pa.Table:
    shown: dict[tuple[str, str], list[str]] = {}
    for listed in prompts:
        texts = shown.setdefault((listed.category, listed.split), [])
        if len(texts) < SHOWN_PROMPTS:
            texts.append(listed.text)
    wanted = [(i, listed, j) for i, listed in enumerate(prompts) for j in range(config.eval.images)]
    requests = [
        Request(prompt=listed.text, seed=candidate_seed(config.eval.seed, listed.text, j)) for _, listed, j in wanted
    ]
    rows: list[dict[str, Any]] = []
    broken = 0
    for chunk, batch in generate_all(model, requests, config.eval.batch_size):
        finite = torch.isfinite(batch.latents).flatten(1).all(dim=1).tolist()
        broken += finite.count(False)
        images = list(decode(model, batch.latents.nan_to_num()))
        judgments = metric(images, [request.prompt for request in chunk])
        judgments = [judgment if ok else BROKEN for judgment, ok in zip(judgments, finite, strict=True)]
        information = SCORES["mi-tune"].values(batch.trace).tolist()
        for request, image, judgment, nats in zip(chunk, images, judgments, information, strict=True):
            index, listed, j = wanted[len(rows)]
            picture = ""
            if listed.text in shown[listed.category, listed.split]:
                picture = f"pictures/{variant.slug}/{index:05d}-{j}.png"
                write_image(folder / picture, image)
            rows.append(
                {
                    "variant": variant.name,
                    "prompt": listed.text,
                    "category": listed.category,
                    "split": listed.split,
                    "image": j,
                    "seed": request.seed,
                    "exact": judgment.exact,
                    "graded": judgment.graded,
                    "malformed": judgment.malformed,
                    "missed": "; ".join(judgment.missed),
                    "drawn": judgment.drawn,
                    "information": nats,  # ½ ∫ ‖Δε‖² dλ along the trajectory: how much the prompt changes
                    "picture": picture,
                }
            )
        progress(len(rows), len(requests))
    if broken == len(rows):
        raise nothing_but_nan(model, f"Every image of {len(prompts)} prompts")
    if broken:
        log.warning("%s: %d of %d images came out as NaN and count as wrong.", variant.name, broken, len(rows))
    return pa.Table.from_pylist(rows)
