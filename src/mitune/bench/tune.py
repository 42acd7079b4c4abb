"""What does fine-tuning on each score's picks gain? Algorithm 1 for every model and seed, judged on held-out prompts.

Each (model, seed) is a run folder of its own: its pool serves all selections, each of which becomes an adapter. Base
and adapters are judged at every guidance scale, with the same prompts and seeds. A killed study goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from mitune.evaluation.comparison import POOLED, markdown_table, summarize
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.metrics.table import metric_for
from mitune.evaluation.rows import flags, numbers, right
from mitune.evaluation.statistics import Interval, bootstrap, bootstrap_ratio, share_of_gain
from mitune.evaluation.tables import DASH, interval, number, table
from mitune.evaluation.variant import BASE, Variant
from mitune.pool.selection import ORACLE
from mitune.prompts.lists import load_prompts
from mitune.report.files import pool_of
from mitune.run.stages import Stages, Step, silent
from mitune.run.store import write_table
from mitune.tuning import tune


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
            variants = [Variant(name=BASE), *(Variant(name=tuned.variant, adapter=tuned.adapter) for tuned in adapters)]
            for scale in dict.fromkeys([base.guidance_scale, *guidance_scales]):
                at_scale = replace(seeded, model=replace(config.model, guidance_scale=scale))
                titled_stages = partial(_at_guidance, stages, scale)
                file = evaluate(at_scale, prompts, variants, run / f"eval-{scale:g}", metric, stages=titled_stages)
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
        """What the selection chose among: its choice as the column `kept`, and what is `right` (NaN where unknown)."""
        file, kept = pool_of(self._round, self.selection) / "candidates.parquet", f"kept.{self.selection}"
        table = pq.read_table(file, columns=["prompt", "exact", "malformed", kept])
        return pa.table({"prompt": table["prompt"], "right": right(table), "kept": table[kept]})


def _picked_right(adapters: Sequence[_Tuned]) -> dict[str, float]:
    """Which share of the candidates that each selection kept is right; of all in the first pool for the base."""
    pools = {tuned.variant: tuned.candidates() for tuned in adapters}
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
    over_base: Interval | None  # at the same guidance scale; None for the base itself
    over_best: Interval | None  # over the base at the scale that suits it best; None for that base
    by_seed: tuple[float, ...]  # over_base of each tuning seed
    of_oracle: float  # over_base as a share of the oracle's; NaN where either is no gain
    malformed: float  # share of the images
    response: float  # ‖Δε‖ along the sampling trajectories, over that of the base
    distinct: float  # scenes among the images of a prompt and an adapter, over their number


def gains(rows: pa.Table) -> list[Gain]:
    """The figures of a study's table, by model, guidance scale and variant, in its order."""
    parts = _parts(rows)
    of_prompts = {key: _by(part, "prompt") for key, part in parts.items()}
    listed = []
    for (model, scale, variant), part in parts.items():
        exact, base = of_prompts[model, scale, variant], of_prompts[model, scale, BASE]
        bases = {key: share for key, share in of_prompts.items() if key[0] == model and key[2] == BASE}
        best = max(bases, key=lambda key: np.mean(bases[key]))
        oracle = of_prompts.get((model, scale, ORACLE), base)
        columns = np.stack([exact, exact - base, exact - bases[best]], axis=1)
        level, over_base, over_best = bootstrap(columns, low=-1, high=1)
        is_base, gained = variant == BASE, over_base.value > 0
        of_base = parts[model, scale, BASE]
        information = [numbers(table, "information").mean() for table in (part, of_base)]
        listed.append(
            Gain(
                model=model,
                guidance_scale=scale,
                variant=variant,
                picked_right=float(numbers(part, "picked_right").mean()),
                exact=level,
                over_base=None if is_base else over_base,
                over_best=None if (model, scale, variant) == best else over_best,
                by_seed=() if is_base else tuple((_by(part, "tuning_seed") - _by(of_base, "tuning_seed")).tolist()),
                of_oracle=share_of_gain(exact - base, oracle - base).value if gained else math.nan,
                malformed=float(numbers(part, "malformed").mean()),
                response=math.sqrt(information[0] / information[1]),
                distinct=_distinct(part),
            )
        )
    return listed


def _parts(rows: pa.Table) -> dict[tuple[str, float, str], pa.Table]:
    """The rows of each model, guidance scale and variant, with a column of what is right: exact and well drawn."""
    rows = rows.append_column("right", [right(rows)])
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
    head = ["model, guidance", "variant", "picks right", "exact", "− base", "− base at its best", "by seed"]
    head += ["of the oracle's gain", "malformed", "‖Δε‖ ÷ base's", "distinct scenes"]
    lines = []
    for gain in gains(rows):
        differences = [interval(difference, sign=True) for difference in (gain.over_base, gain.over_best)]
        seeds = ", ".join(number(value, sign=True) for value in gain.by_seed) or DASH
        share = DASH if math.isnan(gain.of_oracle) else f"{number(100 * gain.of_oracle, 0)} %"
        lines.append(
            [f"{gain.model}, {gain.guidance_scale:g}", gain.variant, number(gain.picked_right), interval(gain.exact)]
            + [*differences, seeds, share, number(gain.malformed), number(gain.response, 2), number(gain.distinct, 2)]
        )
    sections = [table(head, lines)]
    for model in dict.fromkeys(rows["model"].to_pylist()):
        of_model = rows.filter(pc.equal(rows["model"], model))
        scale = of_model["guidance_scale"][0]
        comparisons = summarize(of_model.filter(pc.equal(of_model["guidance_scale"], scale)))
        by_category = [c for c in comparisons if c.split == POOLED and c.metric == "exact"]
        sections.append(f"### {model}, guidance {scale.as_py():g}, by category\n\n{markdown_table(by_category)}")
    return "\n".join(sections)


def picks(configs: Sequence[Config], folder: Path, *, seeds: int) -> str:
    """How much of the way from a random choice to the judge's each selection goes, by category, as Markdown."""
    lines: list[list[str]] = []
    head: list[str] = []
    for config in configs:
        prompts = load_prompts(config.prompts, field=config.prompt_field)
        categories = {listed.text: listed.category for listed in prompts}
        names = [*dict.fromkeys(categories.values()), POOLED]
        head = head or ["model", "picked by", *names]
        name = Path(config.model.name).name
        runs = [folder / f"{name}-{seed}" for seed in range(seeds)]
        columns = pq.read_schema(runs[0] / "round-1" / "pool" / "candidates.parquet").names
        slugs = [column.removeprefix("kept.") for column in columns if column.startswith("kept.")]
        for round_number, slug in product(range(1, config.rounds + 1), slugs):
            chosen = [_Tuned(run, round_number, slug) for run in runs]
            closed = _closed(pa.concat_tables(each.candidates() for each in chosen), config, categories, names)
            cells = [number(share.value, 2) for share in closed[:-1]]
            lines.append([name, chosen[0].variant, *cells, interval(closed[-1], 2)])
    return table(head, lines)


def _closed(rows: pa.Table, config: Config, categories: Mapping[str, str], names: Sequence[str]) -> list[Interval]:
    """The share of the way that a selection goes, by category."""
    exact, kept = (_by_prompt(rows, column, config) for column in ("right", "kept"))
    prompts = rows["prompt"].to_pylist()[:: config.pool.candidates]
    of_prompt = np.array([categories[prompt] for prompt in prompts])
    drawn, exact = np.nanmean(exact, axis=1), np.nan_to_num(exact)
    best = np.sort(exact, axis=1)[:, -config.pool.keep :].mean(axis=1)
    picked = (exact * kept).sum(axis=1) / kept.sum(axis=1)
    gaps = np.stack([picked - drawn, best - drawn, -drawn], axis=1)
    shares = []
    for category in names:
        within = gaps[(of_prompt == category) | (category == POOLED)]
        shares += bootstrap_ratio(*(within[:, [i]] for i in range(3)))
    return shares


def _by_prompt(rows: pa.Table, column: str, config: Config) -> NDArray[np.float64]:
    """A column of a pool's table, (prompts, M)."""
    return numbers(rows, column).reshape(-1, config.pool.candidates)
