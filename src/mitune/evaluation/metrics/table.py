"""The metrics that have a name, and which of them judges a run."""

from __future__ import annotations

from collections.abc import Sequence

from mitune.evaluation.metrics.base import ChoosyMetric, ImageMetric
from mitune.resolver import Row, Table
from mitune.worlds.base import WORLDS, within, world_of_model

METRICS: Table[ImageMetric] = Table(
    "metric",
    ImageMetric,
    {name: Row(f"the judge of the world: {row.summary}", f"{row.target}.metric") for name, row in WORLDS.rows.items()},
    may_fit=(ChoosyMetric,),
)


def metric_for(name: str | None, *, source: str, model: str, prompts: Sequence[str]) -> ImageMetric | None:
    """The metric called `name`; without a name that of the world that the prompts' `source` names, else the model's.

    None if there is none of these. Raises MituneError for an unknown name, and for prompts that it cannot judge by.
    """
    if name is not None:
        metric = METRICS.resolve(name)
    else:
        named = within(source)
        world = named[0] if named is not None else world_of_model(model)
        if world is None:
            return None
        metric = METRICS.fitting(f"of {source if named is not None else model}", world.metric)
    if isinstance(metric, ChoosyMetric):
        metric.check(prompts)
    return metric


def metric_claim(metric: ImageMetric | None) -> dict[str, str]:
    """What a folder of results is tied to: a metric's name, but for the judge of a world in the table, which goes with
    its prompts."""
    return {} if metric is None or metric.name in WORLDS.rows else {"metric": metric.name}
