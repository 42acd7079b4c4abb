"""From a run folder to `report.html`: computes the figures and fills the template.

Only config.yaml is required. A section whose files are absent is left out, and the report says so in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from mitune.evaluation.comparison import MEASURES, POOLED, failures, summarize
from mitune.pool.selection import parse_rule
from mitune.report import plots
from mitune.report.files import read_config, read_json, read_table, rounds, setting
from mitune.report.pictures import before_after
from mitune.report.pools import round_of
from mitune.report.progress import progress
from mitune.report.training import COSTS, cost
from mitune.report.verdict import BASELINE, forest_of, headline_of, levels, metric_table
from mitune.report.words import Context, percent
from mitune.run.store import write_bytes


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
        "headline": headline_of(comparisons, first),
        "levels": levels(comparisons, colors, first),
        "colors": colors,
        "tables": [
            metric_table(comparisons, metric) for metric in MEASURES if any(c.metric == metric for c in comparisons)
        ],
        "forest": forest_of(comparisons, colors),
        "failures": [f for f in failures(images) if f.category == POOLED] if images is not None else [],
        "cards": before_after(run / "eval", images, [BASELINE, *tuned[:1]]) if images is not None else [],
        "progress": progress(rounds(run), rules, comparisons, colors),
        "rounds": [round_of(folder, config, rules, colors) for folder in rounds(run)],
        "cost": cost(read_json(run / "cost.json", COSTS)),
        "percent": percent,
    }


def headline(run: Path) -> str:
    """The verdict on the run's first selection in one sentence; empty if nothing was judged."""
    result = context(run)["headline"]
    if result is None:
        return ""
    difference = result["difference"]
    return (
        f"{result['verdict']}: {result['metric']} {result['base']} → {result['tuned']} with {result['variant']} "
        f"(difference {difference['value']} points, 95 % interval {difference['span']}; prompts × images × seeds: "
        f"{result['basis']})."
    )


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
        "prompts a round": "round_prompts",
        "objective": "finetune.objective",
        "adapter": "finetune.adapter",
        "rank": "finetune.rank",
        "learning rate": "finetune.learning_rate",
        "batch size": "finetune.batch_size",
        "iterations": "finetune.iterations",
        "evaluated on": "eval_prompts",
        "images a prompt": "eval.images",
    }
    values = {label: setting(config, name) for label, name in names.items()}
    for label in ("guidance scale", "sampling steps"):
        values[label] = "the model’s own" if values[label] is None else values[label]
    seeds = [setting(config, f"{part}.seed") for part in ("pool", "finetune", "eval")]
    if None not in seeds:
        values["seeds: pool, training, evaluation"] = seeds
    joined = {label: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for label, v in values.items()}
    return [(label, str(value)) for label, value in joined.items() if value is not None]
