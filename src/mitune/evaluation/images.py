"""The images that are judged: of every variant the same prompts and the same seeds.

The images of a prompt are one record, made by an executor as those of a pool are, in images/VARIANT-CHECKSUM/: its
table has a row an image, its tensors are their latents, which take less room than pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from mitune.config.schema import Config
from mitune.denoiser.opening.adapter_file import adapter_checksum
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, guidance_name, load_model
from mitune.denoiser.pictures import check_pictures
from mitune.denoiser.reading import refuse_cut
from mitune.errors import MituneError
from mitune.evaluation.variant import Variant
from mitune.information import SCORES
from mitune.pool.sampled import prompts_together, sample
from mitune.run.executors.base import Executor
from mitune.run.locks import one_of_many, waiting
from mitune.run.making import make_records
from mitune.run.records import Records
from mitune.run.stages import Stages, silent
from mitune.run.store import claim
from mitune.run.stores.base import Store
from mitune.run.stores.folder import Folder


def make_images(
    config: Config,
    prompts: Sequence[str],
    variants: Sequence[Variant],
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    executor: Executor | None = None,
    store: Callable[[Path], Store] = Folder,
    stages: Stages = silent,
) -> bool:
    """Makes `config.eval.images` images a prompt of every variant; returns whether all are there.

    `shard`, `executor`, `store`: as in `build_pool`; a variant's images are made again once its adapter is another.
    Raises MituneError for prompts that the model's call would cut, and for a folder of other settings or of another
    process.
    """
    if not variants:
        raise MituneError("There is nothing to evaluate; name at least one variant.")
    settings = {
        "model": model_identity(config.model),
        "eval": settings_that_matter(config.eval),
        "prompts": list(prompts),
    }
    with one_of_many(folder, shard):
        with waiting(folder):
            claim(folder, settings, "verdict")
        for variant in variants:
            records = image_records(folder, variant, store)
            with stages(f"Making images of {variant.name}") as progress:
                maker = ImageMaker(config, prompts, variant)
                make_records(maker, records, len(prompts), shard=shard, executor=executor, progress=progress)
    numbers = [image_records(folder, variant, store).numbers() for variant in variants]
    return all(there.issuperset(range(len(prompts))) for there in numbers)


def image_records(folder: Path, variant: Variant, store: Callable[[Path], Store]) -> Records:
    """Where the images of a variant lie: a place of their own, whatever other adapter had its name before."""
    return Records(store(folder / "images" / folder_name(variant)))


def folder_name(variant: Variant) -> str:
    """VARIANT-CHECKSUM, of what its images depend on."""
    checksum = hashlib.sha256(json.dumps(made_by(variant), sort_keys=True).encode()).hexdigest()
    return f"{variant.slug}-{checksum[:8]}"


def made_by(variant: Variant) -> dict[str, Any]:
    """What the images of a variant depend on, beside what those of all do."""
    return {"adapter": adapter_checksum(variant.adapter), "guidance_scale": variant.guidance_scale}


class ImageMaker:
    """Makes the records of a variant (`run/making.py`); the model is opened for the first that is missing."""

    def __init__(self, config: Config, prompts: Sequence[str], variant: Variant) -> None:
        self.config, self.prompts, self.variant = config, prompts, variant
        self.images = config.eval.images
        self._batch_size = config.eval.batch_size  # which out of memory may halve

    @property
    def together(self) -> int:
        """How many prompts fill the denoiser's batches."""
        return prompts_together(self.images, self._batch_size)

    @cached_property
    def _model(self) -> Model:
        model = load_model(self.config.model, adapter=self.variant.adapter)
        refuse_cut(model.pipe, self.prompts, model.call)
        check_pictures(model)  # now rather than when all images are there to be judged
        if self.variant.guidance_scale is None:
            return model
        return replace(model, call=model.call | {guidance_name(type(model.pipe)): self.variant.guidance_scale})

    def records(
        self, items: Sequence[int], on_images: Callable[[int], None]
    ) -> Iterator[tuple[int, pa.Table, dict[str, Tensor]]]:
        """The records of these prompts, in order."""
        samples = sample(
            self._model,
            [self.prompts[index] for index in items],
            count=self.images,
            seed=self.config.eval.seed,
            batch_size=self._batch_size,
            on_images=on_images,
        )
        for images, index in zip(samples, items, strict=True):  # which asks for one more before it ends
            self._batch_size = images.batch_size
            columns = {
                "image": list(range(self.images)),
                "seed": images.seeds,
                # ½ ∫ ‖Δε‖² dλ along the trajectory: how much the prompt changes
                "information": SCORES["mi-tune"].values(images.trace).tolist(),
            }
            yield index, pa.table(columns), {"latents": images.latents}
