"""From a run folder to `report.html`: computes the figures and fills the template.

Only config.yaml is required. A section whose files are absent is left out, and the report says so in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mitune.evaluation.statistics import (
    METRICS,
    POOLED,
    TITLES,
    Comparison,
    Interval,
    Metric,
    Selection,
    failures,
    flags,
    numbers,
    selection,
    summarize,
)
from mitune.information import SCORES
from mitune.pool.scores import POST_HOC
from mitune.pool.selection import ORACLE, Rule, parse_rule
from mitune.report import plots
from mitune.report.files import pool_of, read_config, read_json, read_table, rounds, setting
from mitune.report.pictures import before_after, extremes
from mitune.run.store import write_bytes

BASELINE = "base"
CONTROLS = ("random", "oracle")
COSTS = ("seconds", "candidates", "denoiser_calls", "unraced_calls")  # of a stage
CURVES = ("iteration", "loss", "gradient_norm", "seconds")  # of an iteration
TIES = {name: score.online for name, score in POST_HOC.items() if score.online}  # what decides among equals, by score
BINS = 10  # ranks of a score are shown in tenths

Array = NDArray[np.float64]
Context = dict[str, Any]


def build_report(run: Path) -> Path:
    """Writes `run`/report.html, whole or not at all, and returns its path.

    The page holds all that it shows, and the same run gives the same bytes. Raises MituneError if `run` holds no
    config.yaml, or a file that cannot be read.
    """
    source = files("mitune.report").joinpath("template.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    path = run / "report.html"
    write_bytes(path, environment.from_string(source).render(context(run)).encode())
    return path


def context(run: Path) -> Context:
    """Everything that the template shows, from the files of a run. Raises MituneError like build_report."""
    text, config = read_config(run)
    rules = [parse_rule(str(text)) for text in setting(config, "pool.select") or ()]
    selects = [rule.slug for rule in rules]
    images = read_table(run / "eval" / "images.parquet")
    comparisons = summarize(images, BASELINE) if images is not None else []
    variants = list(dict.fromkeys(c.variant for c in comparisons))
    tuned = [name for name in (*selects, *variants) if name in variants and not name.startswith(BASELINE)]
    first = tuned[0] if tuned else None  # the verdict is on the run's first selection, not on its luckiest
    names = [name for name in dict.fromkeys((*tuned, *selects, *variants)) if name != BASELINE]
    colors = {name: plots.SERIES[index % len(plots.SERIES)] for index, name in enumerate(names)} | {BASELINE: "base"}
    return {
        "run": run.resolve().name,
        "config": text,
        "settings": _settings(config),
        "headline": _headline(comparisons, first),
        "levels": _levels(comparisons, colors, first),
        "colors": colors,
        "tables": [_table(comparisons, metric) for metric in METRICS if any(c.metric == metric for c in comparisons)],
        "forest": _forest(comparisons, colors),
        "failures": [f for f in failures(images) if f.category == POOLED] if images is not None else [],
        "cards": before_after(run / "eval", images, [BASELINE, *tuned[:1]]) if images is not None else [],
        "rounds": [_round(folder, config, rules, colors) for folder in rounds(run)],
        "cost": _cost(read_json(run / "cost.json", COSTS)),
        "percent": percent,
    }


def headline(run: Path) -> str:
    """The verdict on the run's first selection in one sentence; empty if nothing was judged."""
    told = context(run)["headline"]
    if told is None:
        return ""
    return (
        f"{told['verdict']}: {told['metric']} {told['base']} → {told['tuned']} with {told['variant']} (difference "
        f"{told['difference']['value']} points, 95 % interval {told['difference']['span']}; prompts × images × seeds: "
        f"{told['basis']})."
    )


def percent(share: float) -> str:
    """A share in percent, with a space that does not break: 42.0 %."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def span(interval: Interval) -> str:
    """The ends of an interval in percent: 38.1 – 45.9."""
    return f"{100 * interval.low:.1f} – {100 * interval.high:.1f}"


def points(value: float) -> str:
    """A signed difference in percent points: +13.1."""
    return f"{100 * value:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader asks for first; all of it stands below, in config.yaml."""
    names = {
        "model": "model.name",
        "guidance scale": "model.guidance_scale",
        "sampling steps": "model.steps",
        "prompts": "prompts",
        "candidates a prompt, M": "pool.candidates",
        "kept of them, k": "pool.keep",
        "selected by": "pool.select",
        "rounds, R": "rounds",
        "adapter": "finetune.adapter",
        "rank": "finetune.rank",
        "learning rate": "finetune.learning_rate",
        "batch size": "finetune.batch_size",
        "iterations": "finetune.iterations",
        "evaluated on": "eval_prompts",
        "images a prompt": "eval.images",
    }
    shown = {label: setting(config, name) for label, name in names.items()}
    for label in ("guidance scale", "sampling steps"):
        shown[label] = "the model’s own" if shown[label] is None else shown[label]
    seeds = [setting(config, f"{part}.seed") for part in ("pool", "finetune", "eval")]
    if None not in seeds:
        shown["seeds: pool, training, evaluation"] = seeds
    joined = {label: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for label, v in shown.items()}
    return [(label, str(value)) for label, value in joined.items() if value is not None]


def _pooled(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """Each variant's figure over everything, by the strictest metric that there is."""
    metric = min((c.metric for c in comparisons), key=METRICS.index, default=None)
    return {c.variant: c for c in comparisons if (c.category, c.split, c.metric) == (POOLED, POOLED, metric)}


def _headline(comparisons: Sequence[Comparison], first: str | None) -> Context | None:
    """The verdict on variant `first` in words, with what to hold it against; None without an evaluation of it."""
    pooled = _pooled(comparisons)
    tuned = pooled.get(first) if first else None
    if tuned is None or tuned.difference is None:
        return None
    size = f"{abs(100 * tuned.difference.value):.1f} points"
    of_tuned = [c for c in comparisons if (c.variant, c.category, c.metric) == (first, POOLED, tuned.metric)]
    swept = [c for c in pooled.values() if c.variant.startswith(BASELINE)]
    best = max(swept, key=lambda c: c.value.value)
    return {
        "verdict": {1: f"Better by {size}", 0: "No clear difference", -1: f"Worse by {size}"}[tuned.difference.sign],
        "metric": tuned.metric,
        "variant": first,
        "tuned": percent(tuned.value.value),
        "base": percent(pooled[BASELINE].value.value),
        "basis": tuned.basis,
        "difference": _difference(tuned.difference),
        "splits": [(c.split, _difference(c.difference)) for c in of_tuned if c.split != POOLED and c.difference],
        "controls": [(name, _difference(pooled[name].difference)) for name in CONTROLS if name in pooled],
        "best_base": (best.variant, percent(best.value.value)) if len(swept) > 1 else None,
        "beats_best_base": tuned.value.value > best.value.value,
    }


def _difference(difference: Interval | None) -> Context | None:
    """A difference to the base model, in words and as a tone."""
    if difference is None:
        return None
    tone = {1: "better", 0: "unclear", -1: "worse"}[difference.sign]
    span = f"{points(difference.low)} to {points(difference.high)}"
    return {"value": points(difference.value), "span": span, "tone": tone}


def _levels(comparisons: Sequence[Comparison], colors: Mapping[str, str], first: str | None) -> Context | None:
    """Each variant's pooled figure on one scale of whole tens of percent: positions in percent of its width."""
    pooled = _pooled(comparisons)
    if not pooled:
        return None
    low = math.floor(10 * min(c.value.low for c in pooled.values())) / 10
    high = math.ceil(10 * max(c.value.high for c in pooled.values())) / 10
    ends = low, max(high, low + 0.1)
    order = sorted(pooled, key=lambda name: (name != BASELINE, name != first))
    rows = []
    for name in order:
        at = [100 * (x - ends[0]) / (ends[1] - ends[0]) for x in (pooled[name].value.low, pooled[name].value.high)]
        dot = 100 * (pooled[name].value.value - ends[0]) / (ends[1] - ends[0])
        figures = {"color": colors[name], "left": at[0], "width": at[1] - at[0], "dot": dot, "first": name == first}
        value = {"value": percent(pooled[name].value.value), "span": span(pooled[name].value)}
        rows.append({"name": name, **figures, **value, "difference": _difference(pooled[name].difference)})
    title = TITLES[next(iter(pooled.values())).metric]
    return {"title": title, "ends": [f"{100 * end:.0f} %" for end in ends], "rows": rows}


def _label(category: str) -> str:
    return category.replace("_", " ")


def _named(names: Sequence[str]) -> list[str]:
    """The names shown: each, and the pool of them where there are several."""
    own = [name for name in dict.fromkeys(names) if name != POOLED]
    return own if len(own) == 1 else [*own, POOLED]


def _table(comparisons: Sequence[Comparison], metric: Metric) -> Context:
    """One metric's table: a row a category, below it its splits; a cell a variant."""
    own = {(c.category, c.split, c.variant): c for c in comparisons if c.metric == metric}
    variants = list(dict.fromkeys(c.variant for c in own.values()))
    splits = _named([c.split for c in own.values()])
    rows = []
    for category in _named([c.category for c in own.values()]):
        for split in [POOLED, *splits[:-1]]:
            cells = [own.get((category, split, variant)) for variant in variants]
            bases = list(dict.fromkeys(c.basis for c in cells if c))
            if bases:
                shown = [_cell(c) for c in cells]
                name = _label(category) if split == POOLED else f"{_label(category)}, {split}"
                rows.append({"name": name, "sub": split != POOLED, "basis": " or ".join(bases), "cells": shown})
    return {"metric": metric, "title": TITLES[metric], "variants": variants, "rows": rows, "splits": splits}


def _cell(comparison: Comparison | None) -> Context | None:
    if comparison is None:
        return None
    value = comparison.value
    return {"value": percent(value.value), "span": span(value), "difference": _difference(comparison.difference)}


def _forest(comparisons: Sequence[Comparison], colors: Mapping[str, str]) -> Context | None:
    """Differences by category, with the variants that the colors stand for."""
    metric = min((c.metric for c in comparisons), key=METRICS.index, default=None)
    own = [c for c in comparisons if c.metric == metric and c.split == POOLED and c.difference]
    rows = [
        (_label(category), [(colors[c.variant], c.difference) for c in own if c.category == category and c.difference])
        for category in _named([c.category for c in own])
    ]
    if not own or metric is None:
        return None
    plot = plots.forest(rows, f"Differences to the base model in {TITLES[metric]}, by category")
    return {"plot": plot, "variants": list(dict.fromkeys(c.variant for c in own)), "title": TITLES[metric]}


def _round(folder: Path, config: Mapping[str, Any], rules: Sequence[Rule], colors: Mapping[str, str]) -> Context:
    """One round: its pools, and its trainings."""
    title = folder.name.replace("-", " ").capitalize()
    pools: dict[Path, list[Rule]] = {}  # one for all rules, or from the second round on one each
    for rule in rules:
        pools.setdefault(pool_of(folder, rule.slug), []).append(rule)
    return {
        "folder": folder.name,
        "title": title,
        "pools": [
            _pool(path, title if path.name == "pool" else f"{title}, {own[0].slug}", config, own)
            for path, own in (pools or {folder / "pool": []}).items()
        ],
        "training": _training(folder, colors),
    }


def _pool(folder: Path, title: str, config: Mapping[str, Any], rules: Sequence[Rule]) -> Context:
    """A pool's counts, scores and extremes."""
    verdict = {"exact": pa.bool_(), "graded": pa.float64(), "malformed": pa.bool_()}
    candidates = read_table(folder / "candidates.parquet", optional=verdict)
    where = f"{folder.parent.name}/{folder.name}"
    found: Context = {"folder": where, "id": where.replace("/", "-"), "title": title, "made": candidates is not None}
    if candidates is None:
        return found
    names = [name.removeprefix("score.") for name in candidates.column_names if name.startswith("score.")]
    statuses = candidates["status"].to_pylist()
    by = next((name for name in (*(rule.by for rule in rules), "mi-tune", *names) if name in names), None)
    keep = setting(config, "pool.keep") or 1
    return found | {
        "prompts": len(candidates["prompt_index"].unique()),
        "candidates": candidates.num_rows,
        "broken": statuses.count("nan"),
        "raced": len(statuses) - statuses.count("nan") - statuses.count("ok"),
        "by": by,
        "keep": keep,
        "cards": extremes(folder / "extremes", candidates, by, TIES.get(by)) if by else [],
        "scores": _scores(candidates, keep, [rule.by for rule in rules], title),
    }


def _scores(candidates: pa.Table, keep: int, selecting: Sequence[str], where: str) -> list[Context]:
    """Each score of a pool: its distribution, its agreement with the judge, and what it would keep."""
    judged = {quality.score: quality for quality in selection(candidates, keep, ties=TIES)}
    prompts = np.unique(numbers(candidates, "prompt_index"), return_inverse=True)[1]
    exact = numbers(candidates, "exact") * ~flags(candidates, "malformed")
    found = []
    for column in (name for name in candidates.column_names if name.startswith("score.")):
        name, scores = column.removeprefix("score."), numbers(candidates, column)
        finite = np.isfinite(scores)
        if name == ORACLE or not finite.any():  # the oracle is the judge, and stands beside every score as its ceiling
            continue
        sums, counts = (np.bincount(prompts, weights=weights) for weights in (np.where(finite, scores, 0), finite))
        centered = scores - (sums / np.maximum(counts, 1))[prompts]
        groups = [("bad", centered[finite & (exact == 0)]), ("good", centered[finite & (exact == 1)])]
        if not any(len(values) for _, values in groups):
            groups = [("series-0", centered[finite])]
        known = SCORES.get(name)
        post_hoc = POST_HOC.get(name)
        shown: Context = {
            "name": name,
            "selects": name in selecting,
            "formula": known.formula if known else post_hoc.formula if post_hoc else "",
            "source": known.source if known else "",
            "unit": known.unit if known else "",
            "histogram": plots.histogram(groups, f"Distribution of {name}, {where}"),
            "judged": _judged(judged[name]) if name in judged else None,
        }
        if shown["judged"]:
            shares, drawn = _by_rank(scores, exact, prompts), judged[name].drawn.value
            shown["by_rank"] = plots.by_rank(shares, drawn, f"Exact share by rank of {name}, {where}")
        found.append(shown)
    return sorted(found, key=lambda score: not score["selects"])


def _judged(quality: Selection) -> Context | None:
    """A score against the judge, in words; None where no candidate has both."""
    if not quality.kept.prompts:
        return None
    shares = {"kept": quality.kept, "drawn": quality.drawn, "oracle": quality.oracle}
    shown: Context = {
        key: {"value": percent(share.value), "span": span(share), "share": round(100 * share.value, 1)}
        for key, share in shares.items()
    }
    shown |= {"prompts": quality.kept.prompts, "agreement": None}
    if tau := quality.agreement:
        value, low, high = (f"{x:+.2f}".replace("-", "−") for x in (tau.value, tau.low, tau.high))
        shown["agreement"] = {"value": value, "span": f"{low} to {high}", "prompts": tau.prompts, "sign": tau.sign}
    return shown


def _by_rank(scores: Array, exact: Array, prompts: NDArray[np.int64]) -> Array:
    """Exact share of the candidates from the best to the worst of their prompts, in at most ten bins."""
    known = np.isfinite(scores) & np.isfinite(exact)
    orders = []
    for prompt in np.unique(prompts[known]):
        own = np.flatnonzero(known & (prompts == prompt))
        orders.append(exact[own[np.argsort(-scores[own], kind="stable")]])
    bins = min([BINS, *map(len, orders)])
    shares: Array = np.mean([[part.mean() for part in np.array_split(order, bins)] for order in orders], axis=0)
    return shares


def _training(folder: Path, colors: Mapping[str, str]) -> Context | None:
    """The curves of a round's adapters, with the names that the colors stand for; None if none was trained."""
    paths = sorted(folder.glob("adapters/*/training.jsonl"))
    runs = {path.parent.name: rows for path in paths if (rows := read_json(path, CURVES))}
    if not runs:
        return None
    titles = {"loss": "loss", "gradient_norm": "norm of the gradient"}
    made = []
    for key, title in titles.items():
        lines = [
            plots.Curve(colors.get(name, "base"), *(_series(rows, column) for column in ("iteration", key)))
            for name, rows in runs.items()
        ]
        made.append(plots.curves(lines, title, f"Training, {folder.name}: {title}"))
    legend = [
        {
            "name": name,
            "color": colors.get(name, "base"),
            "iterations": len(rows),
            "skipped": sum(bool(row.get("skipped")) for row in rows),
            "seconds": duration(float(np.nansum(_series(rows, "seconds")))),
        }
        for name, rows in runs.items()
    ]
    return {"plots": made, "legend": legend}


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> Array:
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def _cost(entries: Sequence[Mapping[str, Any]] | None) -> list[Context]:
    """What each stage cost, resumed ones added up, and their sum in the last row."""
    if not entries:
        return []
    stages = {str(entry.get("stage")): dict.fromkeys(COSTS, 0.0) for entry in entries}
    for entry in entries:
        stage = stages[str(entry.get("stage"))]
        for key in COSTS:
            stage[key] += entry.get(key) or 0
        if not entry.get("unraced_calls"):  # no pool
            stage["unraced_calls"] += entry.get("denoiser_calls") or 0
    total = {key: sum(stage[key] for stage in stages.values()) for key in COSTS}
    rows = []
    for name, stage in (*stages.items(), ("total", total)):
        share = stage["seconds"] / total["seconds"] if total["seconds"] else 0.0
        counts = {key: f"{stage[key]:,.0f}".replace(",", "\u202f") if stage[key] else "–" for key in COSTS[1:3]}
        saved = stage["unraced_calls"] / stage["denoiser_calls"] if stage["denoiser_calls"] else 1.0
        counts["saved"] = f"{saved:.1f}× fewer by racing" if saved > 1 else ""
        rows.append({"stage": name, "seconds": duration(stage["seconds"]), "share": 100 * share, **counts})
    return rows
