"""The verdict on images that lie in a folder: a table with one row an image. No image is made for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from torch import Tensor

from mitune.config.schema import Config
from mitune.denoiser.opening.models import Model, load_model, nothing_but_nan
from mitune.denoiser.pictures import decode
from mitune.errors import MituneError
from mitune.evaluation.images import image_records, made_by
from mitune.evaluation.metrics.base import ImageMetric, Judgment, judge, merit
from mitune.evaluation.metrics.table import metric_claim
from mitune.evaluation.variant import Variant
from mitune.run.locks import waiting
from mitune.run.records import Records
from mitune.run.seals import is_whole, write_seal
from mitune.run.stages import Stages, Step, silent
from mitune.run.store import write_image, write_table
from mitune.run.stores.base import Store
from mitune.run.stores.folder import Folder
from mitune.worlds.base import Listed

log = logging.getLogger(__name__)
SHOWN_PROMPTS = 1  # of each category and split, whose pictures the report shows


def judge_images(
    config: Config,
    prompts: Sequence[Listed],
    variants: Sequence[Variant],
    folder: Path,
    metric: ImageMetric,
    *,
    store: Callable[[Path], Store] = Folder,
    stages: Stages = silent,
) -> Path:
    """Judges the images that `make_images` has left in `folder`; returns the table, one row an image.

    A variant whose images this metric has judged already is not judged again, unless a file of its verdict is missing
    or damaged. Raises MituneError for a metric without bounds, for a variant without a single image that is a number,
    and where images are missing.
    """
    require_bounds(metric)
    judging = _Judging(config, prompts, folder, metric)
    with waiting(folder):
        tables = [judging.table(variant, image_records(folder, variant, store), stages) for variant in variants]
        target = folder / "images.parquet"
        write_table(target, pa.concat_tables(tables))
    return target


def require_bounds(metric: ImageMetric) -> None:
    """Raises MituneError for a metric that a verdict cannot be made by."""
    if metric.bounds is None:
        raise MituneError(
            f"The metric {metric.name} has no bounds, and a verdict is on a scale of its worst to its best; let "
            "its bounds be the least and the greatest value that it gives."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """An image, as its record has it."""

    prompt: int
    image: int
    seed: int
    information: float
    latents: Tensor  # (C, H, W)


@dataclass(frozen=True)
class _Judging:
    """What is the same for all variants; the model, which turns latents into pictures, is opened if one needs it."""

    config: Config
    prompts: Sequence[Listed]
    folder: Path
    metric: ImageMetric

    @cached_property
    def _model(self) -> Model:
        return load_model(self.config.model)

    @cached_property
    def _pictured(self) -> set[int]:
        """The prompts whose pictures are kept."""
        pictured: dict[tuple[str, str], list[str]] = {}
        for listed in self.prompts:
            texts = pictured.setdefault((listed.category, listed.split), [])
            if len(texts) < SHOWN_PROMPTS:
                texts.append(listed.text)
        return {i for i, one in enumerate(self.prompts) if one.text in pictured[one.category, one.split]}

    def table(self, variant: Variant, records: Records, stages: Stages) -> pa.Table:
        """The rows of a variant: those that are there, whole and of these images and this metric, or else new ones."""
        if missing := set(range(len(self.prompts))) - records.numbers():
            raise self._without_images(variant, min(missing))
        name, seal = f"variants/{variant.slug}.parquet", f"variants/{variant.slug}.json"
        facts = made_by(variant) | {"images": records.checksum(len(self.prompts))} | metric_claim(self.metric)
        if not is_whole(self.folder, facts, seal):
            if (self.folder / name).exists():
                log.warning(
                    "%s is judged again: in %s files are damaged, or its adapter, its images or the metric are others.",
                    variant.name,
                    self.folder,
                )
            with stages(f"Judging {variant.name}") as progress:
                table = pa.Table.from_pylist(self._rows(variant, records, progress))
            write_table(self.folder / name, table)
            write_seal(self.folder, [name, *filter(None, table["picture"].to_pylist())], seal=seal, **facts)
        return pq.read_table(self.folder / name)

    def _rows(self, variant: Variant, records: Records, progress: Step) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        broken, total = 0, len(self.prompts) * self.config.eval.images
        images = self._images(variant, records)
        while chunk := list(islice(images, self.config.eval.batch_size)):
            latents = torch.stack([one.latents for one in chunk])
            finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
            pictures = list(decode(self._model, latents.nan_to_num()))
            judgments = judge(self.metric, pictures, [self.prompts[one.prompt].text for one in chunk])
            for one, picture, judgment, ok in zip(chunk, pictures, judgments, finite, strict=True):
                rows.append(self._row(variant, one, judgment, ok) | {"picture": self._kept(variant, one, picture)})
            broken += finite.count(False)
            progress(len(rows), total)
        if broken == len(rows):
            raise nothing_but_nan(self._model, f"Every image of {len(self.prompts)} prompts")
        if broken:
            log.warning("%s: %d of %d images came out as NaN and count as wrong.", variant.name, broken, len(rows))
        return rows

    def _images(self, variant: Variant, records: Records) -> Iterator[_Made]:
        for prompt in range(len(self.prompts)):
            record = records.read(prompt)
            if record is None:
                raise self._without_images(variant, prompt)
            table, tensors = record
            for row, latents in zip(table.to_pylist(), tensors["latents"], strict=True):
                yield _Made(prompt=prompt, latents=latents, **row)

    def _row(self, variant: Variant, one: _Made, judgment: Judgment, ok: bool) -> dict[str, Any]:
        """One row of the verdict; `ok`: whether the latents are numbers."""
        listed = self.prompts[one.prompt]
        return {
            "variant": variant.name,
            "prompt": listed.text,
            "category": listed.category,
            "split": listed.split,
            "image": one.image,
            "seed": one.seed,
            "exact": judgment.exact if ok or judgment.exact is None else False,
            "graded": merit(self.metric, judgment) if ok else 0.0,  # from 0, the worst, to 1
            "malformed": judgment.malformed or not ok,
            "missed": "; ".join(judgment.missed) if ok else "",
            "drawn": judgment.drawn if ok else "",
            "information": one.information,
        }

    def _kept(self, variant: Variant, one: _Made, picture: Image) -> str:
        """The place of a picture that the report shows; empty for others."""
        if one.prompt not in self._pictured:
            return ""
        name = f"pictures/{variant.slug}/{one.prompt:05d}-{one.image}.png"
        write_image(self.folder / name, picture)
        return name

    def _without_images(self, variant: Variant, prompt: int) -> MituneError:
        return MituneError(
            f"{self.folder} has no images of {variant.name} for {self.prompts[prompt].text!r}; make them first, by the "
            "command that made the others."
        )
