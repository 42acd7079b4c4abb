"""The one way to write a figure, an interval and a table in Markdown: aligned, with the minus sign of print."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Protocol
from unicodedata import combining, east_asian_width

DASH = "–"  # where there is no figure
_FIGURE = re.compile(r"[*+−(\[]*[\d.–].*")  # begins like a number: such a column is aligned to the right


class WithEnds(Protocol):
    """A value with the ends of its interval."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A number with so many digits, or a dash where it is none; `sign` shows that of a positive one too."""
    if math.isnan(value):
        return DASH
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(estimate: WithEnds | None, digits: int = 3, *, sign: bool = False, percent: bool = False) -> str:
    """value [low, high]; a dash where there is none.

    sign: it is a difference, signed, and bold where zero lies outside. percent: of shares; 42.0 % [38.1, 45.9].
    """
    if estimate is None or math.isnan(estimate.value):
        return DASH
    scale, unit = (100, " %") if percent else (1, "")
    value, low, high = (number(scale * x, digits, sign=sign) for x in (estimate.value, estimate.low, estimate.high))
    bold = "**" if sign and (estimate.low > 0 or estimate.high < 0) else ""
    return f"{bold}{value}{unit} [{low}, {high}]{bold}"


def plus_minus(value: float, error: float, digits: int = 2, *, sign: bool = False) -> str:
    """value ± error."""
    return f"{number(value, digits, sign=sign)} ± {number(error, digits)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures are aligned to the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    columns = list(zip(*lines, strict=True))
    right = [all(_FIGURE.fullmatch(cell) or not cell for cell in column[1:]) and len(column) > 1 for column in columns]
    widths = [max(3, *map(_width, column)) for column in columns]
    rule = ["-" * (width - 1) + ":" if to_right else "-" * width for width, to_right in zip(widths, right, strict=True)]
    padded = [
        [_padded(cell, width, to_right) for cell, width, to_right in zip(line, widths, right, strict=True)]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (padded[0], rule, *padded[1:]))


def _width(text: str) -> int:
    """How many columns of a terminal it takes."""
    return sum((2 if east_asian_width(c) in "WF" else 1) for c in text if not combining(c))


def _padded(cell: str, width: int, to_right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if to_right else cell + space
