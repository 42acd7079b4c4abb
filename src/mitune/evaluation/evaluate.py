"""Base against tuned on held-out prompts: the same prompts, the same seeds, judged image by image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mitune.config.schema import Config
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, adapter_checksum, guidance_name, load_model, nothing_but_nan
from mitune.denoiser.pictures import decode
from mitune.denoiser.sampling import Request, candidate_seed, generate_all
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ImageMetric, judge, merit
from mitune.evaluation.metrics.table import metric_claim
from mitune.evaluation.variant import Variant
from mitune.information import SCORES
from mitune.run.locks import sole_worker
from mitune.run.seals import is_whole, write_seal
from mitune.run.store import claim, write_image, write_table
from mitune.worlds.base import Listed

log = logging.getLogger(__name__)
SHOWN_PROMPTS = 1  # of each category and split, whose pictures the report shows
Progress = Callable[[int, int], None]


def evaluate(
    config: Config,
    prompts: Sequence[Listed],
    variants: Iterable[Variant],
    folder: Path,
    metric: ImageMetric,
    *,
    stages: Callable[[Variant], AbstractContextManager[Progress]] = lambda _: nullcontext(lambda _done, _total: None),
) -> Path:
    """Judges `config.eval.images` images a prompt of every variant; returns the table, one row an image.

    A variant that is in the folder already, judged with the same adapter, is not judged again, unless a file of it is
    missing or damaged. Raises MituneError for a folder of other settings or of another process, for a model that makes
    nothing but NaN, and for a metric without bounds.
    """
    if metric.bounds is None:
        raise MituneError(
            f"The metric {metric.name} has no bounds, and a verdict is on a scale of its worst to its best; let "
            "its bounds be the least and the greatest value that it gives."
        )
    settings = {
        "model": model_identity(config.model),
        "eval": settings_that_matter(config.eval),
        "prompts": [listed.text for listed in prompts],
    } | metric_claim(metric)
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
    metric: ImageMetric,
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
    metric: ImageMetric,
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
        judgments = judge(metric, images, [request.prompt for request in chunk])
        information = SCORES["mi-tune"].values(batch.trace).tolist()
        for request, image, judgment, ok, nats in zip(chunk, images, judgments, finite, information, strict=True):
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
                    "exact": judgment.exact if ok or judgment.exact is None else False,
                    "graded": merit(metric, judgment) if ok else 0.0,  # from 0, the worst, to 1
                    "malformed": judgment.malformed or not ok,
                    "missed": "; ".join(judgment.missed) if ok else "",
                    "drawn": judgment.drawn if ok else "",
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
