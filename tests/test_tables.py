"""Figures and tables as they are written: minus signs, dashes where there is nothing, columns that line up."""

import math

import pytest

from mitune.evaluation.statistics import Interval, Share
from mitune.evaluation.tables import interval, number, plus_minus, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (number(-0.0625), "−0.062"),
        (number(0.5, 1, sign=True), "+0.5"),
        (number(math.nan), "–"),
        (plus_minus(-1.234, 0.5), "−1.23 ± 0.50"),
        (plus_minus(-1.234, math.nan, sign=True), "−1.23 ± –"),
        (interval(Interval(-0.1, -0.25, 0.05, 9)), "−0.100 [−0.250, 0.050]"),
        (interval(Interval(0.1, 0.05, 0.25, 9), 2, sign=True), "**+0.10 [+0.05, +0.25]**"),
        (interval(Interval(0.1, -0.05, 0.25, 9), 2, sign=True), "+0.10 [−0.05, +0.25]"),
        (interval(Interval(0.421, 0.4, 0.5, 9), 1, percent=True), "42.1 % [40.0, 50.0]"),
        (interval(None), "–"),
        (interval(Share(hits=0, trials=0)), "–"),
        (interval(Share(hits=1, trials=2), 2), "0.50 [0.09, 0.91]"),
    ],
)
def test_figures(text, shown):
    assert text == shown


def test_columns_line_up_and_figures_stand_to_the_right():
    text = table(["name", "τ", "value ± error"], [["a|b", "−1.0", "10.00 ± 0.10"], ["ä", "–", "0.25 ± 0.01"]])
    assert text == (
        "| name |    τ | value ± error |\n"
        "| ---- | ---: | ------------: |\n"
        "| a\\|b | −1.0 |  10.00 ± 0.10 |\n"
        "| ä    |    – |   0.25 ± 0.01 |\n"
    )
    assert len({len(line) for line in text.splitlines()}) == 1


def test_without_rows_there_is_a_head():
    assert table(["a", "b"], []) == "| a   | b   |\n| --- | --- |\n"
