"""Base against tuned on held-out prompts: the same prompts, the same seeds, judged image by image.

Images are made (`images.py`) and judged (`judging.py`) in two steps with files between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mitune.config.schema import Config
from mitune.evaluation.images import make_images
from mitune.evaluation.judging import judge_images, require_bounds
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.variant import Variant
from mitune.run.executors.base import Executor
from mitune.run.stages import Stages, silent
from mitune.run.stores.base import Store
from mitune.run.stores.folder import Folder
from mitune.worlds.base import Listed


def evaluate(
    config: Config,
    prompts: Sequence[Listed],
    variants: Iterable[Variant],
    folder: Path,
    metric: ImageMetric,
    *,
    shard: tuple[int, int] = (0, 1),
    executor: Executor | None = None,
    store: Callable[[Path], Store] = Folder,
    stages: Stages = silent,
) -> Path | None:
    """Judges `config.eval.images` images a prompt of every variant; returns the table, one row an image.

    The same call goes on where it was stopped, prompt by prompt; with another metric it judges the same images.
    `shard`, `executor`, `store`: as in `build_pool`; None is returned while images of other shards are missing. Raises
    MituneError for prompts that the model's call would cut, for a folder of other settings or of another process, for
    a model that makes nothing but NaN, and for a metric without bounds.
    """
    require_bounds(metric)
    variants = list(variants)
    texts = [listed.text for listed in prompts]
    complete = make_images(config, texts, variants, folder, shard=shard, executor=executor, store=store, stages=stages)
    if not complete:
        return None
    return judge_images(config, prompts, variants, folder, metric, store=store, stages=stages)
