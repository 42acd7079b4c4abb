"""Selection: the best stay, in order, and controls do what they say."""

import math

import pytest
import torch

from mitune.errors import MituneError
from mitune.pool.selection import apply, mean_rank, parse_rule, select

VALUES = [0.2, math.nan, 0.9, 0.9, -1.0]


def test_top_k_in_order_without_nan():
    assert select(VALUES, 2) == [2, 3]
    assert select(VALUES, 5) == [2, 3, 0, 4]


def test_threshold_and_quantile():
    assert select(VALUES, 5, threshold=0.0) == [2, 3, 0]
    assert select(VALUES, 5, quantile=0.6) == [2, 3]


def test_ties_are_broken_when_selecting():
    """All at the ceiling reach the threshold; the second score says which of them come first, NaN last."""
    values, second = [1.0, 0.5, 1.0, 1.0, math.nan], [0.2, 9.0, math.nan, 0.3, 9.0]
    assert select(values, 5, ties=second) == [3, 0, 2, 1]
    assert select(values, 5, threshold=1.0, ties=second) == [3, 0, 2]
    assert apply(parse_rule("a>=1"), {"a": values}, 2, 0, second) == [3, 0]
    assert select(values, 2) == [0, 2]


def test_mean_rank():
    assert mean_rank(torch.tensor([0.9, 0.8, 0.1, 0.2]), torch.tensor([1.0, 2.0, 9.0, 8.0])).tolist() == [2.5] * 4
    assert mean_rank(torch.tensor([math.nan, 3.0, 3.0])).tolist() == [1, 2.5, 2.5]


def test_random_is_seeded_and_fair():
    rule = parse_rule("random")
    picks = [apply(rule, {"a": VALUES}, 1, seed)[0] for seed in range(400)]
    assert picks == [apply(rule, {"a": VALUES}, 1, seed)[0] for seed in range(400)]
    counts = [picks.count(i) for i in range(5)]
    assert counts[1] == 0
    assert all(60 < count < 140 for i, count in enumerate(counts) if i != 1)  # 100 ± 4 standard deviations of 8.7


def test_random_leaves_out_what_has_no_score_at_all():
    rule, nothing = parse_rule("random"), [math.nan] * 3
    assert apply(rule, {"a": nothing, "b": [math.nan, 1.0, 2.0]}, 3, 0) in ([1, 2], [2, 1])
    assert apply(rule, {"a": nothing, "b": nothing}, 3, 0) == []


def test_rules_as_text():
    assert parse_rule("a>=-0.5").threshold == -0.5
    assert parse_rule("a@0.9").quantile == 0.9
    assert parse_rule("a@0.9").slug == "a-upper-0.9"
    own = parse_rule("my_scores.Sharp:of_all>=1e-3")
    assert (own.by, own.threshold, own.slug) == ("my_scores.Sharp:of_all", 1e-3, "my-scores.Sharp-of-all-from-0.001")


@pytest.mark.parametrize("text", ["a@2", "a>=", "a>=1.2.3", "a>=1e999", "../a", ".a", "a b", ""])
def test_bad_rules(text):
    with pytest.raises(MituneError):
        parse_rule(text)
