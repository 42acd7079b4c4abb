"""The columns of a table of judged images or candidates, and which of its rows are right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mitune.errors import MituneError
from mitune.evaluation.statistics import Array


def column_of(rows: pa.Table, name: str) -> list[Any]:
    """A column (n,). Raises MituneError where there is none of that name."""
    if name not in rows.column_names:
        raise MituneError(f"The table has no column {name!r}, only {', '.join(rows.column_names)}; write it again.")
    content: list[Any] = rows[name].to_pylist()
    return content


def numbers(rows: pa.Table, name: str) -> Array:
    """A column of numbers or truth values (n,), NaN where it has none."""
    return np.array([math.nan if value is None else value for value in column_of(rows, name)], np.float64)


def flags(rows: pa.Table, name: str) -> NDArray[np.bool_]:
    """A column of truth values (n,); unknown counts as false."""
    return np.array([bool(value) for value in column_of(rows, name)], np.bool_)


def right(rows: pa.Table) -> Array:
    """Whether each row is right, (n,): exact, and not malformed. NaN where that is unknown."""
    return numbers(rows, "exact") * ~flags(rows, "malformed")
