"""Known answers for the statistics: a mean's normal interval, coverage, pairing, bounds where nothing varies."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from mitune.errors import MituneError
from mitune.evaluation.comparison import Comparison, failures, markdown_table, summarize
from mitune.evaluation.ranking import best_share, lexicographic, selection
from mitune.evaluation.rows import right
from mitune.evaluation.statistics import (
    Interval,
    Share,
    bootstrap,
    bootstrap_of,
    bootstrap_ratio,
    kendall_tau,
    share_of_gain,
    spearman,
)


def image_rows(exact, *, variant="base", category="color", split="", malformed=None):
    """Rows for an array of verdicts (prompts, images)."""
    exact = np.asarray(exact)
    malformed = np.zeros_like(exact) if malformed is None else np.asarray(malformed)
    return [
        {
            "variant": variant,
            "prompt": f"{category} {split} {prompt}",
            "category": category,
            "split": split,
            "image": image,
            "seed": 1000,
            "exact": bool(exact[prompt, image]),
            "graded": float(exact[prompt, image]),
            "malformed": bool(malformed[prompt, image]),
        }
        for prompt, image in np.ndindex(exact.shape)
    ]


def pick(comparisons, **wanted) -> Comparison:
    (found,) = [c for c in comparisons if all(getattr(c, name) == value for name, value in wanted.items())]
    return found


def test_bootstrap_matches_the_normal_interval_of_a_mean():
    """For n = 400 normal values the percentile interval is mean ± 1.96 · s/√n, to the noise of 10 000 resamples.

    A 2.5 % quantile of R draws has the standard error √(0.025 · 0.975 / R) / φ(1.96) = 0.027 of theirs.
    """
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 1))
    (interval,) = bootstrap(values)
    error = values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=5 * 0.027 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=5 * 0.027 * error)


def test_bootstrap_matches_scipy():
    """The same quantity by scipy.stats.bootstrap, whose resamples differ: five standard errors of either end."""
    values = np.random.default_rng(1).exponential(size=30)
    (ours,) = bootstrap(values[:, None])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    spread = values.std() / math.sqrt(30)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=5 * math.sqrt(2) * 0.03 * spread)


def test_bootstrap_covers_the_truth():
    """Of 400 intervals over 60 prompts of 4 images each, about 95 % hold the true rate.

    Theory for percentile intervals at n = 60: about 94 %. Three standard errors of 400 trials are 3.6 %.
    """
    rng = np.random.default_rng(3)
    difficulty = rng.beta(2, 2, size=(60, 400))  # mean ½
    means = rng.binomial(4, difficulty) / 4
    held = [interval.low <= 0.5 <= interval.high for interval in bootstrap(means, resamples=1000)]
    assert np.mean(held) == pytest.approx(0.94, abs=0.036)


def test_images_of_one_prompt_are_no_independent_evidence():
    """Forty images of a prompt that share its fate give the interval of one image, not one √40 narrower."""
    fate = np.random.default_rng(4).random((50, 1)) < 0.5
    one = summarize(pa.Table.from_pylist(image_rows(fate)))
    forty = summarize(pa.Table.from_pylist(image_rows(np.repeat(fate, 40, axis=1))))
    first, second = (pick(c, category="all", split="all", metric="exact") for c in (one, forty))
    assert first.value == second.value
    assert second.images == 40 * first.images


@pytest.mark.parametrize(("prompts", "chance"), [(1, 0.975), (10, 0.308), (100, 0.0362)])
def test_interval_where_every_prompt_scores_the_same(prompts, chance):
    """All of n right: Clopper and Pearson's lower end is 0.025^(1/n), whatever a bootstrap cannot see."""
    lower, _ = stats.binomtest(prompts, prompts).proportion_ci(0.95, "exact")
    (interval,) = bootstrap(np.ones((prompts, 1)), low=0, high=1, resamples=10)
    assert interval.low == pytest.approx(lower)
    assert 1 - interval.low == pytest.approx(chance, rel=2e-3)
    assert interval.high == 1
    (difference,) = bootstrap(np.zeros((prompts, 1)), low=-1, high=1, resamples=10)
    assert (difference.low, difference.high) == pytest.approx((-chance, chance), rel=2e-3)


def test_differences_are_paired_by_prompt():
    """Tuned draws each prompt just as well as base and 1/8 better: the difference has no spread that they share."""
    base = np.zeros((40, 8), bool)
    for prompt in range(40):
        base[prompt, : prompt % 7] = True
    tuned = base.copy()
    tuned[np.arange(40), base.sum(axis=1)] = True
    rows = image_rows(base) + image_rows(tuned, variant="tuned")
    found = pick(summarize(pa.Table.from_pylist(rows)), variant="tuned", category="all", metric="exact")
    assert found.difference is not None
    assert found.difference.value == pytest.approx(1 / 8)
    assert found.value.high - found.value.low > 0.1
    # Forty equal differences: only what forty prompts may have missed is left, one-sided 0.0881 of the range.
    assert found.difference.low == pytest.approx(1 / 8 - 0.0881 * 9 / 8, abs=1e-4)


def test_an_unpaired_order_of_rows_changes_nothing():
    rng = np.random.default_rng(5)
    rows = image_rows(rng.random((20, 3)) < 0.4) + image_rows(rng.random((20, 3)) < 0.6, variant="tuned")
    by_variant = pa.Table.from_pylist(rows)
    tuned_first = pa.Table.from_pylist(rows[:60] + rows[:59:-1])
    assert summarize(by_variant) == summarize(tuned_first)


def test_difference_rests_on_shared_prompts_only():
    """Base has prompts 0 to 9, tuned 0 to 4, and is right there on all: +1 over base's 0 of these five."""
    base = np.zeros((10, 1), bool)
    base[5:] = True
    rows = image_rows(base) + image_rows(np.ones((5, 1), bool), variant="tuned")
    comparisons = summarize(pa.Table.from_pylist(rows))
    found = pick(comparisons, variant="tuned", category="all", metric="exact")
    assert found.difference is not None
    assert (found.difference.value, found.difference.prompts) == (1.0, 5)
    assert pick(comparisons, variant="base", category="all", metric="exact").value.value == 0.5


def test_malformed_images_are_not_exact():
    malformed = np.array([[True, True], [False, False]])
    rows = pa.Table.from_pylist(image_rows(np.ones((2, 2), bool), malformed=malformed))
    comparisons = summarize(rows)
    assert pick(comparisons, category="all", metric="exact").value.value == 0.5
    assert pick(comparisons, category="all", metric="graded").value.value == 1.0


def test_pooling_weighs_prompts_not_categories():
    """Thirty prompts at 1 and ten at 0 pool to 0.75; splits pool alike."""
    rows = image_rows(np.ones((30, 2), bool), split="seen")
    rows += image_rows(np.zeros((10, 2), bool), category="shape", split="unseen")
    comparisons = summarize(pa.Table.from_pylist(rows))
    pooled = pick(comparisons, category="all", split="all", metric="exact")
    assert (pooled.value.value, pooled.prompts, pooled.images) == (0.75, 40, 80)
    assert pick(comparisons, category="shape", split="unseen", metric="exact").value.value == 0
    assert not [c for c in comparisons if c.category == "shape" and c.split == "seen"]


def test_seeds_are_counted_per_image():
    rows = image_rows(np.ones((3, 4), bool))
    again = [{**row, "seed": 2000} for row in rows]
    assert summarize(pa.Table.from_pylist(rows + again))[0].basis == "3 × 4 × 2"
    assert summarize(pa.Table.from_pylist(rows + again[:3]))[0].basis == "3, 15 images"


def test_failures_tell_meaning_from_drawing():
    exact = np.array([[True, False, False, True]])
    malformed = np.array([[False, False, True, True]])
    rows = image_rows(exact, malformed=malformed) + image_rows(np.ones((1, 2), bool), variant="tuned")
    base, _, tuned, _ = failures(pa.Table.from_pylist(rows))
    assert (base.images, base.failed, base.semantic, base.semantic_share) == (4, 3, 1, 1 / 3)
    assert math.isnan(tuned.semantic_share)


def test_refusals_name_what_is_missing():
    rows = pa.Table.from_pylist(image_rows(np.ones((2, 2), bool)))
    with pytest.raises(MituneError, match="no image of 'bsae' to compare with, only of base"):
        summarize(rows, baseline="bsae")
    with pytest.raises(MituneError, match="no column 'malformed'"):
        summarize(rows.drop_columns(["malformed"]))
    half = [{**row, "graded": row["graded"] if row["image"] else None} for row in rows.to_pylist()]
    with pytest.raises(MituneError, match="2 of 4 images have no 'graded'"):
        summarize(pa.Table.from_pylist(half))


def test_a_metric_nobody_has_is_left_out():
    rows = [{**row, "exact": None} for row in image_rows(np.ones((2, 2), bool))]
    assert {c.metric for c in summarize(pa.Table.from_pylist(rows))} == {"graded"}
    assert failures(pa.Table.from_pylist(rows)) == []


def test_kendall_tau_with_ties_matches_scipy():
    rng = np.random.default_rng(6)
    for _ in range(20):
        first, second = rng.normal(size=12), rng.integers(4, size=12).astype(float)
        assert kendall_tau(first, second) == pytest.approx(stats.kendalltau(first, second).statistic)
    assert math.isnan(kendall_tau(first, np.ones(12)))


def candidate_rows(prompts=30, candidates=16, seed=7):
    """A score that is the verdict itself, one that is its opposite, and one that knows nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for candidate in range(candidates):
            exact = candidate % 4 == 0
            row = {"prompt_index": prompt, "exact": exact, "graded": float(exact), "malformed": False}
            scores = {"score.truth": float(exact), "score.wrong": -float(exact), "score.lot": rng.normal()}
            rows.append({**row, **scores})
    return rows


def test_selection_of_known_scores():
    truth, wrong, lot = selection(pa.Table.from_pylist(candidate_rows()), keep=2, resamples=500)
    assert [s.score for s in (truth, wrong, lot)] == ["truth", "wrong", "lot"]
    assert (truth.agreement.value, wrong.agreement.value) == pytest.approx((1, -1))
    assert (truth.kept.value, wrong.kept.value) == (1, 0)
    assert (truth.drawn.value, truth.oracle.value) == (0.25, 1)
    assert lot.agreement.low < 0 < lot.agreement.high
    assert lot.kept.low < 0.25 < lot.kept.high


def test_selection_leaves_out_candidates_without_score_or_verdict():
    rows = candidate_rows(prompts=2, candidates=8)
    rows[0].update({"score.truth": math.nan, "exact": None, "graded": None})
    truth, *_ = selection(pa.Table.from_pylist(rows), resamples=50)
    assert truth.drawn.value == pytest.approx((1 / 7 + 2 / 8) / 2)
    unjudged = [{**row, "exact": None, "graded": None, "malformed": None} for row in rows]
    assert selection(pa.Table.from_pylist(unjudged)) == []


def test_a_random_choice_is_among_all_candidates():
    """A second stage scores the better half alone: its choice is right more often, a random one is not."""
    rows = candidate_rows(prompts=5, candidates=8)  # candidates 0 and 4 are right
    for row, candidate in zip(rows, [*range(8)] * 5, strict=True):
        row["score.truth"] = -float(candidate) if candidate < 3 else math.nan
        row["score.wrong"] = float(candidate) if 0 < candidate < 4 else math.nan
    first, second, every = selection(pa.Table.from_pylist(rows), keep=2, resamples=50)
    assert [s.drawn.value for s in (first, second, every)] == [0.25] * 3
    assert [s.oracle.value for s in (first, second, every)] == [1] * 3  # also where no right one has a score
    assert (first.kept.value, second.kept.value) == (0.5, 0)


def test_of_equal_candidates_those_that_are_kept_count():
    """Two at the ceiling, the right one of which is the more confident: it is kept, and not one of the two by lot."""
    rows = [
        {"prompt_index": 0, "exact": j == 2, "graded": float(j == 2), "malformed": False}
        | {"score.contrast": value, "score.confidence": confidence}
        for j, (value, confidence) in enumerate([(1.0, 0.1), (0.3, 0.9), (1.0, 0.2)])
    ]
    table = pa.Table.from_pylist(rows)
    by_lot, _ = selection(table, resamples=10)
    kept, _ = selection(table, ties={"contrast": "confidence"}, resamples=10)
    assert (by_lot.kept.value, kept.kept.value) == (0.5, 1)
    assert lexicographic(np.array([1.0, 1.0, 0.5]), np.array([0.0, 0.0, 9.0])).tolist() == [1, 1, 0]
    assert best_share(np.array([1.0, 1.0]), np.array([0.0, 1.0]), 1) == 0.5


def test_one_definition_of_right():
    rows = pa.table({"exact": [True, True, False, None], "malformed": [False, True, False, None]})
    assert right(rows).tolist()[:3] == [1, 0, 0] and math.isnan(right(rows)[3])


def test_bootstrap_of_a_mean_is_the_bootstrap_of_the_mean():
    """All intervals rest on the same resampled prompts: as a statistic, as a mean, and as a ratio to a constant."""
    values = np.random.default_rng(8).normal(2.0, 1.0, size=25)
    (expected,) = bootstrap(values[:, None], resamples=300)
    of = bootstrap_of(lambda places: float(values[places].mean()), 25, resamples=300)
    ratio = share_of_gain(values, np.ones(25), resamples=300)
    (same,) = bootstrap_ratio(values[:, None], np.ones((25, 1)), np.zeros((25, 1)), resamples=300)
    for interval in (of, ratio, same):
        assert (interval.value, interval.low, interval.high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )


def test_there_is_no_share_of_a_gain_that_is_none():
    part, rng = np.full(30, 0.1), np.random.default_rng(9)
    clear, unclear = 0.2 + 0.01 * rng.normal(size=30), rng.normal(size=30)
    assert share_of_gain(part, clear, resamples=200).value == pytest.approx(0.5, abs=0.01)
    assert math.isnan(share_of_gain(part, unclear - unclear.mean(), resamples=200).value)
    assert math.isnan(bootstrap_of(lambda _: math.nan, 3, resamples=2).low)


def test_a_share_without_trials_is_unknown():
    share = Share(hits=9, trials=10)
    expected = stats.binomtest(9, 10).proportion_ci(0.95, "wilson")
    assert (share.value, share.low, share.high) == (0.9, expected.low, expected.high)
    nothing = Share(hits=0, trials=0)
    assert all(map(math.isnan, (nothing.value, nothing.low, nothing.high)))


def test_spearman_matches_scipy():
    rng = np.random.default_rng(10)
    first, second = rng.normal(size=9), rng.normal(size=9)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert math.isnan(spearman(first, np.ones(9)))


def comparison(category, variant, value, difference=None, images=40):
    return Comparison(variant, category, "all", "exact", 10, images, 1, value, difference)


def cells(table):
    """The cells of a Markdown table, without what aligns them."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_markdown_table():
    base, tuned = Interval(0.5, 0.4, 0.6, 10), Interval(0.7, 0.6, 0.8, 10)
    better, unclear = Interval(0.2, 0.1, 0.3, 10), Interval(-0.05, -0.1, 0.02, 8)
    one = [comparison("color", "base", base), comparison("color", "tuned", tuned, better)]
    assert markdown_table(one, made_by="mitune eval run") == (
        "| exact match ↑ | prompts × images × seeds |                 base |                tuned "
        "|                tuned − base | made by         |\n"
        "| ------------- | -----------------------: | -------------------: | -------------------: "
        "| --------------------------: | --------------- |\n"
        "| color         |               10 × 4 × 1 | 0.500 [0.400, 0.600] | 0.700 [0.600, 0.800] "
        "| **+0.200 [+0.100, +0.300]** | mitune eval run |\n"
    )
    two = cells(markdown_table([*one, comparison("color", "random", base, unclear, images=41)]))
    assert two[0] == ["exact match ↑", "prompts × images × seeds", "base", "variant", "value", "value − base"]
    assert two[3] == [
        "color", "10, 41 images", "0.500 [0.400, 0.600]", "random", "0.500 [0.400, 0.600]",
        "−0.050 [−0.100, +0.020] (8 prompts)",
    ]  # fmt: skip
    assert cells(markdown_table([one[0], comparison("color", "tuned", tuned)]))[2][3:] == ["0.700 [0.600, 0.800]", "–"]
