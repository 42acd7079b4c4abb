"""Base against tuned on held-out prompts: the same prompts, the same seeds, judged image by image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mitune.config import Config
from mitune.errors import MituneError
from mitune.generate import Request, candidate_seed, decode, generate_all
from mitune.information import SCORES
from mitune.metrics.judgment import Metric
from mitune.models import Model, load_model
from mitune.shapes.prompts import Listed
from mitune.store import claim, write_image, write_table

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

    A variant that is in the folder already is not made again.
    """
    judged = asdict(config.eval)
    del judged["guidance_scales"]  # more of them may be added to a verdict later
    claim(folder, {"model": asdict(config.model), "eval": judged, "prompts": [p.text for p in prompts]}, "verdict")
    tables = []
    for variant in variants:
        file = folder / "variants" / f"{variant.slug}.parquet"
        if not file.exists():
            model = load_model(config.model, adapter=variant.adapter)
            if variant.guidance_scale is not None:
                model = replace(model, call=model.call | {"guidance_scale": variant.guidance_scale})
            with stages(variant) as progress:
                write_table(file, _judge_variant(config, model, variant, prompts, folder, metric, progress))
        tables.append(pq.read_table(file))
    if not tables:
        raise MituneError("There is nothing to evaluate; name at least one variant.")
    target = folder / "images.parquet"
    write_table(target, pa.concat_tables(tables))
    return target


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
    for chunk, batch in generate_all(model, requests, config.eval.batch_size):
        images = list(decode(model, batch.latents.nan_to_num()))
        judgments = metric(images, [request.prompt for request in chunk])
        information = SCORES["mi-tune"](batch.trace).tolist()
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
    return pa.Table.from_pylist(rows)
