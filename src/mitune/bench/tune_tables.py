"""The tables of a study of fine-tuning: what each way gains, at each guidance scale, and what was picked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mitune.bench.tune import Ways, tuned_of
from mitune.evaluation.comparison import POOLED, markdown_table, summarize
from mitune.evaluation.rows import numbers, right
from mitune.evaluation.statistics import Interval, bootstrap, bootstrap_ratio, share_of_gain
from mitune.evaluation.tables import DASH, interval, number, table
from mitune.evaluation.variant import BASE
from mitune.pool.selection import ORACLE
from mitune.prompts.lists import load_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One variant at one guidance scale, over all held-out prompts; differences are paired by prompt and seed."""

    model: str
    guidance_scale: float
    variant: str
    calls: float  # of the denoiser, by its pools, those of post-hoc scores included
    picked_right: float  # share of the last round's best candidates, those it keeps; of all candidates for the base
    exact: Interval
    over_base: Interval | None  # at the same guidance scale; None for the base itself
    over_best: Interval | None  # over the base at the scale that suits it best; None for that base
    by_seed: tuple[float, ...]  # over_base of each tuning seed
    seen: float  # over_base on prompts with combinations that training prompts have; NaN where there are none
    unseen: float
    of_oracle: float  # over_base as a share of what the same way gains with the judge's score; NaN without either gain
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
        oracle = of_prompts[model, scale, _oracle_of(part, rows)]
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
                calls=float(numbers(part, "calls").mean()),
                picked_right=float(numbers(part, "picked_right").mean()),
                exact=level,
                over_base=None if is_base else over_base,
                over_best=None if (model, scale, variant) == best else over_best,
                by_seed=() if is_base else tuple((_by(part, "tuning_seed") - _by(of_base, "tuning_seed")).tolist()),
                seen=_difference(part, of_base, "seen"),
                unseen=_difference(part, of_base, "unseen"),
                of_oracle=share_of_gain(exact - base, oracle - base).value if gained else math.nan,
                malformed=float(numbers(part, "malformed").mean()),
                response=math.sqrt(information[0] / information[1]),
                distinct=_distinct(part),
            )
        )
    return listed


def _oracle_of(part: pa.Table, rows: pa.Table) -> str:
    """The variant that went the same way, for as many rounds, by the judge's score; the base if there is none."""
    way, rounds = part["way"][0], part["rounds"][0]
    same = pc.and_(pc.equal(rows["way"], way), pc.equal(rows["rounds"], rounds))
    names = rows.filter(pc.and_(same, pc.equal(rows["selection"], ORACLE)))["variant"].to_pylist()
    return str(names[0]) if names else BASE


def _difference(part: pa.Table, base: pa.Table, split: str) -> float:
    """By how much a variant is right more often than the base, over the prompts of a split."""
    shares = [_by(table.filter(pc.equal(table["split"], split)), "prompt") for table in (part, base)]
    return float((shares[0] - shares[1]).mean()) if len(shares[0]) else math.nan


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
    head = ["model, guidance", "variant", "calls, thousands", "picks right", "exact", "− base", "− base at its best"]
    head += ["by seed", "seen", "unseen", "of the oracle's gain", "malformed", "‖Δε‖ ÷ base's", "distinct scenes"]
    lines = []
    for gain in gains(rows):
        differences = [interval(difference, sign=True) for difference in (gain.over_base, gain.over_best)]
        seeds = ", ".join(number(value, sign=True) for value in gain.by_seed) or DASH
        splits = [DASH if not gain.by_seed or math.isnan(x) else number(x, sign=True) for x in (gain.seen, gain.unseen)]
        share = DASH if math.isnan(gain.of_oracle) else f"{number(100 * gain.of_oracle, 0)} %"
        lines.append(
            [
                f"{gain.model}, {gain.guidance_scale:g}",
                gain.variant,
                number(gain.calls / 1000, 0) if gain.calls else DASH,
            ]
            + [number(gain.picked_right), interval(gain.exact), *differences, seeds, *splits, share]
            + [number(gain.malformed), number(gain.response, 2), number(gain.distinct, 2)]
        )
    sections = [table(head, lines)]
    for model in dict.fromkeys(rows["model"].to_pylist()):
        of_model = rows.filter(pc.equal(rows["model"], model))
        scale = of_model["guidance_scale"][0]
        comparisons = summarize(of_model.filter(pc.equal(of_model["guidance_scale"], scale)))
        by_category = [c for c in comparisons if c.split == POOLED and c.metric == "exact"]
        sections.append(f"### {model}, guidance {scale.as_py():g}, by category\n\n{markdown_table(by_category)}")
    return "\n".join(sections)


def picks(models: Sequence[Ways], folder: Path, *, seeds: int) -> str:
    """How much of the way from a random choice to the judge's each selection goes, by category, as Markdown."""
    lines: list[list[str]] = []
    head: list[str] = []
    for ways in models:
        config = next(iter(ways.values()))
        categories = {p.text: p.category for p in load_prompts(config.prompts, field=config.prompt_field)}
        names = [*dict.fromkeys(categories.values()), POOLED]
        head = head or ["model", "picked by", *names]
        of_seeds = [tuned_of(ways, folder, seed) for seed in range(seeds)]
        for chosen in zip(*of_seeds, strict=True):
            rows = pa.concat_tables(tuned.candidates() for tuned in chosen)
            keep = next(own for way, own in ways.items() if chosen[0].way in ("", way)).pool.keep
            closed = _closed(rows, keep, categories, names)
            cells = [DASH if math.isnan(share.value) else number(share.value, 2) for share in closed[:-1]]
            model = Path(config.model.name).name
            lines.append([model, chosen[0].variant, *cells, interval(closed[-1], 2)])
    return table(head, lines)


def _closed(rows: pa.Table, keep: int, categories: Mapping[str, str], names: Sequence[str]) -> list[Interval]:
    """The share of the way that a selection goes, by category."""
    prompts = rows["prompt"].to_pylist()
    count = next((at for at, prompt in enumerate(prompts) if prompt != prompts[0]), len(prompts))
    exact, kept = (numbers(rows, column).reshape(-1, count) for column in ("right", "kept"))
    of_prompt = np.array([categories[prompt] for prompt in prompts[::count]])
    drawn, exact = np.nanmean(exact, axis=1), np.nan_to_num(exact)
    best = np.sort(exact, axis=1)[:, -keep:].mean(axis=1)
    picked = (exact * kept).sum(axis=1) / kept.sum(axis=1)
    gaps = np.stack([picked - drawn, best - drawn, -drawn], axis=1)
    shares = []
    for category in names:
        within = gaps[(of_prompt == category) | (category == POOLED)]
        shares += bootstrap_ratio(*(within[:, [i]] for i in range(3)))
    return shares
