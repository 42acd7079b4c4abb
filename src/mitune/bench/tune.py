"""What does fine-tuning on each score's picks gain? Algorithm 1 for every model and seed, judged on held-out prompts.

Each (model, seed) is a run folder of its own: its pool serves all selections, each of which becomes an adapter. Base
and adapters are judged at every guidance scale, with the same prompts and seeds. A killed study goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mitune.config.schema import Config
from mitune.denoiser.opening.models import load_model
from mitune.errors import MituneError
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.metrics.table import metric_for
from mitune.evaluation.statistics import (
    POOLED,
    Interval,
    bootstrap,
    bootstrap_ratio,
    flags,
    markdown_table,
    numbers,
    summarize,
)
from mitune.evaluation.variant import BASE, Variant
from mitune.pool.selection import ORACLE
from mitune.prompts.lists import load_prompts
from mitune.report.files import pool_of
from mitune.run.store import write_table
from mitune.run.work import Stages, Step, silent
from mitune.tuning import tune

HEADER = """# What fine-tuning gains

Made by `{command}`.

Each model makes a pool of candidates for its training prompts. From it a set is selected by each score, at random, and
by the exact judge (*oracle*: what a perfect score would pick); an adapter is fine-tuned on each set and judged on
held-out prompts, half of them with combinations that no training prompt has, with the prompts and seeds of the base.
*2 rounds*: that adapter made candidates in turn, and was fine-tuned further on the picks among them.

*picks right*: share of the images that the adapter was fine-tuned on that are exactly right; for the base, of all
candidates. *exact*: the same share of images of held-out prompts, each with the same weight. *− base*: at the
same guidance scale; *− base at its best*: over the base at that one of the scales shown where it is right most often.
Intervals are 95 % bootstrap intervals over prompts, paired; bold ones hold no zero. *by seed*: each with a pool, an
adapter and images of its own. *‖Δε‖*: how far the prompt moves the denoiser's output along the trajectory. *distinct
scenes*: among the images that a model makes of one prompt, by number.

"""
PICKS = """
## What was picked

How far each selection goes on the way from a random choice (0) to the judge's own (1), over the training prompts; below
0 it picks worse than chance. The interval is 95 %, prompts resampled.

"""


def run_study(
    configs: Sequence[Config],
    folder: Path,
    *,
    seeds: int,
    guidance_scales: Sequence[float] = (),
    stages: Stages = silent,
) -> Path:
    """Runs each of `configs` with `seeds` seeds and returns the table of all judged images, one row an image.

    All are judged at the guidance scale that they were made at and at `guidance_scales`. Raises MituneError for a
    model without a judge, or settings without held-out prompts.
    """
    tables = []
    for config in configs:
        if config.eval_prompts is None:
            raise MituneError("A study of fine-tuning needs eval_prompts to judge by, e.g. shapes:heldout.")
        base, name = load_model(config.model), Path(config.model.name).name
        prompts = load_prompts(config.eval_prompts, base, config.prompt_field)
        texts = [listed.text for listed in prompts]
        metric = metric_for(config.metric, source=config.eval_prompts, model=config.model.name, prompts=texts)
        if metric is None:
            raise MituneError(
                f"Neither {config.model.name} nor {config.eval_prompts} comes with a judge; study an embedded model."
            )
        for seed in range(seeds):
            run, seeded = folder / f"{name}-{seed}", _with_seed(config, seed)
            slugs = tune(replace(seeded, eval_prompts=None), run, stages=stages).adapters
            adapters = [_Tuned(run, number, slug) for number in range(1, config.rounds + 1) for slug in slugs]
            picked = _picked_right(adapters)
            variants = [Variant(name=BASE), *(Variant(name=own.variant, adapter=own.adapter) for own in adapters)]
            for scale in dict.fromkeys([base.guidance_scale, *guidance_scales]):
                at_scale = replace(seeded, model=replace(config.model, guidance_scale=scale))
                shown = partial(_at_guidance, stages, scale)
                file = evaluate(at_scale, prompts, variants, run / f"eval-{scale:g}", metric, stages=shown)
                table = pq.read_table(file)
                for column, value in {"model": name, "guidance_scale": scale, "tuning_seed": seed}.items():
                    table = table.append_column(column, [[value] * len(table)])
                shares = [picked[variant] for variant in table["variant"].to_pylist()]
                tables.append(table.append_column("picked_right", [shares]))
    target = folder / "images.parquet"
    write_table(target, pa.concat_tables(tables))
    return target


def _with_seed(config: Config, seed: int) -> Config:
    """The settings with other candidates, another adapter and other images to judge."""
    return replace(
        config,
        pool=replace(config.pool, seed=config.pool.seed + seed),
        finetune=replace(config.finetune, seed=config.finetune.seed + seed),
        eval=replace(config.eval, seed=config.eval.seed + seed),
    )


@dataclass(frozen=True, slots=True)
class _Tuned:
    """What a selection came to after a round."""

    run: Path
    number: int
    selection: str

    @property
    def variant(self) -> str:
        return self.selection if self.number == 1 else f"{self.selection}, {self.number} rounds"

    @property
    def _round(self) -> Path:
        return self.run / f"round-{self.number}"

    @property
    def adapter(self) -> Path:
        return self._round / "adapters" / self.selection

    def candidates(self) -> pa.Table:
        """What the selection chose among, with its choice as the column `kept`, and what is `right` and well drawn."""
        file, kept = pool_of(self._round, self.selection) / "candidates.parquet", f"kept.{self.selection}"
        table = pq.read_table(file, columns=["prompt", "exact", "malformed", kept])
        right = numbers(table, "exact") * ~flags(table, "malformed")  # NaN for a candidate that came out as NaN
        return pa.table({"prompt": table["prompt"], "right": right, "kept": table[kept]})


def _picked_right(adapters: Sequence[_Tuned]) -> dict[str, float]:
    """Which share of the candidates that each selection kept is right; of all in the first pool for the base."""
    pools = {own.variant: own.candidates() for own in adapters}
    shares = {BASE: float(np.nanmean(numbers(next(iter(pools.values())), "right")))}
    return shares | {name: float(numbers(pool, "right")[flags(pool, "kept")].mean()) for name, pool in pools.items()}


def _at_guidance(stages: Stages, scale: float, title: str) -> AbstractContextManager[Step]:
    return stages(f"{title} at guidance {scale:g}")


# --- Tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One variant at one guidance scale, over all held-out prompts; differences are paired by prompt and seed."""

    model: str
    guidance_scale: float
    variant: str
    picked_right: float  # share of the images that the adapter was trained on; of all candidates for the base
    exact: Interval
    over_base: Interval  # at the same guidance scale
    over_best: Interval  # over the base at the scale that suits it best
    by_seed: tuple[float, ...]  # over_base of each tuning seed
    of_oracle: float  # over_base as a share of the oracle's; NaN where that is not clearly above zero
    malformed: float  # share of the images
    response: float  # ‖Δε‖ along the sampling trajectories, over that of the base
    distinct: float  # scenes among the images of a prompt and an adapter, over their number


def gains(rows: pa.Table) -> list[Gain]:
    """The figures of a study's table, by model, guidance scale and variant, in its order."""
    parts = _parts(rows)
    right = {key: _by(part, "prompt") for key, part in parts.items()}
    found = []
    for (model, scale, variant), part in parts.items():
        base, own = right[model, scale, BASE], right[model, scale, variant]
        best = max((right[key] for key in parts if key[0] == model and key[2] == BASE), key=np.mean)
        oracle = right.get((model, scale, ORACLE), base)
        columns = np.stack([own, own - base, own - best, oracle - base], axis=1)
        exact, over_base, over_best, top = bootstrap(columns, low=-1, high=1)
        of_base = parts[model, scale, BASE]
        information = [numbers(table, "information").mean() for table in (part, of_base)]
        found.append(
            Gain(
                model=model,
                guidance_scale=scale,
                variant=variant,
                picked_right=float(numbers(part, "picked_right").mean()),
                exact=exact,
                over_base=over_base,
                over_best=over_best,
                by_seed=tuple((_by(part, "tuning_seed") - _by(of_base, "tuning_seed")).tolist()),
                of_oracle=over_base.value / top.value if top.low > 0 else math.nan,
                malformed=float(numbers(part, "malformed").mean()),
                response=math.sqrt(information[0] / information[1]),
                distinct=_distinct(part),
            )
        )
    return found


def _parts(rows: pa.Table) -> dict[tuple[str, float, str], pa.Table]:
    """The rows of each model, guidance scale and variant, with a column of what is right: exact and well drawn."""
    rows = rows.append_column("right", pc.and_not(rows["exact"], rows["malformed"]).cast(pa.float64()))
    keys = list(zip(*(rows[name].to_pylist() for name in ("model", "guidance_scale", "variant")), strict=True))
    return {key: rows.filter(pa.array([other == key for other in keys])) for key in dict.fromkeys(keys)}


def _by(part: pa.Table, column: str) -> NDArray[np.float64]:
    """The share of right images for each value of a column, (values,), in the order of these."""
    return np.asarray(part.group_by(column).aggregate([("right", "mean")]).sort_by(column)["right_mean"])


def _distinct(part: pa.Table) -> float:
    counts = part.group_by(["prompt", "tuning_seed"]).aggregate([("drawn", "count_distinct"), ("drawn", "count")])
    return float(np.mean(np.asarray(counts["drawn_count_distinct"]) / np.asarray(counts["drawn_count"])))


def markdown(rows: pa.Table) -> str:
    """The figures as Markdown: all gains, and those at the first guidance scale by category."""
    head = "| model, guidance | variant | picks right | exact | − base | − base at its best | by seed |"
    lines = [
        f"{head} of the oracle's gain | malformed | ‖Δε‖ ÷ base's | distinct scenes |",
        f"|---|---|--:{'|---' * 4}{'|--:' * 4}|",
    ]
    for gain in gains(rows):
        by_seed = ", ".join(_figure(value, "+.3f") for value in gain.by_seed)
        share = "–" if math.isnan(gain.of_oracle) else _figure(gain.of_oracle, ".0%")
        differences = [_signed(interval) for interval in (gain.over_base, gain.over_best)]
        cells = [
            f"{gain.model}, {gain.guidance_scale:g}", gain.variant, f"{gain.picked_right:.3f}", str(gain.exact),
            *differences, by_seed, share, f"{gain.malformed:.3f}", f"{gain.response:.2f}", f"{gain.distinct:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    sections = ["\n".join(lines) + "\n"]
    for model in dict.fromkeys(rows["model"].to_pylist()):
        own = rows.filter(pc.equal(rows["model"], model))
        scale = own["guidance_scale"][0]
        comparisons = summarize(own.filter(pc.equal(own["guidance_scale"], scale)))
        shown = [c for c in comparisons if c.split == POOLED and c.metric == "exact"]
        sections.append(f"### {model}, guidance {scale.as_py():g}, by category\n\n{markdown_table(shown)}")
    return "\n".join(sections)


def picks(configs: Sequence[Config], folder: Path, *, seeds: int) -> str:
    """How much of the way from a random choice to the judge's each selection goes, by category, as Markdown."""
    lines: list[str] = []
    for config in configs:
        prompts = load_prompts(config.prompts, field=config.prompt_field)
        categories = {listed.text: listed.category for listed in prompts}
        names = [*dict.fromkeys(categories.values()), POOLED]
        if not lines:
            lines = [f"| model | picked by | {' | '.join(names)} |", f"|---|---|{'--:|' * len(names)}"]
        name = Path(config.model.name).name
        runs = [folder / f"{name}-{seed}" for seed in range(seeds)]
        columns = pq.read_schema(runs[0] / "round-1" / "pool" / "candidates.parquet").names
        slugs = [column.removeprefix("kept.") for column in columns if column.startswith("kept.")]
        for number, slug in product(range(1, config.rounds + 1), slugs):
            chosen = [_Tuned(run, number, slug) for run in runs]
            rows = pa.concat_tables(each.candidates() for each in chosen)
            right, kept = (_by_prompt(rows, column, config) for column in ("right", "kept"))
            asked = rows["prompt"].to_pylist()[:: config.pool.candidates]
            of_prompt = np.array([categories[prompt] for prompt in asked])
            drawn, right = np.nanmean(right, axis=1), np.nan_to_num(right)
            best = np.sort(right, axis=1)[:, -config.pool.keep :].mean(axis=1)
            picked = (right * kept).sum(axis=1) / kept.sum(axis=1)
            gaps = np.stack([picked - drawn, best - drawn, -drawn], axis=1)
            cells = []
            for category in names:
                some = gaps[(of_prompt == category) | (category == POOLED)]
                (closed,) = bootstrap_ratio(*(some[:, [i]] for i in range(3)))
                value, low, high = (_figure(x, ".2f") for x in (closed.value, closed.low, closed.high))
                cells.append(f"{value} [{low}, {high}]" if category == POOLED else value)
            lines.append(f"| {name} | {chosen[0].variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _by_prompt(rows: pa.Table, column: str, config: Config) -> NDArray[np.float64]:
    """A column of a pool's table, (prompts, M)."""
    return numbers(rows, column).reshape(-1, config.pool.candidates)


def _signed(interval: Interval) -> str:
    """Bold where the whole interval lies on one side of zero."""
    value, low, high = (_figure(x, "+.3f") for x in (interval.value, interval.low, interval.high))
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if interval.sign else text


def _figure(value: float, form: str) -> str:
    """With the minus sign of print."""
    return format(value, form).replace("-", "−")
