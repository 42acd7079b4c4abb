"""Shares, differences and times, as the report's page writes them."""

from __future__ import annotations

import math
from typing import Any

from mitune.evaluation.statistics import Interval
from mitune.evaluation.tables import number

Context = dict[str, Any]  # what the template is given of a part of the page


def percent(share: float) -> str:
    """A share in percent, with a space that does not break: 42.0 %."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def span(interval: Interval) -> str:
    """The ends of an interval in percent: 38.1 – 45.9."""
    return f"{100 * interval.low:.1f} – {100 * interval.high:.1f}"


def points(value: float) -> str:
    """A signed difference in percent points: +13.1."""
    return number(100 * value, 1, sign=True)


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"
