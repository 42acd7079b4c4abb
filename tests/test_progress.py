"""The curves over the rounds, on pools whose figures are known."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mitune.evaluation.comparison import POOLED, Comparison
from mitune.evaluation.statistics import Interval
from mitune.pool.selection import parse_rule
from mitune.report.progress import HELD_OUT, RESPONSE, RIGHT, SCORE, progress, quantities

NAN = float("nan")


def write_pool(folder, exact, score, information):
    folder.mkdir(parents=True)
    columns = {"exact": exact, "malformed": [False] * 4, "score.fits": score, "score.mi-tune": information}
    pq.write_table(pa.table(columns), folder / "candidates.parquet")


def comparison(variant, value, category=POOLED):
    interval = Interval(value, value, value, prompts=1)
    return Comparison(
        metric="exact", category=category, split=POOLED, variant=variant, value=interval, difference=None,
        prompts=1, images=1, seeds=1,
    )  # fmt: skip


@pytest.fixture
def rounds(tmp_path):
    folders = [tmp_path / "round-1", tmp_path / "round-2"]
    write_pool(folders[0] / "pool", [True, False, None, False], [1.0, 0.0, NAN, 0.5], [4.0, 4.0, 4.0, 4.0])
    write_pool(folders[1] / "pool-fits", [True, True, True, False], [1.0, 1.0, 1.0, 0.0], [9.0, 9.0, NAN, 9.0])
    write_pool(folders[1] / "pool-random", [None] * 4, [NAN] * 4, [1.0] * 4)
    return folders


def test_quantities_of_each_round(rounds):
    rules = [parse_rule("fits"), parse_rule("random")]
    verdicts = [("base", 0.5), ("fits", 0.8), ("fits, round 1", 0.7), ("base, guidance 4", 0.1), ("random", 0.4)]
    comparisons = [comparison(*verdict) for verdict in verdicts] + [comparison("fits", 0.0, "color")]
    figures = quantities(rounds, rules, comparisons)
    assert figures[RIGHT]["fits"] == pytest.approx({0: 100 / 3, 1: 75.0})
    assert figures[RIGHT]["random"] == pytest.approx({0: 100 / 3})
    assert figures[SCORE] == {"fits": pytest.approx({0: 0.5, 1: 0.75})}
    assert figures[RESPONSE] == {"fits": pytest.approx({0: 1.0, 1: 1.5}), "random": pytest.approx({0: 1.0, 1: 0.5})}
    assert figures[HELD_OUT] == {"fits": pytest.approx({0: 50, 1: 70, 2: 80}), "random": pytest.approx({0: 50, 2: 40})}


def test_one_round_has_no_curves(rounds):
    rules, colors = [parse_rule("fits")], {"fits": "series-0"}
    assert progress(rounds[:1], rules, [], colors) is None
    drawn = progress(rounds, rules, [], colors)
    assert drawn is not None and len(drawn["plots"]) == 3  # nothing was judged
