"""The tables and the plot of `mitune bench truth`."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, kendalltau, spearmanr

from mitune.bench.truth import ASKED, CAPTION, MIXTURE, SPLIT, UNRELATED, Gap, Pair, Study
from mitune.information import Estimate
from mitune.worlds.shapes.check import Share
from mitune.worlds.shapes.truth import Truth

ESTIMATORS = ("standard", "orthogonal", MIXTURE, "self-confidence")
IN_NATS = ESTIMATORS[:3]
POOLED = "all"
RESAMPLES = 200

Array = NDArray[np.float64]

HEADER = """\
# The number and the truth

How near the embedded models' estimates come to the true mutual information of image and prompt, which the grammar of
the shapes world gives exactly (`mitune.worlds.shapes.truth`). Made by `{command}`.
"""
TEXT = """\
## {model}

{scenes} scenes a category, drawn from the world with their prompts, rendered, taken through the VAE, and noised {draws}
times each. ± is one standard error over scenes; brackets are 95 % intervals (bootstrap over scenes; Wilson for shares).
No guidance occurs: post-hoc estimates use the network's plain outputs.

![Estimate against truth]({figure})

**Bias** of the estimates for the asked prompt, in nats. *Exact* is the category's true mean information, from the
grammar (all: of the whole world, with its own shares of the categories); *truth* that of these scenes. *standard*,
*orthogonal*: as `mitune.scoring.score`, against the empty prompt. *mixture*: the exact marginal in place of the empty
prompt, log p(z|p) − log Σ p(c) p(z|c) over the scene's captions c, each likelihood from the standard estimate.

{bias}

**Rank correlation** with the truth over all captions of the scenes (the asked prompt is one of them): Spearman's ρ, and
below it Kendall's τ. Negative: the estimate prefers the caption that says less.

{ranks}

**Between two captions** of one scene, the log-likelihood ratio is finite and known: the root mean square error of its
standard estimate, beside that of guessing 0, in nats.

{ratios}

**When one part of the prompt is wrong**, the true information is −∞. How far the estimate falls on average from the
asked prompt to the wrong one, and how often it falls at all (nats; self-confidence per dimension).

{falls}

**What the bias of the standard estimate is made of**, mean over scenes in nats. The first four columns add up to
*standard*. *Noisy end*: information at λ below the range of training, exact. *Shares*: the empty prompt learned the
marginal of its training, whose last phase may have drawn some prompts oftener, exact. *Null − conditional*: what the
network's error costs under the empty prompt, beyond what it costs under the asked one, which is *conditional*; and the
part of that difference at λ > {split:.0f}, where scenes are told apart already and the truth has nothing left. Beside
them, *clean end*: what the estimate would gain beyond the truncation of λ. *Mixture − truth*: the bias that is left
with the exact marginal, so of the network's errors under the captions alone.

{gap}
"""


def tables_of(study: Study, figure: str) -> str:
    """All tables in Markdown, with what they mean; `figure` is the file of the plot."""
    return TEXT.format(
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


def correlation(
    groups: Sequence[tuple[Array, Array]], statistic: Callable[[Array, Array], float], seed: int = 0
) -> tuple[float, float, float]:
    """A rank correlation over the pairs of all groups, (truth, estimate) each, and its 95 % interval.

    Groups (scenes) are resampled, because the captions of one scene share its errors. NaN where the truth is constant.
    """
    rng = np.random.default_rng(seed)

    def of(chosen: Iterable[int]) -> float:
        picked = [groups[i] for i in chosen]
        return statistic(np.concatenate([x for x, _ in picked]), np.concatenate([y for _, y in picked]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        value = of(range(len(groups)))
        drawn = [of(rng.integers(len(groups), size=len(groups))) for _ in range(RESAMPLES)]
    if math.isnan(value):
        return value, value, value
    low, high = np.nanquantile(drawn, (0.025, 0.975)).tolist()
    return value, low, high


def spearman(truth: Array, estimate: Array) -> float:
    """Spearman's ρ; NaN where either is constant."""
    return float(spearmanr(truth, estimate).statistic)


def kendall(truth: Array, estimate: Array) -> float:
    """Kendall's τ-b; NaN where either is constant."""
    return float(kendalltau(truth, estimate).statistic)


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
        asked = _of(study, category, ASKED)
        exact = truth.mutual_information(None if category == POOLED else category)
        biases = [_plus_minus(mean(p.estimates[name] - p.truth for p in asked)) for name in IN_NATS]
        rows.append([category, f"{exact:.2f}", _plus_minus(mean(p.truth for p in asked), sign=False), *biases])
    return _table(["category", "exact", "truth", *(f"bias of {name}" for name in IN_NATS)], rows)


def _rank_table(study: Study) -> str:
    rows = []
    for category in _categories(study):
        scenes = _by_scene(_of(study, category, ASKED, CAPTION)).values()
        row = [category]
        for name in ESTIMATORS:
            groups = [
                (np.array([p.truth for p in some]), np.array([p.estimates[name] for p in some])) for some in scenes
            ]
            row.append("<br>".join(_interval(*correlation(groups, statistic)) for statistic in (spearman, kendall)))
        rows.append(row)
    return _table(["category", *ESTIMATORS], rows)


def _ratio_table(study: Study) -> str:
    rows = []
    for category in _categories(study):
        differences = [
            (p.truth - asked.truth, p.estimates["standard"] - asked.estimates["standard"])
            for asked, *others in _by_scene(_of(study, category, ASKED, CAPTION)).values()
            for p in others
        ]
        true, estimated = np.array(differences).reshape(-1, 2).T
        errors = [float(np.sqrt(np.mean(x**2))) if len(x) else math.nan for x in (estimated - true, true)]
        rows.append([category, str(len(true)), *(f"{error:.2f}" for error in errors)])
    return _table(["category", "pairs", "error of the estimate", "of guessing 0"], rows)


def _fall_table(study: Study) -> str:
    kinds = dict.fromkeys(p.kind for p in study.pairs if p.kind not in (ASKED, CAPTION, UNRELATED))
    scenes = _by_scene(study.pairs).values()
    rows = []
    for kind in (*kinds, UNRELATED):
        beside = [(some[0], p) for some in scenes for p in some if p.kind == kind]
        row = [kind, str(len(beside))]
        for name in ("standard", "orthogonal", "self-confidence"):
            falls = [asked.estimates[name] - wrong.estimates[name] for asked, wrong in beside]
            share = Share(hits=sum(fall > 0 for fall in falls), trials=len(falls))
            digits = 4 if name == "self-confidence" else 1
            row += [_plus_minus(mean(falls), digits), f"{share.value:.2f} {_ends(*share.interval)}"]
        rows.append(row)
    names = ("standard", "orthogonal", "self-confidence")
    return _table(["wrong part", "pairs", *(head for name in names for head in (name, "falls"))], rows)


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
        some = [g for g in study.gaps if category in (g.category, POOLED)]
        rows.append([category, *(_plus_minus(mean(map(value, some)), sign=False) for value in columns.values())])
    return _table(["category", *columns], rows)


def _plus_minus(estimate: Estimate, digits: int = 2, sign: bool = True) -> str:
    value = f"{estimate.value:+.{digits}f}" if sign else f"{estimate.value:.{digits}f}"
    return f"{value} ± {estimate.standard_error:.{digits}f}"


def _interval(value: float, low: float, high: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f} {_ends(low, high)}"


def _ends(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# --- The plot ----------------------------------------------------------------------------------------------------


def calibration_figure(study: Study) -> bytes:
    """PNG: estimate against truth for every caption of every scene, one panel an estimator in nats."""
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(IN_NATS)), IN_NATS, strict=True):
        for number, category in enumerate(_categories(study)[:-1]):
            asked, others = _of(study, category, ASKED), _of(study, category, CAPTION)
            color = f"C{number}"
            for pairs, style in (
                (others, {"s": 6, "alpha": 0.25}),
                (asked, {"s": 14, "alpha": 0.9, "label": category}),
            ):
                axes.scatter(
                    [p.truth for p in pairs], [p.estimates[name] for p in pairs], color=color, linewidths=0, **style
                )
        ends = [min(p.truth for p in _of(study, POOLED, ASKED, CAPTION)), max(p.truth for p in study.pairs)]
        axes.plot(ends, ends, color="#868e96", linewidth=1, zorder=0)
        axes.set(title=name, xlabel="true i(x; p), nats")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("estimate, nats")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(f"{study.model}: asked prompts, and faint the other captions of the scenes")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
