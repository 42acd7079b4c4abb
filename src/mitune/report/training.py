"""What trainings and stages took: their curves, and a run's cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mitune.evaluation.statistics import Array
from mitune.report import plots
from mitune.report.files import read_json
from mitune.report.words import Context, duration

COSTS = ("seconds", "candidates", "denoiser_calls", "unraced_calls")  # of a stage
CURVES = ("iteration", "loss", "gradient_norm", "seconds")  # of an iteration


def training(folder: Path, colors: Mapping[str, str]) -> Context | None:
    """The curves of a round's adapters, with the names that the colors stand for; None if none was trained."""
    paths = sorted(folder.glob("adapters/*/training.jsonl"))
    runs = {path.parent.name: rows for path in paths if (rows := read_json(path, CURVES))}
    if not runs:
        return None
    titles = {"loss": "loss", "gradient_norm": "norm of the gradient"}
    charts = []
    for key, title in titles.items():
        lines = [
            plots.Curve(colors.get(name, "base"), *(_series(rows, column) for column in ("iteration", key)))
            for name, rows in runs.items()
        ]
        charts.append(plots.curves(lines, title, f"Training, {folder.name}: {title}"))
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
    return {"plots": charts, "legend": legend}


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> Array:
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def cost(entries: Sequence[Mapping[str, Any]] | None) -> list[Context]:
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
