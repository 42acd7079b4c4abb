"""The rounds of the report: pools with their scores, held against the judge where there is one, and the trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mitune.evaluation.ranking import Selection, selection
from mitune.evaluation.rows import numbers, right
from mitune.evaluation.statistics import Array
from mitune.evaluation.tables import number
from mitune.information import SCORES
from mitune.pool.scores import POST_HOC
from mitune.pool.selection import ORACLE, Rule
from mitune.report import plots
from mitune.report.files import pool_of, read_table, setting
from mitune.report.pictures import extremes
from mitune.report.training import training
from mitune.report.words import Context, percent, span

TIES = {name: score.online for name, score in POST_HOC.items() if score.online}  # what decides among equals, by score
BINS = 10  # ranks of a score are shown in tenths


def round_of(folder: Path, config: Mapping[str, Any], rules: Sequence[Rule], colors: Mapping[str, str]) -> Context:
    """One round: its pools, and its trainings."""
    title = folder.name.replace("-", " ").capitalize()
    pools: dict[Path, list[Rule]] = {}  # one for all rules, or from the second round on one each
    for rule in rules:
        pools.setdefault(pool_of(folder, rule.slug), []).append(rule)
    return {
        "folder": folder.name,
        "title": title,
        "pools": [
            _pool(path, title if path.name == "pool" else f"{title}, {of_pool[0].slug}", config, of_pool)
            for path, of_pool in (pools or {folder / "pool": []}).items()
        ],
        "training": training(folder, colors),
    }


def _pool(folder: Path, title: str, config: Mapping[str, Any], rules: Sequence[Rule]) -> Context:
    """A pool's counts, scores and extremes."""
    verdict = {"exact": pa.bool_(), "graded": pa.float64(), "malformed": pa.bool_()}
    candidates = read_table(folder / "candidates.parquet", optional=verdict)
    where = f"{folder.parent.name}/{folder.name}"
    context: Context = {"folder": where, "id": where.replace("/", "-"), "title": title, "made": candidates is not None}
    if candidates is None:
        return context
    names = [name.removeprefix("score.") for name in candidates.column_names if name.startswith("score.")]
    statuses = candidates["status"].to_pylist()
    by = next((name for name in (*(rule.by for rule in rules), "mi-tune", *names) if name in names), None)
    keep = setting(config, "pool.keep") or 1
    return context | {
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
    exact, listed = right(candidates), []
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
        entry: Context = {
            "name": name,
            "selects": name in selecting,
            "formula": known.formula if known else post_hoc.formula if post_hoc else "",
            "source": known.source if known else "",
            "unit": known.unit if known else "",
            "histogram": plots.histogram(groups, f"Distribution of {name}, {where}"),
            "judged": _judged(judged[name]) if name in judged else None,
        }
        if entry["judged"]:
            shares, drawn = _by_rank(scores, exact, prompts), judged[name].drawn.value
            entry["by_rank"] = plots.by_rank(shares, drawn, f"Exact share by rank of {name}, {where}")
        listed.append(entry)
    return sorted(listed, key=lambda score: not score["selects"])


def _judged(quality: Selection) -> Context | None:
    """A score against the judge, in words; None where no candidate has both."""
    if not quality.kept.prompts:
        return None
    shares = {"kept": quality.kept, "drawn": quality.drawn, "oracle": quality.oracle}
    summary: Context = {
        key: {"value": percent(share.value), "span": span(share), "share": round(100 * share.value, 1)}
        for key, share in shares.items()
    }
    summary |= {"prompts": quality.kept.prompts, "agreement": None}
    if tau := quality.agreement:
        value, low, high = (number(x, 2, sign=True) for x in (tau.value, tau.low, tau.high))
        summary["agreement"] = {"value": value, "span": f"{low} to {high}", "prompts": tau.prompts, "sign": tau.sign}
    return summary


def _by_rank(scores: Array, exact: Array, prompts: NDArray[np.int64]) -> Array:
    """Exact share of the candidates from the best to the worst of their prompts, in at most ten bins."""
    known = np.isfinite(scores) & np.isfinite(exact)
    orders = []
    for prompt in np.unique(prompts[known]):
        places = np.flatnonzero(known & (prompts == prompt))
        orders.append(exact[places[np.argsort(-scores[places], kind="stable")]])
    bins = min([BINS, *map(len, orders)])
    shares: Array = np.mean([[part.mean() for part in np.array_split(order, bins)] for order in orders], axis=0)
    return shares
