"""The tables and the plot of `mitune bench truth`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mitune.bench.pages import page
from mitune.evaluation.comparison import POOLED
from mitune.evaluation.statistics import Array, Interval, Share, bootstrap_of, kendall_tau, spearman
from mitune.evaluation.tables import interval, number, plus_minus, table
from mitune.information import Estimate
from mitune.report.style import MUTED, on_paper, png, sheet
from mitune.worlds.shapes.truth import Truth
from mitune.worlds.shapes.truth_losses import SPLIT
from mitune.worlds.shapes.truth_study import ASKED, CAPTION, MIXTURE, UNRELATED, Gap, Pair, Study

ESTIMATORS = ("standard", "orthogonal", MIXTURE, "self-confidence")
IN_NATS = ESTIMATORS[:3]
RESAMPLES = 200


def tables_of(study: Study, figure: str) -> str:
    """All tables in Markdown, with what they mean; `figure` is the file of the plot."""
    return page(
        "truth-model",
        model=study.model,
        figure=figure,
        split=SPLIT,
        scenes=study.scenes,
        draws=study.draws,
        bias=_bias_table(study),
        ranks=_rank_table(study),
        ratios=_ratio_table(study),
        falls=_fall_table(study),
        gap=_gap_table(study),
    )


# --- Figures -----------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> Estimate:
    """Of independent values, with its standard error."""
    return Estimate.of_mean(torch.tensor(list(values), dtype=torch.float64))


def correlation(groups: Sequence[tuple[Array, Array]], statistic: Callable[[Array, Array], float]) -> Interval:
    """A rank correlation over the pairs of all groups, (truth, estimate) each, and its 95 % interval.

    Groups (scenes) are resampled, because the captions of one scene share its errors. NaN where the truth is constant.
    """

    def of(places: NDArray[np.int64]) -> float:
        picked = [groups[i] for i in places]
        return statistic(np.concatenate([x for x, _ in picked]), np.concatenate([y for _, y in picked]))

    return bootstrap_of(of, len(groups), resamples=RESAMPLES)


def _categories(study: Study) -> list[str]:
    return [*dict.fromkeys(pair.category for pair in study.pairs), POOLED]


def _of(study: Study, category: str, *kinds: str) -> list[Pair]:
    return [p for p in study.pairs if category in (p.category, POOLED) and (not kinds or p.kind in kinds)]


def _by_scene(pairs: Iterable[Pair]) -> dict[int, list[Pair]]:
    scenes: dict[int, list[Pair]] = {}
    for pair in pairs:
        scenes.setdefault(pair.scene, []).append(pair)
    return scenes


# --- Tables ------------------------------------------------------------------------------------------------------


def _bias_table(study: Study) -> str:
    truth = Truth()
    rows = []
    for category in _categories(study):
        pairs = _of(study, category, ASKED)
        exact = truth.mutual_information(None if category == POOLED else category)
        biases = [_estimate(mean(p.estimates[name] - p.truth for p in pairs), sign=True) for name in IN_NATS]
        rows.append([category, number(exact, 2), _estimate(mean(p.truth for p in pairs)), *biases])
    return table(["category", "exact", "truth", *(f"bias of {name}" for name in IN_NATS)], rows)


def _rank_table(study: Study) -> str:
    rows = []
    for category in _categories(study):
        scenes = _by_scene(_of(study, category, ASKED, CAPTION)).values()
        row = [category]
        for name in ESTIMATORS:
            groups = [
                (np.array([p.truth for p in group]), np.array([p.estimates[name] for p in group])) for group in scenes
            ]
            row.append(
                "<br>".join(interval(correlation(groups, statistic), 2) for statistic in (spearman, kendall_tau))
            )
        rows.append(row)
    return table(["category", *ESTIMATORS], rows)


def _ratio_table(study: Study) -> str:
    rows = []
    for category in _categories(study):
        differences = [
            (p.truth - prompted.truth, p.estimates["standard"] - prompted.estimates["standard"])
            for prompted, *others in _by_scene(_of(study, category, ASKED, CAPTION)).values()
            for p in others
        ]
        true, estimated = np.array(differences).reshape(-1, 2).T
        errors = [float(np.sqrt(np.mean(x**2))) if len(x) else math.nan for x in (estimated - true, true)]
        rows.append([category, str(len(true)), *(number(error, 2) for error in errors)])
    return table(["category", "pairs", "error of the estimate", "of guessing 0"], rows)


def _fall_table(study: Study) -> str:
    kinds = dict.fromkeys(p.kind for p in study.pairs if p.kind not in (ASKED, CAPTION, UNRELATED))
    scenes = _by_scene(study.pairs).values()
    rows = []
    for kind in (*kinds, UNRELATED):
        beside = [(group[0], p) for group in scenes for p in group if p.kind == kind]
        row = [kind, str(len(beside))]
        for name in ("standard", "orthogonal", "self-confidence"):
            falls = [prompted.estimates[name] - wrong.estimates[name] for prompted, wrong in beside]
            share = Share(hits=sum(fall > 0 for fall in falls), trials=len(falls))
            digits = 4 if name == "self-confidence" else 1
            row += [_estimate(mean(falls), digits, sign=True), interval(share, 2)]
        rows.append(row)
    names = ("standard", "orthogonal", "self-confidence")
    return table(["wrong part", "pairs", *(head for name in names for head in (name, "falls"))], rows)


def _gap_table(study: Study) -> str:
    columns: dict[str, Callable[[Gap], float]] = {
        "truth": lambda g: g.truth,
        "noisy end": lambda g: g.noisy_end,
        "shares": lambda g: g.emphasis,
        "null − conditional": lambda g: g.null + g.conditional,
        f"at λ > {SPLIT:.0f}": lambda g: g.at_high_snr,
        "= standard": lambda g: g.standard,
        "conditional": lambda g: -g.conditional,
        "clean end": lambda g: g.clean_end,
        "mixture − truth": lambda g: g.mixture - g.truth,
    }
    rows = []
    for category in _categories(study):
        gaps = [g for g in study.gaps if category in (g.category, POOLED)]
        rows.append([category, *(_estimate(mean(map(value, gaps))) for value in columns.values())])
    return table(["category", *columns], rows)


def _estimate(estimate: Estimate, digits: int = 2, *, sign: bool = False) -> str:
    return plus_minus(estimate.value, estimate.standard_error, digits, sign=sign)


# --- The plot ----------------------------------------------------------------------------------------------------


def calibration_figure(study: Study) -> bytes:
    """PNG: estimate against truth for every caption of every scene, one panel an estimator in nats."""
    with on_paper():
        figure = sheet(11, 4.3)
        for axes, name in zip(figure.subplots(1, len(IN_NATS)), IN_NATS, strict=True):
            for index, category in enumerate(_categories(study)[:-1]):
                prompted, others = _of(study, category, ASKED), _of(study, category, CAPTION)
                color = f"C{index}"
                for pairs, style in (
                    (others, {"s": 6, "alpha": 0.25}),
                    (prompted, {"s": 14, "alpha": 0.9, "label": category}),
                ):
                    axes.scatter(
                        [p.truth for p in pairs], [p.estimates[name] for p in pairs], color=color, linewidths=0, **style
                    )
            ends = [min(p.truth for p in _of(study, POOLED, ASKED, CAPTION)), max(p.truth for p in study.pairs)]
            axes.plot(ends, ends, color=MUTED, linewidth=1, zorder=0)
            axes.set(title=name, xlabel="true i(x; p), nats")
        figure.axes[0].set_ylabel("estimate, nats")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
        figure.suptitle(f"{study.model}: asked prompts, and faint the other captions of the scenes")
        return png(figure)
